"""The specification: the model as equations, in NumPy float64.

Every step follows Hugging Face transformers' `modeling_qwen3_5_moe.py`, of dense models
`modeling_qwen3_5.py`, of Qwen3-Next `modeling_qwen3_next.py`, run in float64; rounded to float32, the outputs
are equal to it.  The delta rule is the recurrence, token by token.  Weights are dequantized when a step needs
them and dropped again, one expert at a time, so that the model may be larger than memory.

T tokens; H hidden size; shapes stand beside the lines that make them.

The model computes with the functions below through `ReferenceModel.op`, which holds them by name, and
hands every module's output to `record`, which may put another value in its place.  The oracle's rounded
runs, its re-runs on a candidate's own values and its planted mistakes are made of these two alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.config import LINEAR
from .checkpoint.families import family_of
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


# ---- functions of two ------------------------------------------------------------------------


def add(x, y):
    return x + y


def linear(x, weight):
    """x [T, columns], weight [rows, columns] -> [T, rows]."""
    return x @ weight.T


def swiglu(gate, up):
    return silu(gate) * up


def gated(x, gate):
    return x * sigmoid(gate)


# ---- norms -----------------------------------------------------------------------------------


def unit_rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm(x, weight, eps):
    """Zero-centred: the scale is 1 + weight."""
    return unit_rms(x, eps) * (1.0 + weight)


def rms_norm_gated(x, z, weight, eps):
    """Not zero-centred; the gate comes after the weight."""
    return weight * unit_rms(x, eps) * silu(z)


def l2_norm(x, scale):
    """The epsilon lies inside the root, whatever the model's own epsilon is."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6) * scale


# ---- full attention --------------------------------------------------------------------------


def split_query_and_gate(q, heads):
    """[T, heads * 2n] -> query, gate [T, heads, n]: each head has its n of query, then n of gate."""
    return np.split(q.reshape(len(q), heads, -1), 2, axis=-1)


def rotate(x, positions, inv_freq, scale):
    """x [T, heads, head_dim]; the first 2 * len(inv_freq) entries turn, in halves, not in pairs.
    scale: YaRN's attention factor, or 1."""
    angle = positions[:, None, None] * inv_freq  # [T, 1, half], float64 as positions
    cos, sin, half = np.cos(angle) * scale, np.sin(angle) * scale, len(inv_freq)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


def key_value_head(head, heads, kv_heads):
    """Query head -> the head of the keys and values that it uses."""
    return head // (heads // kv_heads)


def attention_scores(query, keys):
    """One head: query [T, n] at the last T of the P positions, keys [P, n] -> [T, P], -inf for what
    lies in the future."""
    tokens, n = query.shape
    start = len(keys) - tokens
    score = query @ keys.T * n**-0.5
    future = np.arange(len(keys)) > start + np.arange(tokens)[:, None]
    return np.where(future, -np.inf, score)


def attention_mix(p, values):
    """p [T, P], values [P, n] -> [T, n]."""
    return p @ values


# ---- delta net -------------------------------------------------------------------------------


def split_qkvz(qkvz, key_heads, head_k_dim):
    """Qwen3-Next's: [T, conv_dim + value_dim], for each key head its query, its key, the values of its value
    heads, their z -> query, key, value in one [T, conv_dim], z [T, value_dim]."""
    of_head = qkvz.reshape(len(qkvz), key_heads, -1)
    value_rows = (of_head.shape[2] - 2 * head_k_dim) // 2
    ends = np.cumsum([head_k_dim, head_k_dim, value_rows])
    query, key, value, z = (part.reshape(len(qkvz), -1) for part in np.split(of_head, ends, axis=2))
    return np.concatenate([query, key, value], axis=1), z


def split_ba(ba, key_heads):
    """Qwen3-Next's: [T, 2 * value heads], for each key head b, then a, of its value heads -> b, a [T, value
    heads]."""
    b, a = np.split(ba.reshape(len(ba), key_heads, -1), 2, axis=2)
    return b.reshape(len(ba), -1), a.reshape(len(ba), -1)


def causal_conv1d(x, weight, conv_state):
    """Depthwise: x [T, C], weight [C, taps] -> [T, C], silu included; updates conv_state."""
    taps = weight.shape[1]
    inputs = np.concatenate([conv_state, x])  # [taps - 1 + T, C]
    conv_state[:] = inputs[len(x) :]
    return silu(sum(weight[:, j] * inputs[j : j + len(x)] for j in range(taps)))


