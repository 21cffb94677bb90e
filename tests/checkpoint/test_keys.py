"""Every key of a GGUF's architecture and every field of a config.json is read, harmless, or neutral.

A key that changes the computation is refused, one that nobody knows is a warning with its name.
"""

import json
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version

import gguf
import numpy as np
import pytest
from configurations import config_of, gguf_fault, hf_fault
from gguf.constants import GGUFValueType as V
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paths import CONVERTER, GOLDEN
from rewrite import rewrite

from pyengine.checkpoint import fields, keys
from pyengine.checkpoint.config import Config, read_hf_config
from pyengine.checkpoint.families import FAMILIES
from pyengine.cli import main
from pyengine.errors import CheckpointError, FileFormatError, UnknownKeyWarning
from pyengine.files.gguf import GGUF

PLAIN = GOLDEN / "pattern31.gguf"
PREFIX = "qwen35moe."
A = json.loads((CONVERTER / "config.json").read_text())


def with_keys(tmp_path, change):
    """A GGUF with other metadata: {short key: (value, type[, element])}."""
    return rewrite(PLAIN, tmp_path / "x.gguf", {PREFIX + key: value for key, value in change.items()})


def fault(path):
    """The message after the path and the architecture."""
    return gguf_fault(path).removeprefix(PREFIX)


# ---- the lists -----------------------------------------------------------------------------------


FAMILY = FAMILIES["qwen35moe"]
OF_GGUF, OF_HF = fields.gguf_lists(FAMILY), fields.hf_lists(FAMILY)


@pytest.mark.parametrize(
    "lists", [keys.ROPE, *map(fields.gguf_lists, FAMILIES.values()), *map(fields.hf_lists, FAMILIES.values())]
)
def test_a_key_stands_in_one_list(lists):
    neutral = lists.neutral.keys()
    assert not lists.read & lists.harmless
    assert not (lists.read | lists.harmless) & neutral
    assert not [key for key in lists.read | neutral if key.startswith(lists.harmless_prefixes)]


def test_every_key_that_gguf_py_knows_has_a_list():
    """Of the version that the lists were made with; keys of a later one are warned of."""
    known = OF_GGUF.read | OF_GGUF.harmless | OF_GGUF.neutral.keys()
    groups = [gguf.constants.Keys, *(v for v in vars(gguf.constants.Keys).values() if isinstance(v, type))]
    groups += [inner for group in groups for inner in vars(group).values() if isinstance(inner, type)]
    names = {
        value.removeprefix("{arch}.")
        for group in groups
        for value in vars(group).values()
        if isinstance(value, str) and value.startswith("{arch}.")
    }
    names = {name.replace("{dense}", "dense_2") for name in names}
    assert len(names) > 70
    unplaced = {name for name in names - known if not name.startswith(keys.GGUF.harmless_prefixes)}
    assert not unplaced or tuple(map(int, version("gguf").split("."))) > (0, 19, 0)


@pytest.mark.parametrize("name, kind", [("qwen35", "Qwen3_5Text"), ("qwen35moe", "Qwen3_5MoeText"),
                                        ("qwen3next", "Qwen3Next")])  # fmt: skip
def test_transformers_configurations_have_lists(name, kind):
    configuration = getattr(pytest.importorskip("transformers"), f"{kind}Config")()
    lists = fields.hf_lists(FAMILIES[name])
    assert not configuration.to_dict().keys() - (lists.read | lists.harmless | lists.neutral.keys())


def test_what_is_not_in_the_list_cannot_be_read(tmp_path):
    meta = fields.Metadata(GGUF.open(PLAIN))
    with pytest.raises(AssertionError, match="not among the keys that are read"):
        meta.integer("logit_scale")


# ---- keys that change the computation ------------------------------------------------------------

