"""Comparing results bit for bit, with a report that helps."""

import re

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def ordered(values):
    """Integers in the order of the values, neighbours one apart: so differences count ulps."""
    if values.dtype.kind != "f":
        return values.astype(object)
    bits = values.view(UNSIGNED[values.itemsize]).astype(object)
    sign = 1 << (8 * values.itemsize - 1)
    return np.where(bits >= sign, sign - bits, bits)


def differing(got, expected, any_nan=False):
    """A mask of the elements whose bits differ.  any_nan: one NaN is as good as another (which NaN
    an operation gives depends on the order of its operands, and no contract says)."""
    got, expected = np.ascontiguousarray(got), np.ascontiguousarray(expected)
    assert got.shape == expected.shape, f"shape {got.shape}, want {expected.shape}"
    assert got.dtype == expected.dtype, f"{got.dtype}, want {expected.dtype}"
    unsigned = UNSIGNED[got.itemsize]
    different = got.view(unsigned) != expected.view(unsigned)
    if any_nan:
        different &= ~(np.isnan(got) & np.isnan(expected))
    return different


def assert_same_bits(got, expected, what="", any_nan=False):
    different = differing(got, expected, any_nan)
    if not different.any():
        return
    indices = np.argwhere(different)
    first = tuple(int(i) for i in indices[0])
    a, b = got[different], expected[different]
    ulps = max(abs(int(i) - int(j)) for i, j in zip(ordered(a).flat, ordered(b).flat))
    raise AssertionError(
        f"{what}: {len(indices)} of {different.size} differ; first at {first}: "
        f"got {a.flat[0]!r}, want {b.flat[0]!r}; largest difference {ulps} ulp"
    )


def same_names(got, want):
    """Whether two traces name the same tensors in one order, but for routers, which the engine records before
    their experts, so that a recorder may choose these."""
    router = re.compile(r".*\.mlp\.gate(\.[12])?")
    orders = [[name for name in names if not router.fullmatch(name)] for names in (got, want)]
    return sorted(got) == sorted(want) and orders[0] == orders[1]
