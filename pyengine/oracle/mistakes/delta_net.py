"""Known mistakes in delta nets."""

from __future__ import annotations

import numpy as np

from ... import reference as ref
from ...checkpoint.families.qwen35 import value_head_orders
from ..formats import to_bfloat16, to_float16
from .mistake import Mistake, with_operation, with_parameter, with_replacement

_ROWS = {
    "in_proj_qkv": "channels",
    "in_proj_z": "values",
    "in_proj_b": "heads",
    "in_proj_a": "heads",
    "conv1d": "channels",
    "A_log": "heads",
    "dt_bias": "heads",
}


def _reordered(parameter, inverse, axis=0):
    """A parameter's value heads in the order of a GGUF (tiled), or un-tiled once more."""

    def changed(values, model):
        order = value_head_orders(model.config)[_ROWS.get(parameter, "values")]
        return np.take(values, np.argsort(order) if inverse else order, axis=axis)

    return with_parameter((f"linear_attn.{parameter}.weight", f"linear_attn.{parameter}"), changed)


def _tiled(parameter, axis=0):
    return [
        Mistake(
            f"{parameter}: the value heads are left in the file's tiled order",
            _reordered(parameter, True, axis),
        ),
        Mistake(f"{parameter}: the value heads are un-tiled twice", _reordered(parameter, False, axis)),
    ]


def _plain_conv1d(x, weight, conv_state):
    taps = weight.shape[1]
    inputs = np.concatenate([conv_state, x])
    conv_state[:] = inputs[len(x) :]
    return sum(weight[:, j] * inputs[j : j + len(x)] for j in range(taps))


def _delta_rule(step):
    """A recurrence with another order of decay, reading and update: step(state, k, v, beta, decay)
    -> the new state."""

    def delta_rule(query, key, value, beta, log_decay, recurrent_state):
        out, state = np.empty_like(value), recurrent_state
        for t in range(len(query)):
            decay, b = np.exp(log_decay[t])[:, None, None], beta[t][:, None]
            state[:] = step(state, key[t][..., None], value[t], b, decay)
            out[t] = np.sum(state * query[t][..., None], axis=1)
        return out

    return with_operation(delta_rule=delta_rule)


def _updated(state, k, v, beta, read):
    return state + k * ((v - np.sum(read * k, axis=1)) * beta)[:, None, :]


def _stored_state(rounded):
    """The state is kept in another dtype between two tokens; a token's output is of what it just made."""

    def delta_rule(query, key, value, beta, log_decay, recurrent_state):
        out = np.empty_like(value)
        for t in range(len(query)):
            at = slice(t, t + 1)
            out[at] = ref.delta_rule(query[at], key[at], value[at], beta[at], log_decay[at], recurrent_state)
            recurrent_state[:] = rounded(recurrent_state)
        return out

    return with_operation(delta_rule=delta_rule)


def _read_before_the_update(query, key, value, beta, log_decay, recurrent_state):
    out = np.empty_like(value)
    for t in range(len(query)):
        at = slice(t, t + 1)
        decayed = recurrent_state * np.exp(log_decay[t])[:, None, None]
        out[t] = np.sum(decayed * query[t][..., None], axis=1)
        ref.delta_rule(query[at], key[at], value[at], beta[at], log_decay[at], recurrent_state)
    return out


def _late_conv1d(x, weight, conv_state):
    return ref.causal_conv1d(np.concatenate([np.zeros_like(x[:1]), x[:-1]]), weight, conv_state)


def _z_for_values(model, token):
    """The rows of in_proj_z and those of the values are exchanged, where they are two matrices."""
    stored, config = model.weight, model.config

    def weight(name, expert=None):
        stem, _, part = name.rpartition(".in_proj_")
        if part not in ("qkv.weight", "z.weight"):
            return stored(name, expert)
        qkv, z = (stored(f"{stem}.in_proj_{one}.weight") for one in ("qkv", "z"))
        start = 2 * config.key_dim
        return qkv[start:] if part == "z.weight" else np.concatenate([qkv[:start], z])

    model.weight = weight


def _decay_by(exponent):
    return with_operation(log_decay=exponent)


def _swapped_query_and_key(query, key, value, beta, log_decay, state):
    scale = query.shape[-1] ** -0.5
    return ref.delta_rule(key * scale, query / scale, value, beta, log_decay, state)


