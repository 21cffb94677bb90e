"""The sampling that a checkpoint asks for: read as transformers reads it, and written for it."""

import json
import math
import warnings

import pytest
from chat_models import MODEL
from gguf.constants import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite import rewrite

from pyengine import open_checkpoint
from pyengine.errors import FileFormatError, PyengineWarning, UnknownKeyWarning
from pyengine.quantizer.quantize import quantize
from pyengine.text.sampler import Sampler
from pyengine.text.sampling import checkpoint_settings, to_generation_config


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "int8"
    quantize(MODEL, int8=path)
    return path


def of_directory(directory, text):
    (directory / "generation_config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return checkpoint_settings(open_checkpoint(directory))


def of_gguf(tmp_path, **keys):
    metadata = {}
    for name, value in keys.items():
        kind = {float: "FLOAT32", int: "INT32", str: "STRING"}[type(value)]
        metadata[f"general.sampling.{name}"] = value, GGUFValueType[kind]
    return checkpoint_settings(open_checkpoint(rewrite(MODEL, tmp_path / "m.gguf", metadata=metadata)))


@pytest.mark.parametrize("top_k", [-1, 0, None])
def test_a_directory_turns_top_k_off(directory, top_k):
    asked = of_directory(directory, {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": top_k})
    sampler = Sampler(**asked)
    assert (sampler.temperature, sampler.top_p, sampler.top_k) == (0.7, 1.0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": False, "temperature": 0, "top_k": -1, "top_p": None},
        {"temperature": 0.7},
        {"do_sample": None, "temperature": 0.7},
        {"do_sample": True, "temperature": 0},
    ],
)
def test_a_directory_that_asks_for_the_likeliest(directory, fields):
    assert Sampler(**of_directory(directory, fields)).temperature == 0


@pytest.mark.parametrize("value", ["true", 1, 0, []])
def test_do_sample_is_a_truth_value(directory, value):
    with pytest.raises(FileFormatError, match=r"generation_config.json: do_sample: want true or false, got "):
        of_directory(directory, {"do_sample": value})


def test_an_unknown_null_of_a_generation_config_says_nothing(directory, recwarn):
    assert of_directory(directory, {"nobody_knows": None}) == {"temperature": 0.0}
    assert not recwarn.list


@pytest.mark.golden
@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "temperature": None, "min_p": None, "repetition_penalty": None},
        {"do_sample": True, "top_k": 0},
        {"temperature": 0.5, "repetition_penalty": 1.5},
    ],
)
def test_settings_are_those_of_transformers(directory, fields):
    """What transformers' `generate` works with, once its own defaults are in."""
    from transformers import GenerationConfig

    ours = Sampler(**of_directory(directory, fields))
    theirs = GenerationConfig.from_pretrained(directory)
    theirs.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    assert ours.temperature == (theirs.temperature if theirs.do_sample else 0)
    assert ours.repetition_penalty == theirs.repetition_penalty
    if theirs.do_sample:
        assert (ours.top_k, ours.top_p, ours.min_p) == (theirs.top_k, theirs.top_p, theirs.min_p or 0)


BAD = {
    "temperature": [-1, "hot", math.inf, [1], True],
    "top_k": [-2, 1.5, "20"],
    "top_p": [-0.1, 1.5, "1"],
    "min_p": [-0.1, 2],
    "repetition_penalty": [0, -1, "1"],
    "penalty_last_n": [-2, 0.5],
}


@pytest.mark.parametrize(
    "field, value", [(field, value) for field, values in BAD.items() for value in values]
)
def test_a_bad_value_names_file_and_field(directory, field, value):
    text = json.dumps({"do_sample": True, field: value}).replace("Infinity", "1e999")
    with pytest.raises(FileFormatError) as error:
        of_directory(directory, text)
    assert str(error.value).startswith(f"{directory / 'generation_config.json'}: {field}: want ")
    assert ", got " in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [("temp", -0.5), ("top_k", -2), ("top_p", 1.5), ("penalty_repeat", 0.0), ("penalty_last_n", -2)],
)
def test_a_bad_value_of_a_gguf_names_its_key(tmp_path, key, value):
    with pytest.raises(FileFormatError, match=rf"m.gguf: general\.sampling\.{key}: want .*, got "):
        of_gguf(tmp_path, **{key: value})


