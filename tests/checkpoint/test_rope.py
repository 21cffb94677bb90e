"""YaRN from either kind of file, as transformers computes it; every other scaling is one line."""

import dataclasses
import json
import math

import numpy as np
import pytest
from configurations import config_of, gguf_fault, hf_fault
from gguf.constants import GGUFValueType as V
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import CONVERTER, GOLDEN
from rewrite import rewrite

import pyengine
from pyengine import demo
from pyengine.checkpoint.config import Config
from pyengine.checkpoint.rope import Yarn, attention_factor, inverse_frequencies

A = json.loads((CONVERTER / "config.json").read_text())
PLAIN = GOLDEN / "pattern31.gguf"
SCALING = "qwen35moe.rope.scaling."
IDS = np.random.default_rng(1729).integers(0, 288, 40)
LOGN4 = 0.1 * math.log(4) + 1


def with_scaling(tmp_path, source=PLAIN, **change):
    return rewrite(source, tmp_path / "x.gguf", {SCALING + key: value for key, value in change.items()})


def rope(**values):
    return A | {"rope_parameters": A["rope_parameters"] | values}


# ---- the reported cases --------------------------------------------------------------------------


def test_yarn_of_a_gguf_is_computed(tmp_path):
    default = demo.CHECKPOINT
    path = with_scaling(
        tmp_path,
        default,
        type=("yarn", V.STRING),
        factor=(4.0, V.FLOAT32),
        original_context_length=(256, V.UINT32),
    )
    config = config_of(path)
    assert config.yarn == Yarn(4.0, 256, LOGN4) and config.rope_scale == LOGN4
    assert dataclasses.replace(config, yarn=None) == config_of(default)
    for arithmetic in ("float64", "locked"):
        plain, got = (pyengine.load(p, arithmetic).forward(IDS) for p in (default, path))
        assert (plain != got)[1:].any(axis=1).all()  # a first token attends to itself alone


def test_linear_of_a_gguf_is_refused(tmp_path):
    path = with_scaling(tmp_path, type=("linear", V.STRING), factor=(2.0, V.FLOAT32))
    assert gguf_fault(path) == f"{SCALING}type: want 'yarn' as {SCALING}factor is 2.0, got 'linear'"
    path = with_scaling(tmp_path, factor=(2.0, V.FLOAT32))
    assert (
        gguf_fault(path) == f"{SCALING}type: want 'yarn' as {SCALING}factor is 2.0, got no such key (linear)"
    )


def test_yarn_of_a_rope_scaling_is_computed():
    """Older files: theta and the share at the top, `type` for `rope_type`."""
    config = {key: value for key, value in A.items() if key != "rope_parameters"} | {
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    }
    got = Config.from_hf(config)
    assert got.yarn == Yarn(4.0, 512, LOGN4)
    assert dataclasses.replace(got, yarn=None, mrope_section=(3, 3, 2)) == Config.from_hf(A)


def test_a_rope_scaling_beside_other_rope_parameters_is_refused():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert hf_fault(A | {"rope_scaling": scaling}) == (
        "rope_parameters.rope_type: want 'yarn' as rope_scaling.type, got 'default'"
    )


def test_two_names_of_the_type_that_differ_are_refused():
    assert hf_fault(rope(type="yarn", factor=4.0)) == (
        "rope_parameters.rope_type: want 'yarn' as rope_parameters.type, got 'default'"
    )


def test_type_alone_is_the_type():
    parameters = {key: value for key, value in A["rope_parameters"].items() if key != "rope_type"}
    config = A | {"rope_parameters": parameters | {"type": "yarn", "factor": 4.0}}
    assert Config.from_hf(config).yarn == Yarn(4.0, A["max_position_embeddings"], LOGN4)


# ---- wherever it stands --------------------------------------------------------------------------

TOP = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


