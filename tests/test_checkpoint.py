"""Names, shapes, dtypes and head order; what is missing, unknown or not finite is named."""

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from rewrite import GOLDEN, rewrite

from pyengine.checkpoint import Tensor, open_checkpoint
from pyengine.codes import unpack_int4
from pyengine.errors import CheckpointError, InputError
from pyengine.files.gguf import GGUF
from pyengine.quantize import quantize

PLAIN = GOLDEN / "pattern31.gguf"


def stored(name, path=PLAIN):
    return GGUF.open(path).tensors[name].data.copy()


def test_value_heads_are_tiled_in_a_gguf_and_grouped_in_hugging_face():
    # 2 key heads, 6 value heads: tiled k0 k1 k0 k1 k0 k1, grouped k0 k0 k0 k1 k1 k1.
    checkpoint = open_checkpoint(GOLDEN / "nextn.gguf")
    assert checkpoint.value_head_order == "tiled"
    assert checkpoint.key_heads().tolist() == [0, 1, 0, 1, 0, 1]
    dt_bias = checkpoint.tensors["model.layers.0.linear_attn.dt_bias"]
    tiled = dt_bias.stored_float32()
    assert np.array_equal(dt_bias.float64(), tiled[[0, 2, 4, 1, 3, 5]].astype(np.float64))
    out_proj = checkpoint.tensors["model.layers.0.linear_attn.out_proj.weight"]
    columns = out_proj.stored_float32().reshape(64, 6, 32)[:, [0, 2, 4, 1, 3, 5]].reshape(64, 192)
    assert np.array_equal(out_proj.float64(), columns)


def test_grouped_order_after_quantizing(tmp_path):
    quantize(GOLDEN / "nextn.gguf", tmp_path / "int8")
    checkpoint = open_checkpoint(tmp_path / "int8")
    assert checkpoint.value_head_order == "grouped"
    assert checkpoint.key_heads().tolist() == [0, 0, 0, 1, 1, 1]


def test_norms_are_zero_centred_and_the_gated_one_is_not():
    tensors = open_checkpoint(PLAIN).tensors
    norm = tensors["model.layers.0.input_layernorm.weight"]
    assert np.array_equal(norm.float64(), norm.stored_float32() - 1.0)
    assert abs(norm.float64().mean()) < 0.2 < norm.stored_float32().mean()
    gated = tensors["model.layers.0.linear_attn.norm.weight"]
    assert np.array_equal(gated.float64(), gated.stored_float32())


def test_a_log_gives_back_what_is_stored():
    a_log = open_checkpoint(PLAIN).tensors["model.layers.0.linear_attn.A_log"]
    assert a_log.type == "F32" and a_log.float64().dtype == np.float64
    assert np.array_equal(np.float32(-np.exp(a_log.float64()))[np.argsort(a_log.row_order)],
                          a_log.stored_float32())


def test_fused_tensors_are_views_of_the_file():
    tensors = open_checkpoint(GOLDEN / "fused.gguf").tensors
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.up_proj"):
        assert tensors[name].data.base is not None
        assert not tensors[name].data.flags.owndata


def test_nextn_block_is_no_layer_and_tied_head_is_the_embedding():
    assert not any("layers.2" in name for name in open_checkpoint(GOLDEN / "nextn.gguf").tensors)
    tied = open_checkpoint(GOLDEN / "tied.gguf").tensors
    assert tied["lm_head.weight"] is tied["model.embed_tokens.weight"]


def test_shared_gate_as_a_vector_or_a_row(tmp_path):
    name = "blk.0.ffn_gate_inp_shexp.weight"
    row = stored(name)
    paths = [rewrite(PLAIN, tmp_path / f"{i}.gguf", tensors={name: (row.reshape(shape), T.F32)})
             for i, shape in enumerate([(64,), (1, 64)])]
    a, b = (open_checkpoint(p).tensors["model.layers.0.mlp.shared_expert_gate.weight"].float64()
            for p in paths)
    assert a.shape == b.shape == (1, 64) and np.array_equal(a, b)


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.ssm_conv1d.weight", "blk.3.attn_k.weight",
                                  "blk.2.ffn_down_exps.weight", "output_norm.weight"])