def test_a_gguf_turns_top_k_off(tmp_path):
    assert Sampler(**of_gguf(tmp_path, temp=0.5, top_k=-1)).top_k == 0


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"do_sample": True, "typical_p": 0.9}, "typical_p: want 1 or none, got 0.9"),
        ({"num_beams": 4}, "num_beams: want 1 or none, got 4"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size: want 0 or none, got 3"),
        ({"suppress_tokens": [1, 2]}, "suppress_tokens: want none, got [1, 2]"),
        ({"guidance_scale": 1.5}, "guidance_scale: want 1 or none, got 1.5"),
        ({"frobnicate": 1}, "frobnicate: not a key that is known here"),
    ],
)
def test_a_sampler_that_is_not_here_is_named(directory, fields, name):
    with pytest.warns(PyengineWarning) as warned:
        of_directory(directory, fields)
    assert len(warned) == 1 and name in str(warned[0].message)
    assert str(warned[0].message).startswith(f"{directory / 'generation_config.json'}: ")
    assert issubclass(warned[0].category, UnknownKeyWarning) == ("frobnicate" in fields)


@pytest.mark.parametrize(
    "keys, name",
    [
        ({"mirostat": 2}, "general.sampling.mirostat: want 0 or none, got 2"),
        ({"xtc_probability": 0.5}, "general.sampling.xtc_probability: want 0 or none, got 0.5"),
        ({"sequence": "temperature;top_k;top_p;min_p;penalties"}, "general.sampling.sequence: want "),
        ({"sequence": "top_k"}, "general.sampling.sequence: want "),
        ({"frobnicate": 1}, "general.sampling.frobnicate: not a key that is known here"),
    ],
)
def test_a_sampler_of_a_gguf_that_is_not_here_is_named(tmp_path, keys, name):
    with pytest.warns(PyengineWarning, match="m.gguf") as warned:
        of_gguf(tmp_path, **keys)
    assert len(warned) == 1 and name in str(warned[0].message)


def test_what_changes_nothing_is_not_named(directory, tmp_path):
    """The fields of Qwen3.5's own file; neutral values; llama.cpp's order of samplers."""
    qwen = {
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": [2, 1],
        "pad_token_id": 1,
        "temperature": 0.6,
    }
    qwen |= {"top_k": 20, "top_p": 0.95, "transformers_version": "4.57.0", "_from_model_config": True}
    neutral = {
        "typical_p": 1.0,
        "num_beams": 1,
        "suppress_tokens": [],
        "sequence_bias": None,
        "max_length": 20,
    }
    order = "penalties;dry;top_n_sigma;top-k;typ_p;top_p;min_p;xtc;temp"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_directory(directory, qwen | neutral)
        of_directory(directory, {"typical_p": 0.9})  # for draws only, and there are none
        of_gguf(
            tmp_path, sequence=order, mirostat=0, mirostat_tau=5.0, xtc_probability=0.0, xtc_threshold=0.1
        )


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0]),
        "top_k": st.integers(-1, 50),
        "top_p": st.sampled_from([0.0, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.1]),
        "penalty_last_n": st.integers(-1, 70),
    },
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(asked=SETTINGS)
def test_what_is_written_is_read_as_the_same(directory, asked):
    """A GGUF's settings in a directory give the same draws."""
    before, after = Sampler(**asked), Sampler(**of_directory(directory, to_generation_config(asked)))
    if before.temperature == 0:
        assert after.temperature == 0
    else:
        names = "temperature", "top_k", "top_p", "min_p"
        assert [getattr(before, name) for name in names] == [getattr(after, name) for name in names]
    assert before.repetition_penalty == after.repetition_penalty
    if before.repetition_penalty != 1:
        assert before.penalty_last_n == after.penalty_last_n