REFUSED = [
    ("attention.scale", 0.5, V.FLOAT32, "want 0 or 1 / sqrt(48), got 0.5"),
    ("attention.sliding_window", 512, V.UINT32, "want 0 or no such key, got 512"),
    ("attention.causal", False, V.BOOL, "want true or no such key, got False"),
    ("attention.clamp_kqv", 8.0, V.FLOAT32, "want 0 or no such key, got 8.0"),
    ("attention.max_alibi_bias", 8.0, V.FLOAT32, "want 0 or no such key, got 8.0"),
    ("attn_logit_softcapping", 50.0, V.FLOAT32, "want 0 or no such key, got 50.0"),
    ("final_logit_softcapping", 30.0, V.FLOAT32, "want 0 or no such key, got 30.0"),
    ("hidden_act", "gelu", V.STRING, "want \"silu\" or no such key, got 'gelu'"),
    ("hidden_activation", "gelu", V.STRING, "want \"silu\" or no such key, got 'gelu'"),
    ("logit_scale", 0.5, V.FLOAT32, "want 0 or 1 or no such key, got 0.5"),
    ("residual_scale", 1.5, V.FLOAT32, "want 0 or 1 or no such key, got 1.5"),
    ("embedding_scale", 12.0, V.FLOAT32, "want 0 or 1 or no such key, got 12.0"),
    ("expert_weights_scale", 2.5, V.FLOAT32, "want 0 or 1 or no such key, got 2.5"),
    ("expert_weights_norm", False, V.BOOL, "want true or no such key, got False"),
    ("norm_top_k_prob", False, V.BOOL, "want true or no such key, got False"),
    ("expert_gating_func", 2, V.UINT32, "want 0 or 1 or no such key, got 2"),
    ("expert_group_count", 8, V.UINT32, "want 0 or 1 or no such key, got 8"),
    ("leading_dense_block_count", 1, V.UINT32, "want 0 or no such key, got 1"),
    ("use_parallel_residual", True, V.BOOL, "want false or no such key, got True"),
    ("ssm.v_head_reordered", False, V.BOOL, "want true or no such key, got False"),
    ("rope.scaling.attn_factor", 1.2, V.FLOAT32, "want 1 or no such key, got 1.2"),
    ("rope.scaling.yarn_log_multiplier", 0.1, V.FLOAT32, "want 0 or no such key, got 0.1"),
    ("rope.scaling.alpha", 1000.0, V.FLOAT32, "want 0 or no such key, got 1000.0"),
    ("rope.scale_linear", 2.0, V.FLOAT32, "want 1, got 2.0"),
    ("rope.scaling.type", "longrope", V.STRING, "want 'none' or 'yarn', got 'longrope'"),
    ("vocab_size", 287, V.UINT32, "want 288 as token_embd.weight has rows, got 287"),
]


@pytest.mark.parametrize("key, value, kind, message", REFUSED)
def test_metadata_that_is_not_computed_is_refused(tmp_path, key, value, kind, message):
    given = str(np.float32(value)) if kind == V.FLOAT32 else None
    got = fault(with_keys(tmp_path, {key: (value, kind)}))
    assert got.startswith(f"{key}: {message.rsplit(', got ', 1)[0]}, got ")
    assert given is None or float(got.rsplit(" ", 1)[1]) == pytest.approx(value)


@pytest.mark.parametrize("pattern", [[False, True, False, False], [True] * 4])
def test_one_layer_of_an_array_is_enough(tmp_path, pattern):
    path = with_keys(tmp_path, {"attention.sliding_window_pattern": (pattern, V.ARRAY, V.BOOL)})
    assert fault(path).startswith("attention.sliding_window_pattern: want 0 or no such key, got [")


NEUTRAL = {
    "attention.scale": (48**-0.5, V.FLOAT32),
    "attention.sliding_window": (0, V.UINT32),
    "attention.sliding_window_pattern": ([False] * 4, V.ARRAY, V.BOOL),
    "attention.causal": (True, V.BOOL),
    "expert_weights_scale": (1.0, V.FLOAT32),
    "expert_weights_norm": (True, V.BOOL),
    "expert_gating_func": (1, V.UINT32),
    "hidden_act": ("silu", V.STRING),
    "logit_scale": (0.0, V.FLOAT32),
    "rope.scaling.type": ("linear", V.STRING),
    "rope.scaling.factor": (0.0, V.FLOAT32),
    "rope.scaling.attn_factor": (1.0, V.FLOAT32),
    "rope.scaling.finetuned": (False, V.BOOL),
    "rope.scaling.original_context_length": (4096, V.UINT32),
    "rope.scaling.yarn_log_multiplier": (0.0, V.FLOAT32),
    "rope.mrope_interleaved": (True, V.BOOL),
    "ssm.v_head_reordered": (True, V.BOOL),
    "feed_forward_length": (512, V.UINT32),
    "vocab_size": (288, V.UINT32),
    "vision.block_count": (27, V.UINT32),
    "image_token_id": (7, V.UINT32),
}


