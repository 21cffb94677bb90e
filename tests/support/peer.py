"""A second implementation of the model, to plant bugs in: float32, read with gguf-py, the value heads
in the file's own (tiled) order throughout.  It shares no code with pyengine but the Trace it fills.

A fault is a name in `faults`: a bug that shipped in some engine, at the place where that had it.
`peer_faults.py` has those that put another step in place of one of these.
"""

from __future__ import annotations

import gguf
import numpy as np
from peer_faults import PATCHES
from peer_numbers import F, bfloat16, int8_blocks, sigmoid, silu, softmax

from pyengine.oracle.trace import Trace


class Peer:
    """faults: see FAULTS in test_traps.py.  int8: products of int8 activations and the Q8_0 codes."""

    def __init__(self, path, faults=(), int8=False):
        reader = gguf.GGUFReader(path)
        self.tensors = {t.name: t for t in reader.tensors}
        self.faults, self.int8 = set(faults), int8
        value = lambda key: reader.fields[f"qwen35moe.{key}"].contents()  # noqa: E731
        self.eps = float(str(F(value("attention.layer_norm_rms_epsilon"))))
        self.heads, self.kv_heads = value("attention.head_count"), value("attention.head_count_kv")
        self.n, self.rotary = value("attention.key_length"), value("rope.dimension_count")
        self.theta, self.sections = value("rope.freq_base"), value("rope.dimension_sections")
        self.n_k, self.n_v = value("ssm.group_count"), value("ssm.time_step_rank")
        self.dk, self.dv = value("ssm.state_size"), value("ssm.inner_size") // self.n_v
        self.top_k = value("expert_used_count")
        self.layers = value("block_count")
        if "nextn" not in self.faults and "qwen35moe.nextn_predict_layers" in reader.fields:
            self.layers -= value("nextn_predict_layers")
        self.yarn = None
        if "qwen35moe.rope.scaling.type" in reader.fields:
            keys = ("factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
            self.yarn = [value(f"rope.scaling.{key}") for key in keys]
        ratio = self.n_v // self.n_k
        self.grouped = np.array([j * self.n_k + k for k in range(self.n_k) for j in range(ratio)])
        self.weights = {}
        for fault in self.faults:
            if fault in PATCHES:
                PATCHES[fault](self)

    # ---- parameters ----

    def weight(self, name):
        if name not in self.weights:
            tensor = self.tensors[name]
            shape = [int(n) for n in reversed(tensor.shape)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            self.weights[name] = np.asarray(values, F).reshape(shape)
        return self.weights[name]

    def linear(self, x, name, expert=None):
        w = self.weight(name)
        w = (w if expert is None else w[expert]).reshape(-1, x.shape[1])
        tensor = self.tensors[name]
        if not self.int8 or tensor.tensor_type != gguf.GGMLQuantizationType.Q8_0:
            return x @ w.T
        codes, scales = self.codes(name, expert, len(w))
        q, s = int8_blocks(x)
        sums = self.block_sums(np.swapaxes(q, 0, 1), codes)
        return (sums * np.swapaxes(s, 0, 1) * scales.T[:, None]).sum(0)

    def codes(self, name, expert, rows):
        """-> codes int32 [blocks, rows, 32], scales float32 [rows, blocks]."""
        if (name, expert) not in self.weights:
            data = self.tensors[name].data
            raw = np.ascontiguousarray(data if expert is None else data[expert]).reshape(rows, -1, 34)
            scales = np.ascontiguousarray(raw[..., :2]).view(np.float16).astype(F)[..., 0]
            codes = np.swapaxes(raw[..., 2:].view(np.int8).astype(np.int32), 0, 1)
            self.weights[name, expert] = np.ascontiguousarray(codes), scales
        return self.weights[name, expert]

    def block_sums(self, q, codes):
        """q [blocks, T, 32], codes [blocks, rows, 32] -> [blocks, T, rows]."""
        if "saturating" not in self.faults:
            return q.astype(F) @ np.swapaxes(codes, 1, 2).astype(F)  # exact: below 2^24
        # vpmaddubsw: unsigned by signed, neighbours added in 16 bits that saturate.
        products = (q + 128)[:, :, None] * codes[:, None]
        pairs = products.reshape(*products.shape[:3], 16, 2).sum(-1).clip(-32768, 32767)
        return (pairs.sum(-1) - 128 * codes.sum(-1)[:, None]).astype(F)

    def norm(self, x, name):
        w = self.weight(name)  # the file holds 1 + weight
        if "norm_plus_one_twice" in self.faults:
            w = 1 + w
        if "norm_plus_one_missing" in self.faults:
            w = w - 1
        if "norm_in_bfloat16" in self.faults:
            w = bfloat16(w)
        return (self.unit(x) * w).astype(F)

    def unit(self, x):
        mean = np.mean(x * x, -1, keepdims=True, dtype=F)
        if "reduction_by_batch" in self.faults:
            mean = np.sum((x * x)[..., ::-1].copy(), -1, keepdims=True, dtype=F) * F(1 / x.shape[-1])
        return x / np.sqrt(mean + F(self.eps))

    def gated_norm(self, x, z, w):
        return self.unit(x) * w * silu(z)

    def l2(self, x):
        return x / np.sqrt((x * x).sum(-1, keepdims=True) + F(1e-6))

    # ---- running ----

    def run(self, ids, splits=None) -> Trace:
        """The trace of ids, computed in pieces of the lengths `splits` (at once by default)."""
        ids = np.asarray(ids)
        pad = 3 if "left_padding" in self.faults else 0
        run = np.concatenate([np.zeros(pad, ids.dtype), ids])
        splits = [len(run)] if splits is None else splits
        self.pieces, self.states, start = {}, {}, 0
        for length in splits:
            self.step(run[start : start + length], start)
            start += length
        tensors = {name: np.concatenate(parts)[pad:] for name, parts in self.pieces.items()}
        return Trace(ids, tensors, "float32")

    def put(self, name, value, order=None):
        """Into the trace; order: the value heads' grouped order for values tiled by heads."""
        value = value.reshape(len(value), -1)
        if order == "heads":
            value = value[:, self.grouped]
        if order == "values":
            value = value.reshape(len(value), self.n_v, -1)[:, self.grouped].reshape(value.shape)
        self.pieces.setdefault(name, []).append(np.array(value))

    def step(self, ids, start):
        if "vocabulary" in self.faults:
            ids = (ids + 7) % self.weight("token_embd.weight").shape[0]
        x = self.embed(ids)
        self.put("model.embed_tokens", x)
        for i in range(self.layers):
            x = self.layer(i, x, start)
        x = self.last_norm(x)
        self.put("model.norm", x)
        self.put("lm_head", self.logits(x))

    def embed(self, ids):
        return self.weight("token_embd.weight")[ids]

    def last_norm(self, x):
        return self.norm(x, "output_norm.weight")

    def logits(self, x):
        return self.linear(x, "output.weight" if "output.weight" in self.tensors else "token_embd.weight")

    def residual(self, x, normed, y):
        return x + y

    def layer(self, i, x, start):
        name, g = f"model.layers.{i}", f"blk.{i}"
        h = self.norm(x, f"{g}.attn_norm.weight")
        self.put(f"{name}.input_layernorm", h)
        if f"{g}.ssm_a" in self.tensors:
            y = self.delta_net(i, h, f"{name}.linear_attn", g)
        else:
            y = self.attention(i, h, f"{name}.self_attn", g, start)
        x = self.residual(x, h, y)
        h = self.norm(x, f"{g}.post_attention_norm.weight")
        self.put(f"{name}.post_attention_layernorm", h)
        x = self.residual(x, h, self.experts(h, f"{name}.mlp", g))
        self.put(name, x)
        return x

    # ---- delta net ----

    def delta_net(self, i, x, name, g):
        qkv, z, b, a = self.projected(x, g)
        keys = self.n_k * self.dk
        self.put(
            f"{name}.in_proj_qkv",
            np.concatenate(
                [
                    qkv[:, : 2 * keys],
                    qkv[:, 2 * keys :].reshape(len(x), self.n_v, -1)[:, self.grouped].reshape(len(x), -1),
                ],
                axis=1,
            ),
        )
        self.put(f"{name}.in_proj_z", z, "values")
        self.put(f"{name}.in_proj_b", b, "heads")
        self.put(f"{name}.in_proj_a", a, "heads")
        conv_state, state = self.recurrent(i, qkv)
        qkv = self.conv(qkv, self.weight(f"{g}.ssm_conv1d.weight"), conv_state, keys)
        q, k = (qkv[:, s : s + keys].reshape(len(x), self.n_k, self.dk) for s in (0, keys))
        v = qkv[:, 2 * keys :].reshape(len(x), self.n_v, self.dv)
        q, k = self.l2(q), self.l2(k)
        t = np.arange(self.n_v)
        key_head = t // (self.n_v // self.n_k) if "heads" in self.faults else t % self.n_k
        decay = self.log_decay(a, g)  # [T, value heads]
        out = self.recurrence(
            q[:, key_head] * F(self.dk**-0.5), k[:, key_head], v, self.beta(b), decay, state
        )
        y = self.gated_norm(out, z.reshape(out.shape), self.weight(f"{g}.ssm_norm.weight"))
        self.put(f"{name}.norm", y, "values")
        y = self.linear(y.reshape(len(x), -1).astype(F), f"{g}.ssm_out.weight")
        self.put(f"{name}.out_proj", y)
        self.put(name, y)
        return y

    def projected(self, x, g):
        return [self.linear(x, f"{g}.{n}.weight") for n in ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha")]

    def beta(self, b):
        return sigmoid(b)

    def recurrent(self, i, qkv):
        taps = self.weight(f"blk.{i}.ssm_conv1d.weight").shape[1]
        fresh = (np.zeros((taps - 1, qkv.shape[1]), F), np.zeros((self.n_v, self.dk, self.dv), F))
        if i not in self.states or "state_dropped" in self.faults:
            self.states[i] = fresh
        elif "prefix_cache" in self.faults:  # keeps what attention and the convolution need
            self.states[i] = self.states[i][0], fresh[1]
        return self.states[i]

    def conv(self, x, weight, state, keys):
        if "conv1d_channels" in self.faults:  # put into grouped order where the rest is tiled
            rows = weight[2 * keys :].reshape(self.n_v, self.dv, -1)[self.grouped]
            weight = np.concatenate([weight[: 2 * keys], rows.reshape(-1, weight.shape[1])])
        taps = weight.shape[1]
        padded = np.concatenate([state, x])
        late = 1 if "decode_conv" in self.faults else 0  # the prefill hands on a window too early
        state[:] = padded[len(x) - late : len(x) - late + taps - 1]
        windows = np.stack([padded[j : j + len(x)] for j in range(taps)], axis=-1)
        return self.conv_output((windows * weight).sum(-1, dtype=F))

    def conv_output(self, y):
        return silu(y)

    def log_decay(self, a, g):
        ssm_a = self.weight(f"{g}.ssm_a").reshape(-1)
        if "ssm_a_as_a_log" in self.faults:
            ssm_a = -np.exp(ssm_a)
        if "a_log_in_bfloat16" in self.faults:
            ssm_a = -np.exp(bfloat16(np.log(-ssm_a)))
        return ssm_a * self.softplus(a + self.weight(f"{g}.ssm_dt.bias").reshape(-1)).astype(F)

    def softplus(self, x):
        with np.errstate(invalid="ignore"):  # one row plants a NaN
            return np.logaddexp(0, x)

    def recurrence(self, q, k, v, beta, log_decay, state):
        out = np.empty_like(v)
        for t in range(len(q)):
            self.before_token(state, log_decay, t)
            if "last_chunk" in self.faults and t and t == len(q) // 16 * 16:
                state[:] = 0  # the short chunk at the end begins anew
            decay = np.exp(log_decay[t])[:, None, None]
            old = state * decay
            read = state if "decay" in self.faults else old
            delta = (v[t] - np.einsum("hkv,hk->hv", read, k[t])) * beta[t][:, None]
            state[:] = old + np.einsum("hk,hv->hkv", k[t], delta)
            out[t] = np.einsum("hkv,hk->hv", old if "early_output" in self.faults else state, q[t])
            self.after_token(state)
        return out

    def before_token(self, state, log_decay, t):
        """For faults of a chunk's boundary."""

    def after_token(self, state):
        """For faults of what is stored between two tokens."""

    # ---- attention ----

    def attention(self, i, x, name, g, start):
        if f"{g}.attn_q.weight" not in self.tensors:
            raise NotImplementedError("fused files")
        full = self.linear(x, f"{g}.attn_q.weight")
        k, v = self.keys_values(x, g)
        for part, value in (("q_proj", full), ("k_proj", k), ("v_proj", v)):
            self.put(f"{name}.{part}", value)
        heads = full.reshape(len(x), self.heads, 2 * self.n)
        if "strides" in self.faults:  # two halves of each head, read as if each lay in one piece
            q, gate = (u.reshape(len(x), self.heads, self.n) for u in np.split(full, 2, axis=1))
        else:
            q, gate = heads[..., : self.n], heads[..., self.n :]
        positions = self.positions(start, len(x))
        k = k.reshape(len(x), self.kv_heads, self.n)
        q = self.turned(q, f"{g}.attn_q_norm.weight", f"{name}.q_norm", positions)
        k = self.turned(k, f"{g}.attn_k_norm.weight", f"{name}.k_norm", positions)
        if i in self.states and "state_dropped" not in self.faults:
            past_k, past_v = self.states[i]
            k, v = np.concatenate([past_k, k]), np.concatenate([past_v, v])
        k, v = self.states[i] = self.cached(k, v)
        y = self.attention_gated(self.attend(q, k, v.reshape(len(k), self.kv_heads, self.n)), gate)
        y = self.linear(y.reshape(len(x), -1), f"{g}.attn_output.weight")
        self.put(f"{name}.o_proj", y)
        self.put(name, y)
        return y

    def keys_values(self, x, g):
        return self.linear(x, f"{g}.attn_k.weight"), self.linear(x, f"{g}.attn_v.weight")

    def positions(self, start, count):
        return start + np.arange(count)

    def turned(self, x, weight, name, positions):
        x = self.head_norm(x, weight)
        self.put(name, x)
        return self.rope(x, positions)

    def head_norm(self, x, weight):
        return self.norm(x, weight)

    def cached(self, k, v):
        return k, v

    def attention_gated(self, y, gate):
        return y * sigmoid(gate)

    def stretched(self, freq, width):
        """YaRN, as the paper has it -> the frequencies, the factor of cosines and sines."""
        if self.yarn is None:
            return freq, F(1)
        factor, context, fast, slow = self.yarn
        low, high = (
            width * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(self.theta)) for turns in (fast, slow)
        )
        low, high = max(np.floor(low), 0), min(np.ceil(high), width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
        return freq * (1 - ramp) + freq / factor * ramp, F(0.1 * np.log(factor) + 1)

    def table(self, angle, scale):
        return np.cos(angle) * scale, np.sin(angle) * scale

    def rope(self, x, positions):
        width = self.n if "rope_full_width" in self.faults else self.rotary
        freq, scale = self.stretched(1 / self.theta ** (np.arange(0, width, 2) / width), width)
        freq = freq.astype(F)
        if "rope_sections" in self.faults:  # height and width taken for 0
            freq[self.sections[0] :] = 0
        angle = (positions[:, None] * freq).astype(F)[:, None]
        (cos, sin), half, out = self.table(angle, scale), width // 2, x.copy()
        first, second = slice(0, half), slice(half, width)
        if "rope_pairs" in self.faults:
            first, second = slice(0, width, 2), slice(1, width, 2)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def attend(self, q, k, v):
        score = np.einsum("thn,phn->htp", q, self.shared_heads(k)) * self.score_scale()
        seen = self.seen(np.arange(len(k)), len(k) - len(q) + np.arange(len(q))[:, None])
        p = self.probabilities(np.where(seen, score, -np.inf))
        return np.einsum("htp,phn->thn", p, self.shared_heads(v))

    def shared_heads(self, x):
        return np.repeat(x, self.heads // self.kv_heads, 1)

    def score_scale(self):
        return F(self.n**-0.5)

    def seen(self, key, query):
        return key <= query

    def probabilities(self, score):
        return softmax(score)

    # ---- experts ----

    def experts(self, x, name, g):
        gate = self.linear(x, f"{g}.ffn_gate_shexp.weight")
        up = self.linear(x, f"{g}.ffn_up_shexp.weight")
        shared = self.linear(self.activated(gate, up), f"{g}.ffn_down_shexp.weight")
        for part, value in ((".gate_proj", gate), (".up_proj", up), (".down_proj", shared), ("", shared)):
            self.put(f"{name}.shared_expert{part}", value)
        logits = self.router(x, g)
        weights, chosen = self.route(logits)
        self.put(f"{name}.gate", logits)
        self.put(f"{name}.gate.2", chosen)
        self.put(f"{name}.gate.1", weights)
        routed = np.stack(
            [self.combined(x[t : t + 1], g, chosen[t], weights[t], len(x)) for t in range(len(x))]
        )
        self.put(f"{name}.experts", routed)
        scale = self.linear(x, f"{g}.ffn_gate_inp_shexp.weight")
        if "shared_gate_shape" in self.faults:  # a vector of weights taken for one of factors
            scale = x * self.weight(f"{g}.ffn_gate_inp_shexp.weight").reshape(-1)
        self.put(f"{name}.shared_expert_gate", scale)
        y = self.mixed(routed, shared, scale)
        self.put(name, y)
        return y

    def router(self, x, g):
        return self.linear(x, f"{g}.ffn_gate_inp.weight")

    def mixed(self, routed, shared, scale):
        return routed + sigmoid(scale) * shared

    def combined(self, row, g, chosen, weights, tokens):
        """One token's experts, weighted and summed."""
        total = np.zeros(row.shape[1], F)
        for e, w in zip(chosen, weights):
            total += w * self.expert(row, g, e)[0]
        return total

    def expert(self, row, g, e):
        y = self.activated(
            self.linear(row, f"{g}.ffn_gate_exps.weight", e), self.linear(row, f"{g}.ffn_up_exps.weight", e)
        )
        return self.linear(y, f"{g}.ffn_down_exps.weight", e)

    def activated(self, gate, up):
        return silu(up) * gate if "gate_up_swapped" in self.faults else silu(gate) * up

    def route(self, logits):
        p = softmax(logits)
        chosen = np.argsort(-p, axis=-1, kind="stable")[:, : self.top_k]
        if "softmax_after_top_k" in self.faults:
            return softmax(np.take_along_axis(logits, chosen, -1)), chosen
        weights = np.take_along_axis(p, chosen, -1)
        if "not_renormalised" not in self.faults:
            weights = weights / weights.sum(-1, keepdims=True)
        return self.weighed(weights), chosen

    def weighed(self, weights):
        return weights
