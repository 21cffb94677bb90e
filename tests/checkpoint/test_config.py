"""Hyper-parameters from both sources, and what contradicts itself."""

import dataclasses
import json

import numpy as np
import pytest
from gguf.constants import GGUFValueType as V
from paths import GOLDEN
from rewrite import rewrite

from pyengine.checkpoint.config import Config, read_hf_config
from pyengine.errors import CheckpointError, FileFormatError
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


PREFIX = "qwen35moe."
BIG = 2**31 - 1


def gguf_fault(tmp_path, key, value, kind, element=V.BOOL):
    """The message of a GGUF with this metadata, after the path."""
    path = rewrite(
        GOLDEN / "pattern31.gguf",
        tmp_path / "x.gguf",
        {key: None if kind is None else (value, kind, element)},
    )
    with pytest.raises((FileFormatError, CheckpointError)) as caught:
        config_of(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "key, value, kind, message",
    [
        (
            "general.architecture",
            "llama",
            V.STRING,
            "general.architecture: want 'qwen35moe' or 'qwen35' or 'qwen3next', got 'llama'",
        ),
        ("block_count", 0, V.UINT32, "want more than the 0 next-token blocks and at most 1024, got 0"),
        (
            "block_count",
            2**32 - 1,
            V.UINT32,
            "want more than the 0 next-token blocks and at most 1024, got 4294967295",
        ),
        (
            "nextn_predict_layers",
            4,
            V.UINT32,
            "qwen35moe.block_count: want more than the 4 next-token blocks and at most 1024, got 4",
        ),
        ("embedding_length", None, None, "want int, got no such key"),
        ("embedding_length", "64", V.STRING, "want int, got string"),
        ("embedding_length", 64.0, V.FLOAT32, "want int, got float32"),
        ("embedding_length", True, V.BOOL, "want int, got bool"),
        ("embedding_length", -64, V.INT32, f"hidden_size: want 1 to {BIG}, got -64"),
        ("embedding_length", 2**63, V.UINT64, f"hidden_size: want 1 to {BIG}, got {2**63}"),
        (
            "attention.head_count_kv",
            3,
            V.UINT32,
            "num_attention_heads: want a multiple of 3 key-value heads, got 2",
        ),
        ("attention.head_count_kv", 0, V.UINT32, f"num_key_value_heads: want 1 to {BIG}, got 0"),
        (
            "attention.key_length",
            2**20,
            V.UINT32,
            "qwen35moe.attention.value_length: want 1048576 as attention.key_length, got 48",
        ),
        ("ssm.group_count", 3, V.UINT32, "linear_num_value_heads: want a multiple of 3 key heads, got 4"),
        ("ssm.group_count", 0, V.UINT32, f"linear_num_key_heads: want 1 to {BIG}, got 0"),
        ("ssm.time_step_rank", 0, V.UINT32, "qwen35moe.ssm.inner_size: want a multiple of 0 heads, got 128"),
        ("ssm.inner_size", 129, V.UINT32, "want a multiple of 4 heads, got 129"),
        ("ssm.conv_kernel", 17, V.UINT32, "linear_conv_kernel_dim: want 1 to 16 taps, got 17"),
        ("expert_used_count", 7, V.UINT32, "num_experts_per_tok: want at most 6 experts, got 7"),
        ("attention.value_length", 40, V.UINT32, "want 48 as attention.key_length, got 40"),
        ("attention.recurrent_layers", [True] * 3, V.ARRAY, "want 4 entries as block_count, got 3"),
        ("rope.dimension_count", 13, V.UINT32, "rotary_dim: want an even number up to head_dim 48, got 13"),
        ("rope.dimension_count", 50, V.UINT32, "rotary_dim: want an even number up to head_dim 48, got 50"),
        ("rope.freq_base", float("nan"), V.FLOAT32, "rope_theta: want a finite number from 1 on, got nan"),
        ("rope.freq_base", 1e300, V.FLOAT64, "rope_theta: want a finite number from 1 on, got inf"),
        ("rope.freq_base", 10_000_000, V.UINT32, "want float, got uint32"),
        (
            "attention.layer_norm_rms_epsilon",
            float("inf"),
            V.FLOAT32,
            "rms_norm_eps: want a small positive number, got inf",
        ),
        (
            "attention.layer_norm_rms_epsilon",
            -1e-6,
            V.FLOAT32,
            "rms_norm_eps: want a small positive number, got -1e-06",
        ),
        ("tokenizer.ggml.eos_token_id", 288, V.UINT32, "eos_token_id: want 0 to 287, got 288"),
        ("tokenizer.ggml.eos_token_id", -1, V.INT32, "eos_token_id: want 0 to 287, got -1"),
        ("tokenizer.ggml.eos_token_id", "2", V.STRING, "want int, got string"),
        ("tokenizer.ggml.eot_token_id", 1.5, V.FLOAT32, "want int, got float32"),
        (
            "tokenizer.ggml.padding_token_id",
            2**32 - 2,
            V.UINT32,
            "pad_token_id: want 0 to 287, got 4294967294",
        ),
        ("tokenizer.ggml.padding_token_id", "x", V.STRING, "want int, got string"),
    ],
)
def test_metadata_that_contradicts_itself_is_named(tmp_path, key, value, kind, message):
    key = key if "." in key and key.split(".")[0] in ("general", "tokenizer") else PREFIX + key
    if message.startswith("want"):
        message = f"{key}: {message}"
    assert gguf_fault(tmp_path, key, value, kind) == message


