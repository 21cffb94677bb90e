"""Who adds the error, who inherits it; an engine's own floor."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partial import changed, part
from paths import TESTS
from peer import Peer
from planted_bugs import ids_of, oracle, path_of

from pyengine.cli import main
from pyengine.errors import InputError
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.text import as_text
from pyengine.oracle.rounding import rounded_model
from pyengine.oracle.trace import Trace, record_trace

MODEL = path_of("pattern31")
CONVERTER = TESTS / "converter" / "A-Q8_0.gguf"


@functools.cache
def trace_of(*faults):
    return Peer(MODEL, faults).run(ids_of("pattern31"))


def verify(trace, budget="float32", **more):
    return oracle("pattern31").verify(trace, budget, seconds=0, added=True, **more)


def outputs(blocks):
    return [block.name.removeprefix("model.") for block in blocks]


# ---- who adds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, guilty",
    [
        pytest.param("gelu", [f"layers.{i}.mlp" for i in range(4)], marks=pytest.mark.slow),
        ("rope_pairs", ["layers.3.self_attn"]),
        pytest.param("heads", [f"layers.{i}.linear_attn" for i in range(3)], marks=pytest.mark.slow),
        pytest.param("no_last_norm", ["lm_head"], marks=pytest.mark.slow),
    ],
)
def test_the_blocks_that_add_the_error(fault, guilty):
    added = verify(trace_of(fault)).added
    assert len(added.blocks) == 14
    beyond = [block for block in added.blocks if block.added > 1]
    assert outputs(beyond) == guilty
    assert sorted(outputs(added.beyond)) == sorted(outputs(beyond))
    first = added.blocks.index(beyond[0])
    assert all(block.inherited <= 1 and block.total <= 1 for block in added.blocks[:first])
    assert all(block.total > 1 for block in added.blocks[first:])
    if fault == "rope_pairs":  # what comes after it adds nothing, and the first token is right
        assert [t.token for t in added.tokens if t.added > 1] == list(range(1, 24))
        assert all(block.added <= 1 < block.inherited for block in added.blocks[first + 1 :])


def test_a_right_port_adds_nothing():
    verdict = verify(trace_of())
    assert verdict.ok and not verdict.added.beyond and verdict.added.routing is None
    assert "added: none of 14 blocks adds more than its budget" in as_text(verdict)


@pytest.mark.slow
def test_both_sums_of_a_layer():
    """The first is in the MLP's block, the second is the residual."""
    added = verify(trace_of("residual_bfloat16")).added
    beyond = [block.block for block in added.beyond]
    assert set(beyond) == {"mlp", "residual"} and beyond.count("residual") == 4


def test_of_layers_alone_a_layer_is_a_block():
    added = verify(part(trace_of("rope_pairs"), "layers")).added
    assert [(b.name, b.block) for b in added.blocks] == [
        *((f"model.layers.{i}", "layer") for i in range(4)),
        ("lm_head", "ends"),
    ]
    assert outputs(added.beyond) == ["layers.3"]


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 3), st.sampled_from(["mlp", ""]), st.integers(0, 23))
def test_one_wrong_value_is_added_where_it_is(layer, part_of, token):
    """What follows did not see it: it takes it back."""
    name = f"model.layers.{layer}" + (f".{part_of}" if part_of else "")

    def off(value):
        value[token, 3] += np.float32(0.5)
        return value

    added = verify(changed(oracle("pattern31").trace(ids_of("pattern31")), name, off)).added
    assert name in [block.name for block in added.beyond]
    names = [block.name for block in added.blocks]
    # Of each token there is the block that adds most: this one, or one behind it, which takes it back.
    most = {t.token: t.name for t in added.tokens if t.added > 1}
    assert names.index(most[token]) >= names.index(name)
    assert all(block.added <= 1 for block in added.blocks[: names.index(name)])


@pytest.mark.slow
def test_row_by_row():
    """Each tensor says what it inherits, in the same units as end to end."""
    verdict = verify(trace_of("rope_pairs"))
    o_proj = verdict.row("model.layers.3.self_attn.o_proj")
    assert o_proj.inherited_share <= 1 < o_proj.own_share and o_proj.total_share > 1
    head = verdict.row("lm_head")
    assert head.own_share <= 1 < head.inherited_share == pytest.approx(head.total_share, rel=1e-2)