@pytest.mark.parametrize("names", [[name] for name in NEUTRAL] + [list(NEUTRAL)], ids=lambda names: names[-1])
def test_neutral_metadata_loads_in_silence(tmp_path, names, recwarn):
    path = with_keys(tmp_path, {name: NEUTRAL[name] for name in names})
    assert config_of(path) == config_of(PLAIN)
    assert not recwarn.list


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act: want \"silu\" or no such key, got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: want false or no such key, got True"),
        ({"attn_output_gate": False}, "attn_output_gate: want true or no such key, got False"),
        ({"norm_topk_prob": False}, "norm_topk_prob: want true or no such key, got False"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step: want 1 or no such key, got 2"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers: want [] or no such key, got [0]"),
        ({"use_sliding_window": True}, "use_sliding_window: want false or no such key, got true"),
        ({"sliding_window": 512}, "sliding_window: want 0 or no such key, got 512"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: want 0 or no such key, got 30.0"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor: want 1 or no such key, got 2.5"),
        ({"scoring_func": "sigmoid"}, "scoring_func: want \"softmax\" or no such key, got 'sigmoid'"),
        ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config: want no such key, got {}"),
        ({"expert_bias": True}, "expert_bias: want false or no such key, got True"),
        ({"activation": "gelu"}, "activation: want \"silu\" or no such key, got 'gelu'"),
        ({"attention_multiplier": 0.1}, "attention_multiplier: want no such key, got 0.1"),
        ({"output_gate_type": "sigmoid"}, 'output_gate_type: want "swish" or "silu" or no such key'),
        ({"pyengine_dequantize": "bfloat16"}, 'pyengine_dequantize: want "exact" or no such key'),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: want no such key, got"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: want no such key, got"),
        ({"quantization": {"bits": 4}}, "quantization: want no such key, got {'bits': 4}"),
        ({"model_type": "qwen3_vl"}, "model_type: want 'qwen3_5_moe_text' or 'qwen3_5_moe' or"),
        (
            {"layer_types": ["sliding_attention"] * 4},
            "layer_types[0]: want 'linear_attention' or 'full_attention', got 'sliding_attention'",
        ),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_fields_that_are_not_computed_are_refused(change, message, nested):
    label = "text_config." if nested and "model_type" not in change else ""
    config = A | change
    if nested:
        config = {"model_type": "qwen3_5_moe", "text_config": config}
        label = "text_config."
    assert hf_fault(config).startswith(label + message)
    top = {"model_type": "qwen3_5_moe", "text_config": A, **change}  # beside the text model's, as well
    if "layer_types" not in change:
        assert hf_fault(top).startswith(message)


def test_neutral_fields_load_in_silence(recwarn):
    change = {
        "attn_output_gate": True,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "mlp_layer_types": ["sparse"] * 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "final_logit_softcapping": None,
        "quantization_config": None,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "output_gate_type": "swish",
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
    }
    assert Config.from_hf(A | change) == Config.from_hf(A)
    whole = {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": A | change,
        "vision_config": {"depth": 27, "nobody_knows": 1},
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "language_model_only": False,
        "tie_word_embeddings": False,
        "transformers_version": "5.23.0",
        "unsloth_fixed": True,
    }
    assert Config.from_hf(whole) == Config.from_hf(A)
    assert not recwarn.list


# ---- the text model's fields at the top and in text_config ---------------------------------------


def test_two_values_of_one_field_are_refused_with_both_names():
    config = {"hidden_size": 64, "text_config": A}
    assert hf_fault(config) == "text_config.hidden_size: want 64 as hidden_size, got 256"


def test_a_field_may_stand_beside_text_config():
    text = {key: value for key, value in A.items() if key not in ("hidden_size", "head_dim")}
    config = {"text_config": text, "hidden_size": 256, "head_dim": 64, "vocab_size": A["vocab_size"]}
    assert Config.from_hf(config) == Config.from_hf(A)


def test_end_ids_of_both_objects_count():
    config = {"text_config": A, "eos_token_id": [638, 5]}
    assert Config.from_hf(config).eos_token_ids == (638, 5)


# ---- keys of no list -----------------------------------------------------------------------------


def warnings_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        function()
        function()
    return [str(w.message) for w in caught if issubclass(w.category, UnknownKeyWarning)]


names = st.text(st.characters(codec="utf-8", exclude_characters="\0", categories=("L", "N", "P")), min_size=1)


def is_known(name, lists):
    return name in lists.read | lists.harmless | lists.neutral.keys() or name.startswith(
        lists.harmless_prefixes
    )


@settings(max_examples=50, deadline=None)
@given(name=names, value=st.one_of(st.booleans(), st.integers(), st.text(), st.lists(st.integers())))
def test_an_unknown_field_is_one_warning_with_its_name(name, value):
    name = f"x_{name}"
    assert not is_known(name, OF_HF)
    for config, label in (
        (A | {name: value}, name),
        ({"text_config": A, name: value}, name),
        ({"text_config": A | {name: value}}, f"text_config.{name}"),
        (A | {"rope_parameters": A["rope_parameters"] | {name: value}}, f"rope_parameters.{name}"),
    ):
        got = []
        said = warnings_of(
            lambda config=config, got=got: got.append(Config.from_hf(config, f"{name} {value}"))
        )
        assert len(said) == 1 and got[0] == Config.from_hf(A)
        shown = str(FileFormatError(f"{name} {value}", label, ""))
        assert said[0].startswith(shown) and "\n" not in said[0]


