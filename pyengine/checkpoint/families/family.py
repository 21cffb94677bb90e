"""What a family's file says: names, shapes, order and meaning of its parameters and of its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..keys import Lists

if TYPE_CHECKING:
    from ..config import Config

LINEAR, FULL = "linear_attention", "full_attention"


class Spec(NamedTuple):
    """One parameter: its names and its shape as Hugging Face has it."""

    name: str
    gguf: str
    shape: tuple[int, ...]
    linear: bool = True
    order: str | None = None  # which of Family.orders the GGUF's rows or columns have
    decode: Callable[[np.ndarray], np.ndarray] | None = None  # stored in a GGUF -> Hugging Face's, float64
    gguf_also: tuple[str, ...] = ()  # other names that converters give it


# A GGUF tensor that holds several parameters' rows: (ending of its name, {ending of a part: rows}).
Fused = tuple[str, dict[str, Callable[["Config"], int]]]


class Split(NamedTuple):
    """A parameter whose rows a GGUF may have in several tensors, in place of the one.

    ending   of the one tensor's name
    parts    {ending of a part's name: its rows}; the parts' rows one below another are the order's rows
    order    (config) -> where each of Hugging Face's rows lies among the parts' rows, int64
    """

    ending: str
    parts: dict[str, Callable[[Config], int]]
    order: Callable[[Config], np.ndarray]


@dataclass(frozen=True, eq=False)
class Family:
    """One model family.

    architecture     GGUF's general.architecture, and the prefix of its keys
    model_types      config.json's model_type, as transformers has them: the text model's, the whole's
    hf_class         transformers' class of the text model
    quantized_type, quantized_config, quantized_class
                     model_type and classes of hf/modeling_pyengine.py, for directories that `quantize` writes
    sizes            {field of Config and of config.json: GGUF's key} of what other families lack
    gguf_keys, hf_keys   what its own keys mean, beside those that `keys` has for all
    layer_specs      (config, layer) -> the parameters of a decoder layer, in the order of the forward pass
    fused            tensors that a GGUF may have in place of their parts
    split            parts that a GGUF may have in place of a tensor
    value_heads      the order of the delta net's value heads in a GGUF: "tiled" or "grouped"
    in_proj          the delta net's input projections: the ends of their modules' names
    sections         whether rotary positions have sections, all alike for text
    hf_fields        (config) -> fields of config.json that other families lack
    orders           (config) -> {order: where each of Hugging Face's rows lies in a GGUF, int64}
    nextn            what the names of a next-token block's own tensors begin with, behind `blk.N.`
    """

    architecture: str
    model_types: tuple[str, ...]
    hf_class: str
    quantized_type: str
    quantized_config: str
    quantized_class: str
    sizes: dict[str, str]
    layer_specs: Callable[[Config, int], list[Spec]]
    orders: Callable[[Config], dict[str, np.ndarray]]
    fused: tuple[Fused, ...] = ()
    split: tuple[Split, ...] = ()
    value_heads: str = "tiled"
    in_proj: tuple[str, ...] = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    sections: bool = True
    hf_fields: Callable[[Config], dict[str, Any]] = lambda config: {}
    gguf_keys: Lists = field(default_factory=Lists)
    hf_keys: Lists = field(default_factory=Lists)
    nextn: str = "nextn."
