"""A model with some layers of another: the same architecture, other weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from ...checkpoint.names import layer_of

OUTSIDE = None  # what is in no layer: the embeddings, the last norm, the head


def with_part(base: Any, other: Any, part: int | None) -> Any:
    """The base with one layer of the other, or with what is OUTSIDE; both as `load` gives them."""
    model = copy.copy(base)
    if base.arithmetic == "float64":
        mine, theirs = base.checkpoint.tensors, other.checkpoint.tensors
        tensors = {name: (theirs if layer_of(name) == part else mine)[name] for name in mine}
        model.checkpoint = dataclasses.replace(base.checkpoint, tensors=tensors)
        return model
    # A layer has its own weights, in its own file's order of heads, and its own pool.
    if part is OUTSIDE:
        model.embed_tokens, model.norm, model.lm_head = other.embed_tokens, other.norm, other.lm_head
    else:
        model.layers = [*base.layers[:part], other.layers[part], *base.layers[part + 1 :]]
    return model
