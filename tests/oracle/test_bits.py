"""Traces written, read and compared."""

import json

import numpy as np
import pytest
from paths import GOLDEN

import pyengine
from pyengine.errors import FileFormatError, InputError
from pyengine.files.safetensors import DTYPES
from pyengine.files.safetensors_writer import SafetensorsWriter
from pyengine.oracle.bits import compare, compare_tensors
from pyengine.oracle.trace import Trace, record_trace

IDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def trace():
    return record_trace(pyengine.load(GOLDEN / "pattern31.gguf", threads=1), IDS)


def changed(trace, name, index, value):
    tensors = {n: a.copy() for n, a in trace.tensors.items()}
    tensors[name][index] = value
    return Trace(trace.ids, tensors)


def test_written_and_read_again(trace, tmp_path):
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    assert list(again.tensors) == list(trace.tensors) and again.arithmetic == "locked"
    assert compare(trace, again).equal


def test_names_are_module_paths_in_the_order_of_execution(trace):
    names = list(trace.tensors)
    assert names[0] == "model.embed_tokens" and names[-2:] == ["model.norm", "lm_head"]
    for earlier, later in [
        ("model.layers.0.linear_attn.in_proj_qkv", "model.layers.0.linear_attn"),
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn"),
        ("model.layers.2.mlp.gate", "model.layers.2.mlp"),
        ("model.layers.1", "model.layers.2.input_layernorm"),
    ]:
        assert names.index(earlier) < names.index(later)


def test_one_ulp_is_found_with_its_place(trace):
    name = "model.layers.1.mlp"
    value = trace.tensors[name][2, 7]
    other = changed(trace, name, (2, 7), np.nextafter(value, np.float32(np.inf)))
    (difference,) = compare(trace, other).differences
    assert (difference.name, difference.index, difference.count, difference.ulp) == (name, (2, 7), 1, 1)
    assert str(difference).startswith(
        f"{name}: 1 of 320 values differ, largest distance 1 ulp; first at [2, 7]"
    )


def test_the_first_in_execution_order_comes_first(trace):
    late = changed(trace, "lm_head", (0, 0), 9)
    both = changed(late, "model.layers.0.input_layernorm", (4, 1), 9)
    assert [d.name for d in compare(trace, both).differences] == ["model.layers.0.input_layernorm", "lm_head"]


def test_kinds_of_difference():
    x = np.array([[0.0, 1.0]], np.float32)
    assert compare_tensors("x", x, x.copy()) is None
    assert compare_tensors("x", x, np.array([[-0.0, 1.0]], np.float32)).ulp == 0
    assert compare_tensors("x", x, np.array([[np.nan, 1.0]], np.float32)).ulp is None
    assert compare_tensors("x", x, x.reshape(2, 1)).index == ()
    assert compare_tensors("x", x, x.astype(np.float64) + 1e-12) is not None
    assert compare_tensors("x", x.astype(np.float64) + [[0, 1e-12]], x) is None
    i = np.array([[1, 2]])
    assert compare_tensors("x", i, i.copy()) is None
    assert compare_tensors("x", i, i[:, ::-1]).count == 2


def test_partial_traces_compare_what_is_there(trace):
    part = Trace(trace.ids, {n: trace.tensors[n] for n in ("lm_head", "model.norm")})
    result = compare(trace, part)
    assert result.equal and result.compared == ["model.norm", "lm_head"] and len(result.missing) > 50
    assert compare(part, trace).unknown == result.missing


def test_nothing_to_compare(trace):
    with pytest.raises(InputError, match="want the reference's 5 ids"):
        compare(trace, Trace(np.array(IDS[:4]), trace.tensors))
    with pytest.raises(InputError, match="want tensors that both have"):
        compare(trace, Trace(trace.ids, {"other": np.zeros((5, 1), np.float32)}))


def write_trace(path, metadata=None, tensors=(("input_ids", "I64", (1,)), ("a", "F32", (1, 1)))):
    metadata = {"format": "pyengine-trace-1", "order": json.dumps(["a"])} | (metadata or {})
    with SafetensorsWriter(path, tensors, {k: v for k, v in metadata.items() if v is not None}) as writer:
        for name, dtype, shape in tensors:
            writer.write(name, np.zeros(shape, DTYPES[dtype]))
    return path


ORDER = "metadata order: want a JSON list of names, got "


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, "metadata format: want 'pyengine-trace-1', got 'other'"),
        ({"format": None}, "metadata format: want 'pyengine-trace-1', got None"),
        ({"order": None}, ORDER + "None"),
        ({"order": "["}, ORDER + "'['"),
        ({"order": "[" * 100_000}, ORDER + "'" + "[" * 97 + "..." + "[" * 98 + "'"),
        ({"order": "[1]"}, ORDER + "'[1]'"),
        ({"order": '{"a": 1}'}, ORDER + """'{"a": 1}'"""),
        ({"order": '["a", "a"]'}, "metadata order: want every tensor once, got 'a name twice'"),
        ({"order": "[]"}, "metadata order: want every tensor once, got 'a'"),
        ({"order": '["a", "b"]'}, "metadata order: want every tensor once, got 'b'"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path, change, message):
    path = write_trace(tmp_path / "t.safetensors", change)
    with pytest.raises(FileFormatError) as caught:
        Trace.load(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ([("a", "F32", (1, 1))], "input_ids: want I64 or I32 [T], got none"),
        ([("input_ids", "F32", (1,)), ("a", "F32", (1, 1))], "input_ids: want I64 or I32 [T], got F32 [1]"),
        (
            [("input_ids", "I64", (1, 1)), ("a", "F32", (1, 1))],
            "input_ids: want I64 or I32 [T], got I64 [1, 1]",
        ),
    ],
)
def test_traces_without_their_ids(tmp_path, tensors, message):
    path = write_trace(tmp_path / "t.safetensors", tensors=tensors)
    with pytest.raises(FileFormatError) as caught:
        Trace.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_names_that_would_write_on_a_terminal(tmp_path):
    path = write_trace(
        tmp_path / "t.safetensors",
        {"order": json.dumps(["a\x1b[2J"])},
        [("input_ids", "I64", (1,)), ("a\x1b[2J", "F32", (1, 1))],
    )
    with pytest.raises(FileFormatError) as caught:
        Trace.load(path)
    assert str(caught.value) == f"{path}: metadata order: want module paths, got 'a\\x1b[2J'"


def test_chunks_are_joined(trace):
    model = pyengine.load(GOLDEN / "pattern31.gguf", threads=1)
    assert compare(trace, record_trace(model, IDS, chunk=2)).equal
