"""Logits alone: how far off they are, from which token on, and what kind of mistake that is."""

import functools
import json

import numpy as np
import pytest
from further_bugs import ALL
from hypothesis import given, settings
from hypothesis import strategies as st
from partial import changed, part
from peer import Peer
from planted_bugs import ids_of, oracle, path_of

from pyengine.cli import main
from pyengine.oracle import logits
from pyengine.oracle.judge import judge, judge_traces
from pyengine.oracle.report.markdown import as_markdown
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import Trace

MODEL = path_of("pattern31")
OF = {
    logits.IN_HEAD: ("soft_cap", "tied_head"),
    logits.IN_LAST_NORM: ("no_last_norm", "norm_plus_one_twice", "norm_plus_one_missing", "norm_in_bfloat16"),
    logits.FIRST_TOKEN: (
        "heads",
        "gelu",
        "left_padding",
        "vocabulary",
        "kv_float16",
        "expert_order",
        "no_residual",
    ),
    logits.HISTORY: (
        "rope_pairs",
        "rope_base",
        "no_yarn",
        "decay",
        "state_bfloat16",
        "not_itself",
        "no_dt_bias",
    ),
    logits.SPLIT: ("state_dropped", "prefix_cache", "decode_conv", "last_chunk", "window", "late_positions"),
}
BUGS = {bug.fault: bug for bug in ALL if bug.model != "nextn" or bug.fault != "heads"}
BEGINS = {
    "state_dropped": 10,
    "prefix_cache": 12,
    "decode_conv": 23,
    "last_chunk": 16,
    "window": 10,
    "late_positions": 12,
}


@functools.cache
def trace_of(fault, kind="logits"):
    bug = BUGS[fault]
    return part(Peer(path_of(bug.model), [fault]).run(ids_of(bug.model), bug.splits), kind)


@functools.cache
def right():
    return oracle("pattern31").trace(ids_of("pattern31"))


def judged(trace, model="pattern31", budget="float32", **more):
    one = oracle(model)
    return judge(one.model, trace, one.budget(budget, trace), seconds=0, **more).logits


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == logits.IN_HEAD else pytest.mark.slow) for kind in OF]
)
def test_the_kind_of_planted_mistakes(kind):
    for fault in OF[kind]:
        found = judged(trace_of(fault), BUGS[fault].model)
        assert found.kind == kind, f"{fault}: {found.sentence}"
        begins = {logits.SPLIT: BEGINS.get(fault), logits.HISTORY: 1}.get(kind, 0)
        assert found.begins == begins and found.advice.count("dump ") == 1


def test_the_divergence_and_the_likeliest_id():
    trace = trace_of("gelu")
    found = judged(trace)
    p, q = (np.exp(x.astype(np.float64)) for x in (right().tensors["lm_head"], trace.tensors["lm_head"]))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    kld = (p * np.log(p / q)).sum(-1)
    assert found.kld_mean == pytest.approx(kld.mean(), rel=1e-4)
    assert found.kld_largest == pytest.approx(kld.max(), rel=1e-4) and found.kld_token == kld.argmax()
    same = p.argmax(-1) == q.argmax(-1)
    assert (found.same_top, found.tokens) == (same.sum(), 24) and found.other_top == same.argmin()
    error = np.abs(trace.tensors["lm_head"] - right().tensors["lm_head"]).max(-1)
    assert found.worst_token == error.argmax() == np.argmax(found.by_token)


def test_a_right_port_has_no_kind_and_no_advice():
    trace = part(Peer(MODEL).run(ids_of("pattern31")), "logits")
    found = judged(trace)
    assert found.begins is None and found.advice == "" and found.kld_mean < 1e-9 and found.same_top == 24
    text = as_text(oracle("pattern31").verify(trace, "float32"))
    assert "logits: KL divergence " in text and "shape" not in text and "next:" not in text
    assert oracle("pattern31").verify(part(right(), "logits"), "exact").logits is None


def test_of_the_last_token_alone():
    whole = trace_of("rope_base")
    last = Trace(whole.ids, {"lm_head": whole.tensors["lm_head"][-1:]})
    found = judged(last)
    assert (found.kind, found.rows, found.begins) == (logits.UNKNOWN, [23], 23)
    assert "logits of every token say where the error begins" in found.advice
    head = trace_of("tied_head")
    assert judged(Trace(head.ids, {"lm_head": head.tensors["lm_head"][-1:]})).kind == logits.IN_HEAD


