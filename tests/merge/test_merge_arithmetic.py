"""The steps of the arithmetic against exact rational numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from bits import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kernel_runs import examples

from pyengine.merge import arithmetic
from pyengine.merge.arithmetic import Recipe

F32 = np.float32
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(-1e6, 1e6, width=32)


def nearest_float32(exact: Fraction) -> np.float32:
    """Rounded once, ties to even, subnormals too; |exact| within float32's range."""
    if exact == 0:
        return F32(0)
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, -126) - 23)
    return F32(float(round(exact / step) * step))


@given(st.lists(st.tuples(moderate, moderate, moderate), min_size=1, max_size=20))
@examples(25)
def test_multiply_and_add_is_rounded_once(triples):
    x, w, total = (np.array(column, F32) for column in zip(*triples))
    for weight in w[:3]:
        found = arithmetic.fused_multiply_add(x, weight, total)
        exact = [Fraction(float(a)) * Fraction(float(weight)) + Fraction(float(t)) for a, t in zip(x, total)]
        wanted = np.array([nearest_float32(e) for e in exact], F32)
        assert np.array_equal(found, wanted)


# Two factors whose product is 1 and so little more or less that float64 loses it in a sum.
BARELY = {"less": (1 + 2.0**-23, 1 - 2.0**-23), "more": (1 + 2.0**-12, 1 - 2.0**-12 + 2.0**-24)}


@pytest.mark.parametrize("side", BARELY)
@pytest.mark.parametrize("exponent", [-23, -149], ids=["normal", "subnormal"])
def test_where_rounding_twice_would_differ(side, exponent):
    """A sum so near the middle of two float32 that float64 rounds it to the middle."""
    unit, half = 2.0**exponent, 2.0 ** (exponent - 1)
    units = 1 << (23 if exponent == -23 else 20)  # even, so that a middle is rounded down, and odd: up
    total = np.array([units * unit, (units + 1) * unit], F32)
    near, far = BARELY[side]
    x, weight = np.full(2, near * 2.0**-70, F32), F32(far * half * 2.0**70)
    found = arithmetic.fused_multiply_add(x, weight, total)
    exact = [Fraction(float(a)) * Fraction(float(weight)) + Fraction(float(t)) for a, t in zip(x, total)]
    assert np.array_equal(found, np.array([nearest_float32(e) for e in exact], F32))
    twice = (x.astype(np.float64) * float(weight) + total).astype(F32)
    assert not np.array_equal(found, twice)


@given(arrays(F32, st.integers(0, 60), elements=finite), st.integers(0, 2**60 - 1))
@examples(25)
def test_the_sums_are_exact(values, mask_bits):
    magnitudes = np.abs(values)
    keep = np.array([mask_bits >> i & 1 for i in range(len(values))], bool)
    all_of, of_kept = arithmetic.exact_partials(magnitudes, keep)
    assert sum(map(Fraction, all_of)) == sum(map(Fraction, magnitudes.tolist()))
    assert sum(map(Fraction, of_kept)) == sum(map(Fraction, magnitudes[keep].tolist()))


def test_a_sum_of_many_is_exact():
    magnitudes = np.abs(np.random.default_rng(1729).standard_normal(1 << 17)).astype(F32)
    magnitudes[::1000] *= F32(1e-30)
    keep = magnitudes > 0.5
    all_of, of_kept = arithmetic.exact_partials(magnitudes, keep)
    assert math.fsum(all_of) == math.fsum(magnitudes.tolist())
    assert math.fsum(of_kept) == math.fsum(magnitudes[keep].tolist())
    assert len(all_of) < 10  # split in the whole, not value by value


def test_a_sum_that_is_not_finite():
    for bad in (np.nan, np.inf):
        all_of, _ = arithmetic.exact_partials(np.array([1, bad], F32), np.array([True, True]))
        assert np.isnan(arithmetic.rounded_sum(all_of))


@given(
    arrays(
        F32, st.integers(1, 80), elements=st.one_of(st.sampled_from([0.0, -0.0, 1, -1, 2, 1e-40]), finite)
    ),
    st.floats(0, 1, exclude_min=True),
)
@examples(25)
def test_the_greatest_magnitudes_are_kept(values, density):
    """By the sorted order, of equal ones the first; all ways to find the threshold give the same mask."""
    count = arithmetic.kept_count(density, values.size)
    order = np.argsort(-np.abs(values), kind="stable")
    wanted = np.zeros(values.size, bool)
    wanted[order[:count]] = True
    bits = arithmetic.bits_of(values)
    selected = arithmetic.select_threshold(bits, count)
    assert np.array_equal(selected.keep(values, 0), wanted)
    high, left = arithmetic.from_the_top(arithmetic.high_counts(values), count)
    low, ties = arithmetic.from_the_top(arithmetic.low_counts(values, high), left)
    assert (high << 16 | low) == selected.bits
    equal = np.flatnonzero(bits == selected.bits)
    assert selected.last == (values.size - 1 if ties == equal.size else equal[ties - 1])
    for start in range(0, values.size, 7):
        piece = selected.keep(values[start : start + 7].copy(), start)
        assert np.array_equal(piece, wanted[start : start + 7])


def test_models_elect_the_sign_of_the_sum():
    base = np.zeros(5, F32)
    deltas = [np.array([1, 1, -1, 0, 2], F32), np.array([-3, 0.5, 1, 0, -2], F32)]
    recipe = Recipe("ties", (1.0, 1.0), normalize=True)
    merged = arithmetic.combine(base, deltas, recipe)
    # Sums -2, 1.5, 0, 0, 0: 0 elects +.  Where one model agrees the divisor is its weight alone.
    assert_same_bits(merged, np.array([-3, 0.75, 1, 0, 2], F32))


def test_lambda_and_the_sum_of_the_weights():
    base, deltas = np.ones(1, F32), [np.full(1, 2, F32), np.full(1, 4, F32)]
    recipe = Recipe("task_arithmetic", (1.0, 3.0), normalize=True, scale=0.5)
    assert arithmetic.combine(base, deltas, recipe) == 1 + 0.5 * (2 + 12) / 4


def test_norms_that_are_as_good_as_zero_scale_nothing():
    assert arithmetic.l1_factor(F32(1), F32(0)) is None
    assert arithmetic.l1_factor(F32(9e-8), F32(9e-8)) is None
    assert arithmetic.l1_factor(F32(1), F32(0.25)) == 4
