"""csrc/norm.c: pe_rms_norm, pe_rms_norm_gated and pe_l2_norm against their contracts."""

import locked_numpy as locked
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_runs import (
    ARGUMENT,
    POOLS,
    RUNS,
    TAILS,
    check,
    examples,
    ffi,
    floats,
    interesting,
    lib,
    normal,
    pointer,
    rng_of,
    succeed,
    wide,
)
from locked_numpy import F32

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


class TestRmsNorm:
    @staticmethod
    def run(x, scale, eps, ldx=None, head_ld=None, in_place=False):
        tokens, heads, n = x.shape
        head_ld = head_ld or n
        ldx = ldx or heads * head_ld

        def run(pool, memory):
            place = memory.in_out if in_place else memory.input
            source = place(x, ld=(ldx, head_ld))
            y = source if in_place else memory.output(x.shape)
            succeed(
                lib.pe_rms_norm(
                    pool,
                    pointer(source),
                    tokens,
                    ldx,
                    heads,
                    head_ld,
                    n,
                    pointer(memory.input(scale)),
                    eps,
                    pointer(y),
                )
            )
            return y

        return run

    def test_every_length(self):
        for n in [*TAILS, 1000, 2048]:
            rng = rng_of(n, 3)
            x, scale = wide(rng, 2, 1, n), normal(rng, n)
            check(self.run(x, scale, 1e-6), locked.rms_norm(x, scale, 1e-6))

    @examples(40)
    @given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 80), st.integers(0, 70), st.integers(0, 9))
    def test_strides(self, tokens, heads, n, head_gap, token_gap):
        """head_ld > n: query and gate interleaved; ldx > heads * head_ld: part of a wider row."""
        rng = rng_of(tokens, heads, n)
        x, scale = wide(rng, tokens, heads, n), normal(rng, n)
        layout = {"head_ld": n + head_gap, "ldx": heads * (n + head_gap) + token_gap}
        check(self.run(x, scale, 1e-6, **layout), locked.rms_norm(x, scale, 1e-6))

    def test_in_place(self):
        for n in (1, 5, 8, 33, 128, 257):
            rng = rng_of(n, 4)
            x, scale = normal(rng, 5, 3, n), normal(rng, n)
            check(self.run(x, scale, 1e-6, in_place=True), locked.rms_norm(x, scale, 1e-6))

    @pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-20, 1e20, 3e38])
    def test_magnitudes(self, size):
        """Squares under- and overflow float32, not float64."""
        x = np.clip(normal(rng_of(20), 3, 2, 37), -1, 1) * F32(size)
        scale = normal(rng_of(21), 37)
        for eps in (1e-6, 1e-12, 1.0):
            check(self.run(x, scale, eps), locked.rms_norm(x, scale, eps))

    @pytest.mark.slow
    def test_large(self):
        x, scale = normal(rng_of(22), 300, 16, 256), normal(rng_of(23), 256)
        check(self.run(x, scale, 1e-6), locked.rms_norm(x, scale, 1e-6))

    @pytest.mark.parametrize("tokens, heads, n", [(-1, 1, 4), (1, 0, 4), (1, 1, 0), (1, 1, -4)])
    def test_argument_errors(self, tokens, heads, n):
        status = lib.pe_rms_norm(POOLS[1], ffi.NULL, tokens, 4, heads, 4, n, ffi.NULL, 1e-6, ffi.NULL)
        assert status == ARGUMENT


class TestRmsNormGated:
    @staticmethod
    def run(x, z, weight, eps, in_place=False):
        def run(pool, memory):
            source = memory.in_out(x) if in_place else memory.input(x)
            y = source if in_place else memory.output(x.shape)
            succeed(
                lib.pe_rms_norm_gated(
                    pool,
                    *floats(source, memory.input(z)),
                    *x.shape,
                    pointer(memory.input(weight)),
                    eps,
                    pointer(y),
                )
            )
            return y

        return run

    @pytest.mark.parametrize("in_place", [False, True])
    def test_shapes(self, in_place):
        for n in [*TAILS, 511, 513]:
            for rows in (1, 19):
                rng = rng_of(n, rows)
                x, z, weight = wide(rng, rows, n), interesting(rng, rows * n), normal(rng, n)
                z = z.reshape(rows, n)
                check(
                    self.run(x, z, weight, 1e-6, in_place),
                    locked.rms_norm_gated(x, z, weight, 1e-6),
                    runs=RUNS[:3] if rows == 1 else RUNS[3:],
                )

    @pytest.mark.parametrize("rows, n", [(-1, 4), (1, 0), (1, -1)])
    def test_argument_errors(self, rows, n):
        null = ffi.NULL
        assert lib.pe_rms_norm_gated(POOLS[1], null, null, rows, n, null, 1e-6, null) == ARGUMENT


class TestL2Norm:
    @staticmethod
    def run(x, scale, ldx):
        tokens, heads, n = x.shape

        def run(pool, memory):
            source, y = memory.input(x, ld=(ldx, n)), memory.output(x.shape)
            succeed(lib.pe_l2_norm(pool, pointer(source), tokens, ldx, heads, n, scale, pointer(y)))
            return y

        return run

    @pytest.mark.parametrize("scale", [1.0, 128**-0.5])
    def test_shapes(self, scale):
        for n in TAILS:
            for tokens, heads, gap in [(1, 1, 0), (2, 3, 5), (9, 2, 0)]:
                x = wide(rng_of(n, tokens), tokens, heads, n)
                check(self.run(x, scale, heads * n + gap), locked.l2_norm(x, scale), runs=RUNS[::2])

    @pytest.mark.parametrize("size", [0.0, 1e-45, 1e-20, 1e-4, 1e20, 3e38])
    def test_magnitudes(self, size):
        x = np.clip(normal(rng_of(24), 3, 2, 37), -1, 1) * F32(size)
        check(self.run(x, 1.0, 74), locked.l2_norm(x, 1.0))

    @pytest.mark.parametrize("tokens, heads, n", [(-1, 1, 4), (1, 0, 4), (1, 1, 0)])
    def test_argument_errors(self, tokens, heads, n):
        assert lib.pe_l2_norm(POOLS[1], ffi.NULL, tokens, 4, heads, n, 1.0, ffi.NULL) == ARGUMENT
