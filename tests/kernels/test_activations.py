"""csrc/activations.c: the elementwise operations against their contracts."""

import decimal
from decimal import Decimal

import locked_numpy as locked
import numpy as np
import pytest
from kernel_runs import (
    ARGUMENT,
    LEVELS,
    POOLS,
    RUNS,
    SPECIAL,
    TAILS,
    check,
    ffi,
    floats,
    interesting,
    lib,
    one_run,
    pointer,
    rng_of,
    succeed,
    wide,
)
from locked_numpy import F32

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")

FUNCTIONS = ["exp", "sigmoid", "silu", "softplus"]

# Arguments whose value lies within 2^-48 of a midpoint between two float32, relatively (some nearer
# than float64 can tell): found by searching 5e7 arguments.
HARD = {
    "exp": [0x4288942B, 0x337FFFFF, 0x3F5BC24C, 0x4283070F],
    "sigmoid": [
        0x36280000,
        0x368C0000,
        0xB6A20000,
        0xB6CA0000,
        0xB70B0000,
        0xB71B0000,
        0xB72F0000,
        0x37850000,
        0xB7AE8000,
        0xB7AF8000,
    ],
    "silu": [0xB6200000, 0x3711C456, 0x3958EC88, 0xC2B5D802, 0x40C96984, 0x35A32B2B, 0x38380000],
    "softplus": [0x398B9622, 0xBA095059, 0xBA92CC65],
}


def exact(name, x):
    """The function's value, to some 150 digits."""
    x = Decimal(float(x))
    with decimal.localcontext() as context:
        context.prec = 150
        if name == "exp":
            return x.exp()
        if name == "sigmoid":
            return 1 / (1 + (-x).exp())
        if name == "silu":
            return x / (1 + (-x).exp())
        return (1 + x.exp()).ln()


def nearest_float32(value):
    """The nearest of three candidates; a tie is out of the question for these functions."""
    middle = F32(float(value))
    candidates = [np.nextafter(middle, F32(-np.inf)), middle, np.nextafter(middle, F32(np.inf))]
    return min(candidates, key=lambda c: abs(Decimal(float(c)) - value))


def run_elementwise(name, x, in_place=False):
    def run(pool, memory):
        source = memory.in_out(x) if in_place else memory.input(x)
        y = source if in_place else memory.output(x.shape)
        succeed(getattr(lib, f"pe_{name}")(pool, pointer(source), x.size, pointer(y)))
        return y

    return run


