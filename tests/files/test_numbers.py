"""bfloat16: every value there is, and every rounding that there can be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyengine.files.numbers import bfloat16_to_float32, float32_in_bfloat16, float32_to_bfloat16

ALL = np.arange(1 << 16, dtype=np.uint16)


def test_every_bfloat16_is_a_float32_and_comes_back():
    values = bfloat16_to_float32(ALL)
    assert values.dtype == np.float32
    back, nan = float32_to_bfloat16(values), np.isnan(values)
    assert nan.sum() == 2 * 127
    assert np.array_equal(back[~nan], ALL[~nan])
    assert np.isnan(bfloat16_to_float32(back[nan])).all()


@given(hnp.arrays(np.uint32, 8, elements=st.integers(0, 2**32 - 1)))
def test_the_nearest_is_taken_and_of_two_the_even_one(bits):
    x = bits.view(np.float32)
    got = float32_to_bfloat16(x)
    assert np.array_equal(np.isnan(bfloat16_to_float32(got)), np.isnan(x))
    for value, found in zip(x, got):
        if not np.isfinite(value):
            continue
        wide = float(value)
        around = {int(found) + step for step in (-1, 0, 1) if 0 <= (int(found) & 0x7FFF) + step <= 0x7F80}
        # Infinity stands for the value behind the largest one.
        places = {n: _place(n) for n in around}
        least = min(abs(place - wide) for place in places.values())
        nearest = [n for n, place in places.items() if abs(place - wide) == least]
        assert int(found) == (nearest[0] if len(nearest) == 1 else min(nearest, key=lambda n: n & 1))


def _place(bits):
    if bits & 0x7FFF == 0x7F80:
        return (-1.0 if bits & 0x8000 else 1.0) * 2.0**128
    return float(bfloat16_to_float32(np.array([bits], np.uint16))[0])


def test_any_shape_layout_and_float():
    x = np.arange(24, dtype=np.float64).reshape(4, 6).T / 7
    assert np.array_equal(float32_in_bfloat16(x), float32_in_bfloat16(np.ascontiguousarray(x)))
    assert float32_to_bfloat16(np.float32(x)).shape == x.shape
    assert float32_in_bfloat16(np.array([1 + 2**-8, np.inf, -0.0])).tolist() == [1, np.inf, 0]
