"""The specification: the model as equations, in NumPy float64.

Every step follows Hugging Face transformers' `modeling_qwen3_5_moe.py`, run in float64; rounded to
float32, the outputs are equal to it.  The delta rule is the recurrence, token by token.  Weights
are dequantised when a step needs them and dropped again, one expert at a time, so that the model
may be larger than memory.

T tokens; H hidden size; shapes stand beside the lines that make them.
"""

from __future__ import annotations

import numpy as np

from .checkpoint import Checkpoint
from .config import LINEAR, Config
from .decoder.state import DeltaNetState, KeyValueCache, State
from .ids import as_chunk, as_ids

# ---- functions of one argument ---------------------------------------------------------------


def sigmoid(x):
    # Two forms, so that exp never overflows.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    """log(1 + exp(x)); x itself above 20, as torch.nn.functional.softplus."""
    return np.where(x > 20.0, x, np.log1p(np.exp(np.minimum(x, 20.0))))


def softmax(x):
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ---- norms -----------------------------------------------------------------------------------


def unit_rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm(x, weight, eps):
    """Zero-centred: the scale is 1 + weight."""
    return unit_rms(x, eps) * (1.0 + weight)


def rms_norm_gated(x, z, weight, eps):
    """Not zero-centred; the gate comes after the weight."""
    return weight * unit_rms(x, eps) * silu(z)