@st.composite
def placements(draw):
    """One YaRN dictionary, spread over a config.json in one of the ways that people have it."""
    yarn = {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
        "beta_fast": 16.0,
        "beta_slow": 2,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    for name in draw(st.sampled_from([("type",), ("rope_type",), ("type", "rope_type")])):
        yarn[name] = "yarn"
    objects = {"text": {k: v for k, v in A.items() if k != "rope_parameters"}, "top": {}}
    where = draw(st.sampled_from([("text",), ("top",), ("text", "top")]))
    names = draw(
        st.sampled_from([("rope_parameters",), ("rope_scaling",), ("rope_parameters", "rope_scaling")])
    )
    apart = draw(st.sets(st.sampled_from(TOP)))
    for place in where:
        inside = {k: v for k, v in yarn.items() if k not in apart or draw(st.booleans())}
        objects[place] |= {key: yarn[key] for key in apart}
        objects[place] |= {name: dict(inside) for name in names}
    if draw(st.booleans()) and where == ("text",):
        return objects["text"]
    return {"model_type": "qwen3_5_moe", "text_config": objects["text"], **objects["top"]}


@settings(max_examples=200, deadline=None)
@given(config=placements())
def test_any_placement_of_a_yarn_dictionary_is_one_config(config):
    want = Config.from_hf(A)
    yarn = Yarn(4.0, 512, LOGN4, 16.0, 2.0)
    assert Config.from_hf(config) == dataclasses.replace(want, rope_theta=1e6, yarn=yarn)


CONTRADICTIONS = {
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "factor": 2.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 48.0,
    "rope_type": "default",
}


@settings(max_examples=100, deadline=None)
@given(config=placements(), name=st.sampled_from(sorted(CONTRADICTIONS)))
def test_any_contradiction_is_refused_with_both_places(config, name):
    other = {name: CONTRADICTIONS[name]}
    scope = config.setdefault("text_config", dict(config))
    if "rope_scaling" in scope and "rope_parameters" not in scope:
        scope["rope_parameters"] = other
    elif "rope_scaling" not in scope:
        scope["rope_scaling"] = other
    else:
        scope["rope_scaling"] = scope["rope_scaling"] | other
    message = hf_fault(config)
    assert message.count(name.removeprefix("rope_")) >= 1 and " as " in message and ", got " in message


@settings(max_examples=100, deadline=None)
@given(
    kind=st.one_of(
        st.sampled_from(
            ["linear", "dynamic", "longrope", "llama3", "su", "ntk", "mrope", "proportional", "YARN"]
        ),
        st.text(max_size=20).filter(lambda kind: kind not in ("yarn", "default")),
    ),
    name=st.sampled_from(["type", "rope_type"]),
    place=st.sampled_from(["rope_parameters", "rope_scaling", None]),
    nested=st.booleans(),
)
def test_any_other_type_is_refused(kind, name, place, nested):
    base = {key: value for key, value in A.items() if key != "rope_parameters"}
    given_ = {name: kind, "rope_theta": 1e7}
    config = base | ({place: given_ | {"factor": 4.0}} if place else given_)
    config = {"text_config": config} if nested else config
    label = ("text_config." if nested else "") + (f"{place}." if place else "") + name
    assert hf_fault(config).startswith(f"{label}: want 'default' or 'yarn', got ")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"rope_type": "default", "factor": 4.0},
            "rope_type: want 'yarn' as rope_parameters.factor is 4.0, got",
        ),
        ({"rope_type": None, "factor": 4.0}, "want 'yarn' as rope_parameters.factor is 4.0, got no such key"),
        ({"attention_factor": 1.2}, "rope_type: want 'yarn' as rope_parameters.attention_factor is 1.2, got"),
        ({"long_factor": [1.0]}, "long_factor: want no such key, got [1.0]"),
        ({"low_freq_factor": 1.0}, "low_freq_factor: want no such key, got 1.0"),
        ({"extrapolation_factor": 0.5}, "extrapolation_factor: want 1 or no such key, got 0.5"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention: want no such key, got {"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    assert message in hf_fault(rope(**change))


# ---- values --------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"factor": 0.5}, "factor: want a finite number from 1 on, got 0.5"),
        ({"factor": -4}, "factor: want a finite number from 1 on, got -4.0"),
        ({"factor": float("inf")}, "factor: want a finite number, got inf"),
        ({"factor": 10**400}, "factor: want a finite number, got inf"),
        ({"factor": "4"}, "factor: want a number, got '4'"),
        ({"factor": True}, "factor: want a number, got True"),
        (
            {"original_max_position_embeddings": 0},
            "original_max_position_embeddings: want 1 to 2147483647, got 0",
        ),
        (
            {"original_max_position_embeddings": 512.5},
            "original_max_position_embeddings: want an integer, got 512.5",
        ),
        ({"attention_factor": 0}, "attention_factor: want a number from 1e-6 to 1e6, got 0.0"),
        ({"attention_factor": -1.0}, "attention_factor: want a number from 1e-6 to 1e6, got -1.0"),
        ({"beta_fast": 1}, "beta_fast: want a number above beta_slow 1.0, up to 1e6, got 1.0"),
        ({"beta_slow": 64}, "beta_fast: want a number above beta_slow 64.0, up to 1e6, got 32.0"),
        ({"beta_slow": 0}, "beta_slow: want a number from 1e-6 to 1e6, got 0.0"),
        ({"beta_fast": 1e300}, "beta_fast: want a number above beta_slow 1.0, up to 1e6, got 1e+300"),
        ({"mscale": -1.0, "mscale_all_dim": 1.0}, "mscale: want a number from 0 to 1e6, got -1.0"),
        ({"truncate": "no"}, "truncate: want true or false, got 'no'"),
        ({"truncate": None}, "truncate: want true or false, got None"),
    ],
)
def test_values_out_of_range_are_named(change, message):
    got = hf_fault(rope(**YARN | change))
    assert got.removeprefix("rope_parameters.") == message


