"""Facts that Hugging Face's parameter and module names tell by themselves."""

from __future__ import annotations

import re

_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})(?:\.|$)")


def layer_of(name: str) -> int | None:
    """The decoder layer of a parameter or a module; None: it is not in a layer."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def layer_name(layer: int) -> str:
    return f"model.layers.{layer}"


# What a parameter is for, in the order in which its name is looked at: (part of the name, words).
_PURPOSES = (
    (".self_attn.", "attention"),
    (".linear_attn.", "delta net"),
    (".mlp.gate.", "router"),
    (".mlp.shared_expert", "shared expert"),
    (".mlp.experts.", "routed experts"),
    (".mlp.", "MLP"),
    ("embed_tokens.", "embeddings and head"),
    ("lm_head.", "embeddings and head"),
)


def purpose_of(name: str) -> str:
    """What a parameter is for: "attention", "routed experts"; "norms": of no other part."""
    return next((words for part, words in _PURPOSES if part in name), "norms")


def is_routed_expert(name: str) -> bool:
    """Whether a parameter is a stack of routed experts, of which a token needs a few."""
    return ".mlp.experts." in name