@pytest.mark.slow
def test_the_error_without_the_routing():
    """A right port in float16 that chooses another expert at a near-tie."""
    judge = Oracle(None, CONVERTER)
    ids = np.random.default_rng(0).integers(0, judge.model.config.vocab_size, 32)
    trace = record_trace(rounded_model(judge.model, "float16", 1), ids)
    verdict = judge.verify(trace, "float16", added=True)
    routing = verdict.added.routing
    assert verdict.ok and verdict.flips and routing.tensor == "lm_head"
    assert routing.as_it_is > 1 >= routing.near_ties == pytest.approx(routing.every_choice, rel=1e-6)
    assert f"routing: lm_head is at {routing.as_it_is:.2g} x, with near-ties followed at " in as_text(verdict)


# ---- floors ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_floor_is_subtracted():
    """An engine that rounds its residual stream, and the same with a cache in bfloat16."""
    floor, trace = trace_of("residual_bfloat16"), trace_of("residual_bfloat16", "kv_bfloat16")
    judge = oracle("pattern31")
    assert not judge.verify(trace, "bfloat16-state", seconds=0).ok
    verdict = judge.verify(trace, "bfloat16-state", floor=floor)
    assert verdict.ok and verdict.floor.first is None, as_text(verdict)
    wrong = trace_of("residual_bfloat16", "kv_bfloat16", "sigmoid_z")
    verdict = judge.verify(wrong, "bfloat16-state", floor=floor)
    assert not verdict.ok and verdict.first.name == "model.layers.0.linear_attn.norm"
    assert verdict.mistakes[0].name == "the gated norm's gate is sigmoid, not silu"
    added = judge.verify(wrong, "bfloat16-state", floor=floor, seconds=0, added=True).added
    assert outputs(added.beyond)[0].endswith("linear_attn")


def test_a_floor_of_a_right_engine():
    verdict = oracle("pattern31").verify(trace_of("kv_bfloat16"), "bfloat16-state", floor=trace_of())
    assert verdict.ok and verdict.floor.first is None and 0 < verdict.floor.share <= 1
    assert f"floor: at most {verdict.floor.share:.2f} of the budget ({verdict.floor.tensor})" in as_text(
        verdict
    )
    assert verdict.as_dict()["floor"]["beyond"] == 0


def test_a_floor_that_is_beyond_the_budget_itself():
    verdict = oracle("pattern31").verify(
        trace_of("residual_bfloat16"), "float32", floor=trace_of("residual_bfloat16")
    )
    assert verdict.ok and verdict.floor.first == "model.layers.0.post_attention_layernorm"
    text = as_text(verdict)
    assert "beyond the budget itself in " in text and "that is the engine's, quantized or not" in text


def test_floors_that_are_none():
    judge, trace = oracle("pattern31"), trace_of()
    other = Peer(MODEL).run(ids_of("pattern31")[::-1].copy())
    nan = changed(trace, "model.layers.1", lambda v: v * np.nan)
    for floor, message in [
        (other, "input_ids: want the reference's 24 ids, got others"),
        (
            part(trace, "logits"),
            r"floor: want the candidate's tensors, got a trace without model.embed_tokens \(82",
        ),
        (nan, "floor: want numbers, got NaN or infinity in model.layers.1"),
    ]:
        with pytest.raises(InputError, match=message):
            judge.verify(trace, "float32", floor=floor)
    for more, message in [({"floor": trace}, "floor"), ({"added": True}, "added")]:
        with pytest.raises(
            InputError, match=f"{message}: want a budget and the model, got a comparison in bits"
        ):
            judge.verify(trace, **more)
        with pytest.raises(InputError, match=f"{message}: want a budget and the model, got a trace alone"):
            Oracle(trace).verify(trace, judge.budget("float32", trace), **more)
    few = Trace(trace.ids, {"model.norm": trace.tensors["model.norm"]})
    with pytest.raises(
        InputError, match="added: want outputs of layers, mixers or MLPs in the trace, got none"
    ):
        judge.verify(few, "float32", added=True)


def test_from_the_command_line(tmp_path, capsys):
    trace_of("rope_pairs").save(tmp_path / "t")
    trace_of().save(tmp_path / "floor")
    arguments = ["verify", str(MODEL), str(tmp_path / "t"), "--budget", "float32", "--search-seconds", "0"]
    assert main([*arguments, "--added", "--floor", str(tmp_path / "floor")]) == 1
    out = capsys.readouterr().out
    assert "added: 1 of 14 blocks add more than their budget: model.layers.3.self_attn " in out
    assert f"floor: {tmp_path / 'floor'}: at most 0." in out
    assert main(["verify", str(MODEL), str(tmp_path / "t"), "--added"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
