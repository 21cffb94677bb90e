"""A path, or a name, to a checkpoint."""

import shutil

import pytest
from paths import GOLDEN

from pyengine.checkpoint import open_checkpoint
from pyengine.cli import main
from pyengine.demo import CHECKPOINT
from pyengine.errors import InputError


def test_default_is_the_embedded_model_unless_a_file_has_the_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("default").path == CHECKPOINT
    assert main(["generate", "-m", "default", "-p", "In the", "-n", "3"]) == 0
    assert capsys.readouterr().out
    shutil.copy(GOLDEN / "fused.gguf", "default")
    assert open_checkpoint("default").fingerprint == open_checkpoint(GOLDEN / "fused.gguf").fingerprint
    with pytest.raises(InputError, match="got no such path"):
        open_checkpoint("other")
