"""csrc/experts.c: pe_experts against its contract."""

import locked_numpy as locked
import numpy as np
import pytest
from bits import assert_same_bits
from guard import Memory
from kernel_runs import (
    ARGUMENT,
    LEVELS,
    NONFINITE,
    POOLS,
    RUNS,
    TYPES,
    allowed_columns,
    check,
    ffi,
    level,
    lib,
    normal,
    one_run,
    place_activations,
    place_stack,
    pointer,
    random_matrix,
    rng_of,
    run_apart,
    slow_of,
    succeed,
)
from locked_numpy import F32, Matrix

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")

TRACED = ["routed", "shared_gate", "shared_up", "shared"]


class ExpertsCase:
    """Random weights, inputs and routing of one call."""

    def __init__(self, kinds, num_experts, hidden, ff, shared_ff, tokens, top_k):
        """kinds: the types of gate and up, of down, of the shared expert's matrices; of up, if another."""
        rng = rng_of(num_experts, hidden, ff, tokens, top_k, *map(TYPES.index, kinds))
        gate, down, shared, up = (*kinds, kinds[0])[:4]
        self.stack = [self.branch(rng, gate, up, down, hidden, ff) for _ in range(num_experts)]
        self.shared = self.branch(rng, shared, shared, shared, hidden, shared_ff)
        self.quantised = any(not m.dense for m in (*self.stack[0], *self.shared))
        self.hidden, self.ff, self.shared_ff = hidden, ff, shared_ff
        self.x = normal(rng, tokens, hidden)
        order = [rng.permutation(num_experts)[:top_k] for _ in range(tokens)]
        self.selected = np.array(order, np.int32).reshape(tokens, top_k)
        self.weights = rng.random((tokens, top_k)).astype(F32)
        self.gate = normal(rng, tokens) * F32(3)
        self.top_k = top_k
        self.traced = TRACED

    @staticmethod
    def branch(rng, gate, up, down, hidden, ff):
        return (
            random_matrix(rng, gate, ff, hidden),
            random_matrix(rng, up, ff, hidden),
            random_matrix(rng, down, hidden, ff),
        )

    def place_weights(self, memory):
        w = ffi.new("pe_experts_weights *")
        w.num_experts = len(self.stack)
        for i, name in enumerate(("gate", "up", "down")):
            matrices = [branch[i] for branch in self.stack]
            setattr(w, name, place_stack(memory, matrices, extra_scale_ld=i, gap=2 * i)[0])
            setattr(w, f"shared_{name}", place_stack(memory, [self.shared[i]])[0])
        return w

    def place_inputs(self, memory):
        q, s_x = locked.quantize_activations(self.x) if self.quantised else (None, None)
        return place_activations(memory, self.hidden, len(self.x), self.x, q, s_x)

    def place_trace(self, memory):
        widths = {"shared_gate": self.shared_ff, "shared_up": self.shared_ff}
        trace, arrays = ffi.new("pe_experts_trace *"), []
        for name in self.traced:
            arrays.append(memory.output((len(self.x), widths.get(name, self.hidden))))
            setattr(trace, name, pointer(arrays[-1]))
        return trace, tuple(arrays)

    def call(self, pool, memory):
        """-> the status, then y and what is traced."""
        w, a = self.place_weights(memory), self.place_inputs(memory)
        trace, arrays = self.place_trace(memory)
        y = memory.output(self.x.shape)
        status = lib.pe_experts(
            pool,
            w,
            a,
            pointer(memory.input(self.selected), "int32_t *"),
            pointer(memory.input(self.weights)),
            self.top_k,
            pointer(memory.input(self.gate)),
            pointer(y),
            trace if self.traced else ffi.NULL,
        )
        return status, y, *arrays

    def run(self, pool, memory):
        status, *results = self.call(pool, memory)
        succeed(status)
        return tuple(results)

    def expected(self):
        y, trace = locked.experts(self.stack, self.shared, self.x, self.selected, self.weights, self.gate)
        return y, *(trace[name] for name in self.traced)

    def check(self, runs=RUNS):
        check(self.run, self.expected(), runs=runs)


