"""Traces of other people's code: transformers with and without planted bugs, llama.cpp."""

import json

import numpy as np
import pytest
from partial import part
from paths import GOLDEN, TESTS
from transformers_models import transformers_model

import pyengine
from pyengine.errors import InputError
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.recorders.llama_cpp import to_hugging_face
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import LLAMA_CPP, Trace, record_trace
from pyengine.testing import record, record_llama_cpp

CONVERTER = TESTS / "converter" / "A-Q8_0.gguf"
TRAINED = TESTS / "trained" / "bf16.gguf"  # the others are random
MODEL = GOLDEN / "pattern31.gguf"
TOKENS = 40


@pytest.fixture(scope="module")
def oracle():
    return Oracle(None, MODEL)


@pytest.fixture(scope="module")
def ids(oracle):
    return np.random.default_rng(1729).integers(0, oracle.model.config.vocab_size, TOKENS)


# ---- transformers ----------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize(
    "path", [MODEL, CONVERTER, GOLDEN / "nextn.gguf", TRAINED, GOLDEN / "legacy.gguf"], ids=lambda p: p.stem
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_is_within_the_budget_of_its_dtype(path, dtype):
    oracle = Oracle(None, path)
    ids = np.random.default_rng(1729).integers(0, oracle.model.config.vocab_size, TOKENS)
    model = transformers_model(path, dtype)
    for splits in (None, [20, 1, 19]):
        trace = record(model, ids, splits)
        kind = "Qwen3Next" if path.stem == "legacy" else "Qwen3_5Moe"
        assert trace.arithmetic == f"{kind}ForCausalLM {dtype}"
        verdict = oracle.verify(trace, dtype)
        assert verdict.ok and not verdict.missing and not verdict.unknown, as_text(verdict)
        assert all(flip.kind == "near-tie" for flip in verdict.flips)
    for kind in ("layers", "logits", "modules of layer 1"):
        verdict = oracle.verify(part(trace, kind), dtype)
        assert verdict.ok, f"{kind}: {as_text(verdict)}"
    nearest = oracle.verify(trace).nearest
    assert nearest.budget == dtype and nearest.within
    assert dtype == "float32" or not oracle.verify(trace, "float32").ok


@pytest.mark.golden
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 8])
def test_a_recorded_trace_has_no_other_tensor(oracle, ids, tokens):
    """conv1d's output is padded: its length is a multiple of few tokens by chance."""
    trace = record(transformers_model(MODEL, "float32"), ids[:tokens])
    assert set(trace.tensors) == set(oracle.trace(ids[:tokens]).tensors)


@pytest.mark.golden
def test_a_recorded_trace_keeps_every_tensor(oracle, ids):
    trace = record(transformers_model(MODEL, "float32"), ids)
    reference = oracle.trace(ids)
    assert set(trace.tensors) == set(reference.tensors)
    assert all(trace.tensors[n].shape == v.shape for n, v in reference.tensors.items())
    with pytest.raises(InputError, match="splits: want lengths"):
        record(transformers_model(MODEL, "float32"), ids, [1, 2])


