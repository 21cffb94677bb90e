"""The room's README: its configuration and its commands do what it says."""

import json
import re
import shlex
import shutil

import pytest
from merge_models import BASE, census, write_child
from paths import TESTS

from pyengine.checkpoint.open import open_checkpoint
from pyengine.cli import main

README = (TESTS.parent / "pyengine" / "merge" / "README.md").read_text()


def block(kind):
    (text,) = re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)
    return text


@pytest.mark.slow
def test_its_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(BASE, "base.gguf")
    for seed, name in enumerate(("father", "mother")):
        write_child(tmp_path / name, seed)
    (tmp_path / "mother.json").write_text(json.dumps(census(4, 6, dead={(1, 5)})))
    (tmp_path / "merge.yaml").write_text(block("yaml"))
    commands = [shlex.split(line, comments=True)[1:] for line in block("sh").splitlines()]
    assert [command[0] for command in commands] == ["merge", "merge", "verify-files", "info"]
    for command in commands:
        assert main(command) == 0, command
    assert "merged: as its sources give it: 3 models" in capsys.readouterr().out
    merged, mother = (open_checkpoint(name).tensors for name in ("merged", "mother"))
    name = "model.layers.2.self_attn.q_proj.weight"
    if name not in merged:
        name = "model.layers.2.linear_attn.in_proj_qkv.weight"
    assert (merged[name].float64() == mother[name].float64()).all()


def test_every_key_is_explained():
    from pyengine.merge.arithmetic import METHODS, RESCALES
    from pyengine.merge.configuration import _KEYS, PER_MODEL, SHARED

    for name in (
        *_KEYS,
        *PER_MODEL,
        *SHARED,
        *METHODS,
        *RESCALES,
        "per_expert",
        "per_living",
        "dead",
        "below",
    ):
        assert re.search(rf"`[^`]*\b{name}\b[^`]*`", README), name
