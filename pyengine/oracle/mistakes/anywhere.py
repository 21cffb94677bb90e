"""Known mistakes that any operation can have."""

from __future__ import annotations

import numpy as np

from ... import reference as ref
from ..formats import to_bfloat16, to_float16, to_int8_and_back
from .mistake import Mistake, with_operation, with_parameter, with_residual, with_result


def _inputs(rounded):
    return with_operation(linear=lambda x, weight: ref.linear(rounded(x), weight))


def _transposed(values, model):
    return values.T if values.ndim == 2 and values.shape[0] == values.shape[1] else values


def _embeddings_as_head(model, token):
    stored = model.weight
    model.weight = lambda name, expert=None: stored(
        "model.embed_tokens.weight" if name == "lm_head.weight" else name, expert
    )


def _larger_embeddings(model, token):
    embed = model.embed
    model.embed = lambda ids: embed(ids) * model.config.hidden_size**0.5


def _soft_cap(cap):
    return with_result("lm_head", lambda y, x, model: cap * np.tanh(y / cap))


ANYWHERE = [
    Mistake("the residual is left out", with_residual(lambda x, normed, y: y)),
    Mistake("what is added to the residual is left out", with_residual(lambda x, normed, y: x)),
    Mistake(
        "the residual is taken after the norm, not before it", with_residual(lambda x, normed, y: normed + y)
    ),
    Mistake(
        "the residual stream is rounded to bfloat16",
        with_residual(lambda x, normed, y: to_bfloat16(x + y).astype(np.float64)),
    ),
    Mistake("the embeddings are multiplied by sqrt(hidden size)", _larger_embeddings),
    *(Mistake(f"the logits are soft-capped: {cap} tanh(x / {cap})", _soft_cap(cap)) for cap in (15, 30, 50)),
    Mistake("a square weight is transposed", with_parameter("weight", _transposed)),
    Mistake("the embeddings are used for lm_head", _embeddings_as_head),
    Mistake("the weights are rounded to bfloat16", with_parameter("", lambda w, m: to_bfloat16(w))),
    Mistake("the weights are rounded to float16", with_parameter("", lambda w, m: to_float16(w))),
    Mistake("the activations are rounded to bfloat16 before a product", _inputs(to_bfloat16)),
    Mistake("the activations are rounded to float16 before a product", _inputs(to_float16)),
    Mistake(
        "the activations are int8 in blocks of 32", _inputs(lambda x: to_int8_and_back(x.astype(np.float32)))
    ),
]
