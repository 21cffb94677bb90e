"""Qwen3-Next: the two forms of its delta net's projections, layers without experts, its keys."""

import dataclasses
import json

import numpy as np
import pytest
from bits import same_names
from configurations import gguf_fault, hf_fault
from gguf.constants import GGMLQuantizationType as T
from gguf.constants import GGUFValueType as V
from gguf.quants import quantize as quantize_blocks
from hf_directory import hf_tensors, write_file, write_single
from make_slice import write_slice
from odd_model import CONFIG as ODD
from paths import GOLDEN
from rewrite import rewrite

import pyengine
from pyengine.checkpoint.config import Config
from pyengine.checkpoint.families.qwen3next import qkvz_order
from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.tensor import JoinedTensor
from pyengine.cli import main
from pyengine.decoder.footprint import weight_bytes_per_token, weights_copied
from pyengine.errors import PyengineError
from pyengine.files.gguf import GGUF, dequantize
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.verify_files import verify_files
from pyengine.reference import split_ba, split_qkvz

SORTED, LEGACY = GOLDEN / "next.gguf", GOLDEN / "legacy.gguf"
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
HF = open_checkpoint(SORTED).config.to_hf()


def fault(path):
    with pytest.raises(PyengineError) as caught:
        open_checkpoint(path)
    return str(caught.value).removeprefix(f"{path}: ")


def logits(path, arithmetic="locked"):
    return pyengine.load(path, arithmetic).forward(IDS)


def qkvz_of(block, tensors):
    """{name: (stored, type)} of a file's attn_qkv and attn_gate as ssm_in, with the same blocks."""
    config = open_checkpoint(SORTED).config
    rows = np.concatenate([tensors[f"{block}.attn_{part}.weight"].data for part in ("qkv", "gate")])
    return {f"{block}.ssm_in.weight": (rows[qkvz_order(config)].copy(), T.Q8_0)}


@pytest.fixture(scope="module")
def as_ssm_in(tmp_path_factory):
    """The file with its delta nets as older converters wrote them, block for block."""
    tensors, changes = GGUF.open(SORTED).tensors, {}
    for layer in range(3):
        changes |= qkvz_of(f"blk.{layer}", tensors)
    drop = [f"blk.{layer}.attn_{part}.weight" for layer in range(3) for part in ("qkv", "gate")]
    path = tmp_path_factory.mktemp("next") / "ssm_in.gguf"
    return rewrite(SORTED, path, tensors=changes, drop=drop)


# ---- the projections -----------------------------------------------------------------------------


