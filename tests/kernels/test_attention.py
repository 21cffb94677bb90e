"""csrc/attention.c: pe_attention and pe_attention_f16 against their contracts."""

import locked_numpy as locked
import numpy as np
import pytest
from bits import differing
from guard import Memory
from hypothesis import given
from hypothesis import strategies as st
from kernel_runs import (
    ARGUMENT,
    LEVELS,
    NONFINITE,
    POOLS,
    RUNS,
    TAILS,
    check,
    examples,
    ffi,
    level,
    lib,
    normal,
    one_run,
    pointer,
    rng_of,
    succeed,
    wide,
)
from locked_numpy import F32

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


class TestAttention:
    @staticmethod
    def case(start, tokens, heads, kv_heads, n):
        rng = rng_of(start, tokens, heads, kv_heads, n)
        return {
            "query": normal(rng, tokens, heads, n) * F32(3),
            "key_cache": normal(rng, start + tokens, kv_heads, n),
            "value_cache": wide(rng, start + tokens, kv_heads, n),
            "start": start,
            "scale": F32(n**-0.5),
        }

    @staticmethod
    def call(case, pool, memory):
        """-> the status and out."""
        query, keys = case["query"], case["key_cache"]
        out = memory.output(query.shape)
        caches = [case[name] for name in ("key_cache", "value_cache")]
        ld, ld_head = keys.shape[1] * keys.shape[2], keys.shape[2]
        if case.get("by_head"):
            caches = [cache.swapaxes(0, 1) for cache in caches]
            ld, ld_head = keys.shape[2], len(keys) * keys.shape[2]
        half = keys.dtype == np.float16
        kind = "uint16_t *" if half else "float *"
        status = (lib.pe_attention_f16 if half else lib.pe_attention)(
            pool,
            pointer(memory.input(query)),
            *(pointer(memory.input(np.ascontiguousarray(cache)), kind) for cache in caches),
            ld,
            ld_head,
            case["start"],
            len(query),
            query.shape[1],
            keys.shape[1],
            query.shape[2],
            float(case["scale"]),
            pointer(out),
        )
        return status, out

    def run(self, case):
        def run(pool, memory):
            status, out = self.call(case, pool, memory)
            succeed(status)
            return out

        return run

    def check(self, case, runs=RUNS):
        check(self.run(case), self.expected(case), runs=runs)

    @staticmethod
    def expected(case):
        """A float16 cache is widened exactly."""
        names = ("query", "key_cache", "value_cache")
        wide = {name: case[name].astype(F32) for name in names}
        return locked.attention(**wide, start=case["start"], scale=case["scale"])

    @staticmethod
    def halved(case):
        """The same over a float16 cache."""
        names = ("key_cache", "value_cache")
        with np.errstate(over="ignore"):
            caches = {name: case[name].astype(np.float16) for name in names}
        return case | {name: np.where(np.isfinite(a), a, np.float16(3)) for name, a in caches.items()}

    @examples(12)
    @given(
        start=st.sampled_from([0, 1, 7, 8, 9, 30, 31, 32, 33, 63, 64, 65, 130]),
        tokens=st.integers(1, 40),
        group=st.sampled_from([*range(1, 10), 12, 31, 32, 33, 40]),
        kv_heads=st.integers(1, 3),
        n=st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 80, 130]),
        half=st.booleans(),
        by_head=st.booleans(),
    )
    def test_shapes(self, start, tokens, group, kv_heads, n, half, by_head):
        """Around the edges of tiles, spans, pieces and blocks."""
        tokens = min(tokens, 1 + 1000 // (group * n))  # for the restatement's sake
        case = self.case(start, tokens, group * kv_heads, kv_heads, n) | {"by_head": by_head}
        self.check(self.halved(case) if half else case, runs=[("end", 1), ("start", 3)])

    @pytest.mark.slow
    @examples(100)
    @given(data=st.data())
    def test_many_shapes(self, data):
        """The scalar level is the expectation here: it equals the restatement by the tests above."""
        kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
        start, tokens, n = (data.draw(st.integers(*ends)) for ends in ((0, 150), (1, 40), (1, 140)))
        case = self.case(start, tokens, group * kv_heads, kv_heads, n) | {"by_head": data.draw(st.booleans())}
        case = self.halved(case) if data.draw(st.booleans()) else case
        want = one_run(self.run(case), "scalar", "end", 1)
        check(self.run(case), want, runs=[("end", 1), ("start", 2), ("shifted", 3)])

    @pytest.mark.parametrize("half", [False, True])
    @pytest.mark.parametrize("tokens, heads, kv_heads, n", [(1, 4, 2, 33), (2, 1, 1, 200), (1, 33, 1, 5)])
    def test_a_long_cache_that_all_threads_share(self, tokens, heads, kv_heads, n, half):
        """Few blocks: their positions and columns are shared out.  511 positions are too few for this."""
        for start in (511 - tokens, 512 - tokens, 700):
            case = self.case(start, tokens, heads, kv_heads, n) | {"by_head": True}
            self.check(self.halved(case) if half else case, runs=[("end", 1), ("end", 2), ("start", 3)])
        shared = lib.pe_attention_shared_bytes
        assert shared(3, 511, heads, kv_heads) == shared(1, 700, heads, kv_heads) == 0
        assert shared(3, 700, heads, kv_heads) >= 4 * 700 * heads

    def test_a_shared_cache_that_is_not_finite(self):
        case = self.case(700, 1, 2, 1, 19)
        case["key_cache"][600, 0, 7] = np.nan
        self.check_nonfinite(case)

    def test_a_value_that_only_later_tokens_read(self):
        """Tokens of one block read different lengths: infinity times 0 would be NaN."""
        case = self.case(20, 4, 2, 1, 24)
        want = locked.attention(**case)
        case["value_cache"][22] = np.inf
        for run in RUNS:
            for name in LEVELS:
                (got,) = one_run(self.run(case), name, *run)
                assert not differing(got[:2], want[:2]).any() and not np.isfinite(got[2:]).any()

    def test_head_widths(self):
        for n in TAILS:
            self.check(self.case(5, 2, 2, 1, n), runs=RUNS[::2])

    @pytest.mark.parametrize("start", [0, 1, 6, 14, 15, 16, 30])
    def test_positions_and_tokens(self, start):
        for tokens in (0, 1, 2, 5, 9):
            self.check(self.case(start, tokens, 2, 1, 24), runs=RUNS[::2])

    @pytest.mark.parametrize(
        "heads, kv_heads", [(1, 1), (4, 1), (4, 2), (6, 2), (6, 3), (5, 5), (16, 2), (34, 1), (64, 2)]
    )
    def test_heads(self, heads, kv_heads):
        self.check(self.case(3, 3, heads, kv_heads, 20))

    def test_model_shape(self):
        self.check(self.case(40, 2, 16, 2, 256), runs=RUNS[:1] + RUNS[-1:])

    def test_long_context(self):
        self.check(self.case(300, 2, 2, 1, 16), runs=RUNS[:2])
        self.check(self.case(95, 3, 8, 1, 16), runs=RUNS[:2])  # 96, 97, 98: whole pieces and not

    @pytest.mark.slow
    def test_longer_context(self):
        self.check(self.case(3000, 5, 4, 2, 64))

    def test_start_equals_recompute(self):
        """Tokens 5.. alone give what they gave among all."""
        case = self.case(0, 12, 4, 2, 33)
        whole = locked.attention(**case)
        for start in range(12):
            for stop in (start + 1, 12):
                part = dict(case, start=start, query=case["query"][start:stop])
                check(self.run(part), whole[start:stop], runs=RUNS[:1])  # the cache may hold more

    def test_the_future_is_not_read(self):
        case = self.case(4, 3, 2, 1, 17)
        want = locked.attention(**case)
        poison = np.full((5, 1, 17), np.nan, F32)
        for name in ("key_cache", "value_cache"):
            case[name] = np.concatenate([case[name], poison])
        check(self.run(case), want)

    def test_equal_and_distant_scores(self):
        """All scores equal; one so far above that the others' exp is 0."""
        case = self.case(9, 1, 2, 1, 16)
        for key in (np.zeros(16), np.eye(16)[3] * 1e3):
            case["key_cache"][4] = key
            self.check(case)
        case["key_cache"][...] = 1
        self.check(case)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nonfinite_scores(self, bad):
        """inf in a key meets queries of either sign; here they are positive: a score of +inf."""
        for position in (0, 3, 6):
            case = self.case(6, 1, 2, 1, 19)
            case["query"] = np.abs(case["query"])
            case["key_cache"][position, 0, 7] = bad
            self.check_nonfinite(case)

    def test_negative_infinite_score(self):
        case = self.case(6, 1, 2, 1, 19)
        case["query"] = np.abs(case["query"])
        case["key_cache"][3, 0, 7] = -np.inf
        self.check_nonfinite(case)

    def check_nonfinite(self, case):
        for name in LEVELS:
            for threads in (1, 3):
                memory = Memory("end")
                with level(name):
                    assert self.call(case, POOLS[threads], memory)[0] == NONFINITE
                memory.check()

    @pytest.mark.parametrize(
        "change", [{"start": -1}, {"tokens": -1}, {"heads": 0}, {"kv_heads": 0}, {"kv_heads": 3}, {"n": 0}]
    )
    def test_argument_errors(self, change):
        shape = {"start": 0, "tokens": 1, "heads": 4, "kv_heads": 2, "n": 4, **change}
        null = ffi.NULL
        assert lib.pe_attention(POOLS[1], *[null] * 3, 8, 4, *shape.values(), 0.5, null) == ARGUMENT

    def test_control_order_of_the_dot(self):
        """dot16 in eight lanes, or the mix in another order, is seen to differ."""
        case = self.case(30, 1, 2, 1, 100)
        right = locked.attention(**case)
        wrong = dict(
            case, key_cache=case["key_cache"][::-1].copy(), value_cache=case["value_cache"][::-1].copy()
        )
        assert differing(locked.attention(**wrong), right).any()
        a, b = case["query"][0, 0], case["key_cache"][:, 0]
        eight = locked.halve(locked.lanes(a * b, 8))
        assert differing(eight, locked.dot16(a, b)).any()
        with pytest.raises(AssertionError, match="differ"):
            check(self.run(case), locked.attention(**wrong))

    @pytest.mark.parametrize(
        "positions, heads, kv_heads, n, floats",
        [
            (1, 1, 1, 1, 1 + 32),
            (100, 16, 2, 256, 32 * 100 + 32 * 256),  # eight heads at four tokens
            (100, 64, 2, 8, 32 * 100 + 32 * 8),
            (1 << 20, 16, 2, 256, 8 * (1 << 20) + 32 * 256),  # at one token
            (5, 0, 1, 8, 0),
            (5, 1, 0, 8, 0),
        ],
    )
    def test_scratch(self, positions, heads, kv_heads, n, floats):
        """Scores of a block of heads and tokens, and a piece of the cache as float32."""
        assert lib.pe_attention_scratch_bytes(positions, heads, kv_heads, n) == 4 * floats
