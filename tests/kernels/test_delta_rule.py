"""csrc/delta_rule.c: pe_delta_gates and pe_delta_rule against their contracts."""

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
from locked_numpy import F32

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


class TestDeltaGates:
    @staticmethod
    def run(a, b, neg_exp_a_log, dt_bias):
        def run(pool, memory):
            beta, decay = memory.output(a.shape), memory.output(a.shape)
            inputs = [memory.input(v) for v in (a, b, neg_exp_a_log, dt_bias)]
            succeed(lib.pe_delta_gates(pool, *floats(*inputs), *a.shape, *floats(beta, decay)))
            return beta, decay

        return run

    def test_shapes(self):
        for heads in TAILS[:45]:
            for tokens in (1, 2, 9):
                rng = rng_of(heads, tokens)
                values = (
                    normal(rng, tokens, heads) * 5,
                    normal(rng, tokens, heads) * 5,
                    -np.exp(normal(rng, heads) * 3),
                    normal(rng, heads),
                )
                values = [v.astype(F32) for v in values]
                check(self.run(*values), locked.delta_gates(*values), runs=RUNS[::2])

    def test_decay_far_from_one(self):
        """log_decay from -20 to -1e-6, and where exp under- and overflows."""
        a = np.array([[-14, -5, 0, 3, 19, 20, 21, 30, 100]], F32).repeat(5, 0)
        neg = -np.array([1e-6, 1e-3, 0.1, 1, 1, 1, 1, 20, 20], F32)
        values = (a, a[::-1].copy(), neg, np.zeros(9, F32))
        check(self.run(*values), locked.delta_gates(*values))

    @pytest.mark.parametrize("tokens, heads", [(-1, 4), (1, 0), (1, -1)])
    def test_argument_errors(self, tokens, heads):
        null = [ffi.NULL] * 4
        assert lib.pe_delta_gates(POOLS[1], *null, tokens, heads, ffi.NULL, ffi.NULL) == ARGUMENT


class TestDeltaRule:
    @staticmethod
    def case(tokens, key_heads, value_heads, dk, dv):
        rng = rng_of(tokens, key_heads, value_heads, dk, dv)
        return {
            "query": locked.l2_norm(normal(rng, tokens, key_heads, dk), dk**-0.5),
            "key": locked.l2_norm(normal(rng, tokens, key_heads, dk), 1.0),
            "value": wide(rng, tokens, value_heads, dv),
            "beta": rng.random((tokens, value_heads)).astype(F32),
            "decay": np.exp(-20 * rng.random((tokens, value_heads)) ** 4).astype(F32),
            "key_head": rng.integers(0, key_heads, value_heads).astype(np.int32),
            "recurrent_state": wide(rng, value_heads, dk, dv),
        }

    @staticmethod
    def run(case, splits=(), gap=0):
        tokens, value_heads, dv = case["value"].shape
        key_heads, dk = case["key"].shape[1:]
        bounds = [0, *splits, tokens]
        ld_value = value_heads * dv + gap

        def run(pool, memory):
            state = memory.in_out(case["recurrent_state"])
            key_head = pointer(memory.input(case["key_head"]), "int32_t *")
            outputs = []
            for begin, end in zip(bounds, bounds[1:]):
                part = {k: case[k][begin:end] for k in ("query", "key", "value", "beta", "decay")}
                out = memory.output((end - begin, value_heads, dv))
                succeed(
                    lib.pe_delta_rule(
                        pool,
                        *floats(memory.input(part["query"]), memory.input(part["key"])),
                        pointer(memory.input(part["value"], ld=(ld_value, dv))),
                        ld_value,
                        *floats(memory.input(part["beta"]), memory.input(part["decay"])),
                        end - begin,
                        key_heads,
                        value_heads,
                        dk,
                        dv,
                        key_head,
                        *floats(state, out),
                    )
                )
                outputs.append(out)
            return np.concatenate(outputs), state

        return run

    def check(self, case, runs=RUNS, **layout):
        check(self.run(case, **layout), locked.delta_rule(**case), runs=runs)

    def test_value_widths(self):
        for dv in TAILS:
            self.check(self.case(2, 1, 2, 5, dv))

    def test_key_widths(self):
        for dk in [*range(1, 34), 64, 127, 128]:
            self.check(self.case(2, 1, 2, dk, 9), runs=RUNS[::2])

    def test_largest_value_width(self):
        self.check(self.case(2, 1, 1, 3, 1024), runs=RUNS[:2])

    def test_model_shape(self):
        self.check(self.case(3, 2, 4, 128, 128))

    @pytest.mark.parametrize("tokens", range(10))
    def test_tokens_and_strides(self, tokens):
        self.check(self.case(tokens, 2, 6, 7, 19), gap=tokens)

    @pytest.mark.parametrize("key_head", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 1]])
    def test_pairing_of_heads(self, key_head):
        """Grouped, tiled, or any other: value head h reads key_head[h]."""
        case = self.case(4, 2, 4, 6, 10)
        case["key_head"] = np.array(key_head, np.int32)
        self.check(case)

    def test_every_split_equals_one_call(self):
        case = self.case(6, 2, 3, 8, 17)
        whole = locked.delta_rule(**case)
        for mask in range(1 << 5):
            splits = [t for t in range(1, 6) if mask >> (t - 1) & 1]
            check(self.run(case, splits), whole, runs=[RUNS[mask % 5]])

    def test_far_decay(self):
        """decay from exp(-20) to exp(-1e-6), and 0 and 1."""
        case = self.case(7, 1, 7, 9, 12)
        decay = np.array([0, np.exp(-20), np.exp(-1), 0.5, np.exp(-1e-3), np.exp(-1e-6), 1], F32)
        case["decay"] = np.stack([np.roll(decay, t) for t in range(7)])
        self.check(case)

    @pytest.mark.slow
    def test_long(self):
        self.check(self.case(65, 4, 8, 128, 128))

    @pytest.mark.parametrize(
        "field, value",
        [("tokens", -1), ("key_heads", 0), ("value_heads", 0), ("dk", 0), ("dv", 0), ("dv", 1025)],
    )
    def test_argument_errors(self, field, value):
        assert self.status(**{field: value}) == ARGUMENT

    @pytest.mark.parametrize("heads", [[0, 2], [-1, 0], [0, 2**31 - 1]])
    def test_key_head_out_of_range(self, heads):
        assert self.status(key_head=np.array(heads, np.int32)) == ARGUMENT

    @staticmethod
    def status(tokens=1, key_heads=2, value_heads=2, dk=3, dv=3, key_head=None):
        key_head = np.zeros(2, np.int32) if key_head is None else key_head
        null = ffi.NULL
        return lib.pe_delta_rule(
            POOLS[1],
            null,
            null,
            null,
            6,
            null,
            null,
            tokens,
            key_heads,
            value_heads,
            dk,
            dv,
            pointer(key_head, "int32_t *"),
            null,
            null,
        )