@pytest.mark.parametrize("keys, values", [(1, 1), (1, 4), (3, 3), (2, 6)])
def test_the_order_is_that_of_the_model(keys, values):
    config = dataclasses.replace(
        open_checkpoint(SORTED).config,
        linear_num_key_heads=keys,
        linear_num_value_heads=values,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
    )
    rows = np.arange(config.conv_dim + config.value_dim)
    qkv, z = split_qkvz(rows[None], keys, 3)  # which row of in_proj_qkvz each entry is
    assert np.array_equal(np.argsort(qkvz_order(config)), np.concatenate([qkv[0], z[0]]))
    b, a = split_ba(np.arange(2 * values)[None], keys)
    share = values // keys
    assert [int(head) // (2 * share) for head in b[0]] == [g // share for g in range(values)]
    assert np.array_equal(a[0], b[0] + share)


def test_both_forms_are_one_model(as_ssm_in):
    name = "model.layers.1.linear_attn.in_proj_qkvz.weight"
    two, one = (open_checkpoint(path).tensors[name] for path in (SORTED, as_ssm_in))
    assert isinstance(two, JoinedTensor) and not isinstance(one, JoinedTensor)
    assert two.float64().tobytes() == one.float64().tobytes()
    rows = np.array([190, 0, 47, 48, 190])
    assert np.array_equal(two.stored_float32(rows=two.row_order[rows]), one.stored_float32(rows=rows))
    assert np.array_equal(two.rows_float32(None, 30, 150), one.rows_float32(None, 30, 150))
    for arithmetic in ("float64", "locked"):
        assert np.array_equal(logits(SORTED, arithmetic), logits(as_ssm_in, arithmetic))
    a, b = (open_checkpoint(path) for path in (SORTED, as_ssm_in))
    assert a.summary.weight_bytes == b.summary.weight_bytes
    assert weight_bytes_per_token(a) == weight_bytes_per_token(b)


def test_both_forms_have_one_twin(as_ssm_in, tmp_path):
    for source, name in ((SORTED, "a"), (as_ssm_in, "b")):
        quantize(source, tmp_path / f"{name}8", tmp_path / f"{name}4")
        assert verify_files(tmp_path / f"{name}8", tmp_path / f"{name}4", source) == []
    for bits in "84":
        one, other = (tmp_path / f"{name}{bits}" / "model.safetensors" for name in "ab")
        assert one.read_bytes() == other.read_bytes()
    said = json.loads((tmp_path / "a8" / "config.json").read_text())
    assert said["model_type"] == "pyengine_qwen3_next" and said["mlp_only_layers"] == []
    assert said["auto_map"]["AutoModelForCausalLM"] == "modeling_pyengine.PyengineNextForCausalLM"
    names = open_checkpoint(tmp_path / "a4").file.tensors
    layer = "model.layers.0.linear_attn"
    assert names[f"{layer}.in_proj_qkvz.weight_i4"].shape == (384, 32)
    assert names[f"{layer}.in_proj_ba.weight"].dtype == "BF16"


def test_the_parts_may_have_two_types(tmp_path):
    """attn_qkv in Q4_0 and attn_gate in F32 are the file whose matrices are all float32 values."""
    tensors = GGUF.open(SORTED).tensors
    qkv = quantize_blocks(dequantize(tensors["blk.0.attn_qkv.weight"]), T.Q4_0), T.Q4_0
    gate = dequantize(tensors["blk.0.attn_gate.weight"]).astype(np.float32), T.F32
    mixed = {"blk.0.attn_qkv.weight": qkv, "blk.0.attn_gate.weight": gate}
    path = rewrite(SORTED, tmp_path / "mixed.gguf", tensors=mixed)
    tensor = open_checkpoint(path).tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"]
    assert tensor.type == "Q4_0+F32"
    checkpoint = open_checkpoint(path)
    summary = checkpoint.summary
    assert weights_copied(checkpoint) == weights_copied(
        open_checkpoint(SORTED)
    )  # every type is read as mapped
    assert summary.parameter_types["Q4_0"] == 1 and sum(summary.parameter_types.values()) == sum(
        open_checkpoint(SORTED).summary.parameter_types.values()
    )
    widened = {name: (dequantize(t).astype(np.float32), T.F32) for name, t in GGUF.open(path).tensors.items()}
    wide = rewrite(SORTED, tmp_path / "wide.gguf", tensors=widened)
    assert np.array_equal(logits(path, "float64"), logits(wide, "float64"))
    assert np.abs(logits(path) - logits(path, "float64")).max() < 5e-3
    quantize(path, tmp_path / "int8")
    quantize(wide, tmp_path / "wide8")
    one, other = (tmp_path / name / "model.safetensors" for name in ("int8", "wide8"))
    assert one.read_bytes() == other.read_bytes()
    gate[0][7, 3] = np.nan
    path = rewrite(SORTED, tmp_path / "nan.gguf", tensors=mixed)
    with pytest.raises(PyengineError, match=r"blk\.0\.attn_gate\.weight: row 7, group 0: want finite values"):
        quantize(path, tmp_path / "nan8")
    with pytest.raises(PyengineError, match=r"blk\.0\.attn_gate\.weight: value at"):
        open_checkpoint(path).check_finite()


def test_a_file_with_both_forms_or_half_of_one(tmp_path, as_ssm_in):
    tensors = GGUF.open(SORTED).tensors
    both = rewrite(SORTED, tmp_path / "both.gguf", tensors=qkvz_of("blk.0", tensors))
    assert fault(both) == "blk.0.attn_qkv.weight: want this tensor in one form, got it in another as well"
    half = rewrite(SORTED, tmp_path / "half.gguf", drop=["blk.1.attn_gate.weight"])
    assert fault(half).startswith("blk.1.attn_gate.weight: want this tensor, got none")
    none = rewrite(as_ssm_in, tmp_path / "none.gguf", drop=["blk.1.ssm_in.weight"])
    assert fault(none).startswith("blk.1.ssm_in.weight: want this tensor, got none")
    apart = tensors["blk.0.ssm_ba.weight"].data
    of_qwen35 = {"blk.0.ssm_beta.weight": (apart[:4].copy(), T.Q8_0)}
    other = rewrite(SORTED, tmp_path / "other.gguf", tensors=of_qwen35)
    assert fault(other).startswith("blk.0.ssm_beta.weight: want only tensors that the architecture qwen3next")


def test_a_file_of_ollamas_is_one_line(tmp_path):
    """Its converter calls Qwen3-Next qwen35moe, and leaves b and a in one tensor."""
    keys = {"general.architecture": ("qwen35moe", V.STRING), "tokenizer.ggml.pre": ("qwen35", V.STRING)}
    file = GGUF.open(SORTED)
    for key in file.metadata:
        if key.startswith("qwen3next."):
            kind, value = file.metadata.type_of(key), file.metadata[key]
            value = value.tolist() if kind.kind == V.ARRAY else value
            element = [kind.element] if kind.element else []
            keys |= {key: None, key.replace("qwen3next.", "qwen35moe."): (value, kind.kind, *element)}
    path = rewrite(SORTED, tmp_path / "x.gguf", keys)
    assert fault(path).startswith("blk.0.ssm_beta.weight: want this tensor, got none")


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"linear_num_value_heads": 3}, {"linear_num_key_heads": 1}], ids=str)
def test_every_thread_and_split(tmp_path, change):
    config = dataclasses.replace(ODD, architecture="qwen3next", mrope_section=(), **change)
    path, want = tmp_path / "odd.gguf", None
    write_slice(path, config)
    for threads in (1, 3):
        model = pyengine.load(path, threads=threads)
        whole, state = model.forward(IDS), model.new_state()
        assert np.array_equal(whole, np.concatenate([model.forward([i], state) for i in IDS]))
        assert np.array_equal(whole, model.forward(IDS, chunk=3))
        assert want is None or np.array_equal(whole, want)
        want = whole
    exact = logits(path, "float64")
    assert np.abs(exact - want).max() < 1e-3 * np.abs(exact).max()


