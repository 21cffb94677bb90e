"""Without a budget bits are compared, nothing is accused, and the verdict says which budget would do."""

import json

import numpy as np
import pytest
from partial import changed, part
from paths import GOLDEN
from peer import Peer

import pyengine
from pyengine.cli import main
from pyengine.oracle.formats import to_bfloat16, to_float16
from pyengine.oracle.nearest import likely_budget
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.junit import as_junit
from pyengine.oracle.report.markdown import as_markdown
from pyengine.oracle.report.text import as_text
from pyengine.oracle.rounding import rounded_model
from pyengine.oracle.trace import Trace, record_trace
from pyengine.testing import assert_trace_equal

MODEL = GOLDEN / "pattern31.gguf"
TOKENS = 12


@pytest.fixture(scope="module")
def oracle():
    return Oracle(None, MODEL)


@pytest.fixture(scope="module")
def ids(oracle):
    return np.random.default_rng(1729).integers(0, oracle.model.config.vocab_size, TOKENS)


def port(oracle, ids, dtype, arithmetic=""):
    trace = record_trace(rounded_model(oracle.model, dtype, 1), ids)
    return Trace(trace.ids, trace.tensors, arithmetic)


def run(*arguments):
    return main([str(a) for a in arguments])


def test_a_right_port_is_told_which_budget_it_is_within(oracle, ids):
    verdict = oracle.verify(Peer(MODEL).run(ids))
    assert not verdict.ok and not verdict.guilty and not verdict.suspects and not verdict.mistakes
    assert verdict.nearest.within and verdict.nearest.budget == "float32"
    text = as_text(verdict)
    share = f"{verdict.nearest.share:.2f}"
    assert text.startswith(f"not bit-equal; within the float32 budget ({share} of it): ")
    assert text.splitlines()[0].endswith(" of 83 tensors differ in bits")
    assert "bits were compared, as no budget was asked for: --budget float32 accepts this trace" in text
    assert "guilty" not in text and "add up" not in text and "known mistake" not in text
    assert oracle.verify(Peer(MODEL).run(ids), "float32").ok
    facts = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))
    assert facts["nearest_budget"] == {
        "budget": "float32",
        "share": verdict.nearest.share,
        "within": True,
        "tensor": verdict.nearest.tensor,
        "first": None,
    }
    assert "not bit-equal; within the float32 budget" in as_markdown(verdict)
    assert "not bit-equal; within the float32 budget" in as_junit(verdict)


@pytest.mark.parametrize(
    "dtype, arithmetic",
    [
        ("bfloat16", ""),
        ("bfloat16", "my engine, bf16"),
        ("float16", ""),
        ("float16", "Qwen3_5MoeForCausalLM float16"),
        ("int8-activations", "llama.cpp"),
        ("int8-activations", ""),
    ],
)
@pytest.mark.parametrize("kind", ["full", "logits"])
def test_other_dtypes(oracle, ids, dtype, arithmetic, kind):
    trace = part(port(oracle, ids, dtype, arithmetic), kind)
    verdict = oracle.verify(trace)
    assert not verdict.ok and verdict.nearest.within and not verdict.guilty
    if kind == "full" or arithmetic:
        assert verdict.nearest.budget == dtype
    assert oracle.verify(trace, verdict.nearest.budget).ok


@pytest.mark.parametrize("fault", ["rope_pairs", "heads", "norm_plus_one_twice"])
def test_a_broken_port_is_not_accused_either(oracle, ids, fault):
    verdict = oracle.verify(Peer(MODEL, [fault]).run(ids))
    assert not verdict.ok and not verdict.nearest.within and verdict.nearest.budget == "float32"
    assert (
        not verdict.guilty
        and not verdict.mistakes
        and {r.status for r in verdict.rows} <= {"different", "ok"}
    )
    text = as_text(verdict)
    assert text.startswith("not bit-equal; beyond the float32 budget as well (")
    assert f"first in {oracle.verify(Peer(MODEL, [fault]).run(ids), 'float32').first.name})" in text
    assert "--budget float32 names the operation" in text


def test_a_nan_is_within_no_budget(oracle, ids):
    def nan(value):
        value[5, 7] = np.nan
        return value

    verdict = oracle.verify(changed(oracle.trace(ids), "lm_head", nan))
    assert not verdict.nearest.within and "NaN at [5, 7], the first of 1" in as_text(verdict)