@pytest.mark.parametrize("name", FUNCTIONS)
class TestElementwise:
    def test_every_length(self, name):
        for n in [0, *TAILS, 1023, 1024, 1025, 1030, 3001]:
            x = interesting(rng_of(n), n)
            check(run_elementwise(name, x), getattr(locked, name)(x))

    def test_in_place(self, name):
        for n in [1, 7, 8, 9, 16, 17, 31, 64, 65, 2500]:
            x = interesting(rng_of(n, 1), n)
            check(run_elementwise(name, x, in_place=True), getattr(locked, name)(x))

    def test_special_values(self, name):
        """Each alone, so at every place in a vector, and all together."""
        want = getattr(locked, name)(SPECIAL)
        check(run_elementwise(name, SPECIAL), want, any_nan=True)
        for shift in range(0, len(SPECIAL), 5):
            check(
                run_elementwise(name, np.roll(SPECIAL, shift)),
                np.roll(want, shift),
                any_nan=True,
                runs=RUNS[:1],
            )
        for x, y in zip(SPECIAL, want):
            check(run_elementwise(name, x[None]), y[None], any_nan=True, runs=RUNS[:1])

    def test_nan_gives_nan(self, name):
        """Quiet and signalling, alone among numbers."""
        for bits in (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF):
            for n in (1, 9, 33):
                x = np.ones(n, F32)
                x.view(np.uint32)[n // 2] = bits
                y = one_run(run_elementwise(name, x), LEVELS[-1], "end", 1)[0]
                assert np.array_equal(np.isnan(y), np.isnan(x))

    def test_hard_arguments(self, name):
        """Where float64 does not decide, by arithmetic of 150 digits; lanes beside them ordinary."""
        hard = np.array(HARD[name], np.uint32).view(F32)
        want = np.array([nearest_float32(exact(name, x)) for x in hard], F32)
        check(run_elementwise(name, hard), want)
        for x, y in zip(hard, want):
            among = np.full(37, 0.5, F32)
            values = getattr(locked, name)(among)
            among[[0, 19, 36]], values[[0, 19, 36]] = x, y
            check(run_elementwise(name, among), values, runs=RUNS[:2])

    def test_small_dyadic_arguments(self, name):
        """m / 2^e with small m: the value's series starts with terms that are near midpoints."""
        m = np.arange(-63, 64, 2, dtype=np.float64)
        x = np.concatenate([m * 2.0**-e for e in range(6, 30)]).astype(F32)
        want = np.array([nearest_float32(exact(name, v)) for v in x], F32)
        check(run_elementwise(name, x), want)

    @pytest.mark.slow
    def test_many(self, name):
        x = interesting(rng_of(19), 1 << 21)
        check(run_elementwise(name, x), getattr(locked, name)(x))

    def test_negative_length(self, name):
        assert getattr(lib, f"pe_{name}")(POOLS[1], ffi.NULL, -1, ffi.NULL) == ARGUMENT


@pytest.mark.parametrize(
    "name, lengths", [("silu_mul", (511, 512, 513, 1025, 3001)), ("add", (1025, 16384, 50001))]
)
class TestOfTwoArrays:
    """y may be either of them."""

    @staticmethod
    def run(name, first, second, alias):
        def run(pool, memory):
            placed = [
                memory.in_out(x) if i == alias else memory.input(x) for i, x in enumerate((first, second))
            ]
            y = memory.output(first.shape) if alias is None else placed[alias]
            succeed(getattr(lib, f"pe_{name}")(pool, *floats(*placed), first.size, pointer(y)))
            return y

        return run

    @pytest.mark.parametrize("alias", [None, 0, 1])
    def test_every_length(self, name, lengths, alias):
        for n in [0, *TAILS, *lengths]:
            rng = rng_of(n, 2)
            first, second = interesting(rng, n), wide(rng, n)
            check(self.run(name, first, second, alias), getattr(locked, name)(first, second))

    def test_negative_length(self, name, lengths):
        assert getattr(lib, f"pe_{name}")(POOLS[1], ffi.NULL, ffi.NULL, -1, ffi.NULL) == ARGUMENT


class TestSigmoidMul:
    @staticmethod
    def run(x, gate, ld_gate, in_place):
        def run(pool, memory):
            source = memory.in_out(x) if in_place else memory.input(x)
            y = source if in_place else memory.output(x.shape)
            placed = memory.input(gate, ld=ld_gate)
            succeed(lib.pe_sigmoid_mul(pool, *floats(source, placed), ld_gate, *x.shape, pointer(y)))
            return y

        return run

    @pytest.mark.parametrize("in_place", [False, True])
    def test_shapes(self, in_place):
        for n in [*TAILS, 511, 513]:
            for rows, extra in [(1, 0), (3, 5), (9, n)]:
                rng = rng_of(n, rows)
                x, gate = wide(rng, rows, n), interesting(rng, rows * n).reshape(rows, n)
                check(
                    self.run(x, gate, n + extra, in_place),
                    locked.sigmoid_mul(x, gate),
                    runs=RUNS[:1] if rows == 1 else RUNS[1:],
                )

    @pytest.mark.parametrize("rows, n", [(-1, 4), (2, 0), (2, -1)])
    def test_argument_errors(self, rows, n):
        assert lib.pe_sigmoid_mul(POOLS[1], ffi.NULL, ffi.NULL, 4, rows, n, ffi.NULL) == ARGUMENT
