"""csrc/quantize.c: pe_quantize_activations against its contract."""

import locked_numpy as locked
import numpy as np
import pytest
from guard import Memory
from kernel_runs import (
    LEVELS,
    NON_FINITE,
    NONFINITE,
    POOLS,
    TAILS,
    check,
    level,
    lib,
    normal,
    pointer,
    rng_of,
    succeed,
    wide,
)
from locked_numpy import F32, GROUP, PART

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


def run_quantize(x):
    def run(pool, memory):
        tokens, cols = x.shape
        groups = locked.groups_of(cols)
        q = memory.output((tokens, groups * GROUP), np.int16)
        scales = memory.output((tokens, groups))
        sums = memory.output((tokens, groups * GROUP // PART), np.int32)
        succeed(
            lib.pe_quantize_activations(
                pool,
                pointer(memory.input(x)),
                tokens,
                cols,
                pointer(q, "int16_t *"),
                pointer(scales),
                pointer(sums, "int32_t *"),
            )
        )
        return q, scales, sums

    return run


def check_quantize(x):
    q, scales = locked.quantize_activations(x)
    check(run_quantize(x), (q, scales, locked.sums_of(q)))


def with_largest(rows, largest):
    """rows [n, 127] and a column of +-largest, which fixes the scale of its group."""
    rows = np.asarray(rows, F32)
    column = np.where(np.arange(len(rows)) % 2, -largest, largest).astype(F32)
    return np.column_stack([rows, column])


def tie_rows(s):
    """(k + 1/2) s for every k of int16, both signs, in rows of 126 (the last padded with 0)."""
    k = np.arange(32767)
    ties = np.stack([(k + 0.5) * s, -(k + 0.5) * s], 1).ravel()
    rows = np.zeros((-(-ties.size // 126), 127))
    rows[:, :126].flat[: ties.size] = ties
    return rows


def near_ties():
    """(k + 1/2) s, one ulp more and one less, for any s."""
    rng = rng_of(8)
    largest = wide(rng, 600, 1)[:, 0]
    s = (np.abs(largest) / F32(32767)).astype(np.float64)[:, None]
    x = ((rng.integers(-32700, 32700, (600, 127)) + 0.5) * s).astype(F32)
    x.view(np.uint32)[...] += rng.integers(-1, 2, x.shape).astype(np.uint32)
    return np.column_stack([x, largest])


class TestQuantizeActivations:
    @pytest.mark.parametrize("tokens", [1, 2, 3])
    def test_every_tail(self, tokens):
        for cols in TAILS:
            check_quantize(wide(rng_of(cols, tokens), tokens, cols))

    def test_shared_out(self):
        for tokens, cols in [(70, 130), (9, 2048), (200, 5), (65, 128)]:
            check_quantize(normal(rng_of(tokens, cols), tokens, cols))

    @pytest.mark.parametrize("s", [2.0**-9, 1.0, 3 * 2.0**-10, 5 * 2.0**7, 255 * 2.0**-40])
    def test_ties_go_to_even(self, s):
        """s has at most 8 bits, so 32767 s and (k + 1/2) s are float32 and x / s is a tie, exactly."""
        x = with_largest(tie_rows(s), 32767 * s)
        q, scales = locked.quantize_activations(x)
        assert (scales == s).all() and (np.abs(q[:, :126]) % 2 == 0).all()
        check(run_quantize(x), (q, scales, locked.sums_of(q)), runs=[("end", 1), ("start", 3)])

    def test_near_ties(self):
        check_quantize(near_ties())

    def test_quantiser_extremes(self):
        tiny = [
            0.0,
            -0.0,
            1e-45,
            2.0**-126,
            2.0**-101,
            np.nextafter(F32(2.0**-100), F32(0)),
            2.0**-100,
            np.nextafter(F32(2.0**-100), F32(1)),
            2.0**-99,
            1.0,
            2.0**120,
            np.finfo(F32).max,
        ]
        for a in tiny:
            x = np.zeros((2, 131), F32)
            x[0, [3, 129]] = [-a, a]
            x[1] = np.linspace(-float(a), float(a), 131).astype(F32)
            check_quantize(x)

    def test_groups_are_independent(self):
        scale = np.repeat(F32(10.0) ** np.arange(-12, 12, 3, dtype=F32), GROUP)
        check_quantize(normal(rng_of(9), 3, scale.size) * scale)

    @pytest.mark.parametrize("bad", NON_FINITE)
    def test_nonfinite(self, bad):
        for tokens, cols in [(1, 1), (1, 7), (2, 130), (1, 128), (3, 200), (70, 257)]:
            for column in sorted({0, cols // 2, cols - 2, cols - 1} - {-1}):
                x = normal(rng_of(cols), tokens, cols)
                x[-1, column] = bad
                for name in LEVELS:
                    assert self.status(name, x) == NONFINITE

    @pytest.mark.slow
    @pytest.mark.parametrize("bad", NON_FINITE)
    def test_nonfinite_anywhere(self, bad):
        for cols in range(1, 129):
            for column in range(cols):
                x = np.zeros((1, cols), F32)
                x[0, column] = bad
                for name in LEVELS:
                    assert self.status(name, x) == NONFINITE

    @staticmethod
    def status(name, x):
        memory = Memory("end")
        groups = locked.groups_of(x.shape[1])
        q = memory.output((len(x), groups * GROUP), np.int16)
        scales = memory.output((len(x), groups))
        sums = memory.output((len(x), groups * GROUP // PART), np.int32)
        with level(name):
            status = lib.pe_quantize_activations(
                POOLS[2],
                pointer(memory.input(x)),
                *x.shape,
                pointer(q, "int16_t *"),
                pointer(scales),
                pointer(sums, "int32_t *"),
            )
        memory.check()
        return status

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda x, s: np.rint(x * (F32(1) / s)),
            lambda x, s: np.rint(x.astype(np.float64) / s),
            lambda x, s: np.sign(x) * np.floor(np.abs(x / s) + 0.5),
            lambda x, s: np.floor(x / s + 0.5),
            lambda x, s: np.trunc(x / s),
        ],
        ids=["reciprocal", "float64 quotient", "half away from zero", "half up", "truncated"],
    )
    def test_control_wrong_rounding(self, wrong):
        """test_near_ties sees each other way to round."""
        x = near_ties()
        _, s = locked.quantize_activations(x)
        q = wrong(x, s).astype(np.int16)
        with pytest.raises(AssertionError, match="output 0: .* differ"):
            check(run_quantize(x), (q, s, locked.sums_of(q)))
