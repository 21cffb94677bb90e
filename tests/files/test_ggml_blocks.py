"""The table of block types, and that a new row is all that a new type takes."""

import numpy as np
import pytest
from bits import assert_same_bits
from gguf import quants
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN, TESTS
from rewrite import rewrite

import pyengine
from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.summary import stored_bytes
from pyengine.core.matrices import TYPES as LOCKED
from pyengine.errors import CheckpointError, FileFormatError
from pyengine.files import ggml_blocks
from pyengine.files.gguf import GGUF, dequantize, first_nonfinite_scale
from pyengine.quantizer.quality import measure

PLAIN = GOLDEN / "pattern31.gguf"
SMALL = TESTS / "fuzz_corpus" / "gguf" / "few"
NAME, HF = "blk.0.attn_gate.weight", "model.layers.0.linear_attn.in_proj_z.weight"
IDS = [3, 1, 4, 1, 5]


BLOCKS = [row for row in ggml_blocks.ROWS if not row.dense]


def random_blocks(row, shape, seed=0):
    """Stored values of a type, its floats finite."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // row.elements, row.nbytes), dtype=np.uint8)
    for offset, dtype, exponent in row.words:
        word = blocks[..., offset : offset + dtype.itemsize].view(dtype)
        word &= dtype.type(~(exponent & -exponent) & (2 ** (8 * dtype.itemsize) - 1))
    return blocks.reshape(*shape[:-1], -1).view(row.dtype)


@pytest.mark.parametrize("row", ggml_blocks.ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("shape", [(512,), (3, 512), (2, 3, 768)])
def test_values_are_those_of_gguf_py(row, shape):
    stored = random_blocks(row, shape)
    assert stored.shape == (*shape[:-1], row.stored_columns(shape[-1]))
    got = row.to_float32(stored)
    assert got.dtype == np.float32 and got.shape == shape
    want = quants.dequantize(stored.view(np.uint8), row.ggml)
    assert np.array_equal(got.view(np.uint32), want.reshape(shape).view(np.uint32))


WORDS = [(row, word) for row in ggml_blocks.ROWS for word in row.words]


@pytest.mark.parametrize("row, word", WORDS, ids=[f"{row.name}-{word[0]}-{word[2]:x}" for row, word in WORDS])
def test_the_words_are_what_is_not_finite(tmp_path, row, word):
    """One bad word in any block is found where it is."""
    offset, dtype, exponent = word
    stored = random_blocks(row, (8, 512))
    block = 512 // row.elements - 1
    whole = stored.reshape(8, -1).view(np.uint8).reshape(8, -1, row.nbytes)
    whole[5, block, offset : offset + dtype.itemsize].view(dtype)[:] |= dtype.type(exponent)
    path = rewrite(SMALL, tmp_path / "x.gguf", tensors={"x": (stored, row.ggml)})
    tensor = GGUF.open(path).tensors["x"]
    assert first_nonfinite_scale(tensor) == (5, block)
    assert not np.isfinite(dequantize(tensor)[5]).all() and np.isfinite(dequantize(tensor)[:5]).all()


@pytest.mark.slow
@pytest.mark.parametrize("row", BLOCKS, ids=lambda row: row.name)
def test_values_are_those_of_llama_cpp(row):
    pytest.importorskip("llama_cpp")
    from quantized_models import dequantize as by_llama_cpp

    stored = random_blocks(row, (2000, 1024))
    assert_same_bits(row.to_float32(stored), by_llama_cpp(stored, row.ggml), row.name)


@settings(max_examples=3, deadline=None)
@pytest.mark.parametrize("row", BLOCKS, ids=lambda row: row.name)
@given(data=st.data())
def test_any_part_of_a_matrix_has_the_values_of_the_whole(row, data):
    """Random bytes: refused scales too.  Rows of a stack, in any order, at any step, some at a time."""
    shape = data.draw(st.sampled_from([(1,), (5,), (3, 4), (2, 1, 3)]))
    nbytes = data.draw(st.integers(1, 3)) * 256 // row.elements * row.nbytes
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    stored = rng.integers(0, 256, (*shape, nbytes), dtype=np.uint8)
    whole = row.to_float32(stored)
    for part in (np.s_[::-1], np.s_[..., ::-1, :], np.s_[0], np.s_[1:], [0, -1, 0]):
        assert_same_bits(row.to_float32(stored[part]), whole[part], any_nan=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ggml_blocks, "STEP_VALUES", 256 * data.draw(st.integers(1, 4)))
        assert_same_bits(row.to_float32(stored), whole, any_nan=True)
    refused = row.refuses(row.blocks_of(stored))
    values = whole.reshape(*refused.shape, row.elements)
    assert np.isfinite(values[~refused]).all() and not np.isfinite(values[refused]).all(axis=-1).any()
    with np.errstate(all="ignore"):
        want = quants.dequantize(stored, row.ggml).reshape(values.shape)
    assert_same_bits(values[~refused], want[~refused], row.name)


# ---- a new type --------------------------------------------------------------------------------


def q8_1_values(stored):
    """float32 d, float32 that is not read, 32 int8 codes: d * q."""
    blocks = stored.reshape(*stored.shape[:-1], -1, 40)
    return (blocks[..., :4].view("<f4") * blocks[..., 8:].view(np.int8)).reshape(*stored.shape[:-1], -1)


@pytest.fixture
def q8_1(monkeypatch):
    words = ((0, np.dtype("<u4"), 0x7F800000),)
    row = ggml_blocks.BlockType("Q8_1", T.Q8_1, 32, 40, np.dtype(np.uint8), q8_1_values, words)
    monkeypatch.setitem(ggml_blocks.BY_NAME, "Q8_1", row)
    monkeypatch.setitem(ggml_blocks.BY_GGML, T.Q8_1, row)
    return row


def q8_1_file(path):
    rows, columns = GGUF.open(PLAIN).tensors[NAME].shape
    rng = np.random.default_rng(1)
    packed = rng.integers(0, 256, (rows, columns // 32, 40), dtype=np.uint8)
    packed[..., :4].view("<f4")[:] = rng.uniform(0, 1e-3, (rows, columns // 32, 1))
    packed = packed.reshape(rows, -1)
    return packed, rewrite(PLAIN, path, tensors={NAME: (packed, T.Q8_1)})


def test_a_new_type_is_one_row(tmp_path, q8_1):
    """Reading, the float64 model, footprint, quality and the search for NaN: nothing else is edited."""
    packed, path = q8_1_file(tmp_path / "x.gguf")
    values = q8_1_values(packed)
    checkpoint = open_checkpoint(path)
    tensor = checkpoint.tensors[HF]
    assert (tensor.type, tensor.scale_columns) == ("Q8_1", 32)
    assert np.array_equal(tensor.stored_float32(), values)
    checkpoint.check_finite()
    wide = rewrite(PLAIN, tmp_path / "wide.gguf", tensors={NAME: (values, T.F32)})
    a, b = (pyengine.load(p, "float64").forward(IDS) for p in (path, wide))
    assert np.array_equal(a, b)
    assert stored_bytes(tensor) == values.size // 32 * 40
    assert all(figures.noise == 0 for figures in measure(path, wide).tensors)

    packed[3, :4] = np.array([np.nan], np.float32).view(np.uint8)
    broken = rewrite(PLAIN, tmp_path / "nan.gguf", tensors={NAME: (packed, T.Q8_1)})
    with pytest.raises(
        CheckpointError, match=rf"{NAME}: scale of block \(3, 0\) of Q8_1: want a finite value"
    ):
        pyengine.load(broken, "float64")


def test_a_type_that_the_c_core_lacks_runs_in_float64_only(tmp_path, q8_1):
    _, path = q8_1_file(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError) as caught:
        pyengine.load(path)
    assert str(caught.value) == (
        f"{NAME}: want {' or '.join(LOCKED)}, which the locked arithmetic has, got Q8_1 (float64 runs it)"
    )


def test_a_type_without_a_row_is_named(tmp_path):
    _, path = q8_1_file(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=f"{NAME}: want type F32, F16, .*NVFP4, got Q8_1"):
        open_checkpoint(path)
    with pytest.raises(FileFormatError, match=f"{NAME}: want type F32, F16, .*NVFP4, got Q8_1"):
        dequantize(GGUF.open(path).tensors[NAME])
