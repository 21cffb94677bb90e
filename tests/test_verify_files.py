"""What a checkpoint was made from, shown and recomputed; every way to tamper with it."""

import json
import shutil

import pytest
from rewrite import GOLDEN

from pyengine import provenance
from pyengine.checkpoint import open_checkpoint
from pyengine.cli import main
from pyengine.errors import FileFormatError
from pyengine.quantize import METHODS, quantize
from pyengine.verify_files import verify_files

PLAIN, OTHER = GOLDEN / "pattern31.gguf", GOLDEN / "nextn.gguf"


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


def test_another_source_and_another_twin(twins, tmp_path):
    int8, _ = twins
    quantize(OTHER, tmp_path / "other8")
    assert "want the source and method" in verify_files(int8, tmp_path / "other8")[0]
    faults = verify_files(int8, source=OTHER)
    assert any("the source gives" in fault for fault in faults)
    assert any("source.files, sha256: want" in fault for fault in faults)


def test_group_size_and_method_are_read_from_the_provenance(tmp_path, source):
    quantize(source, tmp_path / "a", group_size=32, scale="mse")
    assert verify_files(tmp_path / "a", source=source) == []


# ---- the files beside the tensors ------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "modeling_pyengine.py", "generation_config.json",
                                  "model.safetensors.index.json"])
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
    "engine.name": "another", "engine.version": "9.9", "seed": 1730, "source.files.0.name": "x.gguf",
    "source.files.0.size": 1, "source.files.0.sha256": "0" * 64, "source.tensor_types": {"F16": 3},
    "method": METHODS["mse"], "group_size": 64, "bits": 4, "twin.id": "0" * 64, "twin.kind": "int4",
    "tensors.model.norm.weight.sha256": "0" * 64, "files.config.json.sha256": "0" * 64,
    "sha256": "0" * 64,
}

# Of one who forges the digest too, and the twin's id where it follows.
SEEN_WITHOUT_SOURCE = {"engine.name", "seed", "group_size", "bits", "twin.id", "twin.kind",
                       "tensors.model.norm.weight.sha256", "files.config.json.sha256"}
SEEN_WITH_SOURCE = {"source.files.0.size", "source.files.0.sha256", "source.tensor_types", "method"}
BELIEVED = {"source.files.0.name", "engine.version"}


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
            said["twin"]["id"] = provenance.twin_id(said["source"]["files"], said["method"],
                                                    said["group_size"])
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
    assert SEEN_WITHOUT_SOURCE | SEEN_WITH_SOURCE | BELIEVED == set(FIELDS) - {"sha256"}


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


def test_an_older_provenance_can_be_read_but_not_checked(twins, capsys):
    path = twins[0] / provenance.FILE_NAME
    said = json.loads(path.read_text()) | {"format": "noesis-provenance-1"}
    del said["files"], said["sha256"]
    path.write_text(json.dumps(said))
    assert main(["info", str(twins[0]), "--provenance"]) == 0 and open_checkpoint(twins[0])
    capsys.readouterr()
    assert main(["verify-files", str(twins[0])]) == 1
    assert ("format: want 'noesis-provenance-2', whose fields can be checked, got "
            "'noesis-provenance-1'") in capsys.readouterr().out


# ---- provenance that cannot be read ----------------------------------------------------------


NONE = object()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    directory = tmp_path_factory.mktemp("p") / "int8"
    quantize(PLAIN, directory)
    return json.loads((directory / "noesis_provenance.json").read_text())


@pytest.mark.parametrize("change, message", [
    ({"format": "x"}, "format: want 'noesis-provenance-2', got 'x'"),
    ({"format": NONE}, "format: want str, got None"),
    ({"engine": []}, "engine: want dict, got []"),
    ({"engine": {"name": "pyengine"}}, "engine.version: want str, got None"),
    ({"source": NONE}, "source: want dict, got None"),
    ({"source": {"files": {}, "tensor_types": {}}}, "source.files: want list, got {}"),
    ({"source": {"files": ["x"], "tensor_types": {}}}, "source.files[0]: want dict, got 'x'"),
    ({"source": {"files": [{"name": "x", "size": "1"}], "tensor_types": {}}},
     "source.files[0].size: want int, got '1'"),
    ({"tensors": []}, "tensors: want dict, got []"),
    ({"tensors": {"a\x1b[2J": 1}}, "tensors.a\\x1b[2J: want dict, got 1"),
    ({"tensors": {"a": {"sha256": 1}}}, "tensors.a.sha256: want str, got 1"),
    ({"twin": {"id": None, "kind": "int8"}}, "twin.id: want str, got None"),
    ({"group_size": 0}, "group_size: want an even number from 2 to 1048576, got 0"),
    ({"group_size": 33}, "group_size: want an even number from 2 to 1048576, got 33"),
    ({"group_size": 10**19}, f"group_size: want an even number from 2 to 1048576, got {10**19}"),
    ({"group_size": True}, "group_size: want int, got True"),
    ({"bits": 8.0}, "bits: want int, got 8.0"),
])
def test_provenance_that_is_broken(tmp_path, said, capsys, change, message):
    path = tmp_path / "noesis_provenance.json"
    path.write_text(json.dumps({k: v for k, v in (said | change).items() if v is not NONE}))
    for command in (["verify-files", tmp_path], ["verify-files", tmp_path, "--source", PLAIN],
                    ["info", tmp_path, "--provenance"]):
        assert main([str(word) for word in command]) == 2
        assert capsys.readouterr() == ("", f"pyengine: {path}: {message}\n")


def test_provenance_that_is_missing(twins, capsys):
    int8, _ = twins
    (int8 / "noesis_provenance.json").unlink()
    with pytest.raises(FileFormatError, match="want a file that can be read, got: No such file"):
        verify_files(int8)
    assert main(["verify-files", str(int8)]) == 2
