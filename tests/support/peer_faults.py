"""Bugs that put another step in place of one of `peer.Peer`'s: {name: what it does to a Peer}."""

import types

import numpy as np
from peer_numbers import F, bfloat16, e4m3, sigmoid, silu, softmax


def step(name, function):
    """function(peer, ...) in place of the method."""

    def plant(peer):
        setattr(peer, name, types.MethodType(function, peer))

    return plant


def around(name, function):
    """function(peer, the method, ...) in place of the method."""

    def plant(peer):
        right = getattr(peer, name)
        setattr(peer, name, types.MethodType(lambda self, *a: function(self, right, *a), peer))

    return plant


def both(*plants):
    def plant(peer):
        for one in plants:
            one(peer)

    return plant


# ---- norms -----------------------------------------------------------------------------------


def outer_epsilon(self, x):
    return x / (np.sqrt(np.mean(x * x, -1, keepdims=True, dtype=F)) + F(self.eps))


def rows_by_batch(self, x):
    """Eight rows or more are summed in blocks of 16 columns; fewer, column by column."""
    squares = x * x
    if len(x) < 8:
        mean = np.cumsum(squares, -1, dtype=F)[..., -1:] / F(x.shape[-1])
    else:
        parts = squares.reshape(*x.shape[:-1], -1, 8).sum(-1, dtype=F)
        mean = parts[..., ::-1].copy().sum(-1, keepdims=True, dtype=F) / F(x.shape[-1])
    return x / np.sqrt(mean + F(self.eps))


def whole_gated_norm(self, x, z, w):
    return self.unit(x.reshape(len(x), -1)).reshape(x.shape) * w * silu(z)


def norm_after_rope(self, x, weight, name, positions):
    x = self.norm(self.rope(x, positions), weight)
    self.put(name, x)
    return x


# ---- attention -------------------------------------------------------------------------------


def base(theta):
    def plant(peer):
        peer.theta = theta

    return plant


def no_yarn(self, freq, width):
    return freq, F(1)


def window(self, key, query):
    return (key <= query) & (key > query - 10)


def not_itself(self, key, query):
    return (key < query) | ((key == query) & (query == 0))


def kept_as(narrow):
    return step("cached", lambda self, k, v: (narrow(k), narrow(v)))


def table_in_bfloat16(self, angle, scale):
    return bfloat16(np.cos(angle) * scale), bfloat16(np.sin(angle) * scale)


# ---- delta net -------------------------------------------------------------------------------


def late_conv(self, right, x, weight, state, keys):
    return right(np.concatenate([np.zeros_like(x[:1]), x[:-1]]), weight, state, keys)


def fused_rows(self, x, g):
    """z and the values lie the other way round in the fused matrix that is cut here."""
    fused = np.concatenate([self.weight(f"{g}.attn_qkv.weight"), self.weight(f"{g}.attn_gate.weight")])
    keys, values = 2 * self.n_k * self.dk, self.n_v * self.dv
    q_k, z, v, rest = np.split(x @ fused.T, [keys, keys + values, keys + 2 * values], axis=1)
    assert not rest.size
    b, a = (self.linear(x, f"{g}.{n}.weight") for n in ("ssm_beta", "ssm_alpha"))
    return np.concatenate([q_k, v], axis=1), z, b, a


def swapped_b_a(self, right, x, g):
    qkv, z, b, a = right(x, g)
    return qkv, z, a, b


def boundary(self, state, log_decay, t):
    """A chunk of 8 begins with a state that its last token's product of decays has been left in."""
    if t and t % 8 == 0:
        state *= np.exp(log_decay[t])[:, None, None]


def state_as(narrow):
    def stored(self, state):
        state[:] = narrow(state)

    return step("after_token", stored)


def transposed_state(self, right, i, qkv):
    known = i in self.states
    conv_state, state = right(i, qkv)
    if known:
        state[:] = np.swapaxes(state, 1, 2).copy()
    return conv_state, state


def reversed_taps(self, right, x, weight, state, keys):
    return right(x, weight[:, ::-1], state, keys)


# ---- experts ---------------------------------------------------------------------------------


def combined_by_batch(self, row, g, chosen, weights, tokens):
    """Up to 32 tokens take another path, which adds the experts up from the last one."""
    terms = [w * self.expert(row, g, e)[0] for e, w in zip(chosen, weights)]
    total = np.zeros(row.shape[1], F)
    for term in terms[::-1] if tokens <= 32 else terms:
        total += term
    return total


def combined_in_bfloat16(self, row, g, chosen, weights, tokens):
    total = np.zeros(row.shape[1], F)
    for e, w in sorted(zip(chosen, weights)):
        total = bfloat16(total + bfloat16(w * self.expert(row, g, e)[0]))
    return total


def weighed_inputs(self, row, g, chosen, weights, tokens):
    return sum(self.expert((w * row).astype(F), g, e)[0] for e, w in zip(chosen, weights))


def next_expert(self, right, row, g, e):
    return right(row, g, (e + 1) % self.tensors[f"{g}.ffn_gate_exps.weight"].data.shape[0])


