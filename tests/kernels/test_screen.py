"""csrc/screen.c against its contract: one form of a head, its norms, and the rows that are left."""

import numpy as np
import pytest
from guard import Memory
from kernel_runs import (
    ARGUMENT,
    NON_FINITE,
    NONFINITE,
    POOLS,
    check,
    ffi,
    lib,
    normal,
    place_stack,
    pointer,
    random_matrix,
    rng_of,
    succeed,
    wide,
)
from locked_numpy import F32, Matrix


def sum8(values):
    """float64 [rows, n] -> the sums that the header calls sum8."""
    sums = np.zeros((len(values), 8))
    for i in range(0, values.shape[1], 8):
        sums += values[:, i : i + 8]
    b = sums[:, :4] + sums[:, 4:]
    c = b[:, :2] + b[:, 2:]
    return c[:, 0] + c[:, 1]


def restated(x):
    """float32 [rows, cols] -> data, error, norm, from the statement in pyengine.h alone."""
    rows, cols = x.shape
    blocks = x.reshape(rows, cols // 32, 32).astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        scales = (np.abs(blocks).max(2) / 15).astype(np.float16)
        scales = np.where(np.isinf(scales), np.float16(65504), scales)
    s = scales.astype(np.float64)[..., None]
    codes = np.divide(blocks, s, out=np.zeros_like(blocks), where=s != 0)
    codes = np.clip(np.rint(codes), -15, 15)
    five = (codes + 16).astype(np.uint8)
    bits = np.packbits(five >> 4, axis=-1, bitorder="little")
    nibbles = (five[..., :16] & 15) | (five[..., 16:] & 15) << 4
    data = np.concatenate([scales[..., None].view(np.uint8), bits, nibbles], -1).reshape(rows, -1)
    lost = (blocks - (codes * s).astype(F32).astype(np.float64)).reshape(rows, cols)
    error, norm = (
        (np.sqrt(sum8(v * v)) * (1 + 2.0**-22) + 2.0**-120).astype(F32) for v in (lost, x.astype(np.float64))
    )
    return data, error, norm


def run_rows(w, first, last):
    def run(pool, memory):
        data = memory.output((last - first, w.shape[1] // 32 * 22), np.uint8)
        error, norm = memory.output(last - first), memory.output(last - first)
        form = pointer(data, "uint8_t *")
        stack = place_stack(memory, [w])
        succeed(lib.pe_screen_rows(pool, stack, first, last, form, pointer(error), pointer(norm)))
        return data, error, norm

    return run


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("cols", [32, 64, 288])
def test_rows(kind, cols):
    rng = rng_of(1, cols)
    w = random_matrix(rng, kind, 9, cols)
    if kind == "F32":
        w.codes[:3] *= F32(2.0) ** rng.integers(-140, -100, (3, cols))
        w.codes[4, :32] = 0
        w.codes[5] *= F32(1e9)
        w.codes[6] = rng.integers(-30, 31, cols) / 2 * 0.125  # ties
    data, error, norm = restated(values_of(w))
    check(run_rows(w, 2, 8), (data[2:8], error[2:8], norm[2:8]))


def values_of(w):
    if w.type == "BF16":
        return (w.codes.astype(np.uint32) << 16).view(F32)
    if w.type == "Q8_0":
        return (w.codes.reshape(len(w.codes), -1, 32) * w.scales.astype(F32)[..., None]).reshape(w.shape)
    return w.codes.astype(F32)


def status_of(w, first=0, last=None):
    memory, rows = Memory("end"), w.shape[0]
    data = memory.output((rows, max(1, w.shape[1] // 32) * 22), np.uint8)
    arrays = pointer(data, "uint8_t *"), pointer(memory.output(rows)), pointer(memory.output(rows))
    last = rows if last is None else last
    return lib.pe_screen_rows(POOLS[2], place_stack(memory, [w]), first, last, *arrays)


@pytest.mark.parametrize("bad", [*NON_FINITE, 2.0**60])
def test_rows_that_the_bound_leaves_out(bad):
    w = normal(rng_of(2), 5, 64)
    assert status_of(Matrix("F32", w)) == 0
    w[3, 40] = bad
    assert status_of(Matrix("F32", w)) == NONFINITE


def test_arguments():
    w = Matrix("F32", normal(rng_of(3), 4, 64))
    assert status_of(w, 3, 2) == status_of(w, -1, 2) == status_of(w, 0, 5) == ARGUMENT
    assert status_of(Matrix("F32", normal(rng_of(3), 4, 48))) == ARGUMENT  # half a block
    assert status_of(random_matrix(rng_of(3), "INT8", 4, 64)) == ARGUMENT
    assert lib.pe_screen(POOLS[1], *[ffi.NULL] * 3, -1, 0, 0, 0, 0, ffi.NULL) == ARGUMENT


@pytest.mark.parametrize("rows", [0, 1, 7, 33, 9000])
def test_the_rows_that_are_left(rows):
    rng = rng_of(4, rows)
    s, error, norm = wide(rng, rows), np.abs(wide(rng, rows)), np.abs(wide(rng, rows))
    a, b, c, low = F32(0.7), F32(1e-6), F32(2.0**-140), F32(3.5)
    bound = (error * a + norm * b) + c
    s[: rows // 2] = (low - bound)[: rows // 2]  # at the border
    want = (s + bound >= low).astype(np.uint8)

    def run(pool, memory):
        keep = memory.output(rows, np.uint8)
        given = [pointer(memory.input(x)) for x in (s, error, norm)]
        succeed(lib.pe_screen(pool, *given, rows, a, b, c, low, pointer(keep, "uint8_t *")))
        return keep

    check(run, want)
    assert rows < 30 or want[: rows // 2].sum() > 0
