"""How the tests of the C core run an operation: on every level, with every placement and thread count.

Each case is computed by locked_numpy.py (the contract restated), then by the C core on every instruction
set of this build and processor and with 1, 2 and 3 threads.  The arrays are flush against unreadable
pages (guard.py).  The scalar level must equal the restatement, every other run the scalar level.  There
is no tolerance anywhere.

    pytest tests/kernels                          the fast part
    pytest tests/kernels -m slow                  large shapes
    tools/check/check_sanitizers.sh               the same tests under ASan and UBSan
    tools/check/check_neon.sh                     kernels_main.c, on an emulated 64-bit ARM
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import blocks256
import locked_numpy as locked
import numpy as np
import pytest
from bits import assert_same_bits
from guard import Memory
from hypothesis import HealthCheck, settings
from locked_numpy import BLOCK, BLOCK_CODES, F32, WITH_MINIMUM, Matrix
from paths import SUPPORT

from pyengine import _core

ffi, lib = _core.ffi, _core.lib

SEED = 1729

OK, NONFINITE, ARGUMENT = lib.PE_OK, lib.PE_ERROR_NONFINITE, lib.PE_ERROR_ARGUMENT

# Every placement alone, then more threads.
RUNS = [("end", 1), ("start", 1), ("shifted", 1), ("end", 2), ("end", 3)]

BLOCK_TYPES = list(BLOCK_CODES)

# By their numbers.
TYPES = ["F32", "F16", "BF16", "Q8_0", "INT8", "INT4", *BLOCK_TYPES[1:], *blocks256.LAYOUTS]

# The types of many whose tests are slow: their kernels are those of the others but for how a code is read.
SLOW_TYPES = ["Q2_K", "Q3_K", "Q5_K", "IQ4_XS"]

NON_FINITE = [np.nan, -np.nan, np.inf, -np.inf]

# One of each kind at every size of vector and of unrolled loop, and a few beyond.
TAILS = [*range(1, 36), 47, 48, 49, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129, 130, 191, 255, 256, 257]


def examples(count):
    """hypothesis, the same shapes on every run."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def slow_of(kind):
    """The marks of a test of one type."""
    return [pytest.mark.slow] if kind in SLOW_TYPES else []


def each_of(kinds):
    """The parameters of such tests."""
    return [pytest.param(kind, marks=slow_of(kind)) for kind in kinds]


# ---- levels, threads, calls ------------------------------------------------------------


def list_levels():
    names = []
    while (name := lib.pe_isa_name(len(names))) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return names


LEVELS = list_levels()

POOLS = {n: ffi.gc(lib.pe_pool_new(n, 0), lib.pe_pool_free) for n in (1, 2, 3)}


@contextmanager
def level(name):
    """That instruction set, really in use; the highest one afterwards."""
    assert lib.pe_isa_select(name.encode()) == OK
    assert ffi.string(lib.pe_isa_active()).decode() == name
    try:
        yield
    finally:
        assert lib.pe_isa_select(LEVELS[-1].encode()) == OK


def pointer(array, kind="float *"):
    return ffi.NULL if array is None else ffi.cast(kind, array.ctypes.data)


def floats(*arrays):
    return [pointer(array) for array in arrays]


def succeed(status):
    assert status == OK, f"status {status}"


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def one_run(run, name, placement, threads):
    """run(pool, memory) at one level -> copies of its results."""
    memory = Memory(placement)
    with level(name):
        results = as_tuple(run(POOLS[threads], memory))
    memory.check()
    return tuple(np.array(r) for r in results)


def check(run, expected, any_nan=False, runs=RUNS):
    """run(pool, memory) gives expected at the scalar level, and the scalar level's bits elsewhere."""
    expected = as_tuple(expected)
    for name in LEVELS:
        for placement, threads in runs:
            got = one_run(run, name, placement, threads)
            assert len(got) == len(expected)
            for i, (a, b) in enumerate(zip(got, expected)):
                what = f"{name}, {placement}, {threads} threads, output {i}"
                assert_same_bits(a, b, what, any_nan)
            expected = got  # from here on, the scalar level's own


def rng_of(*key):
    return np.random.default_rng([SEED, *(abs(int(k)) for k in key)])


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(F32)


def wide(rng, *shape):
    """Magnitudes from 2^-20 to 2^20: sums in another order come out different."""
    return (normal(rng, *shape) * np.exp2(rng.integers(-20, 21, shape))).astype(F32)


