"""Hyper-parameters of a Qwen3.5-MoE text model, from a GGUF's metadata or a config.json, checked.

Field names are Hugging Face's (`Qwen3_5MoeTextConfig`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .codes import GROUP
from .errors import CheckpointError, FileFormatError, quote
from .files.strict_json import read_object
from .names import hint

ARCHITECTURE = "qwen35moe"
LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class Config:
    """What the forward pass needs to know.  Sizes are in elements, ids in vocabulary entries."""

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]  # "linear_attention" or "full_attention", one a layer
    rms_norm_eps: float

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int  # partial_rotary_factor * head_dim, even
    rope_theta: float

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int

    tie_word_embeddings: bool = False
    max_position_embeddings: int = 262144
    mrope_section: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_nextn_predict_layers: int = 0  # blocks behind the last layer, no part of the forward pass

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: query, key, value."""
        return 2 * self.key_dim + self.value_dim

    def inv_freq(self) -> np.ndarray:
        """float32 [rotary_dim / 2], as Hugging Face computes it: in float32, never wider.

        Source: Qwen3_5MoeTextRotaryEmbedding.compute_default_rope_parameters.  The power is
        rounded once from float64.  torch has no single answer to hold it against: its float32
        power gives other last bits on plain, AVX2 and AVX-512 processors, for some (theta, width);
        all three equal this for the 35B-A3B's (1e7, 64).
        """
        exponent = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        power = np.power(np.float64(np.float32(self.rope_theta)), exponent.astype(np.float64))
        return np.float32(1) / power.astype(np.float32)

    # ---- from files ----------------------------------------------------------------------------

    @classmethod
    def from_gguf(cls, gguf) -> Config:
        """From a `files.gguf.GGUF`.  Errors: FileFormatError, naming the key."""
        return _check(_from_gguf(_Metadata(gguf), gguf), str(gguf.path))

    @classmethod
    def from_hf(cls, config: dict, where: str = "config.json") -> Config:
        """From a parsed config.json: of the text model, or of the whole with its `text_config`."""
        return _check(_from_hf(_Fields(config.get("text_config", config), where)), where)

    def to_hf(self) -> dict:
        """The config.json of this model, as `Qwen3_5MoeForCausalLM` reads it."""
        return {
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "model_type": "qwen3_5_moe_text",
            "dtype": "bfloat16",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "layer_types": list(self.layer_types),
            "linear_conv_kernel_dim": self.linear_conv_kernel_dim,
            "linear_key_head_dim": self.linear_key_head_dim,
            "linear_num_key_heads": self.linear_num_key_heads,
            "linear_num_value_heads": self.linear_num_value_heads,
            "linear_value_head_dim": self.linear_value_head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_dim / self.head_dim,
                "mrope_interleaved": True,
                "mrope_section": list(self.mrope_section),
            },
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


def read_hf_config(directory: Path) -> Config:
    """The Config of a checkpoint directory; the end ids of generation_config.json come first."""
    config = Config.from_hf(read_json(directory / "config.json"), str(directory / "config.json"))
    generation = directory / "generation_config.json"
    if generation.exists():
        ids = _as_ids(read_json(generation).get("eos_token_id"), str(generation))
        config = replace(config, eos_token_ids=tuple(dict.fromkeys(ids + config.eos_token_ids)))
        _check_ids(config, str(generation))
    return config


def read_group_size(directory: Path) -> int:
    """The columns that share a scale in a checkpoint directory of quantised tensors."""
    path = directory / "config.json"
    group = read_json(path).get("pyengine_group_size", GROUP)
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise FileFormatError(path, "pyengine_group_size", f"want a positive integer, got {group!r}")
    return group


def read_json(path: Path) -> dict:
    """The object in a JSON file of Python's writing.  FileFormatError if there is none."""
    return read_object(path, constants=True)


# ---- GGUF ------------------------------------------------------------------------------------


