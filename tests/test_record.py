"""Traces of other people's code: transformers with and without planted bugs, llama.cpp."""

import json

import numpy as np
import pytest
from rewrite import GOLDEN

import pyengine
from pyengine.errors import InputError
from pyengine.oracle.check import Oracle
from pyengine.oracle.llama_cpp import to_hugging_face
from pyengine.oracle.report import as_text
from pyengine.testing import record, record_llama_cpp
from pyengine.trace import LLAMA_CPP, Trace, record_trace

CONVERTER = GOLDEN.parent / "converter" / "A-Q8_0.gguf"
TRAINED = GOLDEN.parent / "trained" / "bf16.gguf"  # the others are random
MODEL = GOLDEN / "pattern31.gguf"
TOKENS = 40


@pytest.fixture(scope="module")
def oracle():
    return Oracle(None, MODEL)


@pytest.fixture(scope="module")
def ids(oracle):
    return np.random.default_rng(1729).integers(0, oracle.model.config.vocab_size, TOKENS)


# ---- transformers ----------------------------------------------------------------------------


def transformers_model(path, dtype):
    """Of a GGUF's weights; its frequencies float32, as from_pretrained keeps them."""
    torch = pytest.importorskip("torch")
    from hf_float64 import load_float64

    model = load_float64(path)
    inv_freq = model.model.rotary_emb.inv_freq.float()
    model = model.to(getattr(torch, dtype))
    model.model.rotary_emb.inv_freq = inv_freq.double() if dtype == "float64" else inv_freq
    return model


@pytest.mark.golden
@pytest.mark.parametrize("path", [MODEL, CONVERTER, GOLDEN / "nextn.gguf", TRAINED], ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_is_within_the_budget_of_its_dtype(path, dtype):
    oracle = Oracle(None, path)
    ids = np.random.default_rng(1729).integers(0, oracle.model.config.vocab_size, TOKENS)
    model = transformers_model(path, dtype)
    for splits in (None, [20, 1, 19]):
        trace = record(model, ids, splits)
        assert trace.arithmetic == f"Qwen3_5MoeForCausalLM {dtype}"
        verdict = oracle.verify(trace, dtype)
        assert verdict.ok and not verdict.missing and not verdict.unknown, as_text(verdict)
        assert all(flip.kind == "near-tie" for flip in verdict.flips)
    assert dtype == "float32" or not oracle.verify(trace, "float32").ok


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
        c, s = (t[..., :width // 2].unsqueeze(1) for t in (cos, sin))
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
    ("apply_rotary_pos_emb", rotate_pairs, "model.layers.3.self_attn.o_proj",
     "RoPE turns pairs (2i, 2i + 1), not halves"),
    ("Qwen3_5MoeRMSNorm.forward", plain_norm, "model.layers.0.input_layernorm",
     "the norm's +1 is missing: scaled by weight, not by 1 + weight"),
    ("l2norm", no_l2norm, "model.layers.0.linear_attn.norm",
     "the l2 norm of query and key is left out"),
    ("torch_chunk_gated_delta_rule", tiled_heads, "model.layers.0.linear_attn.norm",
     "grouped value heads are paired with key heads as if tiled (g mod n_k)"),
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


def as_llama_cpp(trace, config):
    """A trace of ours with llama.cpp's names, shapes and order, by hand."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    tiled = [k * (heads // keys) + j for j in range(heads // keys) for k in range(keys)]
    name, T = "model.layers.0.linear_attn.in_proj_qkv", len(trace.ids)
    value = trace.tensors[name][:, 2 * config.key_dim:].reshape(T, heads, -1)[:, tiled]
    qkv = np.concatenate([trace.tensors[name][:, :2 * config.key_dim], value.reshape(T, -1)], axis=1)
    z = trace.tensors["model.layers.0.linear_attn.in_proj_z"].reshape(T, heads, -1)[:, tiled]
    return {
        "linear_attn_qkv_mixed-0": qkv[None], "z-0": z,
        "beta-0": trace.tensors["model.layers.0.linear_attn.in_proj_b"][:, tiled, None],
        "linear_attn_out-0": trace.tensors["model.layers.0.linear_attn"],
        "attn_output-3": trace.tensors["model.layers.3.self_attn"],
        "attn_output-0": np.zeros((T, 1), np.float32),  # a delta net's has another meaning
        "l_out-2": trace.tensors["model.layers.2"], "result_output": trace.tensors["lm_head"],
        "node_17": np.zeros((3, 3), np.float32), "l_out-99": np.zeros((T, 1), np.float32),
    }


def test_llama_cpps_names_and_head_order(oracle, ids, tmp_path):
    reference = oracle.trace(ids)
    tensors = as_llama_cpp(reference, oracle.model.config)
    path = tmp_path / "dump.safetensors"
    Trace(ids, {n: np.ascontiguousarray(v) for n, v in tensors.items()}, "mine", LLAMA_CPP).save(path)
    turned = to_hugging_face(Trace.load(path), oracle.model.config)
    assert sorted(turned.tensors) == sorted([
        "model.layers.0.linear_attn.in_proj_qkv", "model.layers.0.linear_attn.in_proj_z",
        "model.layers.0.linear_attn.in_proj_b", "model.layers.0.linear_attn.out_proj",
        "model.layers.0.linear_attn", "model.layers.3.self_attn.o_proj", "model.layers.3.self_attn",
        "model.layers.2", "lm_head"])
    assert oracle.verify(path).ok
    with pytest.raises(InputError, match="want the model, to turn llama.cpp's names"):
        Oracle(reference).verify(path)
    for name, shape, message in [("z-0", (TOKENS, 3), "z-0: want 128 values a token, got 3"),
                                 ("l_out-2", (TOKENS + 1, 2), "l_out-2: want values for 40 tokens")]:
        with pytest.raises(InputError, match=message):
            to_hugging_face(Trace(ids, {name: np.zeros(shape)}, "", LLAMA_CPP), oracle.model.config)


def test_record_llama_cpp_without_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"pip install 'pyengine\[peers\]'"):
        record_llama_cpp(CONVERTER, [1, 2])


def test_the_models_own_trace_is_within_every_budget(oracle, ids):
    trace = record_trace(pyengine.load(MODEL, "float64"), ids)
    for budget in ("exact", "float32", "bfloat16"):
        assert oracle.verify(trace, budget).ok