def test_missing_tensor_is_named(tmp_path, name):
    path = rewrite(PLAIN, tmp_path / "x.gguf", drop=[name])
    with pytest.raises(Exception, match=f"{name}: want this tensor, got none") as caught:
        open_checkpoint(path)
    assert isinstance(caught.value, InputError.__base__)


def test_unknown_tensor_is_named(tmp_path):
    path = rewrite(PLAIN, tmp_path / "x.gguf",
                   tensors={"blk.0.attn_q.bias": (np.zeros(8, np.float32), T.F32)})
    with pytest.raises(CheckpointError, match="blk.0.attn_q.bias: want only tensors"):
        open_checkpoint(path)


def test_wrong_shape_and_type_are_named(tmp_path):
    conv = stored("blk.0.ssm_conv1d.weight")
    path = rewrite(PLAIN, tmp_path / "x.gguf",
                   tensors={"blk.0.ssm_conv1d.weight": (conv.T.copy(), T.F32)})
    with pytest.raises(CheckpointError, match=r"blk.0.ssm_conv1d.weight: want \(256, 4\) F32 or F16 "
                                              r"or BF16, got \(4, 256\) F32"):
        open_checkpoint(path)
    q8 = stored("blk.0.attn_gate.weight")
    path = rewrite(PLAIN, tmp_path / "y.gguf", tensors={"blk.0.attn_norm.weight": (q8, T.Q8_0)})
    with pytest.raises(CheckpointError, match=r"blk.0.attn_norm.weight: want \(64,\)"):
        open_checkpoint(path)


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00])
def test_nonfinite_scale_is_named_with_its_place(tmp_path, bits):
    data = stored("blk.1.ffn_up_exps.weight")
    data[2, 5, 34:36] = np.array([bits], np.uint16).view(np.uint8)
    path = rewrite(PLAIN, tmp_path / "x.gguf",
                   tensors={"blk.1.ffn_up_exps.weight": (data, T.Q8_0)})
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up_exps.weight: scale of block \(2, 5, 1\)"):
        open_checkpoint(path).check_finite()


def test_nonfinite_scale_of_an_int8_checkpoint_is_named(tmp_path):
    quantize(PLAIN, tmp_path / "int8")
    checkpoint = open_checkpoint(tmp_path / "int8")
    checkpoint.check_finite()
    name = "model.layers.0.mlp.experts.down_proj_scale_q8"
    view = checkpoint.file.tensors[name]
    with open(tmp_path / "int8" / "model.safetensors", "r+b") as file:
        file.seek(view.offset + 2 * 3)
        file.write(b"\x00\x7e")
    with pytest.raises(CheckpointError, match="down_proj_q8: scale of row 3, group 0, expert 0"):
        open_checkpoint(tmp_path / "int8").check_finite()


def test_dtypes_after_load():
    for name, tensor in open_checkpoint(PLAIN).tensors.items():
        if name.endswith(("A_log", "dt_bias", "norm.weight", "conv1d.weight")):
            assert tensor.type == "F32", name


def test_q4_0_holds_the_values_of_gguf_py(tmp_path):
    import gguf

    values = np.random.default_rng(1729).normal(size=(128, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, T.Q4_0)
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={"blk.0.attn_gate.weight": (packed, T.Q4_0)})
    tensor = open_checkpoint(path).tensors["model.layers.0.linear_attn.in_proj_z.weight"]
    assert tensor.type == "Q4_0"
    assert np.array_equal(tensor.stored_float32(), gguf.quants.dequantize(packed, T.Q4_0))


def test_int4_nibbles():
    packed = np.array([[0x18, 0xF0]], np.uint8)
    assert unpack_int4(packed).tolist() == [[0, -7, -8, 7]]
    tensor = Tensor("x", "INT4", (1, 4), packed, np.array([[0.5]], np.float16))
    assert tensor.float64().tolist() == [[0, -3.5, -4, 3.5]]


def test_no_such_path():
    with pytest.raises(InputError, match="want a GGUF file or a checkpoint directory"):
        open_checkpoint("/no/such/file")
