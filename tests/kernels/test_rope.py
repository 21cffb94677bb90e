"""csrc/rope.c: pe_rope_table and pe_rope against their contracts."""

import locked_numpy as locked
import numpy as np
import pytest
from guard import Memory
from kernel_runs import (
    ARGUMENT,
    POOLS,
    RUNS,
    TAILS,
    check,
    ffi,
    floats,
    lib,
    normal,
    pointer,
    rng_of,
    run_apart,
    succeed,
    wide,
)
from locked_numpy import F32

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


def inverse_frequencies(half):
    return (1.0 / 1e7 ** (np.arange(half) / half)).astype(F32)


class TestRopeTable:
    @staticmethod
    def run(start, tokens, inv_freq):
        def run(_, memory):
            cos, sin = (memory.output((tokens, inv_freq.size)) for _ in range(2))
            succeed(
                lib.pe_rope_table(
                    start, tokens, pointer(memory.input(inv_freq)), inv_freq.size, *floats(cos, sin)
                )
            )
            return cos, sin

        return run

    @pytest.mark.parametrize("start", [0, 1, 7, 1000, 262143, 2**23, 2**24 - 40])
    def test_the_stated_steps(self, start):
        for half, tokens in [(1, 1), (3, 9), (32, 40)]:
            inv_freq = inverse_frequencies(half)
            check(
                self.run(start, tokens, inv_freq), locked.rope_table(start, tokens, inv_freq), runs=RUNS[:3]
            )

    @pytest.mark.parametrize("start", [0, 100000, 2**24 - 2000])
    def test_nearest_float32(self, start):
        """The stated steps are also the rounded cosine and sine, as NumPy's float64 has them."""
        inv_freq = inverse_frequencies(32)
        angle = np.arange(start, start + 2000.0)[:, None] * inv_freq.astype(np.float64)
        want = np.cos(angle).astype(F32), np.sin(angle).astype(F32)
        check(self.run(start, 2000, inv_freq), want, runs=RUNS[:1])

    def test_argument_errors(self):
        table = Memory("end")
        cos, sin = floats(table.output(64), table.output(64))
        one = np.ones(1, F32)
        for start, tokens, half in [(-1, 1, 1), (0, -1, 1), (2**24, 1, 1), (2**24 - 1, 2, 1), (0, 1, 0)]:
            assert lib.pe_rope_table(start, tokens, pointer(one), half, cos, sin) == ARGUMENT
        for bad in (0.0, -0.0, -0.5, np.nextafter(F32(1), F32(2)), np.inf, np.nan):
            inv_freq = np.array([1.0, bad], F32)
            assert lib.pe_rope_table(0, 1, pointer(inv_freq), 2, cos, sin) == ARGUMENT

    def test_start_near_the_largest_integer(self):
        assert run_apart(__file__, "k.TestRopeTable.far_start()") == 0

    @staticmethod
    def far_start():
        memory = Memory("end")
        one, cos, sin = floats(memory.input(np.ones(1, F32)), memory.output(1), memory.output(1))
        assert lib.pe_rope_table(2**63 - 1, 1, one, 1, cos, sin) == ARGUMENT


class TestRope:
    @staticmethod
    def run(x, cos, sin):
        def run(pool, memory):
            y = memory.in_out(x)
            tables = floats(memory.input(cos), memory.input(sin))
            succeed(lib.pe_rope(pool, pointer(y), *x.shape, cos.shape[1], *tables))
            return y

        return run

    def test_shapes(self):
        for half in [0, *TAILS[:40]]:
            for tokens, heads, rest in [(1, 1, 0), (3, 2, 1), (9, 3, 2 * half)]:
                rng = rng_of(half, tokens)
                n = max(1, 2 * half + rest)
                x = wide(rng, tokens, heads, n)
                cos, sin = normal(rng, tokens, half), normal(rng, tokens, half)
                check(self.run(x, cos, sin), locked.rope(x, cos, sin), runs=RUNS[::2])

    def test_the_rest_stays_in_bits(self):
        """A NaN beyond 2 * half keeps its payload."""
        x = normal(rng_of(25), 2, 2, 9)
        x.view(np.uint32)[..., 8] = 0x7FA12345
        cos, sin = normal(rng_of(26), 2, 4), normal(rng_of(27), 2, 4)
        check(self.run(x, cos, sin), locked.rope(x, cos, sin))

    @pytest.mark.parametrize(
        "tokens, heads, n, half", [(-1, 1, 4, 2), (1, 0, 4, 2), (1, 1, 3, 2), (1, 1, 4, -1)]
    )
    def test_argument_errors(self, tokens, heads, n, half):
        null = ffi.NULL
        assert lib.pe_rope(POOLS[1], null, tokens, heads, n, half, null, null) == ARGUMENT

    def test_half_near_the_largest_integer(self):
        null = "k.ffi.NULL"
        call = f"k.lib.pe_rope(k.POOLS[1], {null}, 1, 1, 4, 2**62, {null}, {null})"
        assert run_apart(__file__, f"assert {call} == k.ARGUMENT") == 0