class TestExperts:
    @pytest.mark.parametrize(
        "kinds",
        [
            *(pytest.param((kind,) * 3, marks=slow_of(kind)) for kind in TYPES),
            ("Q8_0", "Q8_0", "F32"),
            ("INT4", "INT8", "BF16"),
            ("F32", "Q8_0", "INT8"),
            ("INT8", "F16", "Q8_0"),
            ("F32", "Q8_0", "INT8", "BF16"),
            ("BF16", "F32", "F16", "Q8_0"),
            ("INT8", "BF16", "F32", "F16"),
            ("INT4", "INT8", "Q8_0", "INT8"),
            ("Q4_K", "Q6_K", "Q8_0", "Q5_K"),
            ("INT8", "IQ4_XS", "F32", "Q4_K"),  # up alone reads sums
            pytest.param(("Q3_K", "Q5_K", "Q6_K", "F16"), marks=pytest.mark.slow),
            pytest.param(("IQ4_XS", "Q4_1", "Q2_K", "MXFP4"), marks=pytest.mark.slow),
        ],
        ids="-".join,
    )
    def test_types(self, kinds):
        hidden, ff, shared_ff = (max(allowed_columns(kind, n) for kind in kinds) for n in (64, 32, 96))
        for tokens in (1, 2, 5):
            ExpertsCase(kinds, 4, hidden, ff, shared_ff, tokens, 2).check(RUNS[::2])

    @pytest.mark.parametrize("top_k", [1, 2, 3, 6])
    def test_routing(self, top_k):
        """Experts that nobody chose, experts that everybody chose, 1 to 9 tokens."""
        for tokens in range(1, 10):
            ExpertsCase(("INT8",) * 3, 6, 32, 32, 32, tokens, top_k).check(RUNS[::2])

    def test_tails(self):
        for hidden, ff, shared_ff in [(1, 1, 1), (7, 5, 3), (33, 130, 9), (129, 31, 257)]:
            ExpertsCase(("INT8",) * 3, 3, hidden, ff, shared_ff, 3, 2).check()
            ExpertsCase(("F32",) * 3, 3, hidden, ff, shared_ff, 3, 2).check()

    def test_many_tokens(self):
        ExpertsCase(("Q8_0",) * 3, 8, 160, 64, 32, 40, 3).check(RUNS[:1] + RUNS[-2:])

    def test_tokens_do_not_meet(self):
        """Each token alone gives what it gave among all."""
        case = ExpertsCase(("INT4",) * 3, 5, 64, 32, 32, 7, 2)
        whole, *_ = case.expected()
        rows = case.x, case.selected, case.weights, case.gate
        for t in range(7):
            case.x, case.selected, case.weights, case.gate = (r[t : t + 1] for r in rows)
            got = one_run(case.run, LEVELS[-1], "end", 2)[0]
            assert_same_bits(got, whole[t : t + 1], f"token {t}")

    def test_order_of_selection_has_no_influence(self):
        case = ExpertsCase(("INT8",) * 3, 6, 64, 32, 32, 4, 4)
        want = case.expected()
        case.selected, case.weights = case.selected[:, ::-1].copy(), case.weights[:, ::-1].copy()
        check(case.run, want)

    @pytest.mark.parametrize("traced", [[], TRACED[:1], TRACED[1:3], TRACED[3:]])
    def test_trace_is_optional(self, traced):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 96, 3, 2)
        case.traced = traced
        case.check(RUNS[::2])

    def test_no_tokens(self):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 96, 0, 2)
        case.traced = []
        check(case.run, np.zeros((0, 64), F32))

    def test_fused_gate_up(self):
        """gate and up as two views of one array [experts, 2 ff, hidden]."""
        case = ExpertsCase(("INT8",) * 3, 3, 160, 24, 32, 4, 2)

        def run(pool, memory):
            fused = [
                Matrix("INT8", np.concatenate([g.codes, u.codes]), np.hstack([g.scales, u.scales]))
                for g, u, _ in case.stack
            ]
            both = place_stack(memory, fused)
            w, a = case.place_weights(memory), case.place_inputs(memory)
            for view in (w.gate, w.up):
                view.data, view.scales, view.scale_ld = both.data, both.scales, both.scale_ld
                view.expert_stride, view.scale_expert_stride = both.expert_stride, both.scale_expert_stride
            w.up.data = ffi.cast("char *", both.data) + case.ff * case.hidden
            w.up.scales = both.scales + case.ff
            y = memory.output(case.x.shape)
            succeed(
                lib.pe_experts(
                    pool,
                    w,
                    a,
                    pointer(memory.input(case.selected), "int32_t *"),
                    pointer(memory.input(case.weights)),
                    2,
                    pointer(memory.input(case.gate)),
                    pointer(y),
                    ffi.NULL,
                )
            )
            return y

        check(run, case.expected()[0])

    def test_more_matrices_than_a_batch(self):
        """40 experts have 80 matrices that read the hidden states, for about ten tokens each."""
        ExpertsCase(("INT8", "Q8_0", "INT4"), 40, 64, 64, 32, 200, 2).check(RUNS[-2:])

    def test_scratch_is_kept(self):
        pool = ffi.gc(lib.pe_pool_new(1, 0), lib.pe_pool_free)
        assert lib.pe_pool_scratch_bytes(pool) == 0
        sizes = []
        for tokens in (2, 9, 1):
            ExpertsCase(("INT8",) * 3, 4, 64, 32, 32, tokens, 2).run(pool, Memory("end"))
            sizes.append(lib.pe_pool_scratch_bytes(pool))
        assert 0 < sizes[0] < sizes[1] == sizes[2]
        assert sizes == [lib.pe_experts_scratch_bytes(tokens, 64, 4, 2, 32, 32) for tokens in (2, 9, 9)]

    @pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
    def test_expert_out_of_range(self, bad):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 32, 3, 2)
        case.selected[2, 1] = bad
        assert case.call(POOLS[2], Memory("end"))[0] == ARGUMENT

    @pytest.mark.parametrize(
        "field, part, value",
        [
            ("num_experts", None, 0),
            ("gate", "cols", 32),
            ("gate", "rows", 31),
            ("up", "cols", 32),
            ("up", "rows", 64),
            ("down", "rows", 63),
            ("down", "cols", 64),
            ("shared_gate", "cols", 32),
            ("shared_up", "rows", 31),
            ("shared_down", "cols", 64),
            ("shared_down", "rows", 65),
            ("gate", "type", 99),
            ("up", "type", 99),
            ("down", "type", -1),
            ("shared_up", "type", lib.PE_TYPES),
        ],
    )
    def test_shapes_that_do_not_fit(self, field, part, value):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 32, 3, 2)
        memory = Memory("end")
        w, a = case.place_weights(memory), case.place_inputs(memory)
        setattr(getattr(w, field), part, value) if part else setattr(w, field, value)
        assert self.status(case, memory, w, a) == ARGUMENT

    def test_bad_top_k(self):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 32, 3, 2)
        case.top_k = 0
        assert case.call(POOLS[1], Memory("end"))[0] == ARGUMENT

    @staticmethod
    def status(case, memory, w, a):
        y = memory.output(case.x.shape)
        return lib.pe_experts(
            POOLS[1],
            w,
            a,
            pointer(memory.input(case.selected), "int32_t *"),
            pointer(memory.input(case.weights)),
            case.top_k,
            pointer(memory.input(case.gate)),
            pointer(y),
            ffi.NULL,
        )

    def nonfinite_case(self, kind, where):
        """An expert, or the shared one, whose gate (*) up overflows."""
        case = ExpertsCase((kind,) * 3, 3, 64, 32, 32, 3, 2)
        gate, up, _ = case.stack[int(case.selected[1, 0])] if where == "routed" else case.shared
        for w in (gate, up):
            if w.dense:
                w.codes[...] = 1e37
            else:
                w.scales[...] = 65504.0
        case.x[1] = 1e18 if w.dense else 1e34
        return case

    @pytest.mark.parametrize("where", ["routed", "shared"])
    def test_nonfinite_intermediate(self, where):
        case = self.nonfinite_case("INT8", where)
        for name in LEVELS:
            with level(name):
                assert case.call(POOLS[2], Memory("end"))[0] == NONFINITE

    @pytest.mark.parametrize("where", ["routed", "shared"])
    def test_nonfinite_intermediate_of_dense_experts(self, where):
        assert self.nonfinite_case("F32", where).call(POOLS[1], Memory("end"))[0] == NONFINITE

    def test_missing_activations(self):
        """In a process of its own: it crashes."""
        program = (
            "case, memory = k.ExpertsCase(('INT8',) * 3, 4, 64, 32, 32, 3, 2), k.Memory('end')\n"
            "w, a = case.place_weights(memory), case.place_inputs(memory)\n"
            "a.q = k.ffi.NULL\n"
            "assert k.TestExperts.status(case, memory, w, a) == k.ARGUMENT\n"
        )
        assert run_apart(__file__, program) == 0

    def test_control_order_of_the_experts(self):
        """Contributions added as selected, not by ascending index, are seen."""
        case = ExpertsCase(("INT8",) * 3, 6, 64, 32, 32, 4, 4)
        routed = np.zeros(case.x.shape, F32)
        for t in range(4):
            for e, weight in zip(case.selected[t], case.weights[t]):
                routed[t] += locked.feed_forward(*case.stack[e], case.x[t : t + 1])[0] * weight
        case.traced = ["routed"]
        with pytest.raises(AssertionError, match="differ"):
            check(lambda pool, memory: case.run(pool, memory)[1], routed)
