"""The bisecting loop, on a port that dumps what it is asked for."""

import json
import os
import sys

import numpy as np
import pytest
from paths import GOLDEN, SUPPORT

from pyengine.cli import main
from pyengine.errors import InputError
from pyengine.oracle.bisect import MOST_IDS, bisect
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.trace import Trace

MODEL = GOLDEN / "pattern31.gguf"
IDS = np.random.default_rng(1729).integers(0, 288, 10)
LAYERS = [f"model.layers.{i}" for i in range(4)]


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """The engine's own process finds this package where this one does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def engine(fault, how=""):
    return [sys.executable, str(SUPPORT / "engine.py"), str(MODEL), fault, how]


@pytest.mark.slow
def test_one_module_is_left(tmp_path):
    steps = bisect(Oracle(None, MODEL), IDS, engine("rope_pairs"), seconds=60, keep=tmp_path / "t")
    last = steps[-1].verdict
    assert steps[0].asked == ["lm_head"] and steps[1].asked == [*LAYERS, "lm_head"]
    assert [row.name for row in last.guilty] == ["model.layers.3.self_attn.o_proj"] and not last.between
    assert last.mistakes[0].name == "RoPE turns pairs (2i, 2i + 1), not halves"
    assert len(steps) == 4 and set(Trace.load(tmp_path / "t").tensors) == set(steps[-1].asked)
    assert all(set(a.asked) < set(b.asked) for a, b in zip(steps, steps[1:]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, guilty",
    [
        ("heads", "model.layers.0.linear_attn.norm"),
        ("not_renormalised", "model.layers.0.mlp.gate.1"),
        ("norm_plus_one_twice", "model.layers.0.input_layernorm"),
        ("gate_up_swapped", "model.layers.0.mlp.shared_expert.down_proj"),
    ],
)
def test_each_kind_of_module_is_found(fault, guilty):
    steps = bisect(Oracle(None, MODEL), IDS, engine(fault), seconds=20)
    assert steps[-1].verdict.accused.name == guilty and steps[-1].verdict.accused.status == "guilty"
    assert not steps[-1].verdict.between and len(steps[-1].asked) < 40


@pytest.mark.slow
def test_a_right_engine_takes_one_run(capsys):
    ids = " ".join(map(str, IDS))
    assert main(["bisect", "-m", str(MODEL), "--ids", ids, "--", *engine("none")]) == 0
    out = capsys.readouterr().out
    assert "asked for lm_head: within the budget\n" in out and "within the float32 budget: 1 of 83" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, message",
    [
        ("fails", "want exit code 0, got 7: memory"),
        ("no trace", "want a trace in the file of PYENGINE_TRACE, got none"),
        ("not a trace", "its trace: trace: want a safetensors file, got a GGUF"),
        ("other ids", "want a trace of the 10 ids of PYENGINE_IDS, got one of others"),
        ("other shape", r"want 288 features of lm_head, got shape \[10, 287\]"),
        ("other tensor", "want lm_head of PYENGINE_TENSORS in its trace, got none"),
    ],
)
def test_an_engine_that_fails_is_one_clear_line(how, message, capsys, tmp_path):
    import re

    ids, page = " ".join(map(str, IDS)), tmp_path / "page.html"
    arguments = ["bisect", "-m", str(MODEL), "--ids", ids, "--html", str(page), "--", *engine("none", how)]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1 and not page.exists(), err


def test_commands_that_cannot_be(capsys):
    oracle = Oracle(None, MODEL)
    with pytest.raises(InputError, match="no/such: want a command that runs, got No such file"):
        bisect(oracle, IDS, ["no/such"])
    with pytest.raises(InputError, match="ids: want at most"):
        bisect(oracle, np.zeros(MOST_IDS + 1, int), ["true"])
    assert main(["bisect", "-m", str(MODEL), "--ids", "1 2"]) == 2
    assert "COMMAND: want one after --, got none" in capsys.readouterr().err


@pytest.mark.slow
def test_json_and_a_page(capsys, tmp_path):
    ids = " ".join(map(str, IDS))
    page = tmp_path / "page.html"
    options = ["--json", "--html", str(page), "--search-seconds", "0", "--budget", "float32"]
    assert main(["bisect", "-m", str(MODEL), "--ids", ids, *options, "--", *engine("none")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] == [{"asked": ["lm_head"], "ok": True}] and facts["verdict"]["ok"]
    assert "pyengine bisect -m" in page.read_text()
