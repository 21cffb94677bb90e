"""csrc/matmul*.c: pe_matmul and pe_matmul_shared_input against their contracts."""

import blocks256
import locked_numpy as locked
import numpy as np
import pytest
from guard import Memory
from hypothesis import given
from hypothesis import strategies as st
from kernel_runs import (
    ARGUMENT,
    BLOCK_TYPES,
    OK,
    POOLS,
    RUNS,
    TAILS,
    TYPES,
    allowed_columns,
    check,
    check_shared_input,
    each_of,
    examples,
    ffi,
    lib,
    normal,
    place_activations,
    place_stack,
    pointer,
    random_matrix,
    rng_of,
    succeed,
    wide,
)
from locked_numpy import BLOCK, BLOCK_CODES, F32, GROUP, WITH_MINIMUM, Matrix

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


def run_matmul(matrices, expert, inputs, extra_ldy=0, extra_scale_ld=0, gap=0):
    def run(pool, memory):
        rows, cols = matrices[0].shape
        tokens = len(inputs.get("x", inputs.get("q")))
        w = place_stack(memory, matrices, extra_scale_ld, gap)
        a = place_activations(memory, cols, tokens, **inputs)
        y = memory.output((tokens, rows), ld=rows + extra_ldy)
        succeed(lib.pe_matmul(pool, w, expert, a, pointer(y), rows + extra_ldy))
        return y

    return run


def inputs_for(w, x):
    if w.dense:
        return {"x": x}
    q, s_x = locked.quantize_activations(x)
    return {"q": q, "s_x": s_x}


def check_matmul(w, inputs, runs=RUNS, any_nan=False, **layout):
    check(run_matmul([w], 0, inputs, **layout), locked.matmul(w, **inputs), any_nan, runs)


def check_random_matmul(kind, rows, cols, tokens, runs=RUNS, **layout):
    cols = allowed_columns(kind, cols)
    rng = rng_of(TYPES.index(kind), rows, cols, tokens)
    w = random_matrix(rng, kind, rows, cols)
    check_matmul(w, inputs_for(w, wide(rng, tokens, cols)), runs, **layout)


def reads_sums(kind):
    return kind in blocks256.LAYOUTS


def extreme_inputs(tokens, cols, value, scale):
    """q = value in every real column, +-alternating if value is 0: the largest int32 sums."""
    q = np.zeros((tokens, locked.groups_of(cols) * GROUP), np.int16)
    q[:, :cols] = value or 32767 * (1 - 2 * (np.arange(cols) % 2))
    return {"q": q, "s_x": np.full((tokens, locked.groups_of(cols)), scale, F32)}


