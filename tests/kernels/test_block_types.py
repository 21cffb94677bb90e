"""csrc/matmul_blocks32.c and its levels: what the types of blocks have beside test_matmul.py."""

import gguf
import locked_numpy as locked
import numpy as np
import pytest
from guard import Memory
from kernel_runs import (
    BLOCK_TYPES,
    POOLS,
    RUNS,
    check,
    ffi,
    lib,
    packed,
    place_activations,
    pointer,
    product_of,
    quantized,
    random_matrix,
    rng_of,
    succeed,
    wide,
)
from locked_numpy import BLOCK_CODES, F32, Matrix


class TestQ40AsQ80:
    """Q4_0 has the scales and codes of a Q8_0 matrix, hence its bits."""

    @pytest.mark.parametrize("tokens", [1, 3, 17])
    def test_same_bits(self, tokens):
        rng = rng_of(30, tokens)
        w = random_matrix(rng, "Q4_0", 37, 416)
        q, s_x = locked.quantize_activations(wide(rng, tokens, 416))
        same = Matrix("Q8_0", w.codes, w.scales)
        run = product_of(same, q, s_x)
        check(product_of(w, q, s_x), np.array(run(POOLS[1], Memory("end"))))

    def test_control_another_code(self):
        rng = rng_of(31)
        w = random_matrix(rng, "Q4_0", 37, 416)
        q, s_x = locked.quantize_activations(wide(rng, 2, 416))
        other = w.codes.copy()
        other[36] ^= 1
        run = product_of(Matrix("Q8_0", other, w.scales), q, s_x)
        with pytest.raises(AssertionError, match="differ"):
            check(product_of(w, q, s_x), np.array(run(POOLS[1], Memory("end"))))


class TestPlantedBugs:
    """What a wrong kernel gives is seen: each is the restatement with one mistake."""

    def differs(self, w, wrong):
        q, s_x = locked.quantize_activations(wide(rng_of(32), 3, w.shape[1]))
        check(product_of(w, q, s_x), locked.matmul(w, q=q, s_x=s_x))
        with pytest.raises(AssertionError, match="differ"):
            check(product_of(w, q, s_x), locked.matmul(wrong, q=q, s_x=s_x), runs=RUNS[:1])

    @pytest.mark.parametrize("kind", BLOCK_TYPES[1:])
    def test_nibbles_of_neighbours(self, kind):
        """Low nibble = even column, as in INT4."""
        w = random_matrix(rng_of(33), kind, 5, 160)
        codes = w.codes.reshape(5, -1, 2, 16).swapaxes(2, 3).reshape(5, -1)
        self.differs(w, Matrix(kind, codes, w.scales, w.minimums))

    @pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
    def test_fifth_bits_of_the_other_half(self, kind):
        w = random_matrix(rng_of(34), kind, 5, 160)
        low = min(BLOCK_CODES[kind])
        blocks = (w.codes - low).reshape(5, -1, 2, 16)
        swapped = (blocks & 15 | blocks[:, :, ::-1] & 16).reshape(5, -1) + low
        self.differs(w, Matrix(kind, swapped.astype(np.int8), w.scales, w.minimums))

    @pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
    def test_minimum_subtracted(self, kind):
        """As the minimums of K-quants are."""
        w = random_matrix(rng_of(35), kind, 5, 160)
        self.differs(w, Matrix(kind, w.codes, w.scales, -w.minimums))

    @pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
    def test_minimum_of_the_group(self, kind):
        """The first block's minimum for all four."""
        w = random_matrix(rng_of(36), kind, 5, 128)
        self.differs(w, Matrix(kind, w.codes, w.scales, np.repeat(w.minimums[:, :1], 4, 1)))

    def test_scale_of_whole_codes(self):
        """MXFP4's codes are doubled, and its scale is halved: 2^(e - 127) gives twice the value."""
        w = random_matrix(rng_of(37), "MXFP4", 5, 160)
        self.differs(w, Matrix("MXFP4", w.codes, w.scales + np.uint8(1)))


# ---- to float32 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_values_are_those_of_gguf_py(kind):
    """pe_quantize_weights makes the same codes and scales of a matrix as of its values in float32."""
    w = random_matrix(rng_of(38), kind, 9, 320)
    values = gguf.quants.dequantize(packed(w), gguf.GGMLQuantizationType[kind]).astype(F32)
    for placement in ("end", "start", "shifted"):
        for largest in (127, 7):
            got = quantized(w, Memory(placement), largest)
            want = quantized(Matrix("F32", values), Memory(placement), largest)
            assert all(np.array_equal(a, b) for a, b in zip(got, want))


# ---- the restatement -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_equals_its_pytorch_restatement(kind):
    """Blocks of random bytes: tools/golden/locked_torch.py reads them by the header alone."""
    torch = pytest.importorskip("torch")
    import locked_torch

    rng = rng_of(39, BLOCK_TYPES.index(kind))
    rows, cols, tokens = 37, 1184, 19
    stored = packed(random_matrix(rng, kind, rows, cols))
    blocks = stored.reshape(rows, cols // 32, -1)
    blocks[..., -16:] = rng.integers(0, 256, blocks[..., -16:].shape)  # any nibble
    x = wide(rng, tokens, cols)
    codes = locked_torch.block_codes(kind, blocks).reshape(rows, cols)
    w = locked_torch.Matrix(kind, codes, *locked_torch.block_scales(kind, blocks))
    want = locked_torch.matmul(w, locked_torch.Activations(torch.from_numpy(x))).numpy()
    values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]).astype(F32)
    assert np.array_equal(w.row_values(torch.arange(rows)).numpy(), values)

    def run(pool, memory):
        matrix = ffi.new("pe_matrix *", {"type": getattr(lib, f"PE_{kind}"), "rows": rows, "cols": cols})
        matrix.data = pointer(memory.input(stored), "void *")
        q, s_x = locked.quantize_activations(x)
        y = memory.output((tokens, rows))
        a = place_activations(memory, cols, tokens, q=q, s_x=s_x)
        succeed(lib.pe_matmul(pool, matrix, 0, a, pointer(y), rows))
        return y

    check(run, want)