@pytest.mark.parametrize("arithmetic", ["locked", "locked-kv16", "float64"])
def test_this_engines_own_trace_is_equal(oracle, ids, arithmetic):
    trace = record_trace(pyengine.load(MODEL, arithmetic, threads=1), ids)
    assert oracle.verify(trace).ok
    assert assert_trace_equal(trace, model=MODEL).ok
    name = "model.layers.2.mlp"

    def one_ulp(value):
        value[3, 4] = np.nextafter(value[3, 4], np.float32(np.inf))
        return value

    wrong = oracle.verify(changed(trace, name, one_ulp))
    assert not wrong.ok and wrong.first.name == name and wrong.first.difference.ulp == 1
    if arithmetic != "float64":  # asked for, the other arithmetic is compared
        assert not Oracle(None, MODEL, "float64").verify(trace).ok


@pytest.mark.parametrize("arithmetic", ["locked", "float64"])
def test_from_the_command_line(tmp_path, ids, arithmetic, capsys):
    path, words = tmp_path / "t.safetensors", " ".join(map(str, ids))
    trace = ["trace", "-m", MODEL, "--ids", words, "-o", path]
    assert run(*trace, *(["--arithmetic", arithmetic] if arithmetic != "locked" else [])) == 0
    assert run("verify", MODEL, path) == 0
    assert capsys.readouterr().out == "equal: 83 of 83 tensors, every bit\n"


def test_exit_codes(tmp_path, ids, capsys):
    """A CI that names no budget asked for bits."""
    Peer(MODEL).run(ids).save(tmp_path / "right")
    assert run("verify", MODEL, tmp_path / "right") == 1
    assert capsys.readouterr().out.startswith("not bit-equal; within the float32 budget (0.")
    assert run("verify", MODEL, tmp_path / "right", "--budget", "exact") == 1
    assert run("verify", MODEL, tmp_path / "right", "--budget", "float32") == 0
    with pytest.raises(AssertionError, match="not bit-equal; within the float32 budget"):
        assert_trace_equal(tmp_path / "right", model=MODEL)


# ---- hints beside a budget -------------------------------------------------------------------


def test_a_budget_of_another_dtype_is_hinted_at(oracle, ids):
    text = as_text(oracle.verify(port(oracle, ids, "bfloat16"), "float32", seconds=0))
    assert "the candidate's values are those of bfloat16: --budget bfloat16 is made for it" in text
    text = as_text(oracle.verify(port(oracle, ids, "float16", "half precision"), "float32", seconds=0))
    assert "the candidate's arithmetic is 'half precision': --budget float16 is made for it" in text
    assert "--budget" not in as_text(oracle.verify(port(oracle, ids, "bfloat16"), "bfloat16"))
    locked = record_trace(pyengine.load(MODEL, threads=1), ids)
    text = as_text(oracle.verify(locked, "float32", seconds=0))
    assert (
        "the candidate's arithmetic is locked, this engine's own: without --budget its bits are compared"
        in text
    )


@pytest.mark.parametrize("words, budget", [("vLLM FP8", "fp8"), ("MLX, 4bit", "int4"), ("a Q4_K_M", "q4_k")])
def test_a_budget_of_quantized_weights_is_hinted_at(oracle, ids, words, budget):
    wrong = port(oracle, ids, "bfloat16", words)
    text = as_text(oracle.verify(part(wrong, "logits"), "float32", seconds=0))
    assert f"what it was quantized from, --budget {budget} is made for it" in text


def test_the_likely_budget():
    random = np.random.default_rng(1729).standard_normal((5, 7)).astype(np.float32)
    ids = np.arange(5)
    assert likely_budget(Trace(ids, {"a": random})) == "float32"
    assert likely_budget(Trace(ids, {"a": to_bfloat16(random)})) == "bfloat16"
    assert likely_budget(Trace(ids, {"a": to_float16(random)})) == "float16"
    assert likely_budget(Trace(ids, {"a": random, "b": to_float16(random)})) == "float32"
    assert likely_budget(Trace(ids, {"a": to_bfloat16(random)}, "llama.cpp Q8_0")) == "int8-activations"