@pytest.mark.parametrize("kind", each_of(TYPES))
class TestMatmul:
    def test_every_tail_of_columns(self, kind):
        for cols in sorted({allowed_columns(kind, c) for c in (*TAILS, 384, 416, 512)}):
            check_random_matmul(kind, 3, cols, 2)

    def test_every_number_of_rows(self, kind):
        for rows in [*range(1, 36), 63, 64, 65, 97, 130]:
            check_random_matmul(kind, rows, 160, 1, runs=RUNS[:1] + RUNS[-2:])

    def test_every_number_of_tokens(self, kind):
        for tokens in [*range(1, 18), 31, 32, 33, 65]:
            check_random_matmul(kind, 6, 192, tokens, runs=RUNS[:2])
            check_random_matmul(kind, 33, 64, tokens, runs=RUNS[-1:])

    @examples(60)
    @given(
        st.integers(1, 70),
        st.integers(1, 300),
        st.integers(1, 9),
        st.integers(0, 3),
        st.integers(0, 3),
        st.sampled_from(RUNS),
    )
    def test_any_shape(self, kind, rows, cols, tokens, extra_ldy, extra_scale_ld, run):
        check_random_matmul(
            kind, rows, cols, tokens, [run], extra_ldy=extra_ldy, extra_scale_ld=extra_scale_ld
        )

    def test_strides(self, kind):
        for extra in (1, 3, 29):
            check_random_matmul(kind, 37, 160, 3, extra_ldy=extra, extra_scale_ld=extra)

    def test_stack_of_experts(self, kind):
        rng = rng_of(TYPES.index(kind), 10)
        cols = allowed_columns(kind, 160)
        stack = [random_matrix(rng, kind, 5, cols) for _ in range(4)]
        inputs = inputs_for(stack[0], wide(rng, 3, cols))
        for e, w in enumerate(stack):
            for gap in (0, 64, 2):
                check(run_matmul(stack, e, inputs, extra_scale_ld=gap, gap=gap), locked.matmul(w, **inputs))

    def test_no_tokens(self, kind):
        w = random_matrix(rng_of(11), kind, 5, allowed_columns(kind, 64))
        run = run_matmul([w], 0, inputs_for(w, np.zeros((0, w.shape[1]), F32)))
        check(run, np.zeros((0, 5), F32))

    @pytest.mark.slow
    def test_large(self, kind):
        for rows, cols, tokens in [(2048, 512, 1), (700, 2048, 5), (300, 1056, 70)]:
            check_random_matmul(kind, rows, cols, tokens)

    def test_argument_errors(self, kind):
        memory = Memory("end")
        cols = allowed_columns(kind, 64)
        matrix = random_matrix(rng_of(12), kind, 5, cols)
        w = place_stack(memory, [matrix])
        a = place_activations(memory, cols, 2, **inputs_for(matrix, normal(rng_of(13), 2, cols)))
        y = memory.output((2, 5))

        def status(target=None, field=None, value=None, ldy=5):
            old = field and getattr(target, field)
            if field:
                setattr(target, field, value)
            result = lib.pe_matmul(POOLS[1], w, 0, a, pointer(y), ldy)
            if field:
                setattr(target, field, old)
            return result

        for bad in (-1, lib.PE_TYPES, 2**31 - 1):
            assert status(w, "type", bad) == ARGUMENT
        for field in ("rows", "cols"):
            for bad in (0, -1):
                assert status(w, field, bad) == ARGUMENT
        for bad in (32, 96, cols + 64):
            assert status(a, "cols", bad) == ARGUMENT
        assert status(w, "data", ffi.NULL) == ARGUMENT
        assert status(a, "tokens", -1) == ARGUMENT
        assert status(ldy=4) == ARGUMENT
        fields = ("x",) if matrix.dense else ("q", "scales", "sums") if reads_sums(kind) else ("q", "scales")
        for field in fields:
            assert status(a, field, ffi.NULL) == ARGUMENT
        if kind in ("INT8", "INT4"):
            assert status(w, "scales", ffi.NULL) == ARGUMENT
            assert status(w, "scale_ld", 4) == ARGUMENT
        assert np.isnan(y).all(), "an error wrote output"
        assert status() == OK
        memory.check()


class TestMatmulEach:
    """Several matrices of one input, as one piece of work: the same as one after another."""

    @pytest.mark.parametrize("tokens", [1, 5, 70])
    def test_outputs_one_after_another(self, tokens):
        rng = rng_of(20, tokens)
        matrices = [
            random_matrix(rng, kind, rows, 160)
            for kind, rows in (("Q8_0", 40), ("F32", 1), ("INT8", 7), ("BF16", 33))
        ]
        check_shared_input(matrices, wide(rng, tokens, 160))

    def test_argument_errors(self):
        memory = Memory("end")
        matrix = random_matrix(rng_of(21), "F32", 5, 64)
        w = place_stack(memory, [matrix])
        a = place_activations(memory, 64, 2, x=normal(rng_of(22), 2, 64))
        y = memory.output(10 * (lib.PE_MAX_SHARED + 1))
        pointers = ffi.new("pe_matrix *[]", [w] * (lib.PE_MAX_SHARED + 1))
        for count in (-1, lib.PE_MAX_SHARED + 1):
            assert lib.pe_matmul_shared_input(POOLS[1], pointers, count, a, pointer(y)) == ARGUMENT
        a.tokens = -1
        assert lib.pe_matmul_shared_input(POOLS[1], pointers, 2, a, pointer(y)) == ARGUMENT
        assert np.isnan(y).all(), "an error wrote output"
        memory.check()


