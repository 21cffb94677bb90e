"""Hyper-parameters of a text model, from a GGUF's metadata or a config.json, checked.

Field names are Hugging Face's (`Qwen3_5TextConfig`, `Qwen3_5MoeTextConfig`, `Qwen3NextConfig`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..errors import CheckpointError, FileFormatError, quote
from ..files.strict_json import read_json
from ..ids import NO_TOKEN
from .blocks import DEFAULT_INTERVAL, MAX_LAYERS, Blocks, interval_layer_types
from .did_you_mean import hint
from .families import FAMILIES, FULL, LINEAR, family_of
from .fields import Fields, Metadata, hf_lists, read_fields, scopes
from .layout import GROUP
from .rope import Yarn, inverse_frequencies
from .rope_fields import rope_of_gguf, rope_of_hf

if TYPE_CHECKING:
    from ..files import gguf as gguf_file
    from ..files.gguf_metadata import Metadata as GGUFMetadata
    from .keys import Where


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

    architecture: str = "qwen35moe"  # of `families`, which says which of these sizes there are; others are 0
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()  # of a model with experts: layers with an MLP in their place

    tie_word_embeddings: bool = False
    max_position_embeddings: int = 262144
    mrope_section: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_nextn_predict_layers: int = 0  # blocks behind the last layer, no part of the forward pass
    yarn: Yarn | None = None

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

    def has_experts(self, layer: int) -> bool:
        return bool(self.num_experts) and layer not in self.dense_layers

    def inv_freq(self) -> np.ndarray:
        """float32 [rotary_dim / 2], as Hugging Face computes it: in float32, never wider."""
        return inverse_frequencies(self.rotary_dim, self.rope_theta, self.yarn)

    @property
    def rope_scale(self) -> float:
        """What cos and sin are multiplied by: YaRN's attention factor, or 1."""
        return 1.0 if self.yarn is None else self.yarn.attention_factor

    @property
    def context(self) -> int:
        """The positions that the model was made for, YaRN's among them.

        Files differ in whether max_position_embeddings counts what YaRN adds.
        """
        if self.yarn is None:
            return self.max_position_embeddings
        return max(self.max_position_embeddings, self.yarn.context)

    # ---- from files ----------------------------------------------------------------------------

    @classmethod
    def from_gguf(cls, gguf: gguf_file.GGUF) -> Config:
        """From a `files.gguf.GGUF`.  Errors: FileFormatError, naming the key."""
        return _check(_from_gguf(Metadata(gguf), gguf), str(gguf.path))

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config.json") -> Config:
        """From a parsed config.json: of the text model, or of the whole with its `text_config`."""
        return _check(_from_hf(config, read_fields(config, where)), where)

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, as the family's class of transformers reads it."""
        family = family_of(self)
        lacking = set(FAMILY_SIZES) - family.sizes.keys()
        said = {
            "architectures": [family.hf_class],
            "model_type": family.model_types[0],
            "dtype": "bfloat16",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
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
                "rope_type": "default" if self.yarn is None else "yarn",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_dim / self.head_dim,
                **({"mrope_interleaved": True} if family.sections else {}),
                **({"mrope_section": list(self.mrope_section)} if len(self.mrope_section) >= 3 else {}),
                **({} if self.yarn is None else asdict(self.yarn)),
            },
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        return {key: value for key, value in said.items() if key not in lacking} | family.hf_fields(self)


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
    """The columns that share a scale in a checkpoint directory of quantized tensors."""
    path = directory / "config.json"
    group = read_json(path).get("pyengine_group_size", GROUP)
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise FileFormatError(path, "pyengine_group_size", f"want a positive integer, got {group!r}")
    return group


# ---- GGUF ------------------------------------------------------------------------------------


