"""Known mistakes in attention and rotary embeddings."""

from __future__ import annotations

import numpy as np

from ... import reference as ref
from ...checkpoint.rope import inverse_frequencies
from ..formats import to_bfloat16, to_e4m3, to_float16
from .mistake import Mistake, with_operation, with_replacement


def _interleaved(x, positions, inv_freq, scale):
    width = 2 * len(inv_freq)
    order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2), np.arange(width, x.shape[-1])])
    turned = np.empty_like(x)
    turned[..., order] = ref.rotate(x[..., order], positions, inv_freq, scale)
    return turned


def _full_width(model, token):
    c = model.config
    model.inv_freq = inverse_frequencies(c.head_dim, c.rope_theta, c.yarn)


def _last_entries(x, positions, inv_freq, scale):
    start = x.shape[-1] - 2 * len(inv_freq)
    turned = ref.rotate(x[..., start:], positions, inv_freq, scale)
    return np.concatenate([x[..., :start], turned], axis=-1)


def _table_in_bfloat16(x, positions, inv_freq, scale):
    angle = positions[:, None, None] * inv_freq
    cos, sin = (to_bfloat16(f(angle) * scale).astype(np.float64) for f in (np.cos, np.sin))
    half = len(inv_freq)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


def _frequencies(changed):
    def change(model, token):
        model.inv_freq = changed(model.inv_freq.astype(np.float64), model.config)

    return change


def _of_section(keep):
    """Only the frequencies of the temporal section turn: the others' positions are taken for 0."""
    return _frequencies(lambda f, c: np.where(keep(np.arange(len(f)), c), f, 0.0))


def _restarted_positions(model, token):
    model.op.rotate = lambda x, positions, inv_freq, scale: ref.rotate(
        x, np.where(positions >= token, positions - token, positions), inv_freq, scale
    )


def _moved_positions(by):
    def change(model, token):
        model.op.rotate = lambda x, positions, inv_freq, scale: ref.rotate(
            x, np.where(positions >= token, positions + by, positions), inv_freq, scale
        )

    return change


def _yarn(change):
    """change(model, plain frequencies); nothing to a model without YaRN."""

    def made(model, token):
        c = model.config
        if c.yarn is not None:
            change(model, inverse_frequencies(c.rotary_dim, c.rope_theta))

    return made


def _without_yarn(model, plain):
    model.inv_freq, model.rope_scale = plain, 1.0


def _linear_scaling(model, plain):
    model.inv_freq, model.rope_scale = plain / model.config.yarn.factor, 1.0


def _attention_factor(power):
    def change(model, plain):
        model.rope_scale = model.rope_scale**power

    return change


def _scores(changed):
    return with_operation(attention_scores=changed)


def _without_mask(query, keys):
    return query @ keys.T * query.shape[1] ** -0.5


def _without_itself(query, keys):
    """The first token has no other than itself."""
    score = ref.attention_scores(query, keys)
    own = np.arange(len(query))
    score[own[1:], len(keys) - len(query) + own[1:]] = -np.inf
    return score


def _one_ahead(query, keys):
    score = _without_mask(query, keys)
    start = len(keys) - len(query)
    return np.where(np.arange(len(keys)) > start + 1 + np.arange(len(query))[:, None], -np.inf, score)


def _window(model, token):
    def attention_scores(query, keys):
        score, start = ref.attention_scores(query, keys), len(keys) - len(query)
        old = np.arange(len(keys)) <= start + np.arange(len(query))[:, None] - token
        return np.where(old, -np.inf, score)

    model.op.attention_scores = attention_scores


def _cached(rounded):
    """Keys and values as a cache of another dtype holds them."""

    def narrow(x):
        return rounded(x).astype(np.float64)

    return with_operation(
        attention_scores=lambda query, keys: ref.attention_scores(query, narrow(keys)),
        attention_mix=lambda p, values: ref.attention_mix(p, narrow(values)),
    )


def _gates(name, function):
    """Of the attention [T, heads, n], of the shared expert [T, H], and of both."""
    gated = {"the attention's gate": 3, "the shared expert's gate": 2}
    return [
        Mistake(f"a gate {name}", with_operation(gated=function)),
        *(
            Mistake(
                f"{which} {name}",
                with_operation(
                    gated=lambda x, gate, ndim=ndim: (function if x.ndim == ndim else ref.gated)(x, gate)
                ),
            )
            for which, ndim in gated.items()
        ),
    ]


def _split_whole(q, heads):
    return [part.reshape(len(q), heads, -1) for part in np.split(q, 2, axis=1)]