def test_sequences_in_one_pass(as_ssm_in):
    for path in (SORTED, as_ssm_in):
        model = pyengine.load(path)
        alone = [model.forward([*IDS, 7, 8, 9][start:])[-3:] for start in (0, 4, 7)]
        states = [model.new_state() for _ in alone]
        model.forward_batch([(IDS[start:], state) for start, state in zip((0, 4, 7), states)])
        for step, token in enumerate((7, 8, 9)):  # the later ones are replayed
            together = model.forward_batch([([token], state) for state in states])
            for want, got in zip(alone, together):
                assert np.array_equal(got[-1], want[step])


# ---- directories ---------------------------------------------------------------------------------


def test_directories_as_published(tmp_path):
    plain = write_single(tmp_path / "plain", SORTED, hf_tensors(SORTED))
    tensors = hf_tensors(SORTED, apart=True) | {"mtp.fc.weight": ("F32", np.ones((64, 128), np.float32))}
    apart = write_single(tmp_path / "apart", SORTED, tensors, mtp_num_hidden_layers=1)
    got, want = open_checkpoint(apart).config, open_checkpoint(SORTED).config
    assert got == dataclasses.replace(want, num_nextn_predict_layers=0)
    for arithmetic in ("float64", "locked"):
        assert np.array_equal(logits(apart, arithmetic), logits(plain, arithmetic))
    # A GGUF's A_log is not a float32: it is the logarithm of what is stored.
    assert np.abs(logits(plain, "float64") - logits(SORTED, "float64")).max() < 1e-6


