"""csrc/matmul_blocks256.c and its levels: what blocks of 256 columns have beside test_matmul.py."""

import blocks256
import gguf
import locked_numpy as locked
import numpy as np
import pytest
from blocks256 import GROUP, LAYOUTS, PART, Blocks256
from guard import Memory
from kernel_runs import RUNS, check, each_of, packed, product_of, quantized, random_matrix, rng_of, wide
from locked_numpy import F32, Matrix

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")

CODES = {
    "Q2_K": range(4),
    "Q3_K": range(-4, 4),
    "Q4_K": range(16),
    "Q5_K": range(32),
    "Q6_K": range(-32, 32),
    "IQ4_XS": tuple(blocks256.IQ4_NL),
}
SCALES = {
    "Q2_K": range(16),
    "Q3_K": range(-32, 32),
    "Q4_K": range(64),
    "Q5_K": range(64),
    "Q6_K": range(-128, 128),
    "IQ4_XS": range(-32, 32),
}
MINIMUMS = {"Q2_K": 15, "Q4_K": 63, "Q5_K": 63}
HALVES = [0.0, -0.0, 2.0**-24, 2.0**-15, 2.0**-14, 65504.0, -65504.0, -1.0]
COLS = 512
TOKENS = (1, 2, 3, 4, 9)  # both shapes of every level, and a block of tokens that is not full


def check_product(w, q, s_x, runs=RUNS, any_nan=False):
    check(product_of(w, q, s_x), blocks256.matmul(w, q, s_x), any_nan, runs)