class TestMatmulColumns:
    """cols that the type excludes."""

    @pytest.mark.parametrize(
        "kind, excluded",
        [
            *((kind, [1, 16, 31, 33, 127]) for kind in BLOCK_TYPES),
            ("INT4", [1, 63, 129]),
            *((kind, [1, 32, 64, 128, 255]) for kind in blocks256.LAYOUTS),
        ],
    )
    def test_excluded(self, kind, excluded):
        memory = Memory("end")
        w = place_stack(memory, [random_matrix(rng_of(14), kind, 2, allowed_columns(kind, 128))])
        for cols in excluded:
            a = place_activations(memory, cols, 1, **extreme_inputs(1, cols, 1, 1.0))
            w.cols = cols
            assert lib.pe_matmul(POOLS[1], w, 0, a, pointer(memory.output(2)), 2) == ARGUMENT


CODES = {**BLOCK_CODES, "INT8": range(-127, 128), "INT4": range(-7, 8)}
HALVES = [0.0, -0.0, 2.0**-24, 2.0**-15, 2.0**-14, 65504.0, -65504.0, -1.0]
EXPONENTS = [0, 1, 2, 3, 127, 128, 254, 255]  # of MXFP4: 2^-128, a subnormal, to 2^127


def nearest_code(kind, value):
    return min(CODES[kind], key=lambda code: abs(code - value))


