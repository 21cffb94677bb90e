"""What a checkpoint was made from, shown and recomputed."""

import json

import pytest
from rewrite import GOLDEN

from pyengine.cli import main
from pyengine.errors import FileFormatError
from pyengine.quantize import quantize
from pyengine.verify_files import verify_files

PLAIN, OTHER = GOLDEN / "pattern31.gguf", GOLDEN / "nextn.gguf"


@pytest.fixture
def twins(tmp_path):
    quantize(PLAIN, tmp_path / "int8", tmp_path / "int4", shard_bytes=60_000)
    return tmp_path / "int8", tmp_path / "int4"


def test_all_is_as_it_says(twins, capsys):
    int8, int4 = twins
    assert verify_files(int8, int4, PLAIN) == []
    assert verify_files(int4, int8, PLAIN) == []
    assert main(["verify-files", str(int8), "--twin", str(int4), "--source", str(PLAIN)]) == 0
    assert main(["info", str(int8), "--provenance"]) == 0
    out = capsys.readouterr().out
    assert "source       pattern31.gguf" in out and "8 bits" in out


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
    assert any("the source gives" in fault for fault in verify_files(int8, source=OTHER))


def test_group_size_and_method_are_read_from_the_provenance(tmp_path):
    quantize(PLAIN, tmp_path / "a", group_size=32, scale="mse")
    assert verify_files(tmp_path / "a", source=PLAIN) == []


def test_provenance_that_is_missing_or_broken(twins, capsys):
    int8, _ = twins
    path = int8 / "noesis_provenance.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"tensors": []}))
    with pytest.raises(FileFormatError, match="tensors: want dict, got"):
        verify_files(int8)
    path.unlink()
    assert main(["verify-files", str(int8)]) == 2
    assert "no such file" in capsys.readouterr().err
