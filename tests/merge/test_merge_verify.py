"""A merge against its provenance and its sources; every way to tamper with it."""

import json
import shutil

import pytest
from merge_models import BASE, census, write_child, write_configuration

from pyengine.checkpoint import provenance
from pyengine.cli import main
from pyengine.errors import FileFormatError
from pyengine.merge.merge import merge
from pyengine.merge.verify import check_merge
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.verify_files import verify_files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A merge with everything that a configuration can name, its twins, and its sources."""
    root = tmp_path_factory.mktemp("made")
    parents = [write_child(root / name, seed) for seed, name in enumerate(("mother", "father"))]
    counts = root / "census.json"
    counts.write_text(json.dumps(census(4, 6, dead={(0, 1), (3, 2)})))
    rules = [{"census": str(counts), "dead": 0.2, "living": 0.6}, {"value": 0.8}]
    more = {
        "transplants": [
            {"layers": [2], "model": str(parents[1])},
            {"census": str(counts), "model": str(BASE)},
        ],
        "tokenizer": {"source": str(BASE)},
        "seed": 11,
    }
    own = {"weight": [0.3, 0.6], "density": rules}
    path = write_configuration(root / "m.yaml", "dare_ties", parents, own=own, **more)
    merge(path, root / "floats", shard_bytes=60_000)
    merge(path, int8=root / "int8", int4=root / "int4", scale="mse")
    return root


def sources(root):
    return [root / "father", BASE, root / "mother"]


def changed(directory, forge=True, **fields):
    """Its provenance with other fields; forge: and the sha256 of these."""
    path = directory / provenance.FILE_NAME
    said = json.loads(path.read_text())
    for field, value in fields.items():
        *outer, last = field.split("__")
        place = said
        for key in outer:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    if forge:
        said["sha256"] = provenance.own_digest(said)
    path.write_text(json.dumps(said))


@pytest.mark.parametrize("name", ["floats", pytest.param("int8", marks=pytest.mark.slow)])
def test_all_is_as_it_says(made, capsys, name):
    arguments = ["verify-files", made / name, *(a for s in sources(made) for a in ("--source", s))]
    if name == "int8":
        arguments += ["--twin", made / "int4"]
    assert main([str(argument) for argument in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{made / name}: as its provenance says: ")
    assert any(f"{made / name}: as its sources give it: 3 models" in line for line in lines)


def test_what_the_provenance_tells(made, capsys):
    assert main(["info", str(made / "int8"), "--provenance"]) == 0
    out = capsys.readouterr().out
    assert "parent       mother, BF16" in out and f"base         {BASE.name}" in out
    assert "method       dare_ties, seed 11" in out and "output       int8, mse, 128" in out
    said = provenance.read(made / "int8")
    assert [model["role"] for model in said["models"]] == ["parent", "parent", "base"]
    text = json.dumps(said)
    assert str(made) not in text and "census.json" not in text  # no path of the machine


@pytest.mark.parametrize(
    "fields, fault",
    [
        ({"forge": False, "seed": 3}, "sha256: want "),
        ({"seed": 3}, "configuration.seed: want 3, got 11"),
        ({"engine__name": "x"}, "engine.name: want pyengine, got x"),
        ({"output__kind": "float32"}, "output.kind: want bfloat16, got float32"),
        ({"twin__id": "x"}, "twin.id: want "),
        ({"configuration__dtype": "float32"}, "twin.id: want "),
        ({"models__0__files__0__sha256": "0"}, "twin.id: want "),
        ({"tensors__model.norm.weight": {"sha256": "0"}}, "model.norm.weight: want sha256 0"),
    ],
)
def test_a_provenance_that_was_changed(made, tmp_path, fields, fault):
    directory = shutil.copytree(made / "floats", tmp_path / "d")
    changed(directory, **fields)
    assert any(fault in line for line in check_merge(directory).faults)


def test_a_changed_bit_is_found(made, tmp_path):
    directory = shutil.copytree(made / "floats", tmp_path / "d")
    shard = sorted(directory.glob("model-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (fault,) = check_merge(directory).faults
    assert "want sha256" in fault and "the file has" in fault


def forged(made, directory, **fields):
    """A provenance that contradicts nothing of itself."""
    changed(directory, **fields)
    said = provenance.read(directory)
    changed(directory, twin__id=provenance.merge_id(said["models"], said["configuration"], said["output"]))
    return directory


def test_a_forged_seed_gives_other_tensors(made, tmp_path):
    directory = forged(made, shutil.copytree(made / "floats", tmp_path / "d"), seed=3, configuration__seed=3)
    assert not check_merge(directory).faults
    faults = check_merge(directory, sources=sources(made)).faults
    assert len(faults) == 4 and all("the sources give" in fault for fault in faults[:3])


@pytest.mark.slow
def test_sources_that_are_others(made, tmp_path, capsys):
    other = write_child(tmp_path / "other", 9)
    first, *rest = sources(made)
    for given, fault in (
        ([first, BASE], "models[0].files: want a --source with the bytes of mother, its parent, got none"),
        ([other, *rest], "models[1].files: want a --source with the bytes of father, its parent, got none"),
        ([first, *rest, other], f"want the sources that it was made from, got another one: {other}"),
    ):
        result = check_merge(made / "floats", sources=given)
        assert any(fault in line for line in result.faults), result.faults
        assert any("which are others" in line for line in result.not_checked)
    assert main(["verify-files", str(made / "floats"), "--source", str(other)]) == 1


@pytest.mark.slow
def test_twins(made, tmp_path, capsys):
    assert not check_merge(made / "int8", made / "int4").faults
    (fault,) = check_merge(made / "int8", made / "floats").faults
    assert "want the merge of" in fault
    quantize(made / "mother", tmp_path / "q8")
    with pytest.raises(FileFormatError, match="want the provenance of a merge"):
        check_merge(made / "int8", tmp_path / "q8")
    with pytest.raises(FileFormatError, match="want the provenance of a quantization"):
        verify_files(tmp_path / "q8", made / "int8")
    copy = shutil.copytree(made / "int8", tmp_path / "copy")
    (fault,) = check_merge(made / "int8", copy).faults
    assert "want another kind than int8" in fault
    assert main(["verify-files", str(made / "int8"), "--twin", str(made / "int8")]) == 2
    assert main(["verify-files", str(tmp_path / "q8"), "--source", "a", "--source", "b"]) == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"models": {}}, "models: want list"),
        ({"models__0__files__0__size": "1"}, r"models\[0\].files\[0\].size: want int"),
        ({"output__kind": "float16"}, "output.kind: want bfloat16 or float32 or int8 or int4"),
        ({"output__kind": "int8"}, "output.method: want str"),
        ({"tensors__x": {}}, "tensors.x.sha256: want str"),
    ],
)
def test_a_provenance_that_is_none(made, tmp_path, fields, message):
    directory = shutil.copytree(made / "floats", tmp_path / "d")
    changed(directory, **fields)
    with pytest.raises(FileFormatError, match=message):
        provenance.read(directory)


@pytest.mark.slow
def test_merged_twins_are_exported_and_float_merges_are_not(made, tmp_path, capsys):
    assert (
        main(
            ["quantize", str(made / "int8"), "--export", "compressed-tensors", "--int8", str(tmp_path / "c")]
        )
        == 0
    )
    assert (
        main(
            [
                "quantize",
                str(made / "floats"),
                "--export",
                "compressed-tensors",
                "--int8",
                str(tmp_path / "d"),
            ]
        )
        == 2
    )
    assert "want a checkpoint of INT8 or INT4, got bfloat16" in capsys.readouterr().err
