"""The pytest plugin, as a project of somebody else uses it."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN
from peer import Peer

import pyengine
from pyengine.errors import InputError
from pyengine.oracle.trace import record_trace
from pyengine.testing import Oracle, Trace, assert_trace_equal

PROJECT = Path(__file__).parent / "example_project"
MODEL = GOLDEN / "pattern31.gguf"


def run_project(*arguments, fault="", project=PROJECT):
    """pytest in the project, with the plugin also where pyengine is not installed."""
    installed = any(e.name == "pyengine" for e in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "pyengine.testing.model.plugin"]
    environment = os.environ | {
        "ENGINE_FAULT": fault,
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": str(Path(pyengine.__file__).parents[1]),
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_example_project_passes():
    done = run_project()
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_example_project_fails_with_a_planted_bug():
    done = run_project(fault="rope_pairs")
    assert done.returncode == 1 and "2 failed" in done.stdout, done.stdout + done.stderr
    assert (
        "guilty, on the candidate's own inputs: model.layers.3.self_attn.o_proj\n" in done.stdout
        and "looks like: RoPE turns pairs (2i, 2i + 1), not halves" in done.stdout
    )
    assert "pyengine/oracle" not in done.stdout  # the failure is about the trace, not about our code


@pytest.mark.slow
def test_a_bug_of_decoding_alone_fails_that_test_alone():
    done = run_project(fault="decode_conv")
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "the convolution's state is a token old and stands still at token 22" in done.stdout


def usage_error(done):
    """The one line of a pytest.UsageError: no test runs."""
    assert done.returncode == 4 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line]
    return line


@pytest.mark.parametrize(
    "option, value, message",
    [
        (
            "model",
            "/no/such.gguf",
            "want a GGUF file or a directory, got /no/such.gguf: No such file or directory",
        ),
        ("model", __file__, f"want a GGUF file or a directory, got {__file__}: another file"),
        (
            "budget",
            "float33",
            "want exact, float32, bfloat16, float16, int8-activations, fp8-activations, q8_0, q4_k, int4, "
            "fp8, bfloat16-state, several joined by +, or the file of one that was saved, got 'float33'",
        ),
    ],
)
def test_a_wrong_option_is_one_line(option, value, message):
    """Options go before the ini file's."""
    assert usage_error(run_project(f"--pyengine-{option}={value}")) == f"ERROR: pyengine_{option}: {message}"


@pytest.mark.slow
def test_a_wrong_ini_value_is_one_line(tmp_path):
    (tmp_path / "test_x.py").write_text("def test_x(pyengine_oracle):\n    pass\n")
    for option, value, message in [
        ("budget", "float33", "want exact, float32, "),
        ("budget", "test_x.py", "want JSON"),
        ("model", "nothing.gguf", "want a GGUF file or a directory, got nothing.gguf"),
        ("model", "test_x.py", "another file"),
    ]:
        (tmp_path / "pytest.ini").write_text(f"[pytest]\npyengine_{option} = {value}\n")
        line = usage_error(run_project(project=tmp_path))
        assert line.startswith(f"ERROR: pyengine_{option}: ") and message in line, line


@pytest.mark.slow
def test_a_model_with_a_fault_is_one_line(tmp_path):
    (tmp_path / "half.gguf").write_bytes(MODEL.read_bytes()[:100_000])
    done = run_project(f"--pyengine-model={tmp_path}/half.gguf", "-k", "prefill")
    assert done.returncode == 1 and "half.gguf" in done.stdout and "pyengine/checkpoint" not in done.stdout


@pytest.mark.slow
def test_unknown_names_in_the_fixture(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "def test_x(pyengine_oracle):\n"
        "    trace = pyengine_oracle.trace(pyengine_oracle.ids(4))\n"
        "    trace.tensors['model.layer.0.mlp'] = trace.tensors['model.layers.0.mlp']\n"
        "    assert pyengine_oracle.assert_trace_equal(trace, allow_unknown=True).ok\n"
        "    pyengine_oracle.assert_trace_equal(trace)\n"
    )
    done = run_project(f"--pyengine-model={MODEL}", project=tmp_path)
    assert done.returncode == 1 and "did you mean model.layers.0.mlp?" in done.stdout
    assert "pyengine/oracle" not in done.stdout


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