@pytest.mark.parametrize("kind", CODES)
class TestMatmulExtremes:
    COLS = 288

    def matrix(self, kind, codes, scale, minimum=-1.0):
        rows = len(codes)
        shape = (rows, self.COLS // BLOCK) if kind in BLOCK_TYPES else (locked.groups_of(self.COLS), rows)
        dtype = np.uint8 if kind == "MXFP4" else np.float16
        minimums = np.full(shape, minimum, np.float16) if kind in WITH_MINIMUM else None
        return Matrix(kind, np.ascontiguousarray(codes, np.int8), np.full(shape, scale, dtype), minimums)

    def codes(self, kind):
        """Rows of: the lowest code, the highest, alternating both ways, and those next to 0, 1, -1."""
        low, high = min(CODES[kind]), max(CODES[kind])
        odd = np.arange(self.COLS) % 2
        rows = [
            low + 0 * odd,
            high + 0 * odd,
            np.where(odd, low, high),
            np.where(odd, high, low),
            *(nearest_code(kind, value) + 0 * odd for value in (0, 1, -1)),
        ]
        return np.stack(rows)

    @pytest.mark.parametrize("value", [32767, -32767, 0, 1, -1])
    def test_largest_sums(self, kind, value):
        w = self.matrix(kind, self.codes(kind), 128 if kind == "MXFP4" else 1.0)
        for tokens in (1, 2, 5, 8):
            check_matmul(w, extreme_inputs(tokens, self.COLS, value, 1.0))

    @pytest.mark.parametrize("which", range(len(HALVES)))
    def test_scales(self, kind, which):
        """Zero, subnormal, largest and negative weight scales, with the smallest and largest
        activation scales: 2^-24 * 2^-115 is a subnormal float32 and must not be flushed; 65504 times
        the largest is infinite, and with a sum of 0 a NaN."""
        s_w = (EXPONENTS if kind == "MXFP4" else HALVES)[which]
        w = self.matrix(kind, self.codes(kind), s_w, minimum=HALVES[which - 1])
        for s_x in (0.0, 2.0**-115, 1.5 * 2.0**-115, 1.0, 1.0383e34):
            for value in (32767, 3, 0):
                check_matmul(w, extreme_inputs(3, self.COLS, value, s_x), RUNS[:1], any_nan=True)

    def test_one_column_at_a_time(self, kind):
        """Every column meets its own code: a swapped nibble, block or half shows."""
        rng = rng_of(15)
        w = random_matrix(rng, kind, 5, self.COLS)
        q = np.zeros((self.COLS, locked.groups_of(self.COLS) * GROUP), np.int16)
        q[np.arange(self.COLS), np.arange(self.COLS)] = 1 + np.arange(self.COLS)
        s_x = np.ones((self.COLS, locked.groups_of(self.COLS)), F32)
        check_matmul(w, {"q": q, "s_x": s_x}, runs=RUNS[:1])

    def test_every_code(self, kind):
        codes = np.resize(np.array(CODES[kind]), (9, self.COLS))
        w = self.matrix(kind, codes, 128 if kind == "MXFP4" else 1.0)
        q, s_x = locked.quantize_activations(wide(rng_of(16), 4, self.COLS))
        check_matmul(w, {"q": q, "s_x": s_x})


class TestMatmulDenseExtremes:
    def test_every_f16(self):
        """Every finite half, subnormals too, times 1 in its own column."""
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        halves = np.resize(halves[np.isfinite(halves)], (62, 1024))
        check_matmul(Matrix("F16", halves), {"x": np.eye(1, 1024, 5, dtype=F32)}, runs=RUNS[:1])
        check_matmul(Matrix("F16", halves.reshape(-1, 1)), {"x": np.ones((1, 1), F32)}, runs=RUNS[:1])

    def test_every_bf16(self):
        values = np.arange(1 << 16, dtype=np.uint16)
        values = values[(values & 0x7F80) != 0x7F80].reshape(-1, 1)
        check_matmul(Matrix("BF16", values), {"x": np.ones((1, 1), F32)}, runs=RUNS[:1])

    @pytest.mark.parametrize("cols", [1, 8, 9, 24, 31])
    def test_magnitudes(self, cols):
        """Subnormal products survive in float64; a sum beyond float32 is infinite, not an error."""
        for weight, x in [(1e-45, 1.0), (1e-40, 1e38), (3e38, 3e38), (-3e38, 1.0), (0.0, -1.0)]:
            w = Matrix("F32", np.full((3, cols), weight, F32))
            check_matmul(w, {"x": np.full((2, cols), x, F32)})

    @staticmethod
    def cancelling(kind):
        """Large terms that cancel: what is left is decided by the order of the sum."""
        rng = rng_of(17)
        w, x = random_matrix(rng, kind, 9, 203), wide(rng, 4, 203)
        w.codes[:, 100:200] = w.codes[:, :100]
        x[:, 100:200] = -x[:, :100]
        x[:, 200:] *= F32(1e-20)
        return w, x

    @pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
    def test_cancellation(self, kind):
        w, x = self.cancelling(kind)
        check_matmul(w, {"x": x})

    def test_control_order_of_the_sum(self):
        """A sum in ascending order, or with another tree, is seen to differ."""
        w, x = self.cancelling("F32")
        products = x.astype(np.float64)[:, None, :] * w.values().astype(np.float64)
        other_orders = {
            "ascending": locked.ascending(np.moveaxis(products, 2, 0)),
            "four lanes": locked.halve(locked.lanes(products, 4)),
            "neighbours": pairwise_neighbours(locked.lanes(products, 8)),
        }
        for wrong in other_orders.values():
            with pytest.raises(AssertionError, match="differ"):
                check(run_matmul([w], 0, {"x": x}), wrong.astype(F32))

    def test_control_order_of_the_groups(self):
        """Groups added in falling order, or scales multiplied in another order, are seen."""
        rng = rng_of(18)
        w = random_matrix(rng, "INT8", 9, 640)
        q, s_x = locked.quantize_activations(wide(rng, 4, 640))
        columns = [slice(g * GROUP, (g + 1) * GROUP) for g in range(5)]
        terms = [
            locked.exact_dot(q[:, c], w.codes[:, c]) * (w.scales[g].astype(F32) * s_x[:, g, None])
            for g, c in enumerate(columns)
        ]
        other = [
            (locked.exact_dot(q[:, c], w.codes[:, c]) * w.scales[g].astype(F32)) * s_x[:, g, None]
            for g, c in enumerate(columns)
        ]
        for wrong in (locked.ascending(terms[::-1]), locked.ascending(other)):
            with pytest.raises(AssertionError, match="differ"):
                check(run_matmul([w], 0, {"q": q, "s_x": s_x}), wrong)


def pairwise_neighbours(sums):
    while sums.shape[-1] > 1:
        sums = sums[..., 0::2] + sums[..., 1::2]
    return sums[..., 0]