def test_a_factor_that_float32_cannot_hold_is_named():
    assert (
        hf_fault(rope(**YARN | {"factor": 1e40})) == "factor: want frequencies that float32 holds, got 1e+40"
    )
    assert hf_fault(rope(rope_theta=1e300)).endswith("want frequencies that float32 holds, got 1e+300")
    assert hf_fault(rope(**YARN | {"rope_theta": 1})) == "rope_theta: want a number above 1 for YaRN, got 1.0"


def test_missing_values_are_what_transformers_makes_of_them():
    without = {key: value for key, value in YARN.items() if key != "factor"}
    assert hf_fault(rope(**without)) == "factor: want a number, got None"
    assert Config.from_hf(rope(**without, factor=None)).yarn.factor == 8  # 4096 / 512
    alone = {"rope_type": "yarn", "factor": 2.0}
    assert Config.from_hf(rope(**alone)).yarn.original_max_position_embeddings == 4096
    nowhere = {key: value for key, value in rope(**alone).items() if key != "max_position_embeddings"}
    assert hf_fault(nowhere) == "max_position_embeddings: want an integer, got None"
    assert Config.from_hf(rope(**YARN, mscale=1.0, mscale_all_dim=1.0)).rope_scale == 1
    assert Config.from_hf(rope(**YARN, mscale=0.7)).rope_scale == LOGN4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"factor": None}, "factor: want float, got no such key"),
        ({"factor": (0.5, V.FLOAT32)}, "factor: want a finite number from 1 on, got 0.5"),
        ({"factor": (float("nan"), V.FLOAT32)}, "factor: want a finite number from 1 on, got nan"),
        ({"factor": (4, V.UINT32)}, "factor: want float, got uint32"),
        ({"original_context_length": (0, V.UINT32)}, "original_context_length: want 1 to 2147483647, got 0"),
        (
            {"yarn_beta_fast": (0.5, V.FLOAT32)},
            "yarn_beta_fast: want a number above beta_slow 1.0, up to 1e6",
        ),
        ({"yarn_attn_factor": (0.0, V.FLOAT32)}, "yarn_attn_factor: want a number from 1e-6 to 1e6, got 0.0"),
        ({"yarn_ext_factor": (0.0, V.FLOAT32)}, "yarn_ext_factor: want 1 or -1 or no such key, got 0.0"),
        ({"attn_factor": (1.5, V.FLOAT32)}, "attn_factor: want 1 or no such key, got 1.5"),
        ({"type": (1, V.UINT32)}, "type: want str, got uint32"),
    ],
)
def test_values_of_a_gguf_out_of_range_are_named(tmp_path, change, message):
    yarn = {
        "type": ("yarn", V.STRING),
        "factor": (4.0, V.FLOAT32),
        "original_context_length": (256, V.UINT32),
    }
    path = with_scaling(tmp_path, **{k: v for k, v in (yarn | change).items() if v is not None})
    assert gguf_fault(path).startswith(SCALING + message)


def test_what_a_gguf_says_beyond_the_factor(tmp_path):
    path = with_scaling(
        tmp_path,
        type=("yarn", V.STRING),
        factor=(1.1, V.FLOAT32),
        yarn_attn_factor=(1.25, V.FLOAT32),
        yarn_beta_fast=(33.3, V.FLOAT32),
        yarn_beta_slow=(2.0, V.FLOAT32),
        yarn_ext_factor=(1.0, V.FLOAT32),
    )
    assert config_of(path).yarn == Yarn(1.1, 4096, 1.25, 33.3, 2.0)  # the decimals that were meant