def same_everywhere(tokens, value, scale=1.0):
    """q = value in every column, +-32767 by turns if value is 0."""
    q = np.full((tokens, COLS), value or 32767, np.int16)
    if value == 0:
        q[:, 1::2] = -32767
    return q, np.full((tokens, COLS // GROUP), scale, F32)


def extreme_matrix(kind, d=1.0, dmin=1.0):
    """Rows of each extreme code, and of both by turns, with each extreme scale and minimum."""
    codes, scales = CODES[kind], SCALES[kind]
    low, high = min(codes), max(codes)
    odd = np.arange(COLS) % 2
    rows = [low + 0 * odd, high + 0 * odd, np.where(odd, low, high), np.where(odd, high, low)]
    cases = [(code, s) for code in rows for s in (min(scales), max(scales))]
    code, s = (np.stack(x) for x in zip(*((c, np.full(COLS // PART, s)) for c, s in cases)))
    m = np.where(np.arange(len(cases)) % 3 == 0, 0, MINIMUMS.get(kind, 0))[:, None]
    return blocks256.filled(kind, len(cases), COLS, code, s, m, d, dmin)


@pytest.mark.parametrize("kind", each_of(LAYOUTS))
class TestExtremes:
    @pytest.mark.parametrize("value", [32767, -32767, 0, 1, -1])
    def test_largest_sums(self, kind, value):
        """Every bound that the header states is reached by a row and a token."""
        w = extreme_matrix(kind)
        for tokens in TOKENS:
            check_product(w, *same_everywhere(tokens, value), runs=RUNS[:1] + RUNS[-1:])

    @pytest.mark.parametrize("which", range(len(HALVES)))
    def test_scales_of_blocks(self, kind, which):
        w = extreme_matrix(kind, HALVES[which], HALVES[which - 1])
        for s_x in (0.0, 2.0**-115, 1.5 * 2.0**-115, 1.0, 1.0383e34):
            for value in (32767, 3):
                check_product(w, *same_everywhere(3, value, s_x), RUNS[:1], any_nan=True)

    def test_one_column_at_a_time(self, kind):
        """Every column meets its own code, scale and minimum: a swapped nibble, bit or part shows."""
        w = random_matrix(rng_of(40), kind, 5, COLS)
        for value in (1, 256, 32767):  # either byte of q, and both
            q = np.zeros((COLS, COLS), np.int16)
            np.fill_diagonal(q, value)
            check_product(w, q, np.ones((COLS, COLS // GROUP), F32), RUNS[:1])
            for t in range(0, COLS, 37):  # few tokens
                check_product(w, q[t : t + 1], np.ones((1, COLS // GROUP), F32), RUNS[:1])

    def test_every_code_and_scale(self, kind):
        code = np.resize(np.array(CODES[kind]), (67, COLS))
        wide_subs = kind in ("Q4_K", "Q5_K", "IQ4_XS")
        s = np.resize(np.array(SCALES[kind]), (67, COLS // PART // (1 + wide_subs)))
        s = np.repeat(s, 1 + wide_subs, axis=1)
        m = s[:, ::-1] if kind in MINIMUMS else 0
        w = blocks256.filled(kind, 67, COLS, code, s, m, d=1.5, dmin=0.75)
        for tokens in (1, 4):
            check_product(w, *locked.quantize_activations(wide(rng_of(41), tokens, COLS)), RUNS[:1])

    def test_bytes_of_q(self, kind):
        """q is read as bytes by some levels: every low byte, with every sign of the high one."""
        w = random_matrix(rng_of(42), kind, 4, COLS)
        q = np.resize(np.arange(-32767, 32768, 251), (3, COLS)).astype(np.int16)
        q[1] = np.resize(np.array([-256, -255, -1, 0, 1, 127, 128, 255, 256]), COLS)
        check_product(w, q, np.ones((3, COLS // GROUP), F32))


def any_inputs(rng, largest=32767):
    """Four tokens; large q of one sign, so that every sum needs rounding."""
    q = rng.integers(largest // 2, largest + 1, (4, COLS)).astype(np.int16)
    return q, rng.uniform(0.5, 1, (4, COLS // GROUP)).astype(F32)


class TestPlantedBugs:
    """What a wrong kernel gives is seen: each is the restatement with one mistake."""

    def differs(self, kind, change, largest=32767):
        rng = rng_of(43, len(kind))
        w = random_matrix(rng, kind, 9, COLS)
        q, s_x = any_inputs(rng, largest)
        check_product(w, q, s_x, RUNS[:1])
        wrong = Blocks256(kind, w.stored)
        change(wrong)
        with pytest.raises(AssertionError, match="differ"):
            check(product_of(w, q, s_x), blocks256.matmul(wrong, q, s_x), runs=RUNS[:1])

    @pytest.mark.parametrize("kind", LAYOUTS)
    def test_groups_of_a_block_swapped(self, kind):
        def change(w):
            w.s = np.roll(w.s, 8, axis=-1)

        self.differs(kind, change)

    @pytest.mark.parametrize("kind", LAYOUTS)
    def test_parts_of_a_sub_block_swapped(self, kind):
        def change(w):
            w.code = w.code.reshape(*w.code.shape[:2], 8, 2, PART)[..., ::-1, :].reshape(w.code.shape)

        self.differs(kind, change)

    @pytest.mark.parametrize("kind", LAYOUTS)
    def test_codes_of_a_quarter_block(self, kind):
        def change(w):
            w.code[8, 1, 192:] ^= 1

        self.differs(kind, change)

    @pytest.mark.parametrize("kind", MINIMUMS)
    def test_minimum_added(self, kind):
        def change(w):
            w.dmin = -w.dmin

        self.differs(kind, change)

    @pytest.mark.parametrize("kind", ["Q3_K", "Q6_K"])
    def test_offset_forgotten(self, kind):
        def change(w):
            w.code = w.code - min(CODES[kind])

        self.differs(kind, change, largest=8191)  # else these sums do not fit into int32

    @pytest.mark.parametrize("kind", ["Q6_K", "IQ4_XS"])
    def test_unsigned_scale(self, kind):
        def change(w):
            w.s = np.abs(w.s)

        self.differs(kind, change)

    @pytest.mark.parametrize(
        "kind, other",
        [
            ("Q2_K", "Q4_K"),
            ("Q3_K", "Q4_K"),
            ("Q4_K", "Q5_K"),
            ("Q5_K", "Q6_K"),
            ("Q6_K", ""),
            ("IQ4_XS", ""),
        ],
    )
    def test_rounded_after_other_sums(self, kind, other, monkeypatch):
        """D has another type's terms; or its eight terms are added pair by pair."""
        rng = rng_of(44)
        w = random_matrix(rng, kind, 33, COLS)
        q, s_x = any_inputs(rng)
        check_product(w, q, s_x, RUNS[:1])
        right = blocks256.group_sum

        def group_sum(_, p):
            if other:
                return right(other, p)
            a = blocks256.f32(p[0::2]) + blocks256.f32(p[1::2])
            return (a[0] + a[1]) + (a[2] + a[3])

        monkeypatch.setattr(blocks256, "group_sum", group_sum)
        with pytest.raises(AssertionError, match="differ"):
            check_product(w, q, s_x, RUNS[:1])

    @pytest.mark.parametrize("kind", LAYOUTS)
    def test_scales_multiplied_in_another_order(self, kind):
        """D (*) (d (*) s_x)."""
        rng = rng_of(45)
        w = random_matrix(rng, kind, 33, COLS)
        q, s_x = any_inputs(rng)
        wrong = Blocks256(kind, w.stored)
        y = np.zeros((4, 33), F32)
        for g in range(COLS // GROUP):  # one group alone: its s_x is in the scales of the blocks
            for t in range(4):
                wrong.d = w.d * s_x[t, g]
                wrong.dmin = None if w.dmin is None else w.dmin * s_x[t, g]
                alone = np.where(np.arange(COLS) // GROUP == g, q[t : t + 1], 0).astype(np.int16)
                y[t] = y[t] + blocks256.matmul(wrong, alone, np.ones((1, COLS // GROUP), F32))[0]
        with pytest.raises(AssertionError, match="differ"):
            check(product_of(w, q, s_x), y, runs=RUNS[:1])


# ---- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_values_are_those_of_gguf_py(kind):
    """pe_quantize_weights makes the same codes and scales of a matrix as of its values in float32."""
    w = random_matrix(rng_of(46), kind, 9, COLS)
    values = gguf.quants.dequantize(packed(w), gguf.GGMLQuantizationType[kind]).astype(F32)
    assert np.array_equal(w.values().view(np.uint32), values.view(np.uint32))
    for placement in ("end", "start", "shifted"):
        for largest in (127, 7):
            got = quantized(w, Memory(placement), largest)
            want = quantized(Matrix("F32", values), Memory(placement), largest)
            assert all(np.array_equal(a, b) for a, b in zip(got, want))


# ---- the restatement -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.parametrize("kind", LAYOUTS)
def test_equals_its_pytorch_restatement(kind):
    """Blocks of random bytes: tools/golden/locked_torch.py reads them by the header alone."""
    torch = pytest.importorskip("torch")
    import locked_torch

    rng = rng_of(47, len(kind))
    rows, cols, tokens = 37, 1280, 19
    w = random_matrix(rng, kind, rows, cols)
    theirs = locked_torch.super_matrix(kind, w.stored.reshape(rows, cols // 256, -1))
    assert np.array_equal(theirs.row_values(torch.arange(rows)).numpy(), w.values())
    for count in (1, tokens):
        x = wide(rng, count, cols)
        want = locked_torch.matmul(theirs, locked_torch.Activations(torch.from_numpy(x))).numpy()
        check(product_of(w, *locked.quantize_activations(x)), want)
