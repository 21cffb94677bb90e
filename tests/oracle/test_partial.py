"""What is said of a trace that lacks tensors: nothing is accused without its inputs, mistakes are named all
the same, and a right port passes.  `test_mistakes_table.py` has every mistake, in layers and in logits alone.
"""

import functools

import numpy as np
import pytest
from partial import PARTS, changed, part
from paths import GOLDEN, TESTS
from peer import Peer
from planted_bugs import BUGS, names, oracle, path_of

from pyengine.oracle.mistakes.catalogue import MISTAKES
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.text import as_text
from pyengine.oracle.rounding import DTYPES, rounded_model
from pyengine.oracle.trace import Trace, record_trace

CONVERTER = TESTS / "converter" / "A-Q8_0.gguf"
TRAINED = TESTS / "trained" / "bf16.gguf"
LAYERS = "layers", "layers and embedding"

# Not to be told from these tensors: ids that are not in the trace, weights that are not in the model.
UNNAMED = {"vocabulary", "shared_gate_shape", "saturating", "nextn"}
# Layer 3 loses its keys and values too: from a layer before it, that is not to be seen.
NAMED_FROM_LOGITS = {
    "state_dropped": "every state is dropped: keys and values, the convolution's and the recurrent state "
    "at token 10"
}
PLANTED = [bug for bug in BUGS if bug.row or bug.fault == "gate_up_swapped"]
FEW = {"heads", "conv1d_channels", "rope_pairs", "state_dropped", "left_padding", "not_renormalised"}


@functools.cache
def planted(bug):
    ids = np.random.default_rng(1729).integers(0, oracle(bug.model).model.config.vocab_size, 24)
    return Peer(path_of(bug.model), [bug.fault], bug.int8).run(ids, bug.splits)


@functools.cache
def verdict_of(bug, kind):
    trace = part(planted(bug), kind)
    return oracle(bug.model).verify(trace, bug.budget, allow_unknown=True)


def check(bug, kind):
    verdict = verdict_of(bug, kind)
    text = as_text(verdict)
    accused, known = verdict.accused, set(part(planted(bug), kind).tensors)
    assert not verdict.ok and accused is not None, text
    if kind == "logits" or kind == "layer 1 and logits" and accused.name != "lm_head":
        assert accused.status == "suspect" and not verdict.guilty, text
        assert f"{accused.name}, or anything before it" in text and " next" in text
    if accused.status == "guilty":
        assert set(verdict.between).isdisjoint(known) and all(
            name.startswith(f"{accused.name}.") for name in verdict.between
        ), text
    if bug.fault not in UNNAMED:
        named = NAMED_FROM_LOGITS.get(bug.fault) if accused.name == "lm_head" else None
        assert (named or bug.named) in names(verdict), text


@pytest.mark.parametrize("bug", [b for b in PLANTED if b.fault in FEW], ids=str)
@pytest.mark.parametrize("kind", ["layers", pytest.param("logits", marks=pytest.mark.slow)])
def test_a_planted_mistake_in_part_of_a_trace(bug, kind):
    check(bug, kind)


@pytest.mark.slow
@pytest.mark.parametrize("bug", [b for b in PLANTED if b.fault not in FEW], ids=str)
@pytest.mark.parametrize("kind", ["layers and embedding", "layer 1 and logits"])
def test_every_planted_mistake_in_part_of_a_trace(bug, kind):
    check(bug, kind)


# ---- what is said ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken():
    """Of a port whose delta nets, in layers 0 to 2, pair the wrong heads."""
    return planted(next(bug for bug in BUGS if bug.fault == "heads"))


def kept(trace, *tensors):
    return Trace(trace.ids, {name: trace.tensors[name] for name in tensors})


def test_logits_alone(broken):
    verdict = oracle("pattern31").verify(part(broken, "logits"), "float32")
    text = as_text(verdict)
    assert (
        "lm_head, or anything before it: 82 tensors are not in the trace; dump model.layers.0 .. 3 next"
        in text
    )
    assert "guilty" not in text and "GUILTY" not in text
    assert (
        "looks like one of 2, which these tensors do not tell apart: grouped value heads are paired with key "
        "heads as if tiled (g mod n_k); tiled value heads are paired with key heads as if grouped" in text
    )
    facts = verdict.as_dict()
    assert facts["guilty"] == [] and facts["suspects"] == ["lm_head"]
    assert facts["dump_next"] == [f"model.layers.{i}" for i in range(4)] and len(facts["not_in_trace"]) == 82
    assert facts["search"] == {
        "tried": len(MISTAKES),
        "known": len(MISTAKES),
        "start": "the ids",
        "stopped": False,
    }


def test_a_layer_without_the_mistake_is_not_guilty(broken):
    """Layer 3 is full attention."""
    verdict = oracle("pattern31").verify(kept(broken, "model.layers.3", "lm_head"), "float32")
    assert not verdict.guilty and verdict.accused.name == "model.layers.3"
    assert "model.layers.3, or anything before it: 80 tensors are not in the trace; " in as_text(verdict)
    assert "; dump model.layers.0 .. 2 next" in as_text(verdict)
    assert [row.status for row in verdict.rows] == ["suspect", "inherited"]