class _Metadata:
    """The architecture's keys, required by short name."""

    def __init__(self, gguf):
        self.gguf = gguf
        architecture = gguf.metadata.require("general.architecture", str)
        if architecture != ARCHITECTURE:
            raise FileFormatError(gguf.path, "general.architecture",
                                  f"want {ARCHITECTURE!r}, got {architecture!r}")

    def has(self, key):
        return f"{ARCHITECTURE}.{key}" in self.gguf.metadata

    def integer(self, key, default=None):
        if default is not None and not self.has(key):
            return default
        return int(self.gguf.metadata.require(f"{ARCHITECTURE}.{key}", int))

    def number(self, key):
        """A float32 field as the decimal that was meant: 1e-06, not 9.99999997e-07.

        The converter narrows config.json's number to float32; Hugging Face computes with the
        number itself, and the difference shows in the norms' last bits.
        """
        value = self.gguf.metadata.require(f"{ARCHITECTURE}.{key}", float)
        with np.errstate(over="ignore"):  # a float64 beyond float32: infinite, and refused as such
            return float(str(np.float32(value)))

    def array(self, key, of):
        return self.gguf.metadata.require(f"{ARCHITECTURE}.{key}", list, of)

    def error(self, key, problem):
        return FileFormatError(self.gguf.path, f"{ARCHITECTURE}.{key}", problem)


def _from_gguf(meta: _Metadata, gguf) -> Config:
    nextn = meta.integer("nextn_predict_layers", 0)
    blocks = meta.integer("block_count")
    if not 0 <= nextn < blocks <= MAX_LAYERS:
        raise meta.error("block_count", f"want more than the {nextn} next-token blocks and at most "
                         f"{MAX_LAYERS}, got {blocks}")
    value_heads, inner = meta.integer("ssm.time_step_rank"), meta.integer("ssm.inner_size")
    if value_heads < 1 or inner < 1 or inner % value_heads:
        raise meta.error("ssm.inner_size", f"want a multiple of {value_heads} heads, got {inner}")
    head_dim = meta.integer("attention.key_length")
    if meta.integer("attention.value_length") != head_dim:
        raise meta.error("attention.value_length", f"want {head_dim} as attention.key_length, got "
                         f"{meta.integer('attention.value_length')}")
    if "token_embd.weight" not in gguf.tensors:
        others = (name for name in gguf.tensors if not name.startswith(("blk.", "output")))
        raise FileFormatError(gguf.path, "token_embd.weight", "want this tensor, got none" + hint(
            "token_embd.weight", others, "nearest unknown name in the file"))
    return Config(
        vocab_size=_gguf_vocab_size(gguf),
        hidden_size=meta.integer("embedding_length"),
        layer_types=_gguf_layer_types(meta, blocks, nextn),
        rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
        num_attention_heads=meta.integer("attention.head_count"),
        num_key_value_heads=meta.integer("attention.head_count_kv"),
        head_dim=head_dim,
        rotary_dim=meta.integer("rope.dimension_count"),
        rope_theta=meta.number("rope.freq_base"),
        linear_num_key_heads=meta.integer("ssm.group_count"),
        linear_num_value_heads=value_heads,
        linear_key_head_dim=meta.integer("ssm.state_size"),
        linear_value_head_dim=inner // value_heads,
        linear_conv_kernel_dim=meta.integer("ssm.conv_kernel"),
        num_experts=meta.integer("expert_count"),
        num_experts_per_tok=meta.integer("expert_used_count"),
        moe_intermediate_size=meta.integer("expert_feed_forward_length"),
        shared_expert_intermediate_size=meta.integer("expert_shared_feed_forward_length"),
        tie_word_embeddings="output.weight" not in gguf.tensors,
        max_position_embeddings=meta.integer("context_length"),
        mrope_section=tuple(int(n) for n in meta.array("rope.dimension_sections", int)[:3])
        if meta.has("rope.dimension_sections") else (),
        eos_token_ids=_gguf_end_ids(gguf),
        pad_token_id=_gguf_pad_id(gguf.metadata),
        num_nextn_predict_layers=nextn,
    )


def _gguf_layer_types(meta: _Metadata, blocks: int, nextn: int) -> tuple[str, ...]:
    layers = blocks - nextn
    if meta.has("attention.recurrent_layers"):
        recurrent = meta.array("attention.recurrent_layers", bool)
        if len(recurrent) not in (blocks, layers):
            raise meta.error("attention.recurrent_layers",
                             f"want {blocks} entries as block_count, got {len(recurrent)}")
        return tuple(LINEAR if r else FULL for r in recurrent[:layers])
    interval = meta.integer("full_attention_interval")
    if interval < 1:
        raise meta.error("full_attention_interval", f"want at least 1, got {interval}")
    return _interval_layer_types(layers, interval)