def test_config_json_carries_it_on():
    config = config_of(GOLDEN / "yarn.gguf")
    assert config.yarn == Yarn(4.0, 128, LOGN4, 4.0, 0.5)
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    odd = dataclasses.replace(config, yarn=Yarn(3.7, 77, 1.01, 9.5, 0.25, truncate=False))
    assert Config.from_hf(json.loads(json.dumps(odd.to_hf()))) == odd


# ---- the frequencies -----------------------------------------------------------------------------


@pytest.mark.golden
@settings(max_examples=300, deadline=None)
@given(
    dim=st.sampled_from([8, 12, 16, 32, 64, 96, 128]),
    share=st.sampled_from([1, 2, 4]),
    theta=st.one_of(st.sampled_from([1e4, 1e6, 1e7]), st.floats(1.5, 1e8)),
    factor=st.one_of(st.sampled_from([1, 1.0, 2, 4.0, 40]), st.floats(1, 1000)),
    original=st.integers(1, 2**20),
    betas=st.tuples(st.one_of(st.none(), st.floats(3, 200)), st.one_of(st.none(), st.floats(0.01, 2.5))),
    mscale=st.one_of(st.none(), st.tuples(st.floats(0, 3), st.floats(0, 3))),
    given_=st.one_of(st.none(), st.floats(0.1, 3)),
    truncate=st.sampled_from([None, True, False]),
)
def test_every_bit_is_transformers(dim, share, theta, factor, original, betas, mscale, given_, truncate):
    """Where torch's float32 power is the correctly rounded one; where it is not, only there."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import _compute_yarn_parameters

    transformers.utils.logging.set_verbosity_error()
    values = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    values |= {k: v for k, v in zip(("beta_fast", "beta_slow"), betas) if v is not None}
    values |= dict(zip(("mscale", "mscale_all_dim"), mscale or ()))
    values |= {} if given_ is None else {"attention_factor": given_}
    values |= {} if truncate is None else {"truncate": truncate}
    values |= {"rope_theta": theta, "partial_rotary_factor": 1 / share}
    ours = Config.from_hf(A | {"head_dim": dim * share, "rope_parameters": dict(values)})
    theirs = transformers.Qwen3_5MoeTextConfig(head_dim=dim * share, rope_parameters=dict(values))
    want, scale = _compute_yarn_parameters(theirs)
    assert ours.rope_scale == scale
    power = (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)).numpy()
    exponent = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    same = power == np.power(np.float64(np.float32(theta)), exponent).astype(np.float32)
    assert (ours.inv_freq().view(np.int32) == want.numpy().view(np.int32))[same].all() and same.any()


def test_a_factor_of_1_leaves_the_frequencies_and_the_scale():
    plain = inverse_frequencies(64, 1e7)
    assert (
        np.abs(inverse_frequencies(64, 1e7, Yarn(1.0, 262144, attention_factor(1.0))) / plain - 1).max()
        < 1e-6
    )
    assert attention_factor(1.0) == 1 and attention_factor(4.0) == LOGN4


def test_fast_frequencies_stay_and_slow_ones_are_divided():
    plain, got = inverse_frequencies(64, 1e7), inverse_frequencies(64, 1e7, Yarn(4.0, 262144, 1.0))
    ratio = got / plain
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(0.25) and (np.diff(ratio) < 1e-6).all()


@pytest.mark.parametrize(
    "largest, original, factor, context",
    [(512, 512, 4.0, 2048), (2048, 512, 4.0, 2048), (4096, 512, 4.0, 4096), (100, 33, 8.5, 280)],
)
def test_the_context_is_yarns(largest, original, factor, context):
    """Cards add the dictionary and leave max_position_embeddings as it was."""
    config = rope(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
    assert Config.from_hf(config | {"max_position_embeddings": largest}).context == context
    assert Config.from_hf(A | {"max_position_embeddings": largest}).context == largest


def test_a_prompt_within_yarns_context_is_not_warned_of(tmp_path, recwarn):
    path = rewrite(
        PLAIN,
        tmp_path / "x.gguf",
        {
            SCALING + "type": ("yarn", V.STRING),
            SCALING + "factor": (4.0, V.FLOAT32),
            "qwen35moe.context_length": (16, V.UINT32),
        },
    )
    model = pyengine.load(path)
    assert model.context == 64
    assert len(model.generate(list(range(1, 21)), max_tokens=3, context=40, ignore_end=True).ids) == 3
    assert not recwarn.list
