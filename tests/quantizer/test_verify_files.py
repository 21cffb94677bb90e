"""What a checkpoint was made from, shown and recomputed; every way to tamper with it."""

import hashlib
import json
import shutil

import pytest
from hf_directory import write_file
from paths import GOLDEN
from rewrite import split_gguf

from pyengine.checkpoint import provenance
from pyengine.checkpoint.open import open_checkpoint
from pyengine.cli import main
from pyengine.errors import FileFormatError
from pyengine.files.gguf import GGUF
from pyengine.files.safetensors import SafetensorsDirectory, SafetensorsFile
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.verify_files import verify_files

PLAIN, OTHER = GOLDEN / "pattern31.gguf", GOLDEN / "nextn.gguf"


BOTH = [
    pytest.param("pattern31"),
    pytest.param("odd", marks=pytest.mark.slow),
]  # of what does not depend on it


@pytest.fixture(scope="module", params=["pattern31", "odd"])
def source(request, odd_model):
    return odd_model if request.param == "odd" else PLAIN


@pytest.fixture(scope="module")
def intact(tmp_path_factory, source):
    root = tmp_path_factory.mktemp("twins")
    quantize(source, root / "int8", root / "int4", shard_bytes=60_000)
    return root


@pytest.fixture
def twins(tmp_path, intact):
    """Copies to spoil."""
    return [shutil.copytree(intact / name, tmp_path / name) for name in ("int8", "int4")]


def test_all_is_as_it_says(twins, source, capsys):
    int8, int4 = twins
    assert verify_files(int8, int4, source) == []
    assert verify_files(int4, int8, source) == []
    assert main(["verify-files", str(int8), "--twin", str(int4), "--source", str(source)]) == 0
    assert main(["info", str(int8), "--provenance"]) == 0
    out = capsys.readouterr().out
    assert f"source       {source.name}" in out and "8 bits" in out


