"""Matmuls whose tokens a level rewrites first (avx512amx): how csrc/matmul.c cuts the work into batches.

The other levels run the same cases.  Shapes of every kind are in test_matmul.py.
"""

import subprocess
import sys
from pathlib import Path

import locked_numpy as locked
import numpy as np
import pytest
from kernel_runs import LEVELS, RUNS, check, check_shared_input, product_of, random_matrix, rng_of, wide
from locked_numpy import F32, GROUP

from pyengine import _core

SOME_RUNS = [RUNS[0], RUNS[-1]]


def inputs(rng, tokens, cols):
    return locked.quantize_activations(wide(rng, tokens, cols))


def check_product(kind, rows, cols, tokens):
    rng = rng_of(90, rows, cols, tokens)
    w = random_matrix(rng, kind, rows, cols)
    q, s_x = inputs(rng, tokens, cols)
    check(product_of(w, q, s_x), locked.matmul(w, q=q, s_x=s_x), runs=SOME_RUNS)


@pytest.mark.parametrize("kind", ["INT8", "INT4", "Q8_0", "Q5_1"])
class TestTokens:
    def test_more_than_unpacked_codes_serve(self, kind):
        check_product(kind, 35, 160, 16 * 8 + 1)
        check_product(kind, 35, 160, 16 * 17 - 1)

    def test_more_than_the_memory_holds(self, kind):
        """64 groups of 16 tokens take 276 KiB of 4 MiB: two batches."""
        check_product(kind, 2, 64 * GROUP, 245)

    def test_a_block_beyond_the_memory(self, kind):
        """950 groups of 16 tokens do not fit: the kernel of the level below."""
        check_product(kind, 1, 950 * GROUP, 9)


@pytest.mark.parametrize("value", [32767, -32767])
@pytest.mark.parametrize("kind", ["INT8", "Q8_0", "IQ4_NL"])
def test_largest_sums_of_many_tokens(kind, value):
    """The largest |q| with the largest codes, in every token of two blocks and in one of them alone."""
    rng = rng_of(91)
    w = random_matrix(rng, kind, 20, 384)
    lowest = {"INT8": -127, "Q8_0": -128, "IQ4_NL": -127}[kind]
    w.codes[::2], w.codes[1] = lowest, w.codes.max()
    for only in (slice(None), 0, 15, 16, 19):
        q = np.zeros((20, 384), np.int16)
        q[only] = value
        s_x = np.ones((20, 3), F32)
        check(product_of(w, q, s_x), locked.matmul(w, q=q, s_x=s_x), runs=SOME_RUNS)


@pytest.mark.parametrize("s_x", [0.0, 2.0**-115, 1.0383e34])
@pytest.mark.parametrize("kind", ["INT8", "INT4", "Q8_0", "Q4_1"])
def test_smallest_and_largest_scales(kind, s_x):
    """2^-24 * 2^-115 is a subnormal float32; 65504 times the largest is infinite, and times 0 a NaN."""
    rng = rng_of(92)
    w = random_matrix(rng, kind, 17, 160)
    w.scales[:] = np.resize(np.array([2.0**-24, 65504, -0.0], np.float16), w.scales.shape)
    q, _ = inputs(rng, 17, 160)
    q[3] = 0
    scales = np.full((17, 2), s_x, F32)
    with np.errstate(all="ignore"):
        expected = locked.matmul(w, q=q, s_x=scales)
    check(product_of(w, q, scales), expected, any_nan=True, runs=SOME_RUNS)


@pytest.mark.parametrize("tokens", [6, 40])
def test_matrices_that_share_tokens(tokens):
    """Neighbours are rewritten once; types with other limits, and types that read sums, stand between."""
    rng = rng_of(93, tokens)
    kinds = ["INT8", "Q4_1", "INT4", "F32", "Q8_0", "Q4_K", "Q5_1", "INT8"]
    matrices = [random_matrix(rng, kind, 9 + 7 * i, 256) for i, kind in enumerate(kinds)]
    check_shared_input(matrices, wide(rng, tokens, 256))


REFUSED = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
room = ctypes.create_string_buffer(4096)
small = Stack(ctypes.addressof(room), 0, len(room))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(small), None) == 0
from pyengine._core import ffi, lib
names = []
while lib.pe_isa_name(len(names)) != ffi.NULL:
    names.append(ffi.string(lib.pe_isa_name(len(names))).decode())
print(*names, lib.pe_isa_active() == lib.pe_isa_name(len(names) - 1))
"""


@pytest.mark.skipif("avx512amx" not in LEVELS, reason="no AMX")
def test_tiles_that_the_system_refuses():
    """It does where a signal stack is too small for them: then the level below is the highest."""
    root = str(Path(_core.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [*LEVELS[: LEVELS.index("avx512amx")], "True"]