def repeat_heads(x, ratio):
    """[T, key heads, n] -> [T, value heads, n]: value head g uses key head g // ratio."""
    return np.repeat(x, ratio, axis=1)


def log_decay(a, a_log, dt_bias):
    """[T, value heads], <= 0."""
    return -np.exp(a_log) * softplus(a + dt_bias)


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


# ---- router and experts ----------------------------------------------------------------------


def router_probabilities(logits):
    return softmax(logits)


def select_experts(p, top_k):
    """p [T, experts] -> [T, top_k], by falling probability; of equal ones the lower index first."""
    return np.argsort(-p, axis=-1, kind="stable")[:, :top_k]


def routing_weights(p, selected_experts):
    """[T, top_k], each row's sum 1."""
    weights = np.take_along_axis(p, selected_experts, axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True)


def weighted(y, weight):
    """One expert's outputs [tokens, H] by that expert's weight for each [tokens, 1]."""
    return y * weight


# ---- the model -------------------------------------------------------------------------------


OPERATIONS = (
    add,
    linear,
    swiglu,
    gated,
    sigmoid,
    softmax,
    rms_norm,
    rms_norm_gated,
    l2_norm,
    split_query_and_gate,
    rotate,
    key_value_head,
    attention_scores,
    attention_mix,
    split_qkvz,
    split_ba,
    causal_conv1d,
    repeat_heads,
    log_decay,
    delta_rule,
    router_probabilities,
    select_experts,
    routing_weights,
    weighted,
)


