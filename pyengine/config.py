"""Hyper-parameters of a Qwen3.5-MoE text model, from a GGUF's metadata or a config.json, checked.

Field names are Hugging Face's (`Qwen3_5MoeTextConfig`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .codes import GROUP
from .errors import CheckpointError, FileFormatError
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
    return config


def read_group_size(directory: Path) -> int:
    """The columns that share a scale in a checkpoint directory of quantised tensors."""
    path = directory / "config.json"
    group = read_json(path).get("pyengine_group_size", GROUP)
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise FileFormatError(path, "pyengine_group_size", f"want a positive integer, got {group!r}")
    return group


def read_json(path: Path) -> dict:
    """The object in a JSON file.  FileFormatError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(path, "file", "want a JSON object, got no such file") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, "file", f"want JSON, got {error}") from None
    if not isinstance(value, dict):
        raise FileFormatError(path, "file", f"want a JSON object, got {type(value).__name__}")
    return value


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
        return float(str(np.float32(value)))

    def array(self, key):
        return self.gguf.metadata.require(f"{ARCHITECTURE}.{key}", list)

    def error(self, key, problem):
        return FileFormatError(self.gguf.path, f"{ARCHITECTURE}.{key}", problem)


def _from_gguf(meta: _Metadata, gguf) -> Config:
    nextn = meta.integer("nextn_predict_layers", 0)
    blocks = meta.integer("block_count")
    if not 0 <= nextn < blocks <= 100_000:
        raise meta.error("block_count", f"want more than {nextn} next-token blocks, got {blocks}")
    value_heads, inner = meta.integer("ssm.time_step_rank"), meta.integer("ssm.inner_size")
    if value_heads < 1 or inner < 1 or inner % value_heads:
        raise meta.error("ssm.inner_size", f"want a multiple of {value_heads} heads, got {inner}")
    head_dim = meta.integer("attention.key_length")
    if meta.integer("attention.value_length") != head_dim:
        raise meta.error("attention.value_length", f"want {head_dim} as attention.key_length, got "
                         f"{meta.integer('attention.value_length')}")
    if "token_embd.weight" not in gguf.tensors:
        raise FileFormatError(gguf.path, "token_embd.weight", "want this tensor, got none" + hint(
            "token_embd.weight", (name for name in gguf.tensors if not name.startswith(("blk.", "output"))),
            "nearest unknown name in the file"))
    ids = gguf.metadata
    return Config(
        vocab_size=gguf.tensors["token_embd.weight"].shape[0],
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
        mrope_section=tuple(int(n) for n in meta.array("rope.dimension_sections")[:3])
        if meta.has("rope.dimension_sections") else (),
        eos_token_ids=_gguf_end_ids(gguf),
        pad_token_id=ids.get("tokenizer.ggml.padding_token_id"),
        num_nextn_predict_layers=nextn,
    )


def _gguf_layer_types(meta: _Metadata, blocks: int, nextn: int) -> tuple[str, ...]:
    layers = blocks - nextn
    if meta.has("attention.recurrent_layers"):
        recurrent = meta.array("attention.recurrent_layers")
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


def _gguf_end_ids(gguf) -> tuple[int, ...]:
    metadata = gguf.metadata
    ids = [metadata[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                     "tokenizer.ggml.eos_token_ids") if key in metadata]
    return tuple(dict.fromkeys(int(i) for value in ids for i in np.atleast_1d(value)))


# ---- config.json -----------------------------------------------------------------------------


class _Fields:
    """A JSON object whose fields are required by name and type."""

    def __init__(self, values, where):
        if not isinstance(values, dict):
            raise FileFormatError(where, "text_config", "want an object")
        self.values, self.where = values, where

    def integer(self, key, default=None):
        return self._typed(key, int, default)

    def number(self, key, default=None):
        return float(self._typed(key, (int, float), default))

    def get(self, key, default=None):
        return self.values.get(key, default)

    def _typed(self, key, kind, default):
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, kind):
            wanted = "an integer" if kind is int else "a number"
            raise FileFormatError(self.where, key, f"want {wanted}, got {value!r}")
        return value


def _from_hf(fields: _Fields) -> Config:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope = _Fields({**fields.values, **rope}, fields.where)
    if rope.get("rope_type", "default") != "default":
        raise FileFormatError(fields.where, "rope_parameters.rope_type",
                              f"want 'default', got {rope.get('rope_type')!r}")
    if fields.get("attention_bias"):
        raise FileFormatError(fields.where, "attention_bias", "want false, got true")
    if fields.get("hidden_act", "silu") != "silu":
        raise FileFormatError(fields.where, "hidden_act", f"want 'silu', got {fields.get('hidden_act')!r}")
    head_dim = fields.integer("head_dim")
    return Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        layer_types=_hf_layer_types(fields),
        rms_norm_eps=fields.number("rms_norm_eps"),
        num_attention_heads=fields.integer("num_attention_heads"),
        num_key_value_heads=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=int(head_dim * rope.number("partial_rotary_factor", 0.25)),
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
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        max_position_embeddings=fields.integer("max_position_embeddings", 262144),
        mrope_section=tuple(rope.get("mrope_section") or ()),
        eos_token_ids=_as_ids(fields.get("eos_token_id"), fields.where),
        pad_token_id=fields.get("pad_token_id"),
    )


def _hf_layer_types(fields: _Fields) -> tuple[str, ...]:
    layers = fields.integer("num_hidden_layers")
    types = fields.get("layer_types")
    if types is None:
        return _interval_layer_types(layers, fields.integer("full_attention_interval", 4))
    if not isinstance(types, list) or len(types) != layers:
        raise FileFormatError(fields.where, "layer_types", f"want {layers} entries as num_hidden_layers")
    for i, kind in enumerate(types):
        if kind not in (LINEAR, FULL):
            raise FileFormatError(fields.where, f"layer_types[{i}]",
                                  f"want {LINEAR!r} or {FULL!r}, got {kind!r}")
    return tuple(types)


def _as_ids(value, where) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) for v in values):
        raise FileFormatError(where, "eos_token_id", f"want token ids, got {value!r}")
    return tuple(values)


# ---- what must hold of either ----------------------------------------------------------------

_AT_LEAST_ONE = (
    "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim linear_num_key_heads "
    "linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim "
    "num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size "
    "max_position_embeddings"
).split()


def _check(config: Config, where: str) -> Config:
    def fail(field, wanted):
        raise CheckpointError(f"{where}: {field}: want {wanted}, got {getattr(config, field)}")

    for field in _AT_LEAST_ONE:
        if getattr(config, field) < 1:
            fail(field, "at least 1")
    if not config.layer_types:
        fail("num_hidden_layers", "at least 1")
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
    return config