@pytest.mark.parametrize("rows", [slice(None), slice(-1, None)])
def test_they_may_be_called_logits(tmp_path, rows):
    whole = trace_of("rope_base")
    value = whole.tensors["lm_head"][rows]
    Trace(whole.ids, {"logits": value}).save(tmp_path / "t")
    loaded = Trace.load(tmp_path / "t")
    assert list(loaded.tensors) == ["lm_head"] and np.array_equal(loaded.tensors["lm_head"], value)
    assert oracle("pattern31").verify(tmp_path / "t", "float32", seconds=0).row("lm_head").status == "suspect"


def test_some_ids_alone():
    def one_row(value):
        value[:, 7] *= 1.5
        return value

    found = judged(part(changed(right(), "lm_head", one_row), "logits"))
    assert found.kind == logits.IN_HEAD and found.sentence.endswith(
        "1 of 288 ids alone are wrong, the first is 7"
    )


def test_some_tokens_alone():
    """Other experts in the last layer, for two tokens."""

    def record(name, value):
        if name == "model.layers.3.mlp.gate.2":
            value = value.copy()
            for token in (5, 9):
                value[token] = [e for e in range(6) if e not in value[token]][:2]
        kept[name] = value if value.dtype == np.int64 else value.astype(np.float32)
        return value

    kept = {}
    oracle("pattern31").model.forward(right().ids, record=record)
    found = judged(Trace(right().ids, {"lm_head": kept["lm_head"]}))
    assert found.kind == logits.SOME_TOKENS and found.begins == 5
    assert (
        found.sentence.startswith("2 of 24 tokens are wrong, the first is token 5")
        and "mlp.gate.2" in found.advice
    )


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(2, 23), st.floats(0.01, 10), st.integers(0, 2**31))
def test_where_an_error_begins(token, size, seed):
    """Hidden states that turn from one token on: the head and the last norm are right."""
    model = oracle("pattern31").model
    weight, scale = model.weight("lm_head.weight"), 1 + model.weight("model.norm.weight")
    hidden = right().tensors["model.norm"].astype(np.float64) / scale
    other = np.random.default_rng(seed).standard_normal(hidden.shape) * size + hidden
    hidden[token:] = (other / np.sqrt(np.mean(other**2, axis=-1, keepdims=True)))[token:]
    trace = Trace(right().ids, {"lm_head": (hidden * scale @ weight.T).astype(np.float32)})
    found = judged(trace)
    assert (found.kind, found.begins) == (logits.SPLIT, token), found.sentence
    assert f"right up to token {token - 1}, wrong from token {token} on at once" in found.sentence


@pytest.mark.slow
def test_an_edge_is_not_taken_for_a_beginning():
    """In a wide budget the first tokens may be wrong and within it."""
    trace = Peer(MODEL, ["saturating"], int8=True).run(ids_of("pattern31"))
    found = judged(part(trace, "logits"), budget="int8-activations")
    assert (
        found.begins == 1 and found.kind == logits.UNKNOWN and "they may be wrong as well" in found.sentence
    )


def test_a_nan_has_no_other_kind():
    def nan(value):
        value[4, 3] = np.nan
        return value

    found = judged(part(changed(right(), "lm_head", nan), "logits"))
    assert found.begins == 4 and found.kld_largest == np.inf and found.kind == logits.SOME_TOKENS
    verdict = oracle("pattern31").verify(
        part(changed(right(), "lm_head", nan), "logits"), "float32", seconds=0
    )
    json.dumps(verdict.as_dict(), allow_nan=False)


def test_without_the_model():
    """Two traces and a budget: no head can be looked at."""
    trace = trace_of("tied_head")
    budget = oracle("pattern31").budget("float32", trace)
    found = judge_traces(part(right(), "logits"), trace, budget).logits
    assert found.kind == logits.FIRST_TOKEN and found.kld_mean > 1


def test_in_the_reports(tmp_path, capsys):
    trace_of("prefix_cache").save(tmp_path / "t")
    arguments = ["verify", str(MODEL), str(tmp_path / "t"), "--budget", "float32", "--search-seconds", "0"]
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert "the error's shape: right up to token 11, wrong from token 12 on at once" in text
    assert (
        "next: run the same ids in one piece: if they are right then, the state is wrong that token 12"
        in text
    )
    assert main([*arguments, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)["logits"]
    assert facts["kind"] == "split" and facts["begins"] == 12 and len(facts["by_token"]) == 24
    verdict = oracle("pattern31").verify(trace_of("prefix_cache"), "float32", seconds=0)
    assert "the error's shape" in as_markdown(verdict)
    full = oracle("pattern31").verify(trace_of("prefix_cache", "full"), "float32", seconds=0)
    assert "the error's shape" not in as_text(full) and "logits: KL divergence" in as_text(full)
