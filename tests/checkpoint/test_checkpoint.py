"""Names, shapes, dtypes and head order; what is missing, unknown or not finite is named."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from gguf.constants import GGUFValueType as V
from paths import GOLDEN
from rewrite import rewrite

import pyengine
from pyengine.checkpoint.did_you_mean import nearest_name
from pyengine.checkpoint.layout import unpack_int4
from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.tensor import Tensor
from pyengine.errors import CheckpointError, FileFormatError, InputError, PyengineError
from pyengine.files.gguf import GGUF
from pyengine.files.safetensors import SafetensorsDirectory
from pyengine.files.safetensors_writer import SafetensorsWriter
from pyengine.quantizer.quantize import quantize

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
    assert np.array_equal(
        np.float32(-np.exp(a_log.float64()))[np.argsort(a_log.row_order)], a_log.stored_float32()
    )


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
    paths = [
        rewrite(PLAIN, tmp_path / f"{i}.gguf", tensors={name: (row.reshape(shape), T.F32)})
        for i, shape in enumerate([(64,), (1, 64)])
    ]
    a, b = (
        open_checkpoint(p).tensors["model.layers.0.mlp.shared_expert_gate.weight"].float64() for p in paths
    )
    assert a.shape == b.shape == (1, 64) and np.array_equal(a, b)


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "blk.0.ssm_conv1d.weight",
        "blk.3.attn_k.weight",
        "blk.2.ffn_down_exps.weight",
        "output_norm.weight",
    ],
)
def test_missing_tensor_is_named(tmp_path, name):
    path = rewrite(PLAIN, tmp_path / "x.gguf", drop=[name])
    with pytest.raises((CheckpointError, FileFormatError)) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: {name}: want this tensor, got none"


def test_unknown_tensor_is_named(tmp_path):
    path = rewrite(
        PLAIN, tmp_path / "x.gguf", tensors={"blk.0.attn_q.bias": (np.zeros(8, np.float32), T.F32)}
    )
    with pytest.raises(CheckpointError, match="blk.0.attn_q.bias: want only tensors"):
        open_checkpoint(path)


def test_wrong_shape_and_type_are_named(tmp_path):
    conv = stored("blk.0.ssm_conv1d.weight")
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={"blk.0.ssm_conv1d.weight": (conv.T.copy(), T.F32)})
    with pytest.raises(
        CheckpointError, match=r"blk.0.ssm_conv1d.weight: want shape \(256, 4\), got \(4, 256\)"
    ):
        open_checkpoint(path)
    q8 = stored("blk.0.attn_gate.weight")
    path = rewrite(PLAIN, tmp_path / "y.gguf", tensors={"blk.0.attn_norm.weight": (q8, T.Q8_0)})
    with pytest.raises(CheckpointError, match=r"blk.0.attn_norm.weight: want type F32, F16, BF16, got Q8_0"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("embedding_length", 96, "token_embd.weight: want shape (288, 96), got (288, 64)"),
        ("ssm.inner_size", 100, "blk.0.attn_qkv.weight: want shape (228, 64), got (256, 64)"),
        ("expert_count", 7, "blk.0.ffn_gate_inp.weight: want shape (7, 64), got (6, 64)"),
        ("attention.head_count", 4, "blk.3.attn_q.weight: want shape (384, 64), got (192, 64)"),
        (
            "expert_feed_forward_length",
            64,
            "blk.0.ffn_gate_exps.weight: want shape (6, 64, 64), got (6, 32, 64)",
        ),
        ("block_count", 5, "blk.4.attn_norm.weight: want this tensor, got none"),
        (
            "block_count",
            3,
            "blk.3.attn_norm.weight: want only tensors that the architecture qwen35moe has, got this one",
        ),
        # What would take 64 GB and more if it were believed.
        ("ssm.time_step_rank", 2**30, "blk.0.attn_qkv.weight: want shape (2147483776, 64)"),
        ("ssm.state_size", 2**31 - 1, "blk.0.attn_qkv.weight: want shape (8589934716, 64)"),
        ("expert_count", 2**31 - 1, "blk.0.ffn_gate_inp.weight: want shape (2147483647, 64)"),
        ("block_count", 1024, "blk.4.attn_norm.weight: want this tensor, got none"),
    ],
)
def test_hyper_parameters_that_contradict_the_tensors(tmp_path, key, value, message):
    changes = {f"qwen35moe.{key}": (value, V.UINT32)}
    if key == "ssm.time_step_rank":
        changes["qwen35moe.ssm.inner_size"] = (2 * value, V.UINT32)
    if key == "block_count":
        changes["qwen35moe.attention.recurrent_layers"] = None
    path = rewrite(PLAIN, tmp_path / "x.gguf", changes)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: {message}") and peak < 16 << 20


@pytest.mark.parametrize(
    "name, config",
    [
        (
            "x",
            {"num_experts": 2**31 - 1, "num_hidden_layers": 1024, "layer_types": None},
        ),  # names by the billion
        ("model.embed_tokens.weigh" + "t" * 500_000, {}),  # one that takes hours to compare
    ],
)
def test_a_hint_costs_no_more_than_the_file(tmp_path, name, config):
    said = open_checkpoint(PLAIN).config.to_hf() | config
    (tmp_path / "config.json").write_text(json.dumps(said))
    with SafetensorsWriter(tmp_path / "model.safetensors", [(name, "F32", (1,))]) as writer:
        writer.write(name, np.zeros(1, np.float32))
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value) == (
        f"{tmp_path}: model.embed_tokens.weight, .weight_i8 or .weight_i4: want "
        "one of these tensors, got none"
    )
    assert peak < 32 << 20


@pytest.mark.parametrize("value", [0.5, 0.0, -0.0])
def test_a_decay_rate_that_has_no_logarithm_is_one_line(tmp_path, value):
    """ssm_a is -exp(A_log).  float64 takes its logarithm, locked does not; both refuse it."""
    rates = stored("blk.0.ssm_a").copy()
    rates[2] = value
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={"blk.0.ssm_a": (rates, T.F32)})
    for arithmetic in ("float64", "locked"):
        with pytest.raises(CheckpointError) as caught:
            pyengine.load(path, arithmetic)
        assert str(caught.value) == (
            f"{path}: blk.0.ssm_a: value at (2,): want one that gives a finite "
            f"model.layers.0.linear_attn.A_log, got {value:g}"
        )
    with pytest.raises(CheckpointError, match="blk.0.ssm_a: want finite values"):
        quantize(path, tmp_path / "int8")


def test_data_that_begins_at_an_odd_byte_is_the_same_model(tmp_path):
    quantize(PLAIN, tmp_path / "int8")
    path = tmp_path / "int8" / "model.safetensors"
    want = pyengine.load(tmp_path / "int8").forward([1, 2, 3])
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(
        (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
    )
    checkpoint = open_checkpoint(tmp_path / "int8")
    assert any(view.offset % 4 for view in checkpoint.file.tensors.values())
    assert all(
        part.flags.aligned
        for tensor in checkpoint.tensors.values()
        for part in (tensor.data, tensor.scales)
        if part is not None
    )
    assert np.array_equal(pyengine.load(tmp_path / "int8").forward([1, 2, 3]), want)


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00])
def test_nonfinite_scale_is_named_with_its_place(tmp_path, bits):
    data = stored("blk.1.ffn_up_exps.weight")
    data[2, 5, 34:36] = np.array([bits], np.uint16).view(np.uint8)
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={"blk.1.ffn_up_exps.weight": (data, T.Q8_0)})
    with pytest.raises(CheckpointError) as caught:
        pyengine.load(path)
    assert str(caught.value) == (
        f"{path}: blk.1.ffn_up_exps.weight: scale of block (2, 5, 1) of Q8_0: "
        "want a finite value, got NaN or infinity"
    )


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


def test_fingerprints_tell_models_apart(tmp_path):
    """Also the twins of one model, and one whose only change is in a row that is first."""
    names = ["pattern31", "nextn", "fused", "tied", "bfloat16", "yarn", "dense"]
    prints = {name: open_checkpoint(GOLDEN / f"{name}.gguf").fingerprint for name in names}
    assert prints["tied"] == open_checkpoint(GOLDEN / "tied.gguf").fingerprint
    quantize(GOLDEN / "tied.gguf", tmp_path / "int8", tmp_path / "int4")
    for name in ("int8", "int4"):
        prints[name] = open_checkpoint(tmp_path / name).fingerprint
    data = bytearray((GOLDEN / "tied.gguf").read_bytes())
    tensor = open_checkpoint(GOLDEN / "tied.gguf").tensors["model.layers.1.mlp.experts.down_proj"]
    start = bytes(data).find(tensor.data[0, 0].tobytes())
    data[start + 2] ^= 1
    (tmp_path / "changed.gguf").write_bytes(data)
    prints["changed"] = open_checkpoint(tmp_path / "changed.gguf").fingerprint
    assert len(set(prints.values())) == len(prints)


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


# ---- names that differ -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, misspelt",
    [
        ("token_embd.weight", "token_embed.weight"),
        ("blk.2.attn_norm.weight", "blk.2.attn_nrm.weight"),
        ("blk.1.ssm_a", "blk.1.ssm_a.weight"),
        ("blk.3.attn_k.weight", "blk.3.self_attn_k.weight"),
        ("blk.0.ffn_down_exps.weight", "blk.0.ffn_down_experts.weight"),
    ],
)
def test_a_misspelt_name_in_a_gguf_is_reported_with_its_likeness(tmp_path, name, misspelt):
    tensor = GGUF.open(PLAIN).tensors[name]
    path = rewrite(
        PLAIN, tmp_path / "x.gguf", drop=[name], tensors={misspelt: (tensor.data.copy(), tensor.type)}
    )
    with pytest.raises(PyengineError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == (
        f"{path}: {name}: want this tensor, got none; nearest unknown name in the file: {misspelt}"
    )
    added = rewrite(PLAIN, tmp_path / "y.gguf", tensors={misspelt: (tensor.data.copy(), tensor.type)})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(added)
    assert f"{misspelt}: want only tensors" in str(caught.value)
    assert str(caught.value).endswith(f"; nearest known name: {name}")


def renamed(directory, changes):
    """The directory's tensors under other names; a file's layout is as it was."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = {changes.get(name, name): entry for name, entry in header.items()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return directory


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    "bits, name, misspelt",
    [
        (8, f"{LAYER}.mlp.experts.gate_up_proj_scale_q8", f"{LAYER}.mlp.experts.gate_up_proj_q8_scale"),
        (8, f"{LAYER}.mlp.gate.weight_scale_i8", f"{LAYER}.mlp.gate.weight_scales_i8"),
        (
            4,
            f"{LAYER}.mlp.shared_expert.up_proj.weight_scale_i4",
            f"{LAYER}.mlp.shared_expert.up_proj.scale_i4",
        ),
        (8, "model.norm.weight", "model.final_norm.weight"),
        (4, "model.embed_tokens.weight", "model.tok_embeddings.weight"),
    ],
)
def test_a_misspelt_name_in_a_directory_is_reported_with_its_likeness(tmp_path, bits, name, misspelt):
    quantize(GOLDEN / "nextn.gguf", **{f"int{bits}": tmp_path / "out"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(renamed(tmp_path / "out", {name: misspelt}))
    assert name in str(caught.value) and "got none" in str(caught.value)
    assert str(caught.value).endswith(f"; nearest unknown name in the file: {misspelt}")


@pytest.mark.parametrize("codes", ["weight_int8", "weight_q8", "qweight"])
def test_misspelt_codes_are_not_taken_for_floats_that_are_missing(tmp_path, codes):
    quantize(GOLDEN / "nextn.gguf", tmp_path / "out")
    stem = "model.layers.1.self_attn.k_proj"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(renamed(tmp_path / "out", {f"{stem}.weight_i8": f"{stem}.{codes}"}))
    assert f"{stem}.weight, .weight_i8 or .weight_i4: want one of these tensors, got none" in str(
        caught.value
    )
    assert f"in the file: {stem}.{codes}" in str(caught.value)


def test_an_unknown_name_in_a_directory_is_reported_with_the_nearest(tmp_path):
    quantize(GOLDEN / "nextn.gguf", tmp_path / "out")
    name, other = "model.layers.1.input_layernorm.weight", "model.layers.7.input_layernorm.weights"
    source = SafetensorsDirectory.open(tmp_path / "out").tensors[name]
    with SafetensorsWriter(tmp_path / "out" / "more.safetensors", [(other, "F32", source.shape)]) as more:
        more.write(other, source.data)
    os.replace(tmp_path / "out" / "model.safetensors", tmp_path / "out" / "first.safetensors")
    tensors = dict.fromkeys(
        json.loads((tmp_path / "out" / "noesis_provenance.json").read_text())["tensors"], "first.safetensors"
    )
    (tmp_path / "out" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": tensors | {other: "more.safetensors"}})
    )
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "out")
    assert f"{other}: want only tensors that the model has" in str(caught.value)
    assert str(caught.value).endswith("nearest known name: model.layers.0.input_layernorm.weight")


def test_nearest_name():
    names = ["model.layers.0.mlp.gate.weight", "model.layers.11.mlp.gate.weight", "lm_head.weight"]
    assert nearest_name("model.layers.11.mlp.gates.weight", names) == names[1]
    assert nearest_name("model.layers.7.mlp.gates.weight", names) == names[0]
    assert nearest_name("lm_heads.weight", names) == names[2]
    assert nearest_name("vision.patch_embed", names) is None and nearest_name("x", []) is None


def test_a_name_like_no_other_has_no_hint(tmp_path):
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={"zzz": (np.zeros(8, np.float32), T.F32)})
    with pytest.raises(CheckpointError, match="zzz: want only tensors .* got this one$"):
        open_checkpoint(path)