def one_fewer(self, weights):
    weights = weights.copy()
    weights[:, -1] = 0
    return weights / weights.sum(-1, keepdims=True)


def softmax_twice(self, logits):
    p = softmax(logits)
    chosen = np.argsort(-p, axis=-1, kind="stable")[:, : self.top_k]
    return softmax(np.take_along_axis(p, chosen, -1)), chosen


def gelu(self, gate, up):
    return (0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up).astype(F)


PATCHES = {
    "eps_outside": step("unit", outer_epsilon),
    "norm_rows_by_batch": step("unit", rows_by_batch),
    "layer_norm": around("norm", lambda self, right, x, name: right(x - x.mean(-1, keepdims=True), name)),
    "no_head_norm": step("head_norm", lambda self, x, weight: x),
    "norm_after_rope": step("turned", norm_after_rope),
    "no_last_norm": step("last_norm", lambda self, x: x),
    "whole_gated_norm": step("gated_norm", whole_gated_norm),
    "gate_before_norm": step("gated_norm", lambda self, x, z, w: self.unit(x * silu(z)) * w),
    "sigmoid_z": step("gated_norm", lambda self, x, z, w: self.unit(x) * w * sigmoid(z)),
    "rope_base": base(1e6),
    "no_yarn": step("stretched", no_yarn),
    "no_yarn_scale": around("stretched", lambda self, right, *a: (right(*a)[0], F(1))),
    "rope_table_bfloat16": step("table", table_in_bfloat16),
    "late_positions": step("positions", lambda self, start, count: start - (start > 0) + np.arange(count)),
    "window": step("seen", window),
    "not_itself": step("seen", not_itself),
    "sees_next": step("seen", lambda self, key, query: key <= query + 1),
    "score_scale": step("score_scale", lambda self: F(1 / self.n)),
    "probabilities_bfloat16": step("probabilities", lambda self, score: bfloat16(softmax(score))),
    "heads_in_turn": step("shared_heads", lambda self, x: np.tile(x, (1, self.heads // self.kv_heads, 1))),
    "keys_as_values": around("keys_values", lambda self, right, x, g: right(x, g)[::-1]),
    "kv_bfloat16": kept_as(bfloat16),
    "kv_float16": kept_as(lambda x: x.astype(np.float16).astype(F)),
    "kv_8_bits": kept_as(e4m3),
    "no_attention_gate": step("attention_gated", lambda self, y, gate: y),
    "silu_attention_gate": step("attention_gated", lambda self, y, gate: y * silu(gate)),
    "late_conv": around("conv", late_conv),
    "reversed_taps": around("conv", reversed_taps),
    "no_conv_silu": step("conv_output", lambda self, y: y),
    "no_l2": step("l2", lambda self, x: x),
    "fused_rows": step("projected", fused_rows),
    "swapped_b_a": around("projected", swapped_b_a),
    "plain_beta": step("beta", lambda self, b: b),
    "no_dt_bias": around(
        "log_decay", lambda self, right, a, g: right(a - self.weight(f"{g}.ssm_dt.bias").reshape(-1), g)
    ),
    "decay_twice": around("log_decay", lambda self, right, a, g: 2 * right(a, g)),
    "decay_base_2": around("log_decay", lambda self, right, a, g: F(np.log(2)) * right(a, g)),
    "early_output": lambda peer: None,  # at its place in Peer.recurrence
    "chunk_boundary": step("before_token", boundary),
    "state_bfloat16": state_as(bfloat16),
    "state_float16": state_as(lambda x: x.astype(np.float16).astype(F)),
    "transposed_state": around("recurrent", transposed_state),
    "combined_by_batch": step("combined", combined_by_batch),
    "combined_bfloat16": step("combined", combined_in_bfloat16),
    "weighed_inputs": step("combined", weighed_inputs),
    "next_expert": around("expert", next_expert),
    "expert_order": step("weighed", lambda self, weights: weights[:, ::-1]),
    "one_fewer": step("weighed", one_fewer),
    "softmax_twice": step("route", softmax_twice),
    "router_bfloat16": around("router", lambda self, right, x, g: bfloat16(right(x, g))),
    "gelu": step("activated", gelu),
    "late_shared_gate": step("mixed", lambda self, routed, shared, scale: sigmoid(scale) * (routed + shared)),
    "no_shared_gate": step("mixed", lambda self, routed, shared, scale: routed + shared),
    "no_shared_expert": step("mixed", lambda self, routed, shared, scale: routed),
    "normed_residual": step("residual", lambda self, x, normed, y: normed + y),
    "no_residual": step("residual", lambda self, x, normed, y: y),
    "residual_bfloat16": step("residual", lambda self, x, normed, y: bfloat16(x + y)),
    "large_embeddings": around(
        "embed", lambda self, right, ids: right(ids) * F(np.sqrt(self.weight("token_embd.weight").shape[1]))
    ),
    "soft_cap": around("logits", lambda self, right, x: 30 * np.tanh(right(x) / 30)),
    "tied_head": step("logits", lambda self, x: x @ self.weight("token_embd.weight").T),
    "late_logits": around("logits", lambda self, right, x: np.roll(right(x), 1, axis=0)),
}