def published(**changes):
    """Qwen3-Next-80B-A3B-Instruct's config.json."""
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    } | changes


def test_the_published_configuration():
    config = Config.from_hf(published())
    assert config.architecture == "qwen3next" and config.rotary_dim == 64 and config.mrope_section == ()
    assert config.layer_types.count("full_attention") == 12 and config.dense_layers == ()
    assert Config.from_hf(config.to_hf()) == config
    assert "intermediate_size" not in config.to_hf()


@pytest.mark.parametrize(
    "change, dense",
    [
        ({"mlp_only_layers": [1]}, (1,)),
        ({"mlp_only_layers": [1, 3, 9, -1]}, (1, 3)),  # transformers asks whether a layer is in the list
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (0, 1, 2, 3)),
        ({"mlp_only_layers": None, "decoder_sparse_step": None}, ()),
    ],
    ids=str,
)
def test_layers_without_experts(change, dense):
    config = Config.from_hf(published(num_hidden_layers=4, **change))
    assert config.dense_layers == dense and [config.has_experts(i) for i in range(4)] == [
        i not in dense for i in range(4)
    ]
    assert config.intermediate_size == (5120 if dense else 0)
    assert Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm_topk_prob": False}, "norm_topk_prob: want true or no such key, got False"),
        ({"attention_bias": True}, "attention_bias: want false or no such key, got True"),
        ({"hidden_act": "gelu"}, "hidden_act: want \"silu\" or no such key, got 'gelu'"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: want at least 1, got 0"),
        ({"decoder_sparse_step": 1.5}, "decoder_sparse_step: want an integer, got 1.5"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers: want a list of integers, got [True]"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: want a list of integers, got 3"),
        (
            {"mlp_only_layers": [0], "intermediate_size": None},
            "intermediate_size: want an integer, got None",
        ),
        ({"mlp_only_layers": [0], "intermediate_size": 0}, "intermediate_size: want 1 to 2147483647, got 0"),
        ({"use_sliding_window": True}, "use_sliding_window: want false or no such key, got true"),
        (
            {"sliding_window": 128, "use_sliding_window": None},
            "sliding_window: want 0 or no such key, got 128",
        ),
        ({"num_experts": 0}, "num_experts: want 1 to 2147483647, got 0"),
        ({"num_experts_per_tok": 513}, "num_experts_per_tok: want at most 512 experts, got 513"),
        ({"attn_output_gate": False}, "attn_output_gate: want true or no such key, got False"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type: want \"swish\" or \"silu\" or no such key, got"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type: want 'default' or 'yarn'"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types[0]: want 'linear_attention' or"),
        ({"n_shared_experts": 2}, "n_shared_experts: want 1 or no such key, got 2"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_computed_is_refused(change, message):
    assert message in hf_fault(published(**change))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("ssm.v_head_reordered", (True, V.BOOL), "want false or no such key, got True"),
        ("expert_weights_norm", (False, V.BOOL), "want true or no such key, got False"),
        ("expert_used_count", (13, V.UINT32), "want at most 12 experts, got 13"),
        ("leading_dense_block_count", (1, V.UINT32), "want 0 or no such key, got 1"),
        ("attention.sliding_window", (64, V.UINT32), "want 0 or no such key, got 64"),
    ],
)
def test_keys_of_a_gguf_are_refused(tmp_path, key, value, message):
    path = rewrite(SORTED, tmp_path / "x.gguf", {f"qwen3next.{key}": value})
    assert message in gguf_fault(path)