def _from_gguf(meta: Metadata, gguf: gguf_file.GGUF) -> Config:
    meta.check_keys()
    blocks = Blocks(meta)
    value_heads, inner = meta.integer("ssm.time_step_rank"), meta.integer("ssm.inner_size")
    if value_heads < 1 or inner < 1 or inner % value_heads:
        raise meta.error("ssm.inner_size", f"want a multiple of {value_heads} heads, got {inner}")
    head_dim = meta.integer("attention.key_length")
    if meta.integer("attention.value_length") != head_dim:
        raise meta.error(
            "attention.value_length",
            f"want {head_dim} as attention.key_length, got {meta.integer('attention.value_length')}",
        )
    _check_attention_scale(meta, head_dim)
    width = meta.integer("embedding_length")
    if meta.integer("embedding_length_out", width) not in (0, width):
        raise meta.error(
            "embedding_length_out",
            f"want {width} as embedding_length, got {meta.integer('embedding_length_out')}",
        )
    if "token_embd.weight" not in gguf.tensors:
        others = (name for name in gguf.tensors if not name.startswith(("blk.", "output")))
        raise FileFormatError(
            gguf.path,
            "token_embd.weight",
            "want this tensor, got none"
            + hint("token_embd.weight", others, "nearest unknown name in the file"),
        )
    rope = rope_of_gguf(meta)
    return Config(
        vocab_size=_gguf_vocab_size(meta, gguf),
        hidden_size=width,
        layer_types=blocks.layer_types,
        rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
        num_attention_heads=blocks.head_count("attention.head_count"),
        num_key_value_heads=blocks.head_count("attention.head_count_kv"),
        head_dim=head_dim,
        rotary_dim=rope.rotary_dim,
        rope_theta=rope.theta,
        linear_num_key_heads=meta.integer("ssm.group_count"),
        linear_num_value_heads=value_heads,
        linear_key_head_dim=meta.integer("ssm.state_size"),
        linear_value_head_dim=inner // value_heads,
        linear_conv_kernel_dim=meta.integer("ssm.conv_kernel"),
        architecture=meta.family.architecture,
        **{field: meta.integer(key) for field, key in meta.family.sizes.items()},
        dense_layers=(),  # llama.cpp has experts in every layer
        tie_word_embeddings="output.weight" not in gguf.tensors,
        max_position_embeddings=meta.integer("context_length"),
        mrope_section=rope.mrope_section if meta.family.sections else (),
        eos_token_ids=_gguf_end_ids(gguf),
        pad_token_id=_gguf_pad_id(gguf.metadata),
        num_nextn_predict_layers=blocks.nextn,
        yarn=rope.yarn,
    )


def _check_attention_scale(meta: Metadata, head_dim: int) -> None:
    """What scores are divided by is the root of the head's size; llama.cpp takes 0 for that."""
    scale = meta.number("attention.scale", 0.0)
    if scale and not (head_dim > 0 and math.isclose(scale, head_dim**-0.5, rel_tol=1e-6)):
        raise meta.error("attention.scale", f"want 0 or 1 / sqrt({head_dim}), got {scale}")


def _gguf_vocab_size(meta: Metadata, gguf: gguf_file.GGUF) -> int:
    key = "tokenizer.ggml.tokens"
    rows: int = gguf.tensors["token_embd.weight"].shape[0]
    if meta.integer("vocab_size", rows) != rows:
        raise meta.error(
            "vocab_size", f"want {rows} as token_embd.weight has rows, got {meta.integer('vocab_size')}"
        )
    if key in gguf.metadata and (gguf.metadata.type_of(key).length or 0) > rows:
        raise FileFormatError(
            gguf.path,
            key,
            f"want at most {rows} as token_embd.weight has rows, got {gguf.metadata.type_of(key).length}",
        )
    return rows


_END_KEYS = tuple(f"tokenizer.ggml.{key}" for key in ("eos_token_id", "eot_token_id", "eos_token_ids"))


def _gguf_end_ids(gguf: gguf_file.GGUF) -> tuple[int, ...]:
    metadata = gguf.metadata
    ids: list[int] = []
    for key in _END_KEYS:
        if key in metadata and metadata.type_of(key).python_type() is list:
            ids += metadata.require(key, list, int).tolist()
        elif key in metadata:
            ids.append(metadata.require(key, int))
    return tuple(dict.fromkeys(ids))


def _gguf_pad_id(metadata: GGUFMetadata) -> int | None:
    key = "tokenizer.ggml.padding_token_id"
    return _unless_none(metadata.require(key, int)) if key in metadata else None


def _unless_none(pad: int) -> int | None:
    return None if pad in NO_TOKEN else int(pad)


# ---- config.json -----------------------------------------------------------------------------


def _from_hf(config: dict[str, Any], fields: Fields) -> Config:
    head_dim = fields.integer("head_dim")
    rope = rope_of_hf(config, fields, head_dim)
    layer_types = _hf_layer_types(fields)
    dense_layers = _hf_dense_layers(fields, len(layer_types))
    sizes = (*fields.family.sizes, *(("intermediate_size",) if dense_layers else ()))
    return Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        layer_types=layer_types,
        rms_norm_eps=fields.number("rms_norm_eps"),
        num_attention_heads=fields.integer("num_attention_heads"),
        num_key_value_heads=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=rope.rotary_dim,
        rope_theta=rope.theta,
        linear_num_key_heads=fields.integer("linear_num_key_heads"),
        linear_num_value_heads=fields.integer("linear_num_value_heads"),
        linear_key_head_dim=fields.integer("linear_key_head_dim"),
        linear_value_head_dim=fields.integer("linear_value_head_dim"),
        linear_conv_kernel_dim=fields.integer("linear_conv_kernel_dim"),
        architecture=fields.family.architecture,
        **{field: fields.integer(field) for field in sizes},
        dense_layers=dense_layers,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        max_position_embeddings=fields.integer("max_position_embeddings", 262144),
        mrope_section=rope.mrope_section if fields.family.sections else (),
        eos_token_ids=_hf_end_ids(config, fields.where),
        pad_token_id=_hf_pad_id(fields),
        yarn=rope.yarn,
    )