def l2_norm(x):
    """The epsilon lies inside the root, whatever the model's own epsilon is."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


# ---- full attention --------------------------------------------------------------------------


def rotate(x, positions, inv_freq):
    """x [T, heads, head_dim]; the first 2 * len(inv_freq) entries turn, in halves, not in pairs."""
    angle = positions[:, None, None] * inv_freq.astype(np.float64)  # [T, 1, half]
    cos, sin, half = np.cos(angle), np.sin(angle), len(inv_freq)
    x1, x2, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


def causal_attention(query, keys, values):
    """query [T, heads, n] at the last T of the P positions; keys, values [P, kv_heads, n]."""
    tokens, heads, n = query.shape
    group = heads // keys.shape[1]
    start = len(keys) - tokens
    out = np.empty_like(query)
    future = np.arange(len(keys)) > start + np.arange(tokens)[:, None]  # [T, P]
    for head in range(heads):
        k, v = keys[:, head // group], values[:, head // group]  # [P, n]
        score = query[:, head] @ k.T * n ** -0.5  # [T, P]
        out[:, head] = softmax(np.where(future, -np.inf, score)) @ v
    return out


# ---- delta net -------------------------------------------------------------------------------


def causal_conv1d(x, weight, conv_state):
    """Depthwise: x [T, C], weight [C, taps] -> [T, C], silu included; updates conv_state."""
    taps = weight.shape[1]
    inputs = np.concatenate([conv_state, x])  # [taps - 1 + T, C]
    conv_state[:] = inputs[len(x):]
    return silu(sum(weight[:, j] * inputs[j:j + len(x)] for j in range(taps)))


def delta_rule(query, key, value, beta, log_decay, recurrent_state):
    """query, key [T, value heads, dk], value [T, value heads, dv], beta, log_decay [T, value heads]
    -> [T, value heads, dv]; updates recurrent_state [value heads, dk, dv]."""
    out = np.empty_like(value)
    decay = np.exp(log_decay)
    state = recurrent_state
    for t in range(len(query)):
        q, k = query[t, :, :, None], key[t, :, :, None]  # [value heads, dk, 1]
        state *= decay[t, :, None, None]
        kv_mem = np.sum(state * k, axis=1)  # [value heads, dv]
        delta = (value[t] - kv_mem) * beta[t, :, None]
        state += k * delta[:, None, :]
        out[t] = np.sum(state * q, axis=1)
    return out


# ---- the model -------------------------------------------------------------------------------


class ReferenceModel:
    """`forward` and `new_state`, as every model of this package; `config`, `arithmetic`."""

    arithmetic = "float64"

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.inv_freq = self.config.inv_freq()  # float32 values, widened: Hugging Face's own

    def new_state(self) -> State:
        return State(self.config, np.float64)

    def forward(self, ids, state: State | None = None, *, chunk: int | None = None,
                last_only: bool = False, record=None) -> np.ndarray:
        """ids [T] -> logits float32 [T, vocab], or [1, vocab] of the last token alone.

        state: continued and updated; None starts afresh.  chunk: tokens computed at a time (all at
        once by default).  record: called with (name, float64 [tokens, features]) for every module's
        output.  Errors: InputError for ids or a chunk out of range, FileFormatError when the model's
        file has changed since it was opened.
        """
        self.checkpoint.file.check_unchanged()
        ids = as_ids(ids, self.config.vocab_size)
        state = self.new_state() if state is None else state
        record = record or (lambda name, value: None)
        pieces = []
        for start in range(0, len(ids), as_chunk(chunk or len(ids))):
            hidden = self._hidden(ids[start:start + (chunk or len(ids))], state, record)
            if last_only:
                pieces = [hidden[-1:]]
            else:
                pieces.append(self._logits(hidden, record))
        if last_only:
            pieces = [self._logits(pieces[0], record)]
        return np.concatenate(pieces).astype(np.float32)

    # ---- parameters ----

    def weight(self, name, expert=None):
        """A parameter in float64, in Hugging Face's order."""
        return self.checkpoint.tensors[name].float64(expert)

    def linear(self, x, name, record):
        y = x @ self.weight(f"{name}.weight").T
        record(name, y)
        return y

    def norm(self, x, name, record):
        y = rms_norm(x, self.weight(f"{name}.weight"), self.config.rms_norm_eps)
        record(name, y)
        return y

    # ---- steps ----

    def _hidden(self, ids, state: State, record):
        embed_tokens = self.checkpoint.tensors["model.embed_tokens.weight"]
        hidden = embed_tokens.stored_float32(rows=ids).astype(np.float64)  # [T, H]
        record("model.embed_tokens", hidden)
        positions = np.arange(state.position, state.position + len(ids), dtype=np.float64)
        for index, layer_state in enumerate(state.layers):
            hidden = self._layer(index, hidden, positions, layer_state, record)
        state.position += len(ids)
        return hidden

    def _logits(self, hidden, record):
        hidden = self.norm(hidden, "model.norm", record)
        logits = hidden @ self.weight("lm_head.weight").T  # [T, vocab]
        record("lm_head", logits)
        return logits

    def _layer(self, index, hidden, positions, state, record):
        name = f"model.layers.{index}"
        x = self.norm(hidden, f"{name}.input_layernorm", record)
        if self.config.layer_types[index] == LINEAR:
            hidden = hidden + self._linear_attn(x, f"{name}.linear_attn", state, record)
        else:
            hidden = hidden + self._self_attn(x, f"{name}.self_attn", positions, state, record)
        x = self.norm(hidden, f"{name}.post_attention_layernorm", record)
        hidden = hidden + self._mlp(x, f"{name}.mlp", record)
        record(name, hidden)
        return hidden

    def _linear_attn(self, x, name, state: DeltaNetState, record):
        c: Config = self.config
        qkv = self.linear(x, f"{name}.in_proj_qkv", record)  # [T, conv_dim]
        z = self.linear(x, f"{name}.in_proj_z", record)  # [T, value_dim]
        b = self.linear(x, f"{name}.in_proj_b", record)  # [T, value heads]
        a = self.linear(x, f"{name}.in_proj_a", record)  # [T, value heads]

        conv1d = self.weight(f"{name}.conv1d.weight")[:, 0]  # [conv_dim, taps]
        qkv = causal_conv1d(qkv, conv1d, state.conv_state)
        query, key, value = np.split(qkv, [c.key_dim, 2 * c.key_dim], axis=1)
        query = query.reshape(len(x), c.linear_num_key_heads, c.linear_key_head_dim)
        key = key.reshape(len(x), c.linear_num_key_heads, c.linear_key_head_dim)
        value = value.reshape(len(x), c.linear_num_value_heads, c.linear_value_head_dim)
        query = l2_norm(query) * c.linear_key_head_dim ** -0.5
        key = l2_norm(key)
        ratio = c.linear_num_value_heads // c.linear_num_key_heads
        query, key = np.repeat(query, ratio, axis=1), np.repeat(key, ratio, axis=1)

        beta = sigmoid(b)
        a_log, dt_bias = self.weight(f"{name}.A_log"), self.weight(f"{name}.dt_bias")
        log_decay = -np.exp(a_log) * softplus(a + dt_bias)  # [T, value heads], <= 0
        core = delta_rule(query, key, value, beta, log_decay, state.recurrent_state)

        core = rms_norm_gated(core, z.reshape(core.shape), self.weight(f"{name}.norm.weight"),
                              c.rms_norm_eps).reshape(len(x), -1)  # [T, value_dim]
        record(f"{name}.norm", core)
        y = self.linear(core, f"{name}.out_proj", record)  # [T, H]
        record(name, y)
        return y

    def _self_attn(self, x, name, positions, cache: KeyValueCache, record):
        c: Config = self.config
        n = c.head_dim
        q = self.linear(x, f"{name}.q_proj", record)  # per head: n of query, then n of gate
        query, gate = np.split(q.reshape(len(x), c.num_attention_heads, 2 * n), 2, axis=-1)
        query = rms_norm(query, self.weight(f"{name}.q_norm.weight"), c.rms_norm_eps)
        record(f"{name}.q_norm", query.reshape(len(x), -1))
        key = self.linear(x, f"{name}.k_proj", record).reshape(len(x), c.num_key_value_heads, n)
        key = rms_norm(key, self.weight(f"{name}.k_norm.weight"), c.rms_norm_eps)
        record(f"{name}.k_norm", key.reshape(len(x), -1))
        value = self.linear(x, f"{name}.v_proj", record).reshape(key.shape)

        query, key = (rotate(v, positions, self.inv_freq) for v in (query, key))
        cache.append(key, value)
        out = causal_attention(query, cache.keys, cache.values)  # [T, heads, n]
        y = self.linear((out * sigmoid(gate)).reshape(len(x), -1), f"{name}.o_proj", record)
        record(name, y)
        return y

    def _mlp(self, x, name, record):
        shared = self._shared_expert(x, f"{name}.shared_expert", record)
        routing_weights, selected_experts = self._gate(x, f"{name}.gate", record)
        routed = self._experts(x, f"{name}.experts", routing_weights, selected_experts)
        record(f"{name}.experts", routed)
        y = routed + sigmoid(self.linear(x, f"{name}.shared_expert_gate", record)) * shared
        record(name, y)
        return y

    def _shared_expert(self, x, name, record):
        gate = self.linear(x, f"{name}.gate_proj", record)
        up = self.linear(x, f"{name}.up_proj", record)
        y = self.linear(silu(gate) * up, f"{name}.down_proj", record)
        record(name, y)
        return y

    def _gate(self, x, name, record):
        """The router -> routing_weights, selected_experts [T, top_k], by falling probability; of
        equal ones the lower index first."""
        logits = self.linear(x, name, record)  # [T, experts]
        p = softmax(logits)
        selected = np.argsort(-p, axis=-1, kind="stable")[:, :self.config.num_experts_per_tok]
        weights = np.take_along_axis(p, selected, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        record(f"{name}.1", weights)
        record(f"{name}.2", selected)
        return weights, selected

    def _experts(self, x, name, routing_weights, selected_experts):
        routed = np.zeros_like(x)
        for expert in np.unique(selected_experts):
            token, place = np.nonzero(selected_experts == expert)
            gate = x[token] @ self.weight(f"{name}.gate_proj", expert).T
            up = x[token] @ self.weight(f"{name}.up_proj", expert).T
            y = (silu(gate) * up) @ self.weight(f"{name}.down_proj", expert).T
            routed[token] += y * routing_weights[token, place, None]
        return routed