def test_one_changed_bit_is_found_and_named(twins):
    int8, _ = twins
    shard = sorted(int8.glob("model-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (fault,) = verify_files(int8)
    assert "want sha256" in fault and "the file has" in fault
    assert main(["verify-files", str(int8)]) == 1


def test_another_source_is_one_line(twins, tmp_path, capsys):
    """The line that matters, for each directory; not one for each tensor."""
    int8, int4 = twins
    (fault,) = verify_files(int8, source=OTHER)
    assert fault.startswith(f"{int8}: {provenance.FILE_NAME}: source.files[0].sha256: want ")
    assert f" as {OTHER}, got " in fault and fault.endswith(": another source")
    first, second = verify_files(int8, int4, OTHER)
    assert first == fault and second == fault.replace(str(int8), str(int4))
    assert main(["verify-files", str(int8), "--source", str(OTHER)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == fault and len(said) == 2
    assert f"{int8}: its tensors against the source, which is another" in said[1]


def test_a_source_of_another_number_of_files(twins, tmp_path):
    names = list(GGUF.open(PLAIN).tensors)
    split_gguf(PLAIN, tmp_path / "m", [names[::2], names[1::2]])
    (fault,) = verify_files(twins[0], source=tmp_path / "m-00001-of-00002.gguf")
    assert "source.files: want 2 files as " in fault and fault.endswith(", got 1")


def test_tensors_that_the_source_does_not_give(twins, source):
    """A forged method: of many tensors the first few are named."""
    tampered(twins[0], "method", "mse", forge=True)
    faults = verify_files(twins[0], source=source)
    assert len(faults) == 4 and all("the source gives" in fault for fault in faults[:3])
    assert faults[3].startswith(f"{twins[0]}: and ") and faults[3].endswith(" more like the last")


# ---- the twin ----------------------------------------------------------------------------------


def spoil_byte(directory):
    path = sorted(directory.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def append(name, text):
    def spoil(directory):
        with open(directory / name, "a") as file:
            file.write(text)

    return spoil


def provenance_field(field, value, forge=False):
    return lambda directory: tampered(directory, field, value, forge)


SPOILED = {
    "a byte": (spoil_byte, ": want sha256 "),
    "its code": (
        append("modeling_pyengine.py", 'import os; os.system("id")\n'),
        "modeling_pyengine.py: want",
    ),
    "its config": (append("config.json", "\n"), "config.json: want sha256"),
    "new code": (append("more.py", ""), "more.py: the file has it, the provenance does not"),
    "new weights": (append("adapter_model.safetensors", "x"), "adapter_model.safetensors: the file has it"),
    "a pickle": (append("pytorch_model.bin", "x"), "pytorch_model.bin: the file has it"),
    "a template": (append("chat_template.jinja", "x"), "chat_template.jinja: "),
    "its provenance": (provenance_field("engine.version", "9"), f"{provenance.FILE_NAME}: sha256: want"),
    "a forged field": (provenance_field("seed", 3, forge=True), "seed: want 1729, got 3"),
}


@pytest.mark.parametrize("source", BOTH, indirect=True)
@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_twin_is_verified_as_whole_as_the_first(twins, source, capsys, how, which):
    spoil, message = SPOILED[how]
    spoil(twins[which])
    for order in (twins, twins[::-1]):
        for more in ({}, {"source": source}):
            faults = verify_files(*order, **more)
            assert any(fault.startswith(str(twins[which])) and message in fault for fault in faults), faults
            assert all(fault.startswith(str(twins[which])) for fault in faults)
    assert main(["verify-files", str(twins[0]), "--twin", str(twins[1])]) == 1
    assert message in capsys.readouterr().out


def test_a_twin_without_its_files(twins, capsys):
    for path in twins[1].glob("*.safetensors"):
        path.unlink()
    assert main(["verify-files", str(twins[0]), "--twin", str(twins[1])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(twins[1]) in line and "No such file" in line


def test_the_directory_itself_is_no_twin(twins, tmp_path, capsys):
    (tmp_path / "link").symlink_to(twins[0])
    for same in (twins[0], tmp_path / "link", twins[0] / ".." / twins[0].name):
        assert main(["verify-files", str(twins[0]), "--twin", str(same)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f"pyengine: {same}: want the other checkpoint as twin, got the directory itself\n"


def test_a_copy_of_the_directory_is_no_twin(twins, tmp_path):
    copy = shutil.copytree(twins[0], tmp_path / "copy")
    (fault,) = verify_files(twins[0], copy)
    assert fault == (
        f"{copy}: {provenance.FILE_NAME}: bits: want the other number of bits than 8, as the twin of "
        f"{twins[0]}, got 8"
    )


def test_a_twin_of_another_source_or_method(twins, source, tmp_path):
    quantize(OTHER, int4=tmp_path / "other4")
    quantize(source, int4=tmp_path / "mse4", scale="mse")
    for other in ("other4", "mse4"):
        (fault,) = verify_files(twins[0], tmp_path / other)
        assert fault.startswith(f"{tmp_path / other}: want the source and method of {twins[0]}, got another")
    faults = verify_files(twins[0], tmp_path / "mse4", source)
    assert len(faults) == 1  # each is what the source gives in its own way


# ---- what is said --------------------------------------------------------------------------------


def test_what_was_checked_and_what_was_not(twins, source, capsys):
    int8, int4 = twins
    (int8 / "README.md").write_text("a card")
    (int8 / ".cache" / "huggingface").mkdir(parents=True)

    def said(*words):
        assert main(["verify-files", *map(str, words)]) == 0
        return capsys.readouterr().out.splitlines()

    counts = [
        f"{len(said['tensors'])} tensors, {len(said['files'])} other files, the provenance's own fields"
        for said in map(provenance.read, twins)
    ]
    given = f"1 source file, {len(provenance.read(int8)['tensors'])} tensors that it gives"
    of_first = f"{int8}: as its provenance says: {counts[0]}"
    of_twin = [
        f"{int4}: as its provenance says: {counts[1]}",
        f"{int4}: the twin of {int8}: the same source and method",
    ]
    of_source = [f"{one}: as {source} gives it: {given}" for one in twins]
    beside = f"{int8 / '.cache'}; {int8 / 'README.md'}"
    believed = "names of source files and the engine's version, which nothing confirms"
    twin, origin = "the twin (--twin)", "the source (--source)"
    assert said(int8) == [of_first, f"not checked: {beside}; {twin}; {origin}; {believed}"]
    assert said(int8, "--twin", int4) == [of_first, *of_twin, f"not checked: {beside}; {origin}; {believed}"]
    assert said(int8, "--source", source) == [
        of_first,
        of_source[0],
        f"not checked: {beside}; {twin}; {believed}",
    ]
    assert said(int8, "--twin", int4, "--source", source) == [
        of_first,
        *of_twin,
        *of_source,
        f"not checked: {beside}; {believed}",
    ]


def test_an_unindexed_tensor_is_a_fault(twins):
    (fault,) = verify_files(without_index_entry(twins[0], "model.norm.weight"))
    assert "model.norm.weight: want only tensors that the index names, got this one" in fault


def without_index_entry(directory, name):
    """One that forges the digests too; the tensor's copy in another shard is not named by the index."""
    shards = sorted(directory.glob("model-*.safetensors"))
    opened = SafetensorsFile.open(shards[0])
    tensors = {n: (v.dtype, v.data) for n, v in opened.tensors.items()}
    norm = SafetensorsDirectory.open(directory).tensors[name]
    write_file(shards[0], tensors | {name: (norm.dtype, norm.data)}, opened.metadata)
    return directory


def test_group_size_and_method_are_read_from_the_provenance(tmp_path, source):
    quantize(source, tmp_path / "a", group_size=32, scale="mse")
    assert verify_files(tmp_path / "a", source=source) == []


# ---- the files beside the tensors ------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "modeling_pyengine.py", "generation_config.json", "model.safetensors.index.json"]
)
def test_a_file_that_travels_with_the_tensors(twins, name):
    path = twins[0] / name
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    (fault,) = verify_files(twins[0])
    assert f"{name}: want sha256" in fault
    path.write_bytes(content)
    assert verify_files(twins[0]) == []


def test_a_file_that_is_gone_one_that_is_new_and_code_that_is_new(twins):
    int8, _ = twins
    (int8 / "README.md").write_text("a card")
    assert verify_files(int8) == []
    (int8 / "more.py").write_text("")
    (int8 / "modeling_pyengine.py").unlink()
    faults = verify_files(int8)
    gone = next(fault for fault in faults if "modeling_pyengine.py: want sha256" in fault)
    assert gone.endswith("the file has none")
    assert any("more.py: the file has it, the provenance does not" in fault for fault in faults)


# ---- the provenance's own fields -------------------------------------------------------------

FIELDS = {  # path: another value
    "engine.name": "another",
    "engine.version": "9.9",
    "seed": 1730,
    "source.files.0.name": "x.gguf",
    "source.files.0.size": 1,
    "source.files.0.sha256": "0" * 64,
    "source.tensor_types": {"F16": 3},
    "method": "mse",
    "method_in_words": "by feel",
    "group_size": 64,
    "bits": 4,
    "twin.id": "0" * 64,
    "twin.kind": "int4",
    "tensors.model.norm.weight.sha256": "0" * 64,
    "files.config.json.sha256": "0" * 64,
    "sha256": "0" * 64,
}

# Of one who forges the digest too, and the twin's id where it follows.
SEEN_WITHOUT_SOURCE = {
    "engine.name",
    "seed",
    "group_size",
    "bits",
    "twin.id",
    "twin.kind",
    "tensors.model.norm.weight.sha256",
    "files.config.json.sha256",
}
SEEN_WITH_SOURCE = {"source.files.0.size", "source.files.0.sha256", "source.tensor_types", "method"}
BELIEVED = {"source.files.0.name", "engine.version", "method_in_words"}


def tampered(directory, field, value, forge=False):
    """The provenance with a field changed; forge: the digests that follow from it as well."""
    path = directory / provenance.FILE_NAME
    said = json.loads(path.read_text())
    place = said
    *parents, last = parts_of(field)
    for part in parents:
        place = place[part]
    assert place[last] != value
    place[last] = value
    if forge:
        if field != "twin.id":
            said["twin"]["id"] = provenance.twin_id(
                said["source"]["files"], said["method"], said["group_size"]
            )
        said["sha256"] = provenance.own_digest(said)
    path.write_text(json.dumps(said))


def parts_of(field):
    first, _, rest = field.partition(".")
    if first in ("tensors", "files"):
        return [first, *rest.rsplit(".", 1)]
    return [int(part) if part.isdigit() else part for part in field.split(".")]


def test_the_table_has_every_field(twins):
    said = json.loads((twins[0] / provenance.FILE_NAME).read_text())
    assert {field.split(".")[0] for field in FIELDS} == set(said) - {"format"}
    assert set(FIELDS) - {"sha256"} == SEEN_WITHOUT_SOURCE | SEEN_WITH_SOURCE | BELIEVED


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_was_changed(twins, field):
    tampered(twins[0], field, FIELDS[field])
    assert any("sha256" in fault for fault in verify_files(twins[0]))
    assert main(["verify-files", str(twins[0])]) == 1


@pytest.mark.parametrize("field", sorted(SEEN_WITHOUT_SOURCE | SEEN_WITH_SOURCE | BELIEVED))
def test_a_field_that_was_forged_with_its_digests(twins, source, field):
    tampered(twins[0], field, FIELDS[field], forge=True)
    faults = verify_files(twins[0])
    assert bool(faults) == (field in SEEN_WITHOUT_SOURCE)
    name = parts_of(field)[1] if field.startswith(("tensors", "files")) else field
    assert not faults or any(f"{name}: want" in fault for fault in faults), faults
    if field not in SEEN_WITHOUT_SOURCE:
        assert bool(verify_files(twins[0], source=source)) == (field in SEEN_WITH_SOURCE)


def test_a_method_that_no_engine_has(twins):
    tampered(twins[0], "method", "by feel", forge=True)
    (fault,) = verify_files(twins[0])
    assert "method: want one that this engine has, got 'by feel'" in fault


# The sentences that noesis-provenance-2 has, and hashes, in place of the method's key.
SENTENCES = {
    "absmax": "symmetric, absmax / largest code as float16, nearest code, ties to even",
    "mse": "symmetric, float16 scale of least squared error, nearest code, ties to even",
}


def make_older(directory):
    """The provenance as noesis-provenance-2 has it, made by that format's own rules."""
    path = directory / provenance.FILE_NAME
    said = json.loads(path.read_text())
    sentence = SENTENCES[said["method"]]
    lines = [*(file["sha256"] for file in said["source"]["files"]), sentence, str(said["group_size"])]
    said["twin"]["id"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    said |= {"format": "noesis-provenance-2", "method": sentence}
    del said["method_in_words"], said["sha256"]
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(said | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=2) + "\n")
    return path


@pytest.mark.parametrize("source", BOTH, indirect=True)
@pytest.mark.parametrize("scale", SENTENCES)
def test_the_format_before_this_one_is_read_and_verified(tmp_path, source, scale, capsys):
    int8, int4 = tmp_path / "int8", tmp_path / "int4"
    quantize(source, int8, int4, scale=scale)
    make_older(int8)
    assert verify_files(int8, int4, source) == verify_files(int4, int8, source) == []
    make_older(int4)
    assert verify_files(int8, int4, source) == []
    assert main(["info", str(int8), "--provenance"]) == 0 and SENTENCES[scale] in capsys.readouterr().out
    other = tmp_path / "other"
    quantize(source, other, scale="mse" if scale == "absmax" else "absmax")
    (fault,) = verify_files(int8, other)
    assert fault.startswith(f"{other}: want the source and method of {int8}, got another")
    tampered(int8, "method", SENTENCES["mse"] + ".", forge=True)
    (fault,) = verify_files(int8)
    assert "method: want one that this engine has" in fault


def test_an_older_provenance_can_be_read_but_not_checked(twins, capsys):
    path = twins[0] / provenance.FILE_NAME
    said = json.loads(path.read_text()) | {"format": "noesis-provenance-1"}
    del said["files"], said["sha256"], said["method_in_words"]
    path.write_text(json.dumps(said))
    assert main(["info", str(twins[0]), "--provenance"]) == 0 and open_checkpoint(twins[0])
    capsys.readouterr()
    assert main(["verify-files", str(twins[0])]) == 1
    assert (
        "format: want 'noesis-provenance-3', whose fields can be checked, got 'noesis-provenance-1'"
    ) in capsys.readouterr().out


# ---- provenance that cannot be read ----------------------------------------------------------


NONE = object()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    directory = tmp_path_factory.mktemp("p") / "int8"
    quantize(PLAIN, directory)
    return json.loads((directory / "noesis_provenance.json").read_text())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "x"}, "format: want 'noesis-provenance-3', got 'x'"),
        ({"method_in_words": NONE}, "method_in_words: want str, got None"),
        ({"format": NONE}, "format: want str, got None"),
        ({"engine": []}, "engine: want dict, got []"),
        ({"engine": {"name": "pyengine"}}, "engine.version: want str, got None"),
        ({"source": NONE}, "source: want dict, got None"),
        ({"source": {"files": {}, "tensor_types": {}}}, "source.files: want list, got {}"),
        ({"source": {"files": ["x"], "tensor_types": {}}}, "source.files[0]: want dict, got 'x'"),
        (
            {"source": {"files": [{"name": "x", "size": "1"}], "tensor_types": {}}},
            "source.files[0].size: want int, got '1'",
        ),
        ({"tensors": []}, "tensors: want dict, got []"),
        ({"tensors": {"a\x1b[2J": 1}}, "tensors.a\\x1b[2J: want dict, got 1"),
        ({"tensors": {"a": {"sha256": 1}}}, "tensors.a.sha256: want str, got 1"),
        ({"twin": {"id": None, "kind": "int8"}}, "twin.id: want str, got None"),
        ({"group_size": 0}, "group_size: want an even number from 2 to 1048576, got 0"),
        ({"group_size": 33}, "group_size: want an even number from 2 to 1048576, got 33"),
        ({"group_size": 10**19}, f"group_size: want an even number from 2 to 1048576, got {10**19}"),
        ({"group_size": True}, "group_size: want int, got True"),
        ({"bits": 8.0}, "bits: want int, got 8.0"),
    ],
)
def test_provenance_that_is_broken(tmp_path, said, capsys, change, message):
    path = tmp_path / "noesis_provenance.json"
    path.write_text(json.dumps({k: v for k, v in (said | change).items() if v is not NONE}))
    for command in (
        ["verify-files", tmp_path],
        ["verify-files", tmp_path, "--source", PLAIN],
        ["info", tmp_path, "--provenance"],
    ):
        assert main([str(word) for word in command]) == 2
        assert capsys.readouterr() == ("", f"pyengine: {path}: {message}\n")


def test_provenance_that_is_missing(twins, capsys):
    int8, _ = twins
    (int8 / "noesis_provenance.json").unlink()
    with pytest.raises(FileFormatError, match="want a file that can be read, got: No such file"):
        verify_files(int8)
    assert main(["verify-files", str(int8)]) == 2