@pytest.mark.parametrize(
    "key, value, element, message",
    [
        (
            "qwen35moe.attention.recurrent_layers",
            ["yes"] * 4,
            V.STRING,
            "want list of bool, got array of 4 string",
        ),
        ("qwen35moe.attention.recurrent_layers", [1] * 4, V.INT32, "want list of bool, got array of 4 int32"),
        ("qwen35moe.rope.dimension_sections", ["a"], V.STRING, "want list of int, got array of 1 string"),
        ("tokenizer.ggml.eos_token_ids", [0.5], V.FLOAT32, "want list of int, got array of 1 float32"),
        (
            "tokenizer.ggml.tokens",
            [f"t{i}" for i in range(289)],
            V.STRING,
            "want at most 288 as token_embd.weight has rows, got 289",
        ),
    ],
)
def test_arrays_of_another_element_type_are_named(tmp_path, key, value, element, message):
    assert gguf_fault(tmp_path, key, value, V.ARRAY, element) == f"{key}: {message}"


def hf_values(**change):
    return config_of(GOLDEN / "pattern31.gguf").to_hf() | change


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": None}, "hidden_size: want an integer, got None"),
        ({"hidden_size": True}, "hidden_size: want an integer, got True"),
        ({"hidden_size": 64.0}, "hidden_size: want an integer, got 64.0"),
        ({"hidden_size": -1}, f"hidden_size: want 1 to {BIG}, got -1"),
        ({"hidden_size": 10**19}, f"hidden_size: want 1 to {BIG}, got {10**19}"),
        ({"num_experts": "6"}, "num_experts: want an integer, got '6'"),
        ({"num_experts": [[[[[6]]]]]}, "num_experts: want an integer, got [[[[...]]]]"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: want 1 to 1024, got 0"),
        (
            {"num_hidden_layers": 10**9, "layer_types": None},
            "num_hidden_layers: want 1 to 1024, got 1000000000",
        ),
        (
            {"layer_types": None, "full_attention_interval": 0},
            "full_attention_interval: want at least 1, got 0",
        ),
        ({"layer_types": ["linear_attention"]}, "layer_types: want 4 entries as num_hidden_layers, got 1"),
        ({"layer_types": "linear"}, "layer_types: want 4 entries as num_hidden_layers, got 'linear'"),
        (
            {"layer_types": ["linear_attention"] * 3 + ["mamba"]},
            "layer_types[3]: want 'linear_attention' or 'full_attention', got 'mamba'",
        ),
        (
            {"layer_types": ["linear_attention"] * 3 + [{}]},
            "layer_types[3]: want 'linear_attention' or 'full_attention', got {}",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: want \"silu\" or no such key, got 'gelu'"),
        ({"hidden_act": ["silu"]}, "hidden_act: want \"silu\" or no such key, got ['silu']"),
        ({"attention_bias": True}, "attention_bias: want false or no such key, got True"),
        ({"attention_bias": "no"}, "attention_bias: want false or no such key, got 'no'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: want true or false, got 'false'"),
        (
            {"head_dim": 2**17, "rope_parameters": {"rope_theta": 1e7}},
            "head_dim: want at most 65536, got 131072",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e7}},
            "rope_parameters.rope_type: want 'default' or 'yarn', got 'linear'",
        ),
        ({"rope_parameters": [1]}, "rope_parameters: want an object, got [1]"),
        ({"rope_parameters": {}, "rope_scaling": "x"}, "rope_scaling: want an object, got 'x'"),
        (
            {"rope_parameters": {"rope_theta": float("nan")}},
            "rope_parameters.rope_theta: want a finite number, got nan",
        ),
        (
            {"rope_parameters": {"rope_theta": float("inf")}},
            "rope_parameters.rope_theta: want a finite number, got inf",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": float("inf")}},
            "rope_parameters.partial_rotary_factor: want a finite number, got inf",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 1e300}},
            "rope_parameters.partial_rotary_factor: want a share of head_dim, 0 to 1, got 1e+300",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e7, "mrope_section": 3}},
            "rope_parameters.mrope_section: want a list of integers, got 3",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e7, "mrope_section": ["x"]}},
            "rope_parameters.mrope_section: want a list of integers, got ['x']",
        ),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: want a number, got '1e-6'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: want a small positive number, got 0.0"),
        ({"vocab_size": 0}, f"vocab_size: want 1 to {BIG}, got 0"),
        ({"eos_token_id": "x"}, "eos_token_id: want token ids, got 'x'"),
        ({"eos_token_id": [2, None]}, "eos_token_id: want token ids, got [2, None]"),
        ({"eos_token_id": True}, "eos_token_id: want token ids, got True"),
        ({"eos_token_id": 288}, "eos_token_id: want 0 to 287, got 288"),
        ({"pad_token_id": -2}, "pad_token_id: want 0 to 287, got -2"),
        ({"pad_token_id": "x"}, "pad_token_id: want an integer, got 'x'"),
        ({"text_config": [1]}, "text_config: want an object, got [1]"),
    ],
)
def test_config_json_faults_are_named(change, message):
    with pytest.raises((FileFormatError, CheckpointError)) as caught:
        Config.from_hf(hf_values(**change))
    assert str(caught.value) == f"config.json: {message}"


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "rms_norm_eps",
    ],
)
def test_a_missing_field_is_named(key):
    values = hf_values()
    del values[key]
    want = "a number" if key == "rms_norm_eps" else "an integer"
    with pytest.raises(FileFormatError) as caught:
        Config.from_hf(values)
    assert str(caught.value) == f"config.json: {key}: want {want}, got None"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "want some bytes, got an empty file"),
        ("[1]", "want a JSON object, got a list"),
        ('{"a":' * 100000, "want a JSON object, got one nested too deeply"),
        ('{"hidden_size": 64, "hidden_size": 65}', "want a JSON object, got the key 'hidden_size' twice"),
        ('{"hidden_size": ' + "9" * 10**6 + "}", "want a JSON object, got an integer of 1000000 digits"),
        (
            "{,}",
            "want a JSON object, got Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1)",
        ),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_config_json_that_is_none(tmp_path, name, text, message):
    (tmp_path / "config.json").write_text(json.dumps(hf_values()))
    (tmp_path / name).write_text(text)
    with pytest.raises(FileFormatError) as caught:
        read_hf_config(tmp_path)
    assert str(caught.value) == f"{tmp_path / name}: file: {message}"