def test_a_layer_without_experts_in_a_gguf_is_one_line(tmp_path):
    """llama.cpp has no such layer."""
    parts = ("gate_inp", "gate_exps", "up_exps", "down_exps", "gate_shexp", "up_shexp", "down_shexp")
    drop = [f"blk.1.ffn_{part}.weight" for part in (*parts, "gate_inp_shexp")]
    mlp = {
        f"blk.1.ffn_{part}.weight": (np.ones((64, 64), np.float32), T.F32) for part in ("gate", "up", "down")
    }
    path = rewrite(SORTED, tmp_path / "x.gguf", tensors=mlp, drop=drop)
    assert fault(path).startswith("blk.1.ffn_gate_inp.weight: want this tensor, got none")


# ---- next-token prediction -----------------------------------------------------------------------


@pytest.mark.parametrize("model, layers", [(SORTED, 4), (GOLDEN / "nextn.gguf", 2)])
def test_a_file_of_next_token_blocks_alone(tmp_path, model, layers):
    names, block = list(GGUF.open(model).tensors), f"blk.{layers}."
    others = [name for name in names if name.startswith("blk.") and not name.startswith(block)]
    path = rewrite(model, tmp_path / "mtp.gguf", drop=others)
    wanted = f"want a model with its {layers} layers, got next-token-prediction blocks alone"
    assert fault(path) == f"blk.{layers}: {wanted}"
    plain = rewrite(model, tmp_path / "plain.gguf", drop=[name for name in names if name.startswith(block)])
    assert np.array_equal(logits(plain), logits(model))


def test_a_directory_of_next_token_blocks_alone(tmp_path):
    matrix = "F32", np.ones((4, 4), np.float32)
    directory = tmp_path / "mtp"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(HF))
    names = ["model.embed_tokens.weight", "lm_head.weight", "mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"]
    write_file(directory / "model.safetensors", dict.fromkeys(names, matrix))
    wanted = "want a model with its layers, got next-token-prediction blocks alone"
    assert fault(directory).endswith(f"mtp.fc.weight: {wanted}")


# ---- used ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line(tmp_path, capsys):
    assert main(["info", str(SORTED)]) == 0
    said = capsys.readouterr().out
    assert "qwen3next" in said and "experts_per_token        5" in said and "mlp_layers" not in said
    assert main(["tokenize", "-m", str(SORTED), "-p", "the cat"]) == 0
    capsys.readouterr()
    assert main(["generate", "-m", str(SORTED), "-p", "the cat", "-n", "2"]) == 0
    quantize(SORTED, tmp_path / "int8")
    assert main(["info", str(tmp_path / "int8")]) == 0
    assert main(["generate", "-m", str(tmp_path / "int8"), "-p", "the cat", "-n", "2"]) == 0
    assert main(["bench", "-m", str(SORTED), "-p", "4", "-n", "2", "-r", "1"]) == 0
    assert "qwen3next 513K.A318K Q8_0" in capsys.readouterr().out
    text, chat = "the cat e\u0301 123", [{"role": "user", "content": "the cat"}]
    one, other = (pyengine.load(path) for path in (SORTED, tmp_path / "int8"))
    assert one.tokenizer.encode(text) == other.tokenizer.encode(text)
    assert np.array_equal(one.generate(chat, 2).prompt_ids, other.generate(chat, 2).prompt_ids)
    (tmp_path / "text").write_text(text * 20)
    assert main(["perplexity", "-m", str(SORTED), "-f", str(tmp_path / "text"), "-c", "32"]) == 0
    assert main(["quality", str(tmp_path / "int8"), "--source", str(SORTED)]) == 0


# ---- against transformers ------------------------------------------------------------------------

