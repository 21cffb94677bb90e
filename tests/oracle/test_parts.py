"""Traces of part of the tokens and features, of several steps, and of the layers' memories."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN
from peer import Peer

import pyengine
from pyengine.errors import FileFormatError, InputError
from pyengine.files.safetensors_writer import SafetensorsWriter
from pyengine.oracle.memories import memories, with_memories
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.text import as_text
from pyengine.oracle.rounding import rounded_model
from pyengine.oracle.trace import Trace, aligned, is_state, record_trace
from pyengine.oracle.widths import state_widths, widths

MODEL = GOLDEN / "pattern31.gguf"
TOKENS = 12
IDS = np.random.default_rng(1729).integers(0, 288, TOKENS)


@functools.cache
def oracle():
    return Oracle(None, MODEL)


@functools.cache
def port(fault=None):
    return Peer(MODEL, [fault] if fault else []).run(IDS)


def cut(trace, rows, columns):
    """These tokens, and those of the features that each tensor has."""
    at = {name: columns[columns < array.shape[1]] for name, array in trace.tensors.items()}
    at = {name: kept for name, kept in at.items() if len(kept)}
    tensors = {name: trace.tensors[name][rows][:, kept] for name, kept in at.items()}
    return Trace(trace.ids, tensors, trace.arithmetic, rows=dict.fromkeys(tensors, rows), columns=at)


indices = st.lists(st.integers(0, TOKENS - 1), min_size=1, unique=True).map(lambda x: np.array(sorted(x)))


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(indices, indices)
def test_any_part_of_a_right_port_is_within_the_budget(rows, columns):
    verdict = oracle().verify(cut(port(), rows, columns), "float32", seconds=5)
    assert verdict.ok, as_text(verdict)
    assert all(row.rows == tuple(rows) or len(rows) == TOKENS for row in verdict.rows if row.error)


@settings(max_examples=20, deadline=None)
@given(indices, indices, indices, indices)
def test_two_parts_are_compared_where_both_have_values(rows, columns, other_rows, other_columns):
    whole = Trace(IDS, {"lm_head": np.arange(TOKENS * 20.0).reshape(TOKENS, 20)})
    ours, theirs = cut(whole, rows, columns), cut(whole, other_rows, other_columns)
    if not set(rows) & set(other_rows) or not set(columns) & set(other_columns):
        with pytest.raises(InputError, match="that both traces have, got none"):
            aligned(ours, theirs)
        return
    a, b = aligned(ours, theirs)
    wanted = whole.tensors["lm_head"][np.intersect1d(rows, other_rows)][
        :, np.intersect1d(columns, other_columns)
    ]
    assert np.array_equal(a.tensors["lm_head"], wanted) and np.array_equal(b.tensors["lm_head"], wanted)


@pytest.mark.slow
def test_a_mistake_is_seen_in_a_part_and_its_token_is_named():
    rows, columns = np.array([0, 3, 7]), np.arange(8)
    trace = cut(port("rope_pairs"), rows, columns)
    verdict = oracle().verify(trace, "float32", seconds=30)
    assert verdict.accused.name == "model.layers.3.self_attn.o_proj" and verdict.accused.status == "suspect"
    assert verdict.accused.token == 3 and verdict.accused.place.first[0] == 3
    assert "RoPE turns pairs (2i, 2i + 1), not halves" in [match.name for match in verdict.mistakes]


def test_a_part_is_no_input_of_a_re_run():
    trace = cut(port(), np.arange(TOKENS), np.arange(4))
    assert trace.is_whole("model.layers.0.mlp.gate.2") is False
    assert trace.known() == set()
    last = Trace(IDS, {"model.norm": port().tensors["model.norm"][-1:]}).with_rows()
    assert last.known() == {"model.norm"} and not last.is_whole("model.norm")


def test_parts_and_steps_survive_a_file(tmp_path):
    trace = cut(port(), np.array([2, 11]), np.array([0, 5]))
    trace.steps, trace.resolution = (10, 1, 1), 5e-5
    trace.save(tmp_path / "t")
    again = Trace.load(tmp_path / "t")
    assert again.steps == (10, 1, 1) and again.resolution == 5e-5
    for name, array in trace.tensors.items():
        assert np.array_equal(again.tensors[name], array)
        assert again.rows[name].tolist() == [2, 11] and again.columns[name].tolist()[0] == 0
    assert again.parts_key() == trace.parts_key() != port().parts_key() == ""


def test_one_list_of_tokens_for_every_tensor(tmp_path):
    entries = {"input_ids": IDS, "@rows": np.array([1, 4]), "model.norm": np.ones((2, 3), np.float32)}
    metadata = {"format": "pyengine-trace-1", "order": '["model.norm"]'}
    kinds = {"int64": "I64", "float32": "F32"}
    write(tmp_path / "t", entries, metadata, kinds)
    assert Trace.load(tmp_path / "t").rows["model.norm"].tolist() == [1, 4]


def write(path, entries, metadata, kinds):
    with SafetensorsWriter(
        path, [(n, kinds[str(a.dtype)], a.shape) for n, a in entries.items()], metadata
    ) as out:
        for name, array in entries.items():
            out.write(name, array)


@pytest.mark.parametrize(
    "more, metadata, message",
    [
        ({"x@rows": np.array([0, 12])}, {}, "x@rows: want rising indices below 12"),
        ({"x@rows": np.array([3, 3])}, {}, "x@rows: want rising indices"),
        (
            {"@rows": np.array([0, 1]), "x@columns": np.array([0])},
            {},
            "x@columns: want 3 indices as the tensor has, got 1",
        ),
        ({"x@rows": np.ones((1, 2), np.int64)}, {}, r"x@rows: want I64 or I32 \[n\], got I64 \[1, 2\]"),
        ({"y@rows": np.array([0, 1])}, {}, "y@rows: want the indices of a tensor of the trace"),
        (
            {"x@rows": np.array([0, 1])},
            {"steps": "[3]"},
            "steps: want a JSON list of lengths with the sum 12",
        ),
        ({"x@rows": np.array([0, 1])}, {"steps": "{"}, "steps: want a JSON list of lengths"),
        ({"x@rows": np.array([0, 1])}, {"resolution": "-1"}, "resolution: want a number from 0 on"),
    ],
)
def test_parts_that_cannot_be(tmp_path, more, metadata, message):
    entries = {"input_ids": IDS, "x": np.ones((2, 3), np.float32), **more}
    metadata = {"format": "pyengine-trace-1", "order": '["x"]', **metadata}
    write(tmp_path / "t", entries, metadata, {"int64": "I64", "float32": "F32"})
    with pytest.raises(FileFormatError, match=message):
        Trace.load(tmp_path / "t")


@pytest.mark.slow
def test_an_error_that_begins_with_a_step_is_said_to():
    """A port whose decode step loses what the prompt left."""
    trace = Peer(MODEL, ["state_dropped"]).run(IDS, [8, 1, 3])
    trace.steps = (8, 1, 3)
    verdict = oracle().verify(trace, "float32", seconds=0)
    assert "token 8 begins step 2 of 3, of 1 tokens" in " ".join(verdict.hints), as_text(verdict)
    trace.steps = (12,)
    assert oracle().verify(trace, "float32", seconds=0).hints == []


# ---- memories of layers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pattern31", "next"])
def test_every_width_is_that_of_a_trace(name):
    model = pyengine.load(GOLDEN / f"{name}.gguf", "float64")
    trace = record_trace(with_memories(model, widths(model.config)), IDS)
    assert {n: array.shape[1] for n, array in trace.tensors.items()} == widths(model.config)


@pytest.mark.slow
def test_the_engines_states_equal_the_references_within_the_budget():
    """The engine keeps value heads in the file's order; a trace has Hugging Face's."""
    trace = record_trace(pyengine.load(MODEL), IDS, states=True)
    assert set(state_widths(oracle().model.config)) < set(trace.tensors)
    assert oracle().verify(trace).ok  # in bits, by the engine itself
    verdict = oracle().verify(Trace(IDS, trace.tensors, "mine"), "int8-activations", seconds=5)
    assert verdict.ok and len(verdict.rows) == len(trace.tensors), as_text(verdict)


def test_states_of_a_run_in_pieces_are_those_of_the_whole():
    model = oracle().model
    state = model.new_state()
    for piece in np.split(IDS, [5, 6]):
        model.forward(piece, state)
    once = record_trace(model, IDS, states=True)
    for name, value in memories(state).items():
        assert np.array_equal(value.astype(np.float32), once.tensors[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, change",
    [
        ("linear_attn.recurrent_state", lambda x: x * 1.001),
        ("linear_attn.conv_state", lambda x: np.roll(x, x.shape[1] // 3)),
    ],
)
def test_a_wrong_state_is_blamed_on_itself(part, change):
    """Its inputs are in the trace and right: so the state alone is wrong."""
    name = f"model.layers.1.{part}"
    tensors = dict(record_trace(rounded_model(oracle().model, "float32", 0), IDS, states=[name]).tensors)
    assert oracle().verify(Trace(IDS, tensors), "float32", seconds=0).ok
    tensors[name] = change(tensors[name]).astype(np.float32)
    verdict = oracle().verify(Trace(IDS, tensors), "float32", seconds=2)
    assert [row.name for row in verdict.guilty] == [name], as_text(verdict)
    assert is_state(name) and json.dumps(verdict.as_dict())