def rotate_pairs(q, k, cos, sin, *_, **__):
    """apply_rotary_pos_emb with pairs (2i, 2i + 1)."""
    import torch

    def turned(x):
        width = cos.shape[-1]
        c, s = (t[..., : width // 2].unsqueeze(1) for t in (cos, sin))
        even, odd = x[..., 0:width:2], x[..., 1:width:2]
        pairs = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2)
        return torch.cat([pairs, x[..., width:]], -1)

    return turned(q), turned(k)


def plain_norm(self, x):
    """Qwen3_5MoeRMSNorm with weight in place of 1 + weight."""
    return (self._norm(x.float()) * self.weight.float()).type_as(x)


def no_l2norm(x, dim=-1, eps=1e-6):
    return x


def tiled_heads(rule):
    """A delta rule whose query and key heads, repeated in groups before, are put in turns."""

    def changed(query, key, value, *arguments, **more):
        if query.shape[2] != value.shape[2]:
            ratio = value.shape[2] // query.shape[2]
            query, key = (x.repeat(1, 1, ratio, 1) for x in (query, key))
        return rule(query, key, value, *arguments, **more)

    return changed


HF_BUGS = [
    (
        "apply_rotary_pos_emb",
        rotate_pairs,
        "model.layers.3.self_attn.o_proj",
        "RoPE turns pairs (2i, 2i + 1), not halves",
    ),
    (
        "Qwen3_5MoeRMSNorm.forward",
        plain_norm,
        "model.layers.0.input_layernorm",
        "the norm's +1 is missing: scaled by weight, not by 1 + weight",
    ),
    ("l2norm", no_l2norm, "model.layers.0.linear_attn.norm", "the l2 norm of query and key is left out"),
    (
        "torch_chunk_gated_delta_rule",
        tiled_heads,
        "model.layers.0.linear_attn.norm",
        "grouped value heads are paired with key heads as if tiled (g mod n_k)",
    ),
]


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place, bug, guilty, name", HF_BUGS, ids=[b[0] for b in HF_BUGS])
def test_a_bug_planted_in_transformers(monkeypatch, oracle, ids, dtype, place, bug, guilty, name):
    model = transformers_model(MODEL, dtype)
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

    owner, _, attribute = place.rpartition(".")
    owner = getattr(modeling, owner) if owner else modeling
    monkeypatch.setattr(owner, attribute, bug(getattr(owner, attribute)) if bug is tiled_heads else bug)
    verdict = oracle.verify(record(model, ids), dtype)
    assert verdict.guilty and verdict.first.name == guilty, as_text(verdict)
    assert name in [match.name for match in verdict.mistakes], as_text(verdict)


@pytest.mark.golden
def test_frequencies_that_a_cast_rounded_are_named(oracle, ids):
    """model.to(bfloat16) rounds the rotary table too: a bug that is easily made."""
    import torch

    model = transformers_model(MODEL, "float32")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to(torch.bfloat16).float()
    verdict = oracle.verify(record(model, ids), "float32")
    assert verdict.mistakes[0].name == "RoPE's frequencies are rounded to bfloat16"


# ---- llama.cpp -------------------------------------------------------------------------------


@pytest.mark.slow
def test_llama_cpp_is_within_the_int8_budget(tmp_path):
    pytest.importorskip("llama_cpp")
    oracle = Oracle(None, CONVERTER)
    ids = np.array(json.loads((CONVERTER.parent / "expected.json").read_text())["ids"])
    trace = record_llama_cpp(CONVERTER, ids, threads=1)
    trace.save(tmp_path / "llama.safetensors")
    verdict = oracle.verify(tmp_path / "llama.safetensors", "int8-activations")
    assert verdict.ok and not verdict.missing and not verdict.unknown, as_text(verdict)
    assert not oracle.verify(trace, "float32").ok
    with pytest.raises(InputError, match="want a GGUF that llama.cpp runs"):
        record_llama_cpp(CONVERTER.with_name("README.md"), ids)


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.parametrize("ssm_in", [False, True])
@pytest.mark.parametrize("file_type, budget", [("F32", "float16"), ("Q8_0", "int8-activations")])
def test_llama_cpp_runs_the_same_qwen3next(tmp_path, ssm_in, file_type, budget):
    """Both forms of its projections, a next-token block behind its layers.  llama.cpp's cache is float16."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("torch")
    from gguf_writer import write_gguf
    from golden_models import CONFIGS, SEED, writer_options
    from hf_float64 import random_state_dict

    config, path = CONFIGS["next"], tmp_path / "next.gguf"
    options = writer_options("next") | {"file_type": file_type, "ssm_in": ssm_in}
    write_gguf(path, config, random_state_dict(config, SEED), **options)
    oracle = Oracle(None, path)
    ids = np.random.default_rng(1729).integers(0, config["vocab_size"], TOKENS)
    verdict = oracle.verify(record_llama_cpp(path, ids, threads=1), budget)
    assert verdict.ok and not verdict.missing and not verdict.unknown, as_text(verdict)


def test_llama_cpps_names_of_qwen3next():
    oracle = Oracle(None, GOLDEN / "next.gguf")
    config, ids = oracle.model.config, np.arange(9)
    truth, keys, T = oracle.trace(ids).tensors, 2, 9
    qkvz = truth["model.layers.0.linear_attn.in_proj_qkvz"].reshape(T, keys, -1)
    query, key, value, z = np.split(qkvz, [32, 64, 128], axis=2)  # by key head; two value heads of 32 to each
    qkv = np.concatenate([part.reshape(T, -1) for part in (query, key, value)], axis=1)
    tensors = {
        "linear_attn_qkv_mixed-0": qkv,
        "z-0": np.ascontiguousarray(z),
        "linear_attn_mixed_qkvz-1": truth["model.layers.1.linear_attn.in_proj_qkvz"],
        "linear_attn_mixed_ba-1": truth["model.layers.1.linear_attn.in_proj_ba"],
        "final_output-1": truth["model.layers.1.linear_attn.norm"],
        "linear_attn_qkv_mixed-2": qkv,  # without its z it is no module's output
        "model.embed_tokens": truth["model.embed_tokens"],
        "ffn_moe_topk-3": truth["model.layers.3.mlp.gate.2"],
    }
    turned = to_hugging_face(Trace(ids, tensors, "mine", LLAMA_CPP), config)
    assert sorted(turned.tensors) == [
        "model.embed_tokens",
        "model.layers.0.linear_attn.in_proj_qkvz",
        "model.layers.1.linear_attn.in_proj_ba",
        "model.layers.1.linear_attn.in_proj_qkvz",
        "model.layers.1.linear_attn.norm",
        "model.layers.3.mlp.gate.2",
    ]
    assert oracle.verify(turned, "exact").ok


def as_llama_cpp(trace, config):
    """A trace of ours with llama.cpp's names, shapes and order, by hand."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    tiled = [k * (heads // keys) + j for j in range(heads // keys) for k in range(keys)]
    name, T = "model.layers.0.linear_attn.in_proj_qkv", len(trace.ids)
    value = trace.tensors[name][:, 2 * config.key_dim :].reshape(T, heads, -1)[:, tiled]
    qkv = np.concatenate([trace.tensors[name][:, : 2 * config.key_dim], value.reshape(T, -1)], axis=1)
    z = trace.tensors["model.layers.0.linear_attn.in_proj_z"].reshape(T, heads, -1)[:, tiled]
    return {
        "linear_attn_qkv_mixed-0": qkv[None],
        "z-0": z,
        "beta-0": trace.tensors["model.layers.0.linear_attn.in_proj_b"][:, tiled, None],
        "linear_attn_out-0": trace.tensors["model.layers.0.linear_attn"],
        "attn_output-3": trace.tensors["model.layers.3.self_attn"],
        "attn_output-0": np.zeros((T, 1), np.float32),  # a delta net's has another meaning
        "l_out-2": trace.tensors["model.layers.2"],
        "result_output": trace.tensors["lm_head"],
        "node_17": np.zeros((3, 3), np.float32),
        "l_out-99": np.zeros((T, 1), np.float32),
    }


def test_llama_cpps_names_and_head_order(oracle, ids, tmp_path):
    reference = oracle.trace(ids)
    tensors = as_llama_cpp(reference, oracle.model.config)
    path = tmp_path / "dump.safetensors"
    Trace(ids, {n: np.ascontiguousarray(v) for n, v in tensors.items()}, "mine", LLAMA_CPP).save(path)
    turned = to_hugging_face(Trace.load(path), oracle.model.config)
    assert sorted(turned.tensors) == sorted(
        [
            "model.layers.0.linear_attn.in_proj_qkv",
            "model.layers.0.linear_attn.in_proj_z",
            "model.layers.0.linear_attn.in_proj_b",
            "model.layers.0.linear_attn.out_proj",
            "model.layers.0.linear_attn",
            "model.layers.3.self_attn.o_proj",
            "model.layers.3.self_attn",
            "model.layers.2",
            "lm_head",
        ]
    )
    assert oracle.verify(path).ok
    with pytest.raises(InputError, match="want the model, to turn llama.cpp's names"):
        Oracle(reference).verify(path)
    for name, shape, message in [
        ("z-0", (TOKENS, 3), "z-0: want 128 values a token, got 3"),
        ("l_out-2", (TOKENS + 1, 2), "l_out-2: want values for 40 tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            to_hugging_face(Trace(ids, {name: np.zeros(shape)}, "", LLAMA_CPP), oracle.model.config)


def test_record_llama_cpp_without_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        InputError, match=r"want the package llama-cpp-python: pip install 'pyengine-lm\[peers\]'$"
    ):
        record_llama_cpp(CONVERTER, [1, 2])


def test_the_models_own_trace_is_within_every_budget(oracle, ids):
    trace = record_trace(pyengine.load(MODEL, "float64"), ids)
    for budget in ("exact", "float32", "bfloat16"):
        assert oracle.verify(trace, budget).ok
