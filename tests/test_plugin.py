"""The pytest plugin, as a project of somebody else uses it."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from peer import Peer
from rewrite import GOLDEN

import pyengine
from pyengine.errors import InputError
from pyengine.testing import Oracle, Trace, assert_trace_equal
from pyengine.trace import record_trace

PROJECT = Path(__file__).parent / "example_project"
MODEL = GOLDEN / "pattern31.gguf"


def run_project(*arguments, fault="", project=PROJECT):
    """pytest in the project, with the plugin also where pyengine is not installed."""
    installed = any(e.name == "pyengine" for e in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "pyengine.testing.plugin"]
    environment = os.environ | {"ENGINE_FAULT": fault, "PYTEST_ADDOPTS": "",
                                "PYTHONPATH": str(Path(pyengine.__file__).parents[1])}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin,
                           *arguments], cwd=project, env=environment, capture_output=True, text=True)


def test_the_example_project_passes():
    done = run_project()
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_example_project_fails_with_a_planted_bug():
    done = run_project(fault="rope_pairs")
    assert done.returncode == 1 and "2 failed" in done.stdout, done.stdout + done.stderr
    assert ("guilty, on the candidate's own inputs: model.layers.3.self_attn.o_proj\n" in done.stdout
            and "looks like: RoPE turns pairs (2i, 2i + 1), not halves" in done.stdout)
    assert "pyengine/oracle" not in done.stdout  # the failure is about the trace, not about our code


@pytest.mark.slow
def test_a_bug_of_decoding_alone_fails_that_test_alone():
    done = run_project(fault="decode_conv")
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "the convolution's state is a token old and stands still at token 22" in done.stdout


@pytest.mark.slow
def test_options_go_before_the_ini_file():
    done = run_project("--pyengine-model", "/no/such.gguf")
    assert done.returncode == 1 and "pyengine: /no/such.gguf: want a GGUF file" in done.stdout
    done = run_project("--pyengine-budget", "nonsense", "-k", "prefill")
    assert done.returncode == 1 and "nonsense" in done.stdout


@pytest.mark.slow
def test_without_a_model_tests_are_skipped(tmp_path):
    (tmp_path / "test_x.py").write_text("def test_x(pyengine_oracle):\n    pass\n")
    done = run_project("-rs", project=tmp_path)
    assert done.returncode == 0 and "want --pyengine-model" in done.stdout


def test_assert_trace_equal():
    ids = np.random.default_rng(1729).integers(0, 288, 8)
    trace = record_trace(pyengine.load(MODEL, "float64"), ids)
    assert assert_trace_equal(trace, trace).ok
    assert assert_trace_equal(trace, model=MODEL).ok
    other = Trace(ids, {"lm_head": trace.tensors["lm_head"] + np.float32(1)})
    with pytest.raises(AssertionError, match="different: 1 of 1 tensors; the first is lm_head"):
        assert_trace_equal(other, trace)
    with pytest.raises(AssertionError, match="guilty, on the candidate's own inputs"):
        wrong = Peer(MODEL, ["norm_plus_one_twice"]).run(ids)
        assert_trace_equal(wrong, model=MODEL, budget="bfloat16")
    with pytest.raises(InputError, match="want a reference or a model"):
        Oracle()
