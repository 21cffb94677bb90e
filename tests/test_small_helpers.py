"""The helpers that every room may use: checks, softmax, tables, names."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pyengine.checkpoint.names import is_routed_expert, layer_name, layer_of
from pyengine.checks import integer, is_integer, is_number, number
from pyengine.errors import InputError
from pyengine.probabilities import log_softmax, softmax
from pyengine.tables import markdown_table, table

NOT_NUMBERS = st.one_of(
    st.booleans(), st.none(), st.text(), st.binary(), st.complex_numbers(), st.lists(st.integers())
)
NUMPY_BOOLS = [np.True_, np.False_, np.array(3), np.complex64(1)]


@given(NOT_NUMBERS | st.sampled_from(NUMPY_BOOLS))
@settings(deadline=None, derandomize=True)
def test_what_is_not_a_number_is_refused(value):
    assert not is_integer(value) and not is_number(value)
    with pytest.raises(InputError, match="^n: want an integer of at least 0, got "):
        integer("n", value, 0)
    with pytest.raises(InputError, match="^n: want a number that is finite, got "):
        number("n", value)


@given(st.integers(-5, 5), st.sampled_from([int, np.int8, np.int64]))
@settings(deadline=None, derandomize=True)
def test_integers(value, kind):
    assert is_integer(kind(value)) and not is_integer(float(value))
    if value < 0:
        with pytest.raises(InputError, match=f"want an integer of at least 0, got .*{value}"):
            integer("n", kind(value), 0)
    else:
        assert type(integer("n", kind(value), 0)) is int and integer("n", kind(value), 0) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, np.float32(np.inf), 2, -1])
def test_numbers_out_of_range(value):
    with pytest.raises(InputError, match="^p: want a number from 0 to 1, got "):
        number("p", value, 0, 1)


def test_numbers_in_range():
    assert [number("p", v, 0, 1) for v in (0, 1, 0.5, np.float32(0.25))] == [0, 1, 0.5, 0.25]
    assert type(number("p", np.int8(1), 0)) is float
    with pytest.raises(InputError, match="want a number of at least 0, got -1"):
        number("p", -1, 0)


logits = arrays(
    np.float32, array_shapes(max_dims=3, max_side=7), elements=st.floats(-(2.0**99), 2.0**99, width=32)
)


@given(logits, st.floats(1e-300, 1e300))
@settings(deadline=None, derandomize=True)
def test_probabilities_are_finite_and_sum_to_one(x, temperature):
    before = x.copy()
    p, log_p = softmax(x, temperature), log_softmax(x)
    assert p.dtype == log_p.dtype == np.float64 and p.shape == log_p.shape == x.shape
    assert np.allclose(p.sum(axis=-1), 1) and (p >= 0).all() and (log_p <= 0).all()
    assert np.allclose(np.exp(log_p), softmax(x)) and np.array_equal(before, x)
    for row in np.ndindex(x.shape[:-1]):  # a row alone, as sampling has it, gives the same bits
        assert np.array_equal(log_softmax(x[row]), log_p[row])
        assert np.array_equal(softmax(x[row], temperature), p[row])


def test_tables():
    rows = [("name", "n", ""), ("a", "10", "x"), ("long|er", "9", "")]
    assert table(rows, "<><") == ["name      n", "a        10  x", "long|er   9"]
    assert markdown_table(rows, "<><") == [
        "| name     |   n |     |",
        "|----------|----:|-----|",
        "| a        |  10 | x   |",
        "| long\\|er |   9 |     |",
    ]


@pytest.mark.parametrize(
    "name, layer",
    [
        ("model.layers.7", 7),
        ("model.layers.12.mlp.gate.weight", 12),
        ("model.layers.12x.mlp", None),
        ("model.layers.", None),
        ("model.layers.-1.x", None),
        ("model.layers.٣.x", None),
        ("xmodel.layers.1", None),
        ("model.layers." + "9" * 5000, None),
        ("lm_head.weight", None),
        ("", None),
    ],
)
def test_the_layer_of_a_name(name, layer):
    assert layer_of(name) == layer
    if layer is not None:
        assert name.startswith(layer_name(layer))
    assert not is_routed_expert(name)
    assert is_routed_expert("model.layers.1.mlp.experts.gate_proj")