@pytest.mark.parametrize(
    "ids, message",
    [("x", "want token ids, got 'x'"), ([288], "want 0 to 287, got 288"), (-1, "want 0 to 287, got -1")],
)
def test_generation_config_ids(tmp_path, ids, message):
    (tmp_path / "config.json").write_text(json.dumps(hf_values()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises((FileFormatError, CheckpointError)) as caught:
        read_hf_config(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'generation_config.json'}: eos_token_id: {message}"


def test_numbers_that_json_does_not_have_are_no_fault_elsewhere(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_values(time_step_limit=[0.0, float("inf")])))
    assert read_hf_config(tmp_path).hidden_size == 64


@pytest.mark.parametrize("sections", [None, [], [3], [3, 3]])
def test_sections_that_are_not_three_are_left_out(sections):
    """transformers indexes three, and has a default of three, which change no logit of a text."""
    config = Config.from_hf(hf_values(rope_parameters={"rope_theta": 1e7, "mrope_section": sections}))
    assert "mrope_section" not in config.to_hf()["rope_parameters"]
    parameters = {"rope_theta": 1e7, "mrope_section": [4, 4, 4, 0]}
    assert Config.from_hf(hf_values(rope_parameters=parameters)).to_hf()["rope_parameters"][
        "mrope_section"
    ] == [4, 4, 4, 0]


@pytest.mark.parametrize("value, kind", [(-1, V.INT32), (2**32 - 1, V.UINT32)])
def test_no_padding_token_of_a_gguf(tmp_path, value, kind):
    key = "tokenizer.ggml.padding_token_id"
    path = rewrite(GOLDEN / "pattern31.gguf", tmp_path / "x.gguf", {key: (value, kind)})
    assert config_of(path).pad_token_id is None