def test_a_layer_is_guilty_if_its_input_is_there():
    bug = next(bug for bug in BUGS if bug.fault == "rope_pairs")
    verdict = oracle("pattern31").verify(part(planted(bug), "layers"), "float32")
    assert [row.name for row in verdict.guilty] == ["model.layers.3"]
    assert verdict.next == [
        f"model.layers.3.{name}"
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    ]
    assert verdict.search.start == "model.layers.2"


def test_the_last_known_point_is_said(broken):
    right = oracle("pattern31").trace(broken.ids)
    wrong = changed(right, "lm_head", lambda v: v + 1)
    verdict = oracle("pattern31").verify(kept(wrong, "model.layers.1", "lm_head"), "float32")
    assert (
        "lm_head, or anything before it, back to model.layers.1: 41 tensors are not in the trace; "
        "dump model.layers.2 .. 3 next" in as_text(verdict)
    )
    verdict = oracle("pattern31").verify(kept(wrong, "model.layers.3", "lm_head"), "float32")
    assert "lm_head, or anything before it, back to model.layers.3: 1 tensor is not in the trace" in as_text(
        verdict
    )
    verdict = oracle("pattern31").verify(kept(wrong, "model.norm", "lm_head"), "float32")
    assert [row.name for row in verdict.guilty] == ["lm_head"]


def test_the_search_stops_in_time(broken):
    verdict = oracle("pattern31").verify(part(broken, "logits"), "float32", seconds=0)
    assert verdict.search.stopped and verdict.search.tried == 0 and not verdict.mistakes
    assert "looks like none of the 0 known mistakes tried" in as_text(verdict)


@pytest.mark.slow
def test_first_tokens_rule_out_what_all_of_them_would(broken):
    """A mistake that is named is named with the short cut and without it."""
    from pyengine.oracle import diagnose

    of_few = [m.name for m in oracle("pattern31").verify(part(broken, "logits"), "float32").mistakes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnose, "first_tokens", lambda trace, count: trace)
        whole = [m.name for m in oracle("pattern31").verify(part(broken, "logits"), "float32").mistakes]
    assert of_few == whole != []


def test_a_missing_mask_is_named_from_logits():
    """It looks ahead: the first tokens alone do not show it."""
    model = oracle("pattern31").model
    mistake = next(m for m in MISTAKES if m.name == "the causal mask is missing")
    ids = np.random.default_rng(1729).integers(0, 288, 24)
    with np.errstate(all="ignore"):
        trace = record_trace(mistake.made(model), ids)
    verdict = oracle("pattern31").verify(part(trace, "logits"), "float32")
    assert names(verdict)[0] == mistake.name


# ---- right ports -----------------------------------------------------------------------------


@functools.cache
def right_port(path, dtype, order, seed):
    model = Oracle(None, path).model
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, 32)
    return record_trace(rounded_model(model, dtype, order), ids)


@functools.cache
def oracle_of(path):
    return Oracle(None, path)


def passes(path, dtype, order, seed, kind):
    verdict = oracle_of(path).verify(part(right_port(path, dtype, order, seed), kind), dtype)
    assert verdict.ok, as_text(verdict)
    assert all(flip.kind == "near-tie" for flip in verdict.flips)
    return verdict


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float16"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("layers", "logits")]
)
def test_a_near_tie_that_the_trace_does_not_hold(dtype, kind):
    """This model and these ids have one: rounding decides, and is not a mistake."""
    verdict = passes(CONVERTER, dtype, 1, 0, kind)
    assert verdict.flips and all(flip.assumed for flip in verdict.flips)
    assert "assumed: the choice is not in the trace" in as_text(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", [GOLDEN / "pattern31.gguf", CONVERTER, TRAINED], ids=lambda p: p.stem)
def test_a_right_port_is_not_accused(path, dtype, kind):
    for order, seed in [(0, 0), (1, 1), (2, 2), (3, 3)]:
        passes(path, dtype, order, seed, kind)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("splits", [None, (10, 1, 13)])
def test_the_peer_is_not_accused(kind, splits):
    ids = np.random.default_rng(1729).integers(0, 288, 24)
    trace = part(Peer(GOLDEN / "pattern31.gguf").run(ids, splits), kind)
    verdict = oracle("pattern31").verify(trace, "float32")
    assert verdict.ok and len(verdict.rows) == len(trace.tensors), as_text(verdict)
    nearest = oracle("pattern31").verify(trace).nearest
    assert nearest.budget == "float32" and nearest.within and 0 < nearest.share <= 1


@pytest.mark.slow
def test_a_broken_port_is_not_excused_by_near_ties():
    """Choices are assumed only where they explain the whole tensor."""
    trace = right_port(CONVERTER, "float16", 1, 0)

    def off(value):
        value[20, 3] += 0.5
        return value

    wrong = part(changed(trace, "lm_head", off), "logits")
    verdict = oracle_of(CONVERTER).verify(wrong, "float16", seconds=5)
    assert not verdict.ok and verdict.accused.name == "lm_head" and verdict.first.token == 20
