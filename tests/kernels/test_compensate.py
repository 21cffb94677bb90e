"""csrc/compensate.c: memory, arguments, and what rounding with compensation is for.

`test_compensate_torch.py` compares it with its restatement.
"""

import numpy as np
import pytest
from bits import assert_same_bits
from guard import PLACEMENTS, Memory
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import ARGUMENT, LEVELS, NONFINITE, POOLS, level, lib, pointer, succeed
from moments import factored, moments, normal

from pyengine.core import rounding
from pyengine.core.threads import Pool
from pyengine.errors import InputError, NonFiniteError

# n, rows, group_size: one of everything; no whole tile; whole ones alone; a panel of pe_factor and a bit;
# more rows than the strips have.
SHAPES = [(1, 1, 16), (8, 32, 8), (37, 18, 16), (64, 64, 128), (70, 33, 7), (150, 69, 50)]


def test_a_tie_and_a_zero_group():
    """Ties go to the even code; columns that weigh little leave the scale to the others."""
    w = np.array([[7, 3.5, 2.5, -3.5, 5, 0, 0, 0, 0, 0]], np.float32)
    weights = np.array([1, 1e-9, 1e-9, 1e-9, 1] * 2)
    codes, scales = rounding.round_weights(Pool(1), w, weights, 7, 5)
    assert codes.tolist() == [[7, 4, 2, -4, 5, 0, 0, 0, 0, 0]] and scales.tolist() == [[1, 0]]


# ---- what it is for ----------------------------------------------------------------------------


def loss(w, codes, scales, h, group):
    e = w - codes * np.repeat(scales.astype(np.float64), group, axis=1)[:, : w.shape[1]]
    return float(((e @ h) * e).sum())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([7, 127]))
def test_errors_that_are_compensated_cost_less(seed, n, largest):
    """Less than nearest codes with the same choice of scales, on the tokens it was made of, in all."""
    w, h = normal(seed, 24, n).astype(np.float32), moments(n, seed)
    f = factored(h)
    compensated = rounding.round_weights(Pool(1), w, f, largest, 16)
    nearest = rounding.round_weights(Pool(1), w, np.full(n, 1.0), largest, 16)
    assert loss(w, *compensated, h, 16) <= 1.02 * loss(w, *nearest, h, 16)


def test_a_correction_is_a_least_squares_solution():
    """b H^-1 with b = w K: with 127 codes the rounded rows are near w + w K H^-1."""
    n = 24
    w, h, k = normal(1, 6, n).astype(np.float32), moments(n, 2), normal(3, n, n)
    codes, scales = rounding.round_weights(Pool(1), w, factored(h), 127, 8, np.ascontiguousarray(w @ k))
    made = codes * np.repeat(scales.astype(np.float64), 8, axis=1)
    wanted = w + np.linalg.solve(h, (w @ k).T).T
    e = made - wanted
    assert ((e @ h) * e).sum() < 1e-3 * ((wanted @ h) * wanted).sum()


# ---- memory and arguments ----------------------------------------------------------------------


def every_operation(pool, memory, n, rows, group):
    """-> what each gives, in arrays that nothing lies beside."""
    a, b = memory.input(normal(1, 5, n)), memory.input(normal(5, 5, rows))
    h, square, out = memory.in_out(moments(n)), np.zeros((n, n)), memory.in_out(np.zeros((n, rows)))
    square = memory.in_out(square)
    for left, right, shape, lower, into in ((a, b, (n, rows), 0, out), (a, a, (n, n), 1, square)):
        arguments = pointer(left, "double *"), pointer(right, "double *"), 5, *shape, lower
        succeed(lib.pe_add_products(pool, *arguments, pointer(into, "double *")))
    x, sums = memory.input(normal(2, 5, n).astype(np.float32)), memory.in_out(np.zeros(n))
    succeed(lib.pe_add_squares(pool, pointer(x), 5, n, pointer(sums, "double *")))
    succeed(lib.pe_factor(pool, pointer(h, "double *"), n))
    w, b = memory.input(normal(3, rows, n).astype(np.float32)), memory.input(normal(4, rows, n))
    results = [out, np.tril(square), sums, h]
    weights = memory.input(np.exp(normal(6, n)))
    for correction, factors, diagonal in ((b, h, None), (None, h, None), (None, None, weights)):
        codes = memory.output((rows, n), np.int8)
        scales = memory.output((rows, -(-n // group)), np.uint16)
        succeed(
            lib.pe_round_weights(
                pool,
                pointer(w),
                pointer(correction, "double *"),
                pointer(factors, "double *"),
                pointer(diagonal, "double *"),
                rows,
                n,
                group,
                7,
                pointer(codes, "int8_t *"),
                pointer(scales, "uint16_t *"),
            )
        )
        results += [codes, scales]
    return results


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("n, rows, group", SHAPES)
def test_levels_and_memory(placement, n, rows, group):
    """The scalar level's bits on every level; nothing is read or written outside the arrays."""
    expected = None
    for name in LEVELS:
        for pool in POOLS.values():
            memory = Memory(placement)
            with level(name):
                got = every_operation(pool, memory, n, rows, group)
            memory.check()
            expected = expected or [array.copy() for array in got]
            for i, (one, other) in enumerate(zip(got, expected, strict=True)):
                assert_same_bits(one, other, f"{name}, output {i}")


def test_what_is_refused():
    pool = POOLS[1]
    bad = np.array([[1.0, 0], [2, 1]])  # not positive definite
    assert lib.pe_factor(pool, pointer(bad, "double *"), 2) == NONFINITE
    with pytest.raises(NonFiniteError):
        rounding.factor(Pool(1), np.full((2, 2), np.nan))
    for value in np.nan, np.inf, 1e30:
        w = np.array([[1, value]], np.float32)
        with pytest.raises(NonFiniteError):
            rounding.round_weights(Pool(1), w, np.full(2, 1.0), 7, 2)
    assert lib.pe_factor(pool, pointer(bad, "double *"), 0) == ARGUMENT
    with pytest.raises(InputError, match="factors of the columns"):
        rounding.round_weights(Pool(1), np.zeros((2, 3), np.float32), np.ones(2), 7, 2)
    with pytest.raises(InputError):
        rounding.round_weights(Pool(1), np.zeros((2, 3), np.float32), np.ones(3), 8, 2)
