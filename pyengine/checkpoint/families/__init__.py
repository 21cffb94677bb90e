"""One file per model family: its parameters, their names in each kind of file, their order, its keys.

A new family is a file here and a row of FAMILIES.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .family import FULL, LINEAR, Family, Spec
from .qwen3next import QWEN3NEXT
from .qwen35 import QWEN35, minus_one
from .qwen35moe import QWEN35MOE

if TYPE_CHECKING:
    from ..config import Config

__all__ = [
    "FAMILIES",
    "FULL",
    "LINEAR",
    "MODEL_TYPES",
    "Family",
    "Spec",
    "family_of",
    "model_specs",
    "value_head_orders",
]

FAMILIES = {family.architecture: family for family in (QWEN35MOE, QWEN35, QWEN3NEXT)}
MODEL_TYPES = {
    kind: family for family in FAMILIES.values() for kind in (*family.model_types, family.quantized_type)
}


def family_of(config: Config) -> Family:
    return FAMILIES[config.architecture]


def model_specs(config: Config) -> list[Spec]:
    """Every parameter of the model, in the order of the forward pass."""
    layer_specs, vocabulary = family_of(config).layer_specs, (config.vocab_size, config.hidden_size)
    specs = [Spec("model.embed_tokens.weight", "token_embd.weight", vocabulary)]
    for layer in range(config.num_hidden_layers):
        specs += layer_specs(config, layer)
    norm = "model.norm.weight", "output_norm.weight", (config.hidden_size,)
    specs.append(Spec(*norm, False, decode=minus_one))
    if not config.tie_word_embeddings:
        specs.append(Spec("lm_head.weight", "output.weight", vocabulary))
    return specs


def value_head_orders(config: Config) -> dict[str, np.ndarray]:
    """The family's orders of the delta net's value heads: see `Family.orders`."""
    return family_of(config).orders(config)