def run_apart(test_file, program):
    """A program in a process of its own, which it may crash; k is the test file as a module.

    -> exit status
    """
    folders = [str(Path(test_file).parent), str(SUPPORT), str(Path(_core.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", f"import {Path(test_file).stem} as k\n" + program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
    )
    return done.returncode


# ---- matrices as the C core reads them ------------------------------------------------------------


def block_columns(kind):
    """cols is a multiple of this."""
    return 256 if kind in blocks256.LAYOUTS else BLOCK if kind in BLOCK_TYPES else 2 if kind == "INT4" else 1


def allowed_columns(kind, cols):
    """cols raised to what the type can hold."""
    return -(-cols // block_columns(kind)) * block_columns(kind)


def random_matrix(rng, kind, rows, cols):
    if kind == "F32":
        return Matrix(kind, wide(rng, rows, cols))
    if kind == "F16":
        return Matrix(kind, (normal(rng, rows, cols) * F32(0.01)).astype(np.float16))
    if kind == "BF16":
        return Matrix(kind, (wide(rng, rows, cols).view(np.uint32) >> 16).astype(np.uint16))
    if kind in BLOCK_TYPES:
        shape = rows, cols // BLOCK
        codes = rng.choice(BLOCK_CODES[kind], (rows, cols)).astype(np.int8)
        scales = rng.integers(115, 129, shape, np.uint8) if kind == "MXFP4" else random_scales(rng, shape)
        minimums = -random_scales(rng, shape) if kind in WITH_MINIMUM else None
        return Matrix(kind, codes, scales, minimums)
    if kind in blocks256.LAYOUTS:
        return blocks256.random_blocks(rng, kind, rows, cols, lambda shape: random_scales(rng, shape))
    limit = {"INT8": (-127, 128), "INT4": (-7, 8)}[kind]
    codes = rng.integers(*limit, (rows, cols)).astype(np.int8)
    return Matrix(kind, codes, random_scales(rng, (locked.groups_of(cols), rows)))


def random_scales(rng, shape):
    return (rng.uniform(0.5, 1, shape) * np.exp2(rng.integers(-12, 1, shape))).astype(np.float16)


def packed(w):
    """The matrix as stored: uint8 [rows, bytes of a row]."""
    if w.type in blocks256.LAYOUTS:
        return w.stored
    rows, cols = w.shape
    if w.type == "INT4":
        nibbles = (w.codes + 8).astype(np.uint8)
        return nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    if w.type in BLOCK_TYPES:
        return packed_blocks(w).reshape(rows, -1)
    return np.ascontiguousarray(w.codes).view(np.uint8).reshape(rows, -1)


def packed_blocks(w):
    """-> uint8 [rows, blocks, bytes]: the scale, the minimum, the fifth bits, then the nibbles."""
    rows, cols = w.shape
    shape = rows, cols // BLOCK
    numbers = {code: number for number, code in reversed(list(enumerate(BLOCK_CODES[w.type])))}
    if w.type == "Q8_0":
        stored = w.codes.view(np.uint8).reshape(*shape, BLOCK)
    else:
        stored = np.vectorize(numbers.get, [np.uint8])(w.codes).reshape(*shape, BLOCK)
    if w.type == "MXFP4":  # has two zeros
        stored[..., ::2][stored[..., ::2] == 0] = 8
    parts = [part for part in (w.scales, w.minimums) if part is not None]
    parts = [np.ascontiguousarray(part).view(np.uint8).reshape(*shape, -1) for part in parts]
    if len(numbers) == 32:
        parts.append(np.packbits(stored >> 4, axis=-1, bitorder="little"))
    if w.type != "Q8_0":
        low, high = stored[..., :16] & 15, stored[..., 16:] & 15
        stored = low | high << 4
    return np.concatenate([*parts, stored], axis=-1)


def place_stack(memory, matrices, extra_scale_ld=0, gap=0):
    """A stack of matrices as a pe_matrix: gap bytes between two experts, extra_scale_ld float16
    between two groups' scales.  The last group's scales end with the last row, as they do where
    up's scales are a view into the second half of gate_up's."""
    first = matrices[0]
    data = np.stack([packed(w).ravel() for w in matrices])
    w = ffi.new("pe_matrix *")
    w.type = getattr(lib, f"PE_{first.type}")
    w.rows, w.cols = first.shape
    w.expert_stride = data.shape[1] + gap
    w.data = pointer(memory.input(data, ld=w.expert_stride), "void *")
    if first.type in ("INT8", "INT4"):
        scales = np.stack([w.scales for w in matrices])
        w.scale_ld = w.rows + extra_scale_ld
        w.scale_expert_stride = scales.shape[1] * w.scale_ld + gap
        placed = memory.input(scales, ld=(w.scale_expert_stride, w.scale_ld))
        w.scales = pointer(placed, "uint16_t *")
    return w


def place_activations(memory, cols, tokens, x=None, q=None, s_x=None):
    """What the matrix does not read is NULL."""
    a = ffi.new("pe_activations *")
    a.tokens, a.cols = tokens, cols
    a.x = ffi.NULL if x is None else pointer(memory.input(x))
    a.q = ffi.NULL if q is None else pointer(memory.input(q), "int16_t *")
    a.scales = ffi.NULL if s_x is None else pointer(memory.input(s_x))
    a.sums = ffi.NULL if q is None else pointer(memory.input(locked.sums_of(q)), "int32_t *")
    return a


def product_of(w, q, s_x):
    """run(pool, memory) of pe_matmul."""

    def run(pool, memory):
        y = memory.output((len(q), w.shape[0]))
        a = place_activations(memory, w.shape[1], len(q), q=q, s_x=s_x)
        succeed(lib.pe_matmul(pool, place_stack(memory, [w]), 0, a, pointer(y), w.shape[0]))
        return y

    return run


def quantized(w, memory, largest=127):
    """pe_quantize_weights, groups of 32 -> codes, scales."""
    rows, cols = w.shape
    codes, scales = memory.output((rows, cols), np.int8), memory.output((rows, cols // 32), np.uint16)
    succeed(
        lib.pe_quantize_weights(
            POOLS[1],
            place_stack(memory, [w]),
            0,
            ffi.NULL,
            ffi.NULL,
            0,
            rows,
            largest,
            32,
            lib.PE_SCALE_ABSMAX,
            pointer(codes, "int8_t *"),
            pointer(scales, "uint16_t *"),
        )
    )
    memory.check()
    return codes, scales


# ---- values ------------------------------------------------------------

SPECIAL = np.array(
    [
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        1e-38,
        -1e-38,
        2.0**-126,
        1.0,
        -1.0,
        20.0,
        np.nextafter(F32(20), F32(21)),
        np.nextafter(F32(20), F32(0)),
        88.72283,
        88.72284,
        88.8,
        89.0,
        100.0,
        100.5,
        200.0,
        400.5,
        709.0,
        710.0,
        1e30,
        3.4028235e38,
        -16.6,
        -17.4,
        -87.33,
        -87.34,
        -88.0,
        -103.2,
        -103.9,
        -103.98,
        -104.0,
        -104.1,
        -107.0,
        -150.0,
        -200.5,
        -400.5,
        -708.0,
        -745.5,
        -1e30,
        -3.4028235e38,
        np.inf,
        -np.inf,
        np.nan,
        -np.nan,
    ],
    F32,
)


def interesting(rng, n):
    """Arguments of every size: uniform where the functions bend, and by exponent."""
    uniform = rng.uniform(-110, 95, n)
    scaled = rng.standard_normal(n) * np.exp2(rng.integers(-30, 8, n))
    return np.where(rng.random(n) < 0.5, uniform, scaled).astype(F32)


def check_shared_input(matrices, x):
    """pe_matmul_shared_input of x [tokens, cols]: the products of the matrices, one after another."""
    tokens, cols = x.shape
    q, s_x = locked.quantize_activations(x)

    def run(pool, memory):
        stored = [place_stack(memory, [w]) for w in matrices]
        a = place_activations(memory, cols, tokens, x=x, q=q, s_x=s_x)
        y = memory.output(tokens * sum(w.shape[0] for w in matrices))
        succeed(
            lib.pe_matmul_shared_input(pool, ffi.new("pe_matrix *[]", stored), len(stored), a, pointer(y))
        )
        return y

    parts = [locked.matmul(w, **({"x": x} if w.dense else {"q": q, "s_x": s_x})) for w in matrices]
    check(run, np.concatenate([part.ravel() for part in parts]))