def _interval_layer_types(layers: int, interval: int) -> tuple[str, ...]:
    return tuple(LINEAR if (i + 1) % interval else FULL for i in range(layers))


def _gguf_vocab_size(gguf) -> int:
    rows, key = gguf.tensors["token_embd.weight"].shape[0], "tokenizer.ggml.tokens"
    if key in gguf.metadata and (gguf.metadata.type_of(key).length or 0) > rows:
        raise FileFormatError(gguf.path, key, f"want at most {rows} as token_embd.weight has rows, "
                              f"got {gguf.metadata.type_of(key).length}")
    return rows


_END_KEYS = tuple(f"tokenizer.ggml.{key}" for key in ("eos_token_id", "eot_token_id", "eos_token_ids"))


def _gguf_end_ids(gguf) -> tuple[int, ...]:
    metadata, ids = gguf.metadata, []
    for key in _END_KEYS:
        if key in metadata and metadata.type_of(key).python_type() is list:
            ids += metadata.require(key, list, int).tolist()
        elif key in metadata:
            ids.append(metadata.require(key, int))
    return tuple(dict.fromkeys(ids))


def _gguf_pad_id(metadata) -> int | None:
    key = "tokenizer.ggml.padding_token_id"
    return metadata.require(key, int) if key in metadata else None


# ---- config.json -----------------------------------------------------------------------------


class _Fields:
    """A JSON object whose fields are required by name and type."""

    def __init__(self, values, where):
        if not isinstance(values, dict):
            raise FileFormatError(where, "text_config", f"want an object, got {quote(values)}")
        self.values, self.where = values, where

    def integer(self, key, default=None):
        return self._typed(key, int, default)

    def number(self, key, default=None):
        value = self._typed(key, (int, float), default)
        if not math.isfinite(value):
            raise self.error(key, f"want a finite number, got {value}")
        return float(value)

    def boolean(self, key, default):
        return self._typed(key, bool, default)

    def text(self, key, default):
        return self._typed(key, str, default)

    def get(self, key, default=None):
        return self.values.get(key, default)

    def error(self, key, problem):
        return FileFormatError(self.where, key, problem)

    def _typed(self, key, kind, default):
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = {int: "an integer", bool: "true or false", str: "a text"}.get(kind, "a number")
            raise self.error(key, f"want {wanted}, got {quote(value)}")
        return value


def _from_hf(fields: _Fields) -> Config:
    rope = _rope_fields(fields)
    for of, key, want in ((rope, "rope_type", "default"), (fields, "hidden_act", "silu")):
        if of.text(key, want) != want:
            raise of.error(key, f"want {want!r}, got {quote(of.get(key))}")
    if fields.boolean("attention_bias", False):
        raise fields.error("attention_bias", "want false, got true")
    head_dim = fields.integer("head_dim")
    return Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        layer_types=_hf_layer_types(fields),
        rms_norm_eps=fields.number("rms_norm_eps"),
        num_attention_heads=fields.integer("num_attention_heads"),
        num_key_value_heads=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=int(head_dim * _rotary_share(rope)),
        rope_theta=rope.number("rope_theta"),
        linear_num_key_heads=fields.integer("linear_num_key_heads"),
        linear_num_value_heads=fields.integer("linear_num_value_heads"),
        linear_key_head_dim=fields.integer("linear_key_head_dim"),
        linear_value_head_dim=fields.integer("linear_value_head_dim"),
        linear_conv_kernel_dim=fields.integer("linear_conv_kernel_dim"),
        num_experts=fields.integer("num_experts"),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        shared_expert_intermediate_size=fields.integer("shared_expert_intermediate_size"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        max_position_embeddings=fields.integer("max_position_embeddings", 262144),
        mrope_section=_mrope_section(rope),
        eos_token_ids=_as_ids(fields.get("eos_token_id"), fields.where),
        pad_token_id=None if fields.get("pad_token_id") is None else fields.integer("pad_token_id"),
    )