def _hf_pad_id(fields: Fields) -> int | None:
    return _unless_none(fields.integer("pad_token_id", -1))


def _hf_end_ids(config: dict[str, Any], where: Where) -> tuple[int, ...]:
    ids = [_as_ids(scope.get("eos_token_id"), where) for _, scope in scopes(config, where)]
    return tuple(dict.fromkeys(sum(ids, ())))


def _hf_layer_types(fields: Fields) -> tuple[str, ...]:
    layers = fields.integer("num_hidden_layers")
    if not 1 <= layers <= MAX_LAYERS:
        raise fields.error("num_hidden_layers", f"want 1 to {MAX_LAYERS}, got {layers}")
    types = fields.get("layer_types")
    if types is None:
        interval = fields.integer("full_attention_interval", DEFAULT_INTERVAL)
        if interval < 1:
            raise fields.error("full_attention_interval", f"want at least 1, got {interval}")
        return interval_layer_types(layers, interval)
    if not isinstance(types, list) or len(types) != layers:
        got = len(types) if isinstance(types, list) else quote(types)
        raise fields.error("layer_types", f"want {layers} entries as num_hidden_layers, got {got}")
    for i, kind in enumerate(types):
        if kind not in (LINEAR, FULL):
            raise FileFormatError(
                fields.where,
                f"{fields.label('layer_types')}[{i}]",
                f"want {LINEAR!r} or {FULL!r}, got {quote(kind)}",
            )
    return tuple(types)


def _hf_dense_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """The layers that have no experts, in a family whose configuration can say so.  As in transformers, a
    number in mlp_only_layers that is no layer's says nothing."""
    if "decoder_sparse_step" not in hf_lists(fields.family).read:
        return ()
    step, listed = fields.integer("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
    if step < 1:
        raise fields.error("decoder_sparse_step", f"want at least 1, got {step}")
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise fields.error("mlp_only_layers", f"want a list of integers, got {quote(listed)}")
    return tuple(layer for layer in range(layers) if layer in set(listed) or (layer + 1) % step)


def _as_ids(value: Any, where: Where) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(v) is int for v in values):
        raise FileFormatError(where, "eos_token_id", f"want token ids, got {quote(value)}")
    return tuple(values)


# ---- what must hold of either ----------------------------------------------------------------

# What no tensor of the file need confirm must not be large by itself: a model of delta nets alone has
# no head_dim, and its rotary frequencies would be made all the same.
MAX_SIZE = 2**31 - 1
MAX_HEAD_DIM = 1 << 16

_SIZES = (
    "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim linear_num_key_heads "
    "linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim "
    "max_position_embeddings"
).split()
FAMILY_SIZES = {field for family in FAMILIES.values() for field in family.sizes}


def _check(config: Config, where: str) -> Config:
    def fail(field: str, wanted: str) -> NoReturn:
        raise CheckpointError(f"{where}: {field}: want {wanted}, got {getattr(config, field)}")

    for field in (
        *_SIZES,
        *family_of(config).sizes,
        *(("intermediate_size",) if config.dense_layers else ()),
    ):
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
    _check_frequencies(config, where)
    _check_ids(config, where)
    return config


def _check_frequencies(config: Config, where: str) -> None:
    if config.yarn is not None and config.rope_theta == 1:
        raise CheckpointError(f"{where}: rope_theta: want a number above 1 for YaRN, got 1.0")
    inv_freq = config.inv_freq()
    if not ((inv_freq > 0) & (inv_freq <= 1)).all():
        field, value = ("factor", config.yarn.factor) if config.yarn else ("rope_theta", config.rope_theta)
        raise CheckpointError(f"{where}: {field}: want frequencies that float32 holds, got {value}")


def _check_ids(config: Config, where: str) -> None:
    pad = () if config.pad_token_id is None else (config.pad_token_id,)
    for field, ids in (("eos_token_id", config.eos_token_ids), ("pad_token_id", pad)):
        for i in ids:
            if not 0 <= i < config.vocab_size:
                raise CheckpointError(f"{where}: {field}: want 0 to {config.vocab_size - 1}, got {i}")
