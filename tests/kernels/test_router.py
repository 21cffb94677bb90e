"""csrc/router.c: pe_router and pe_routing_weights against their contracts."""

import locked_numpy as locked
import numpy as np
import pytest
from guard import Memory
from kernel_runs import (
    ARGUMENT,
    LEVELS,
    NONFINITE,
    POOLS,
    RUNS,
    TAILS,
    check,
    ffi,
    level,
    lib,
    normal,
    one_run,
    pointer,
    rng_of,
    succeed,
)
from locked_numpy import F32

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


class TestRouter:
    @staticmethod
    def call(logits, top_k, pool, memory):
        weights = memory.output((len(logits), top_k))
        selected = memory.output((len(logits), top_k), np.int32)
        status = lib.pe_router(
            pool,
            pointer(memory.input(logits)),
            *logits.shape,
            top_k,
            pointer(weights),
            pointer(selected, "int32_t *"),
        )
        return status, weights, selected

    def run(self, logits, top_k):
        def run(pool, memory):
            status, *results = self.call(logits, top_k, pool, memory)
            succeed(status)
            return tuple(results)

        return run

    def check(self, logits, top_k, runs=RUNS):
        check(self.run(logits, top_k), locked.router(logits, top_k), runs=runs)

    def test_numbers_of_experts(self):
        for experts in TAILS:
            logits = normal(rng_of(experts, 5), 3, experts) * F32(3)
            for top_k in sorted({1, min(8, experts), experts} if experts < 40 else {1, 8}):
                self.check(logits, top_k, runs=RUNS[:3])

    @pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 9, 33])
    def test_tokens(self, tokens):
        logits = normal(rng_of(tokens, 6), tokens, 64)
        if tokens:
            self.check(logits, 8)
        else:
            check(self.run(logits, 8), (np.zeros((0, 8), F32), np.zeros((0, 8), np.int32)))

    def test_equal_logits_take_the_lower_index(self):
        for experts in (2, 8, 9, 33, 256):
            _, selected = one_run(
                self.run(np.full((1, experts), 0.25, F32), min(8, experts)), LEVELS[-1], "end", 1
            )
            assert selected[0].tolist() == list(range(min(8, experts)))

    def test_ties_everywhere(self):
        """Few distinct logits, so most places are decided by the tie rule."""
        for experts in (5, 16, 40, 257):
            logits = rng_of(experts, 7).integers(0, 3, (6, experts)).astype(F32)
            self.check(logits, min(8, experts))

    def test_unequal_logits_with_equal_probabilities(self):
        """The tie is of p, not of the logit: far below the greatest every p is 0."""
        logits = np.array([[-300, -200, 0, -250, -150, -400]], F32)
        weights, selected = one_run(self.run(logits, 4), LEVELS[-1], "end", 1)
        assert selected.tolist() == [[2, 0, 1, 3]] and weights.tolist() == [[1, 0, 0, 0]]
        self.check(logits, 6)

    def test_magnitudes(self):
        """logit - m overflows to -inf: a probability of 0, not an error."""
        self.check(np.array([[3e38, -3e38, 0, 3e38]], F32), 4)
        self.check(np.array([[1e-45, -1e-45, 0, -0.0]], F32), 4)

    @pytest.mark.slow
    def test_most_experts(self):
        self.check(normal(rng_of(28), 2, 65536), 8, runs=RUNS[:1])

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nonfinite(self, bad):
        self.check_nonfinite(bad)

    def test_negative_infinity(self):
        self.check_nonfinite(-np.inf)

    def check_nonfinite(self, bad):
        for at in (0, 5, 32):
            logits = normal(rng_of(29), 5, 33)
            logits[-1, at] = bad
            for name in LEVELS:
                with level(name):
                    assert self.call(logits, 4, POOLS[2], Memory("end"))[0] == NONFINITE

    @pytest.mark.parametrize(
        "tokens, experts, top_k", [(-1, 4, 1), (1, 0, 0), (1, 0, 1), (1, 4, 0), (1, 4, 5), (1, 65537, 1)]
    )
    def test_argument_errors(self, tokens, experts, top_k):
        null = ffi.NULL
        assert lib.pe_router(POOLS[1], null, tokens, experts, top_k, null, null) == ARGUMENT

    def test_control_tie_rule(self):
        """Taking the higher of two equal ones is seen."""
        logits = np.array([[0, 1, 1, 0, 1]], F32)
        weights, selected = locked.router(logits, 2)
        assert selected.tolist() == [[1, 2]]
        with pytest.raises(AssertionError, match="differ"):
            check(self.run(logits, 2), (weights, np.array([[4, 2]], np.int32)))

    def test_scratch(self):
        assert lib.pe_router_scratch_bytes(256) == 256 * 4


class TestRoutingWeights:
    @staticmethod
    def call(logits, selected, pool, memory):
        weights = memory.output(selected.shape)
        status = lib.pe_routing_weights(
            pool,
            pointer(memory.input(logits)),
            *logits.shape,
            selected.shape[1],
            pointer(memory.input(selected), "int32_t *"),
            pointer(weights),
        )
        return status, weights

    def run(self, logits, selected):
        def run(pool, memory):
            status, weights = self.call(logits, selected, pool, memory)
            succeed(status)
            return (weights,)

        return run

    @pytest.mark.parametrize("experts", [1, 5, 8, 33, 256])
    @pytest.mark.parametrize("tokens", [1, 5])
    def test_any_experts(self, tokens, experts):
        rng, top_k = rng_of(experts, tokens), min(8, experts)
        logits = normal(rng, tokens, experts) * F32(3)
        selected = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
        check(self.run(logits, selected), (locked.routing_weights(logits, selected),), runs=RUNS[:3])

    def test_the_routers_own_experts_have_the_routers_weights(self):
        logits = normal(rng_of(3, 9), 7, 40)
        weights, selected = one_run(TestRouter().run(logits, 8), LEVELS[-1], "end", 1)
        (again,) = one_run(self.run(logits, selected), LEVELS[-1], "end", 1)
        assert again.tobytes() == weights.tobytes()

    def test_experts_of_no_probability(self):
        logits, selected = np.array([[0, -300, -200]], F32), np.array([[1, 2]], np.int32)
        assert self.call(logits, selected, POOLS[1], Memory("end"))[0] == NONFINITE

    @pytest.mark.parametrize("expert", [-1, 3, 2**31 - 1])
    def test_no_expert_of_that_number(self, expert):
        logits, selected = np.zeros((2, 3), F32), np.array([[0, 1], [2, expert]], np.int32)
        assert self.call(logits, selected, POOLS[2], Memory("end"))[0] == ARGUMENT

    def test_argument_errors(self):
        null = ffi.NULL
        for tokens, experts, top_k in [(-1, 4, 1), (1, 0, 1), (1, 4, 0), (1, 4, 5), (1, 65537, 1)]:
            assert lib.pe_routing_weights(POOLS[1], null, tokens, experts, top_k, null, null) == ARGUMENT

    def test_control_the_weights_order(self):
        """The sum is taken in the order chosen; weights of other experts are seen."""
        logits = normal(rng_of(4, 9), 1, 9)
        selected = np.array([[3, 5, 1]], np.int32)
        other = locked.routing_weights(logits, selected[:, ::-1])
        with pytest.raises(AssertionError, match="differ"):
            check(self.run(logits, selected), (other,))