DEFAULTS = {"num_hidden_layers": 4, "vocab_size": 96}
ODD_CONFIGURATIONS = [
    {},
    {"linear_num_key_heads": 4},  # as many key heads as value heads
    {"linear_num_key_heads": 1},
    {"num_experts_per_tok": 6},  # every expert
    {"num_experts": 1, "num_experts_per_tok": 1},
    {"tie_word_embeddings": True},
    {"decoder_sparse_step": 2},
    {"mlp_only_layers": [0, 3]},
    {"mlp_only_layers": [0, 1, 2, 3]},
    {"mlp_only_layers": [1, 7, -1], "decoder_sparse_step": 2},
    {"linear_conv_kernel_dim": 2, "rms_norm_eps": 1e-3},
    {"full_attention_interval": 2, "num_key_value_heads": 4},
    {"layer_types": ["full_attention"] * 4},
    {"layer_types": ["linear_attention"] * 4},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5,
                         "original_max_position_embeddings": 128}, "max_position_embeddings": 512},
]  # fmt: skip


@pytest.mark.golden
@pytest.mark.parametrize("change", ODD_CONFIGURATIONS, ids=str)
def test_odd_but_legal_configurations_equal_transformers(change, tmp_path):
    """A directory that transformers wrote: float64 is transformers' own; locked of its twins is the
    restatement's; transformers runs the twins to the same float64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from hf_float64 import Float64Mode, random_tensor, trace
    from locked_torch import Weights
    from make_golden import exceptions, rounded, run_model, run_restatement

    from pyengine.hf.modeling_pyengine import PyengineNextForCausalLM

    others = ("layer_types", "eos_token_id", "pad_token_id", "dtype", "architectures", "model_type")
    small = {key: value for key, value in HF.items() if key not in others}
    fields = small | {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 96} | DEFAULTS | change
    config = transformers.Qwen3NextConfig(
        **fields, attn_implementation="eager", experts_implementation="eager", dtype="float32"
    )
    model = transformers.Qwen3NextForCausalLM(config)
    generator = torch.Generator().manual_seed(1729)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = random_tensor(name, tuple(parameter.shape), config.tie_word_embeddings, generator)
            parameter.copy_(drawn.float())
    model.save_pretrained(tmp_path / "hf")
    ids = np.random.default_rng(1729).integers(0, 96, 14)
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    model = model.double().eval()
    model.model.rotary_emb.inv_freq = inv_freq.double()
    with Float64Mode():
        exact = trace(model, ids)
    got = run_model(pyengine.load(tmp_path / "hf", "float64"), ids, "14")
    assert list(got) == list(exact)
    crossed = [exceptions(value, rounded(value), rounded(got[name])) for name, value in exact.items()]
    assert sum(map(len, crossed)) <= 2  # on rounding boundaries; others raise
    quantize(tmp_path / "hf", tmp_path / "int8", tmp_path / "int4")
    for directory in ("int8", "int4"):
        want = run_restatement(Weights.load(tmp_path / directory), ids, "9+1+4")
        got = run_model(pyengine.load(tmp_path / directory), ids, "9+1+4")
        assert same_names(got, want)
        assert all(got[name].tobytes() == value.tobytes() for name, value in want.items())
        twin, info = PyengineNextForCausalLM.from_pretrained(
            tmp_path / directory, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad(), Float64Mode():
            got = (
                twin(input_ids=torch.as_tensor(ids)[None], use_cache=False)
                .logits[0]
                .numpy()
                .astype(np.float32)
            )
        assert (got != pyengine.load(tmp_path / directory, "float64").forward(ids)).sum() <= 1


@pytest.mark.golden
def test_the_older_pre_tokenizer_is_transformers():
    pytest.importorskip("transformers")
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from pyengine.text.gguf_vocabulary import PATTERNS

    assert PATTERNS["qwen2"] == PRETOKENIZE_REGEX
