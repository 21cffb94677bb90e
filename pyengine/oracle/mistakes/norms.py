"""Known mistakes in norms."""

from __future__ import annotations

import numpy as np

from ... import reference as ref
from ..formats import to_bfloat16
from .mistake import Mistake, with_operation, with_parameter


def _scaled_norm(scale):
    return with_operation(rms_norm=lambda x, weight, eps: ref.unit_rms(x, eps) * scale(weight))


def _layer_norm(x, weight, eps):
    return ref.rms_norm(x - x.mean(axis=-1, keepdims=True), weight, eps)


def _epsilon(factor):
    def change(model, token):
        norm, gated = model.op.rms_norm, model.op.rms_norm_gated
        model.op.rms_norm = lambda x, weight, eps: norm(x, weight, eps * factor)
        model.op.rms_norm_gated = lambda x, z, weight, eps: gated(x, z, weight, eps * factor)

    return change


def _gated_norm(function):
    return with_operation(rms_norm_gated=function)


def _outer_epsilon(x, eps):
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps)


def _of_heads(function):
    """Of q_norm and k_norm alone, whose input is [T, heads, n]."""
    return with_operation(
        rms_norm=lambda x, weight, eps: (function if x.ndim == 3 else ref.rms_norm)(x, weight, eps)
    )


def _after_rope(model, token):
    """q_norm and k_norm take what RoPE has turned."""
    turn = model.op.rotate

    def rms_norm(x, weight, eps):
        if x.ndim == 3:
            x = turn(x, np.arange(len(x), dtype=np.float64), model.inv_freq, model.rope_scale)
        return ref.rms_norm(x, weight, eps)

    model.op.rms_norm, model.op.rotate = rms_norm, lambda x, positions, inv_freq, scale: x


def _without_the_last(model, token):
    norm = type(model).norm
    model.norm = lambda x, name, record: (
        record(name, x) if name == "model.norm" else norm(model, x, name, record)
    )


def _all_heads_at_once(x, z, weight, eps):
    whole = ref.unit_rms(x.reshape(len(x), -1), eps).reshape(x.shape)
    return weight * whole * ref.silu(z)


NORMS = [
    Mistake("the norm's +1 is missing: scaled by weight, not by 1 + weight", _scaled_norm(lambda w: w)),
    Mistake("the norm's +1 is there twice: scaled by 2 + weight", _scaled_norm(lambda w: 2 + w)),
    Mistake("the norm's weight is left out", _scaled_norm(lambda w: 1.0)),
    Mistake(
        "1 + weight of the norm is rounded to bfloat16",
        _scaled_norm(lambda w: to_bfloat16(1 + w).astype(np.float64)),
    ),
    Mistake("the norm is left out", with_operation(rms_norm=lambda x, weight, eps: x)),
    Mistake("the norm subtracts the mean, as LayerNorm does", with_operation(rms_norm=_layer_norm)),
    Mistake("the norm's epsilon is 10 times the model's", _epsilon(10)),
    Mistake("the norm's epsilon is a tenth of the model's", _epsilon(0.1)),
    Mistake(
        "the norm's epsilon lies outside the root",
        with_operation(
            rms_norm=lambda x, weight, eps: _outer_epsilon(x, eps) * (1 + weight),
            rms_norm_gated=lambda x, z, weight, eps: weight * _outer_epsilon(x, eps) * ref.silu(z),
        ),
    ),
    Mistake("q_norm and k_norm are left out", _of_heads(lambda x, weight, eps: x)),
    Mistake(
        "the norm's +1 is missing in q_norm and k_norm alone",
        _of_heads(lambda x, weight, eps: ref.unit_rms(x, eps) * weight),
    ),
    Mistake("q_norm and k_norm come after RoPE", _after_rope),
    Mistake("the last norm is left out", _without_the_last),
    Mistake(
        "the norm's +1 is missing in the last norm alone",
        with_parameter("model.norm.weight", lambda w, m: w - 1),
    ),
    Mistake(
        "the norm's +1 is there twice in the last norm alone",
        with_parameter("model.norm.weight", lambda w, m: w + 1),
    ),
    Mistake("the gated norm is taken over all heads at once", _gated_norm(_all_heads_at_once)),
    Mistake(
        "the gated norm is scaled by 1 + weight, as the other norms are",
        _gated_norm(lambda x, z, weight, eps: (1 + weight) * ref.unit_rms(x, eps) * ref.silu(z)),
    ),
    Mistake(
        "the gated norm takes its gate before the norm",
        _gated_norm(lambda x, z, weight, eps: weight * ref.unit_rms(x * ref.silu(z), eps)),
    ),
    Mistake(
        "the gated norm's gate is sigmoid, not silu",
        _gated_norm(lambda x, z, weight, eps: weight * ref.unit_rms(x, eps) * ref.sigmoid(z)),
    ),
    Mistake(
        "the gated norm's gate is left out",
        _gated_norm(lambda x, z, weight, eps: weight * ref.unit_rms(x, eps)),
    ),
]