ATTENTION = [
    Mistake("RoPE turns pairs (2i, 2i + 1), not halves", with_operation(rotate=_interleaved), history=True),
    Mistake("RoPE turns the whole head: the partial rotary width is dropped", _full_width, history=True),
    Mistake(
        "RoPE turns the last entries of the head, not the first",
        with_operation(rotate=_last_entries),
        history=True,
    ),
    Mistake("RoPE is left out", with_operation(rotate=lambda x, positions, inv_freq, scale: x), history=True),
    Mistake("RoPE turns the other way", _frequencies(lambda f, c: -f), history=True),
    *(
        Mistake(
            f"RoPE's base is {base:,}",
            _frequencies(lambda f, c, base=base: float(base) ** (-np.arange(len(f)) / len(f))),
            history=True,
        )
        for base in (10_000, 1_000_000, 10_000_000)
    ),
    Mistake(
        "RoPE's sections are misread: only the temporal one turns, taken as a block",
        _of_section(lambda i, c: i < (c.mrope_section or (len(i),))[0]),
        history=True,
    ),
    Mistake(
        "RoPE's sections are misread: only the temporal one turns, taken as interleaved",
        _of_section(lambda i, c: i % 3 == 0),
        history=True,
    ),
    Mistake(
        "RoPE's frequencies are rounded to bfloat16", _frequencies(lambda f, c: to_bfloat16(f)), history=True
    ),
    Mistake(
        "RoPE's frequencies are rounded to float16", _frequencies(lambda f, c: to_float16(f)), history=True
    ),
    Mistake(
        "RoPE's cosines and sines are rounded to bfloat16",
        with_operation(rotate=_table_in_bfloat16),
        history=True,
    ),
    Mistake("YaRN is left out", _yarn(_without_yarn), history=True),
    Mistake(
        "YaRN is taken for linear scaling: every frequency is divided by the factor",
        _yarn(_linear_scaling),
        history=True,
    ),
    Mistake("YaRN's attention factor is left out", _yarn(_attention_factor(0)), history=True),
    Mistake("YaRN's attention factor is applied twice", _yarn(_attention_factor(2)), history=True),
    Mistake("positions start again", _restarted_positions, at_token=True, history=True),
    Mistake("positions are one behind", _moved_positions(-1), at_token=True, history=True),
    Mistake("positions are one ahead", _moved_positions(1), at_token=True, history=True),
    Mistake(
        "query and gate are split across the whole, not head by head",
        with_operation(split_query_and_gate=_split_whole),
    ),
    Mistake(
        "query and gate are exchanged",
        with_operation(split_query_and_gate=lambda q, heads: ref.split_query_and_gate(q, heads)[::-1]),
    ),
    Mistake("k_proj and v_proj are exchanged", with_replacement(k_proj="v_proj", v_proj="k_proj")),
    Mistake(
        "query heads use the key heads in turn, not in groups",
        with_operation(key_value_head=lambda head, heads, kv_heads: head % kv_heads),
    ),
    Mistake(
        "the attention scores are not scaled",
        _scores(lambda query, keys: ref.attention_scores(query * query.shape[1] ** 0.5, keys)),
        history=True,
    ),
    Mistake(
        "the attention scores are scaled by 1 / n, not by 1 / sqrt(n)",
        _scores(lambda query, keys: ref.attention_scores(query * query.shape[1] ** -0.5, keys)),
        history=True,
    ),
    Mistake("the causal mask is missing", _scores(_without_mask), looks_ahead=True),
    Mistake(
        "a token attends to the one after it: the mask is one off", _scores(_one_ahead), looks_ahead=True
    ),
    Mistake("a token does not attend to itself: the mask is one off", _scores(_without_itself), history=True),
    Mistake("attention sees a window of the last tokens alone", _window, at_token=True, history=True),
    Mistake(
        "the attention's probabilities are rounded to bfloat16",
        with_operation(softmax=lambda x: to_bfloat16(ref.softmax(x)).astype(np.float64)),
        history=True,
    ),
    Mistake("keys and values are kept in bfloat16", _cached(to_bfloat16)),
    Mistake("keys and values are kept in float16", _cached(to_float16)),
    Mistake("keys and values are kept in 8 bits (e4m3)", _cached(to_e4m3)),
    *_gates("is left out", lambda x, gate: x),
    *_gates("is without its sigmoid", lambda x, gate: x * gate),
    *_gates("is silu, not sigmoid", lambda x, gate: x * ref.silu(gate)),
]