def _rope_fields(fields: _Fields) -> _Fields:
    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.get(key) or {}
    if not isinstance(rope, dict):
        raise fields.error(key, f"want an object, got {quote(rope)}")
    return _Fields({**fields.values, **rope}, fields.where)


def _rotary_share(rope: _Fields) -> float:
    share = rope.number("partial_rotary_factor", 0.25)
    if not 0 < share <= 1:
        raise rope.error("partial_rotary_factor", f"want a share of head_dim, 0 to 1, got {share}")
    return share


def _mrope_section(rope: _Fields) -> tuple[int, ...]:
    section = rope.get("mrope_section") or []
    if not isinstance(section, list) or not all(type(n) is int for n in section):
        raise rope.error("mrope_section", f"want a list of integers, got {quote(section)}")
    return tuple(section)


def _hf_layer_types(fields: _Fields) -> tuple[str, ...]:
    layers = fields.integer("num_hidden_layers")
    if not 1 <= layers <= MAX_LAYERS:
        raise fields.error("num_hidden_layers", f"want 1 to {MAX_LAYERS}, got {layers}")
    types = fields.get("layer_types")
    if types is None:
        interval = fields.integer("full_attention_interval", 4)
        if interval < 1:
            raise fields.error("full_attention_interval", f"want at least 1, got {interval}")
        return _interval_layer_types(layers, interval)
    if not isinstance(types, list) or len(types) != layers:
        got = len(types) if isinstance(types, list) else quote(types)
        raise fields.error("layer_types", f"want {layers} entries as num_hidden_layers, got {got}")
    for i, kind in enumerate(types):
        if kind not in (LINEAR, FULL):
            raise fields.error(f"layer_types[{i}]", f"want {LINEAR!r} or {FULL!r}, got {quote(kind)}")
    return tuple(types)


def _as_ids(value, where) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(v) is int for v in values):
        raise FileFormatError(where, "eos_token_id", f"want token ids, got {quote(value)}")
    return tuple(values)


# ---- what must hold of either ----------------------------------------------------------------

# What no tensor of the file need confirm must not be large by itself: a model of delta nets alone has
# no head_dim, and its rotary frequencies would be made all the same.
MAX_SIZE = 2**31 - 1
MAX_HEAD_DIM = 1 << 16
MAX_LAYERS = 1024

_SIZES = (
    "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim linear_num_key_heads "
    "linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim "
    "num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size "
    "max_position_embeddings"
).split()


def _check(config: Config, where: str) -> Config:
    def fail(field, wanted):
        raise CheckpointError(f"{where}: {field}: want {wanted}, got {getattr(config, field)}")

    for field in _SIZES:
        if not 1 <= getattr(config, field) <= MAX_SIZE:
            fail(field, f"1 to {MAX_SIZE}")
    if not config.head_dim <= MAX_HEAD_DIM:
        fail("head_dim", f"at most {MAX_HEAD_DIM}")
    if config.num_attention_heads % config.num_key_value_heads:
        fail("num_attention_heads", f"a multiple of {config.num_key_value_heads} key-value heads")
    if config.linear_num_value_heads % config.linear_num_key_heads:
        fail("linear_num_value_heads", f"a multiple of {config.linear_num_key_heads} key heads")
    if config.num_experts_per_tok > config.num_experts:
        fail("num_experts_per_tok", f"at most {config.num_experts} experts")
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        fail("rotary_dim", f"an even number up to head_dim {config.head_dim}")
    if not 1 <= config.linear_conv_kernel_dim <= 16:
        fail("linear_conv_kernel_dim", "1 to 16 taps")
    if not 0 < config.rms_norm_eps < 1:
        fail("rms_norm_eps", "a small positive number")
    if not 1 <= config.rope_theta < float("inf"):
        fail("rope_theta", "a finite number from 1 on")
    _check_ids(config, where)
    return config


def _check_ids(config: Config, where: str) -> None:
    pad = () if config.pad_token_id is None else (config.pad_token_id,)
    for field, ids in (("eos_token_id", config.eos_token_ids), ("pad_token_id", pad)):
        for i in ids:
            if not 0 <= i < config.vocab_size:
                raise CheckpointError(f"{where}: {field}: want 0 to {config.vocab_size - 1}, got {i}")
