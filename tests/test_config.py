"""Hyper-parameters from both sources, and what contradicts itself."""

import dataclasses
import json

import numpy as np
import pytest
from gguf.constants import GGUFValueType as V
from rewrite import GOLDEN, rewrite

from pyengine.config import Config, read_hf_config
from pyengine.errors import CheckpointError, FileFormatError, PyengineError
from pyengine.files.gguf import GGUF

NAMES = sorted(p.stem for p in GOLDEN.glob("*.gguf"))


def config_of(path):
    return Config.from_gguf(GGUF.open(path))


@pytest.mark.parametrize("name", NAMES)
def test_gguf_and_config_json_say_the_same(name, tmp_path):
    config = config_of(GOLDEN / f"{name}.gguf")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    again = read_hf_config(tmp_path)
    assert dataclasses.replace(again, num_nextn_predict_layers=config.num_nextn_predict_layers) == config


def test_epsilon_is_the_decimal_that_was_meant():
    assert config_of(GOLDEN / "pattern31.gguf").rms_norm_eps == 1e-6
    assert config_of(GOLDEN / "tied.gguf").rms_norm_eps == 1e-5


def test_recurrent_layers_win_over_the_interval():
    # This file's interval says something else, on purpose.
    assert config_of(GOLDEN / "fused.gguf").layer_types == ("full_attention", "linear_attention")


def test_interval_without_recurrent_layers_and_nextn_block():
    config = config_of(GOLDEN / "nextn.gguf")
    assert config.layer_types == ("linear_attention", "full_attention")
    assert config.num_nextn_predict_layers == 1


def test_inv_freq_of_the_35b_a3b():
    config = dataclasses.replace(config_of(GOLDEN / "pattern31.gguf"), rotary_dim=64, head_dim=256)
    inv_freq = config.inv_freq()
    assert inv_freq.dtype == np.float32 and inv_freq.shape == (32,)
    assert inv_freq[0] == 1
    # The bits of torch 2.13's 1 / (1e7 ** (torch.arange(0, 64, 2, dtype=torch.float) / 64)), added.
    assert int(inv_freq.view(np.uint32).astype(np.int64).sum()) == 31052616799


@pytest.mark.parametrize("key, value, kind, message", [
    ("qwen35moe.block_count", 0, V.UINT32, "block_count"),
    ("qwen35moe.embedding_length", None, None, "embedding_length: want int, got no such key"),
    ("qwen35moe.embedding_length", "64", V.STRING, "embedding_length: want int"),
    ("qwen35moe.attention.head_count_kv", 3, V.UINT32, "num_attention_heads: want a multiple of 3"),
    ("qwen35moe.ssm.group_count", 3, V.UINT32, "linear_num_value_heads: want a multiple of 3"),
    ("qwen35moe.ssm.inner_size", 127, V.UINT32, "ssm.inner_size: want a multiple of 4"),
    ("qwen35moe.expert_used_count", 7, V.UINT32, "num_experts_per_tok: want at most 6"),
    ("qwen35moe.rope.dimension_count", 13, V.UINT32, "rotary_dim: want an even number"),
    ("qwen35moe.rope.dimension_count", 64, V.UINT32, "rotary_dim: want an even number up to"),
    ("qwen35moe.attention.layer_norm_rms_epsilon", 0.0, V.FLOAT32, "rms_norm_eps"),
    ("qwen35moe.rope.freq_base", float("nan"), V.FLOAT32, "rope_theta"),
    ("qwen35moe.attention.value_length", 40, V.UINT32, "attention.value_length: want 48"),
    ("qwen35moe.attention.recurrent_layers", [True] * 3, V.ARRAY, "recurrent_layers: want 4"),
])
def test_metadata_that_contradicts_itself_is_named(tmp_path, key, value, kind, message):
    changed = rewrite(GOLDEN / "pattern31.gguf", tmp_path / "x.gguf",
                      {key: None if kind is None else (value, kind)})
    with pytest.raises(PyengineError, match=message.replace(".", r"\.")):
        config_of(changed)


@pytest.mark.parametrize("change, message", [
    ({"hidden_size": None}, "hidden_size: want an integer, got None"),
    ({"hidden_size": True}, "hidden_size: want an integer, got True"),
    ({"num_experts": "6"}, "num_experts: want an integer, got '6'"),
    ({"layer_types": ["linear_attention"]}, "layer_types: want 4 entries"),
    ({"layer_types": ["linear_attention"] * 3 + ["mamba"]}, r"layer_types\[3\]: want"),
    ({"hidden_act": "gelu"}, "hidden_act: want 'silu', got 'gelu'"),
    ({"attention_bias": True}, "attention_bias: want false"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: want 'default', got 'yarn'"),
    ({"vocab_size": 0}, "vocab_size: want at least 1, got 0"),
    ({"eos_token_id": "x"}, "eos_token_id: want token ids"),
])
def test_config_json_faults_are_named(change, message):
    values = config_of(GOLDEN / "pattern31.gguf").to_hf() | change
    with pytest.raises((FileFormatError, CheckpointError), match=message):
        Config.from_hf(values)


@pytest.mark.parametrize("text, message", [("", "want JSON"), ("[1]", "want a JSON object"),
                                           ("{" * 100000, "want JSON")])
def test_config_json_that_is_none(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_hf_config(tmp_path)