class ReferenceModel:
    """`forward` and `new_state`, as every model of this package; `config`, `arithmetic`.

    op  the OPERATIONS by name: what every step computes with
    """

    arithmetic = "float64"

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.inv_freq = self.config.inv_freq()  # float32 values, widened: Hugging Face's own
        self.rope_scale = self.config.rope_scale
        self.op = SimpleNamespace(**{function.__name__: function for function in OPERATIONS})

    def new_state(self) -> State:
        return State(self.config, np.float64)

    def forward(
        self,
        ids,
        state: State | None = None,
        *,
        chunk: int | None = None,
        last_only: bool = False,
        record=None,
    ) -> np.ndarray:
        """ids [T] -> logits float32 [T, vocab], or [1, vocab] of the last token alone.

        state: continued and updated; None starts afresh.  chunk: tokens computed at a time (all at
        once by default).  record: called with (name, float64 [tokens, features]) for every module's
        output; the value it returns, unless that is None, is what the model goes on with.
        Errors: InputError for ids or a chunk out of range, FileFormatError when the model's file has
        changed since it was opened.
        """
        self.checkpoint.file.check_unchanged()
        ids = as_ids(ids, self.config.vocab_size)
        state = self.new_state() if state is None else state
        record = _going_on(record)
        pieces = []
        for start in range(0, len(ids), as_chunk(chunk or len(ids))):
            hidden = self._hidden(ids[start : start + (chunk or len(ids))], state, record)
            if last_only:
                pieces = [hidden[-1:]]
            else:
                pieces.append(self._logits(hidden, record))
        if last_only:
            pieces = [self._logits(pieces[0], record)]
        return np.concatenate(pieces).astype(np.float32)

    def forward_batch(self, sequences, *, chunk: int | None = None, last_only=False) -> list:
        """[(ids [T], state)] -> the logits of each, as `forward` gives them: one after the other."""
        if isinstance(last_only, bool):
            last_only = [last_only] * len(sequences)
        return [
            self.forward(ids, state, chunk=chunk, last_only=last)
            for (ids, state), last in zip(sequences, last_only)
        ]

    def logits_in_pieces(self, sequences, *, rows: int = 128, chunk: int = 512):
        """Sequences of ids, each from an empty state -> the logits of every token, as `forward` gives them.

        An iterator of (sequence, first token, logits float32 [n, vocab]), n <= rows: the tokens of each
        sequence in order, one sequence after the other.  chunk: tokens computed at a time.
        Errors as of `forward`.
        """
        self.checkpoint.file.check_unchanged()
        record = _going_on(None)
        for i, ids in enumerate([as_ids(ids, self.config.vocab_size) for ids in sequences]):
            state = self.new_state()
            for start in range(0, len(ids), as_chunk(chunk)):
                hidden = self._hidden(ids[start : start + chunk], state, record)
                for row in range(0, len(hidden), rows):
                    yield i, start + row, self._logits(hidden[row : row + rows], record).astype(np.float32)

    def run_layer(self, index: int, hidden, record) -> np.ndarray:
        """One decoder layer from a fresh state: hidden [T, H] -> [T, H]; record as forward's."""
        positions = np.arange(len(hidden), dtype=np.float64)
        state = self.new_state().layers[index]
        return self._layer(index, hidden, positions, state, _going_on(record))

    def run_head(self, hidden, record) -> np.ndarray:
        """The last norm and lm_head: hidden float64 [T, H] -> float64 [T, vocab]."""
        return self._logits(hidden, _going_on(record))

    def expert_output(self, layer: int, expert: int, x) -> np.ndarray:
        """One routed expert's output float64 [T, H], before its weight; x [T, H]: rows of the layer's
        recorded `post_attention_layernorm`."""
        return self._expert(x, f"model.layers.{layer}.mlp.experts", expert)

    # ---- parameters ----

    def weight(self, name, expert=None):
        """A parameter in float64, in Hugging Face's order."""
        return self.checkpoint.tensors[name].float64(expert)

    def linear(self, x, name, record):
        return record(name, self.op.linear(x, self.weight(f"{name}.weight")))

    def norm(self, x, name, record):
        y = self.op.rms_norm(x, self.weight(f"{name}.weight"), self.config.rms_norm_eps)
        return record(name, y)

    def head_norm(self, x, name, record):
        """x [T, heads, n], each head by itself; recorded as [T, heads * n]."""
        y = self.op.rms_norm(x, self.weight(f"{name}.weight"), self.config.rms_norm_eps)
        return record(name, y.reshape(len(x), -1)).reshape(x.shape)

    # ---- steps ----

    def embed(self, ids):
        """[T] -> [T, H]."""
        embed_tokens = self.checkpoint.tensors["model.embed_tokens.weight"]
        return embed_tokens.stored_float32(rows=ids).astype(np.float64)

    def _hidden(self, ids, state: State, record):
        hidden = record("model.embed_tokens", self.embed(ids))  # [T, H]
        positions = np.arange(state.position, state.position + len(ids), dtype=np.float64)
        for index, layer_state in enumerate(state.layers):
            hidden = self._layer(index, hidden, positions, layer_state, record)
        state.position += len(ids)
        return hidden

    def _logits(self, hidden, record):
        return self.linear(self.norm(hidden, "model.norm", record), "lm_head", record)  # [T, vocab]

    def _layer(self, index, hidden, positions, state, record):
        op, name = self.op, f"model.layers.{index}"
        x = self.norm(hidden, f"{name}.input_layernorm", record)
        if self.config.layer_types[index] == LINEAR:
            y = self._linear_attn(x, f"{name}.linear_attn", state, record)
        else:
            y = self._self_attn(x, f"{name}.self_attn", positions, state, record)
        hidden = op.add(hidden, y)
        x = self.norm(hidden, f"{name}.post_attention_layernorm", record)
        return record(name, op.add(hidden, self._mlp(index, x, f"{name}.mlp", record)))

    def _linear_attn(self, x, name, state: DeltaNetState, record):
        c, op = self.config, self.op
        qkv, z, b, a = self._delta_net_inputs(x, name, record)
        conv1d = self.weight(f"{name}.conv1d.weight")[:, 0]  # [conv_dim, taps]
        qkv = op.causal_conv1d(qkv, conv1d, state.conv_state)
        query, key, value = np.split(qkv, [c.key_dim, 2 * c.key_dim], axis=1)
        query = query.reshape(len(x), c.linear_num_key_heads, c.linear_key_head_dim)
        key = key.reshape(len(x), c.linear_num_key_heads, c.linear_key_head_dim)
        value = value.reshape(len(x), c.linear_num_value_heads, c.linear_value_head_dim)
        query = op.l2_norm(query, c.linear_key_head_dim**-0.5)
        key = op.l2_norm(key, 1.0)
        ratio = c.linear_num_value_heads // c.linear_num_key_heads
        query, key = op.repeat_heads(query, ratio), op.repeat_heads(key, ratio)

        beta = op.sigmoid(b)
        log_decay = op.log_decay(a, self.weight(f"{name}.A_log"), self.weight(f"{name}.dt_bias"))
        core = op.delta_rule(query, key, value, beta, log_decay, state.recurrent_state)

        core = op.rms_norm_gated(
            core, z.reshape(core.shape), self.weight(f"{name}.norm.weight"), c.rms_norm_eps
        ).reshape(len(x), -1)  # [T, value_dim]
        core = record(f"{name}.norm", core)
        return record(name, self.linear(core, f"{name}.out_proj", record))  # [T, H]

    def _delta_net_inputs(self, x, name, record):
        """qkv [T, conv_dim], z [T, value_dim], b, a [T, value heads]."""
        c, op, in_proj = self.config, self.op, family_of(self.config).in_proj
        projected = [self.linear(x, f"{name}.{part}", record) for part in in_proj]
        if len(in_proj) == 4:
            return projected
        qkvz, ba = projected
        qkv, z = op.split_qkvz(qkvz, c.linear_num_key_heads, c.linear_key_head_dim)
        return qkv, z, *op.split_ba(ba, c.linear_num_key_heads)

    def _self_attn(self, x, name, positions, cache: KeyValueCache, record):
        c, op = self.config, self.op
        q = self.linear(x, f"{name}.q_proj", record)  # [T, heads * 2n]
        query, gate = op.split_query_and_gate(q, c.num_attention_heads)  # [T, heads, n]
        query = self.head_norm(query, f"{name}.q_norm", record)
        key = self.linear(x, f"{name}.k_proj", record)
        key = key.reshape(len(x), c.num_key_value_heads, c.head_dim)
        key = self.head_norm(key, f"{name}.k_norm", record)
        value = self.linear(x, f"{name}.v_proj", record).reshape(key.shape)

        query, key = (op.rotate(v, positions, self.inv_freq, self.rope_scale) for v in (query, key))
        cache.append(key, value)
        out = self._causal_attention(query, cache.keys, cache.values)  # [T, heads, n]
        out = op.gated(out, gate).reshape(len(x), -1)
        return record(name, self.linear(out, f"{name}.o_proj", record))

    def _causal_attention(self, query, keys, values):
        """query [T, heads, n] at the last T of the P positions; keys, values [P, kv heads, n]."""
        op, out, heads = self.op, np.empty_like(query), query.shape[1]
        for head in range(heads):
            kv_head = op.key_value_head(head, heads, keys.shape[1])
            p = op.softmax(op.attention_scores(query[:, head], keys[:, kv_head]))
            out[:, head] = op.attention_mix(p, values[:, kv_head])
        return out

    def _mlp(self, index, x, name, record):
        if not self.config.has_experts(index):
            return self._swiglu(x, name, record)
        op = self.op
        shared = self._swiglu(x, f"{name}.shared_expert", record)
        weights, selected_experts = self._gate(x, f"{name}.gate", record)
        routed = self._experts(x, f"{name}.experts", weights, selected_experts)
        routed = record(f"{name}.experts", routed)
        gate = self.linear(x, f"{name}.shared_expert_gate", record)  # [T, 1]
        return record(name, op.add(routed, op.gated(shared, gate)))

    def _swiglu(self, x, name, record):
        """A dense model's MLP, or the shared expert."""
        gate = self.linear(x, f"{name}.gate_proj", record)
        up = self.linear(x, f"{name}.up_proj", record)
        return record(name, self.linear(self.op.swiglu(gate, up), f"{name}.down_proj", record))

    def _gate(self, x, name, record):
        """The router -> routing weights, selected experts [T, top_k]."""
        op = self.op
        p = op.router_probabilities(self.linear(x, name, record))  # [T, experts]
        selected = record(f"{name}.2", op.select_experts(p, self.config.num_experts_per_tok))
        return record(f"{name}.1", op.routing_weights(p, selected)), selected

    def _experts(self, x, name, weights, selected_experts):
        op, routed = self.op, np.zeros_like(x)
        for expert in np.unique(selected_experts):
            token, place = np.nonzero(selected_experts == expert)
            y = self._expert(x[token], name, expert)
            routed[token] = op.add(routed[token], op.weighted(y, weights[token, place, None]))
        return routed

    def _expert(self, x, name, expert):
        op = self.op
        gate = op.linear(x, self.weight(f"{name}.gate_proj", expert))
        up = op.linear(x, self.weight(f"{name}.up_proj", expert))
        return op.linear(op.swiglu(gate, up), self.weight(f"{name}.down_proj", expert))


def _going_on(record):
    """record(name, value) -> the value to go on with."""

    def value_of(name, value):
        other = None if record is None else record(name, value)
        return value if other is None else other

    return value_of