def test_an_unknown_field_of_null_says_nothing(recwarn):
    rope = A["rope_parameters"] | {"nobody_knows": None}
    for config in (A | {"nobody_knows": None}, A | {"rope_parameters": rope}):
        assert Config.from_hf({"text_config": config, "nobody_else": None}) == Config.from_hf(A)
    assert not recwarn.list


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore::pyengine.errors.UnknownKeyWarning")
@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(OF_HF.read | OF_HF.neutral.keys())),
    rope=st.booleans(),
    rope_name=st.sampled_from(sorted(keys.ROPE.read | keys.ROPE.neutral.keys())),
    value=json_values,
    nested=st.booleans(),
)
@example(name="rms_norm_eps", rope=False, rope_name="type", value=float("nan"), nested=False)
def test_any_value_of_a_field_is_a_config_or_one_line(name, rope, rope_name, value, nested):
    change = {"rope_parameters": A["rope_parameters"] | {rope_name: value}} if rope else {name: value}
    config = {"text_config": A, **change} if nested else A | change
    try:
        assert Config.from_hf(config).num_hidden_layers >= 1
    except (FileFormatError, CheckpointError) as error:
        assert str(error).startswith("config.json: ") and "want " in str(error)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix", "vocab"])
def test_a_gguf_that_is_not_a_model_says_so(tmp_path, kind):
    path = rewrite(PLAIN, tmp_path / "x.gguf", {"general.type": (kind, V.STRING)})
    with pytest.raises(FileFormatError) as caught:
        config_of(path)
    assert str(caught.value) == f"{path}: general.type: want 'model' or no such key, got '{kind}'"


@pytest.mark.parametrize("value", [("model", V.STRING), (7, V.UINT32), (["a", "b"], V.ARRAY, V.STRING)])
def test_a_type_that_says_nothing_else_loads(tmp_path, value):
    assert config_of(rewrite(PLAIN, tmp_path / "x.gguf", {"general.type": value})) == config_of(PLAIN)


@settings(max_examples=25, deadline=None)
@given(name=names)
def test_an_unknown_key_is_one_warning_with_its_name(tmp_path_factory, name):
    path = with_keys(tmp_path_factory.mktemp("x"), {f"x_{name}": (1.5, V.FLOAT32)})
    said = warnings_of(lambda: config_of(path))
    assert len(said) == 1 and f": {PREFIX}x_" in said[0] and said[0].startswith(f"{path}: ")


def test_many_unknown_keys_are_few_lines():
    said = warnings_of(lambda: Config.from_hf(A | {f"x{i}": i for i in range(10_000)}, "many"))
    assert len(said) == keys.MOST_WARNINGS + 1
    assert said[-1] == "many: 9980 more: not known here; they are ignored"


def test_keys_of_other_prefixes_are_not_the_architectures(tmp_path, recwarn):
    path = rewrite(PLAIN, tmp_path / "x.gguf", {"llama.rope.scaling.type": ("yarn", V.STRING)})
    assert config_of(path) == config_of(PLAIN)
    assert not recwarn.list


def test_the_command_prints_one_plain_line(tmp_path, capsys):
    path = with_keys(tmp_path, {"frobnicate": (1, V.UINT32)})
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr()
    assert said.err == (
        f"pyengine: warning: {path}: qwen35moe.frobnicate: not a key that is known here; it is ignored\n"
    )
    path = with_keys(tmp_path, {"rope.scaling.factor": (2.0, V.FLOAT32)})
    assert main(["info", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "rope.scaling.type: want 'yarn'" in said.err


def test_a_process_says_it_once_whatever_its_filters(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(A | {"frobnicate": 1}))
    code = (
        "import sys, pyengine.checkpoint.config as c\n"
        f"for _ in range(3): c.read_hf_config(__import__('pathlib').Path({str(folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("frobnicate") == 1
    path = with_keys(tmp_path, {"frobnicate": (1, V.UINT32)})
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pyengine", "info", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr.count("\n") == 1


def test_our_own_directories_load_in_silence(tmp_path, recwarn):
    from pyengine.quantizer.quantize import quantize

    quantize(GOLDEN / "tied.gguf", tmp_path / "int8", tmp_path / "int4")
    for name in ("int8", "int4"):
        read_hf_config(tmp_path / name)
    shutil.copy(CONVERTER / "config.json", tmp_path)
    read_hf_config(tmp_path)
    assert not [w for w in recwarn.list if issubclass(w.category, UnknownKeyWarning)]
