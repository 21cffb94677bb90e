"""csrc/causal_conv1d.c: pe_causal_conv1d against its contract."""

import locked_numpy as locked
import numpy as np
import pytest
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
    succeed,
    wide,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


class TestCausalConv1d:
    @staticmethod
    def run(x, weight, state, splits=()):
        """splits: the tokens at which a new call begins."""
        tokens, channels = x.shape
        bounds = [0, *splits, tokens]

        def run(pool, memory):
            placed_state = memory.in_out(state)
            out = []
            for begin, end in zip(bounds, bounds[1:]):
                y = memory.output((end - begin, channels))
                succeed(
                    lib.pe_causal_conv1d(
                        pool,
                        pointer(memory.input(x[begin:end])),
                        end - begin,
                        channels,
                        pointer(memory.input(weight)),
                        len(weight),
                        *floats(placed_state, y),
                    )
                )
                out.append(y)
            return np.concatenate(out), placed_state

        return run

    @staticmethod
    def case(tokens, channels, taps):
        rng = rng_of(tokens, channels, taps)
        return wide(rng, tokens, channels), normal(rng, taps, channels), wide(rng, taps - 1, channels)

    def test_channels(self):
        for channels in TAILS:
            case = self.case(3, channels, 4)
            check(self.run(*case), locked.causal_conv1d(*case))

    @pytest.mark.parametrize("taps", range(1, 17))
    def test_taps_and_tokens(self, taps):
        for tokens in (0, 1, 2, 3, 9, 17):
            case = self.case(tokens, 21, taps)
            check(self.run(*case), locked.causal_conv1d(*case), runs=RUNS[::2])

    def test_many_channels_shared_out(self):
        case = self.case(5, 1000, 4)
        check(self.run(*case), locked.causal_conv1d(*case))

    @pytest.mark.parametrize("taps", [1, 2, 4, 7])
    def test_every_split_equals_one_call(self, taps):
        case = self.case(6, 70, taps)
        whole = locked.causal_conv1d(*case)
        for mask in range(1 << 5):
            splits = [t for t in range(1, 6) if mask >> (t - 1) & 1]
            check(self.run(*case, splits), whole, runs=[RUNS[mask % 5]])
        check(self.run(*case, [0, 3, 3, 6]), whole)  # with calls of no tokens

    @pytest.mark.parametrize("tokens, channels, taps", [(-1, 4, 4), (1, 0, 4), (1, 4, 0), (1, 4, 17)])
    def test_argument_errors(self, tokens, channels, taps):
        null = ffi.NULL
        status = lib.pe_causal_conv1d(POOLS[1], null, tokens, channels, null, taps, null, null)
        assert status == ARGUMENT