def _tiled_heads_in_groups(x, ratio):
    head = np.arange(x.shape[1] * ratio)
    return x[:, (head % ratio * x.shape[1] + head // ratio) // ratio]


def _all_queries_first(qkvz, key_heads, head_k_dim):
    key_dim = key_heads * head_k_dim
    return np.split(qkvz, [key_dim + qkvz.shape[1] // 2], axis=1)


DELTA_NET = [
    Mistake(
        "grouped value heads are paired with key heads as if tiled (g mod n_k)",
        with_operation(repeat_heads=lambda x, ratio: np.tile(x, (1, ratio, 1))),
    ),
    Mistake(
        "tiled value heads are paired with key heads as if grouped (t div ratio)",
        with_operation(repeat_heads=_tiled_heads_in_groups),
    ),
    *(mistake for parameter in _ROWS for mistake in _tiled(parameter)),
    *_tiled("out_proj", axis=1),
    Mistake("conv1d's taps are reversed", with_parameter("conv1d.weight", lambda w, m: w[..., ::-1])),
    Mistake(
        "conv1d's weight is read as [taps, channels]",
        with_parameter("conv1d.weight", lambda w, m: w.reshape(w.shape[-1], -1).T.reshape(w.shape)),
    ),
    Mistake("the silu after conv1d is left out", with_operation(causal_conv1d=_plain_conv1d)),
    Mistake(
        "in_proj_a and in_proj_b are exchanged",
        with_replacement(in_proj_a="in_proj_b", in_proj_b="in_proj_a"),
    ),
    Mistake(
        "in_proj_qkvz is read as all queries, keys, values and z, not key head by key head",
        with_operation(split_qkvz=_all_queries_first),
    ),
    Mistake(
        "in_proj_ba is read as all b and all a, not key head by key head",
        with_operation(split_ba=lambda ba, key_heads: np.split(ba, 2, axis=1)),
    ),
    Mistake(
        "b and a of in_proj_ba are exchanged",
        with_operation(split_ba=lambda ba, key_heads: ref.split_ba(ba, key_heads)[::-1]),
    ),
    Mistake("query and key are exchanged", with_operation(delta_rule=_swapped_query_and_key)),
    Mistake("the l2 norm of query and key is left out", with_operation(l2_norm=lambda x, scale: x * scale)),
    Mistake(
        "the query is not scaled by 1 / sqrt(dk)",
        with_operation(l2_norm=lambda x, scale: ref.l2_norm(x, 1.0)),
    ),
    Mistake(
        "ssm_a, which is -exp(A_log), is taken for A_log",
        _decay_by(lambda a, a_log, dt_bias: ref.log_decay(a, -np.exp(a_log), dt_bias)),
        history=True,
    ),
    Mistake(
        "A_log is taken for its exponential",
        _decay_by(lambda a, a_log, dt_bias: -a_log * ref.softplus(a + dt_bias)),
        history=True,
    ),
    Mistake(
        "A_log is rounded to bfloat16",
        _decay_by(lambda a, a_log, dt_bias: ref.log_decay(a, to_bfloat16(a_log), dt_bias)),
        history=True,
    ),
    Mistake(
        "dt_bias is left out", _decay_by(lambda a, a_log, dt_bias: ref.log_decay(a, a_log, 0.0)), history=True
    ),
    Mistake(
        "softplus is left out of the decay",
        _decay_by(lambda a, a_log, dt_bias: -np.exp(a_log) * (a + dt_bias)),
        history=True,
    ),
    Mistake("the decay is left out", _decay_by(lambda a, a_log, dt_bias: np.zeros_like(a)), history=True),
    Mistake(
        "the decay is applied twice",
        _decay_by(lambda a, a_log, dt_bias: 2 * ref.log_decay(a, a_log, dt_bias)),
        history=True,
    ),
    Mistake(
        "the decay is a power of 2, not of e",
        _decay_by(lambda a, a_log, dt_bias: np.log(2) * ref.log_decay(a, a_log, dt_bias)),
        history=True,
    ),
    Mistake(
        "a token's output is read from the state before its update",
        with_operation(delta_rule=_read_before_the_update),
    ),
    Mistake("the recurrent state is kept in bfloat16", _stored_state(to_bfloat16), history=True),
    Mistake("the recurrent state is kept in float16", _stored_state(to_float16), history=True),
    Mistake("conv1d is a token late", with_operation(causal_conv1d=_late_conv1d)),
    Mistake("in_proj_z and the values of in_proj_qkv are exchanged", _z_for_values),
    Mistake("beta is without its sigmoid", with_operation(sigmoid=lambda x: x)),
    Mistake("beta is doubled", with_operation(sigmoid=lambda x: 2 * ref.sigmoid(x))),
    Mistake(
        "the delta rule reads the state before its decay",
        _delta_rule(lambda state, k, v, b, decay: _updated(state * decay, k, v, b, state)),
        history=True,
    ),
    Mistake(
        "the delta rule decays the state after its update",
        _delta_rule(lambda state, k, v, b, decay: _updated(state, k, v, b, state) * decay),
    ),
    Mistake(
        "the delta rule adds the value without what the state holds",
        _delta_rule(lambda state, k, v, b, decay: _updated(state * decay, k, v, b, 0 * state)),
        history=True,
    ),
]
