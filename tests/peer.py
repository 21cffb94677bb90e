"""A second implementation of the model, to plant bugs in: float32, read with gguf-py, the value heads
in the file's own (tiled) order throughout.  It shares no code with pyengine but the Trace it fills.

A fault is a name in `faults`: a bug that shipped in some engine, at the place where that had it.
"""

from __future__ import annotations

import gguf
import numpy as np

from pyengine.trace import Trace

F = np.float32


def sigmoid(x):
    return (1 / (1 + np.exp(-np.clip(x, -80, 80)))).astype(F)


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def bfloat16(x):
    bits = np.ascontiguousarray(x, F).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(F)


def int8_blocks(x, nearest=np.rint):
    """[T, n] -> codes [T, blocks, 32] int32, scales [T, blocks, 1]."""
    blocks = x.reshape(len(x), -1, 32)
    scale = (np.abs(blocks).max(-1, keepdims=True) / F(127)).astype(F)
    codes = nearest(blocks / np.where(scale == 0, F(1), scale)).astype(np.int32)
    return codes, scale.astype(np.float16).astype(F)  # as llama.cpp's Q8_0 keeps it


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
        ratio = self.n_v // self.n_k
        self.grouped = np.array([j * self.n_k + k for k in range(self.n_k) for j in range(ratio)])
        self.weights = {}

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
        mean = np.mean(x * x, -1, keepdims=True, dtype=F)
        if "reduction_by_batch" in self.faults:
            mean = np.sum((x * x)[..., ::-1].copy(), -1, keepdims=True, dtype=F) * F(1 / x.shape[-1])
        return (x / np.sqrt(mean + F(self.eps)) * w).astype(F)

    # ---- running ----

    def run(self, ids, splits=None) -> Trace:
        """The trace of ids, computed in pieces of the lengths `splits` (at once by default)."""
        ids = np.asarray(ids)
        pad = 3 if "left_padding" in self.faults else 0
        run = np.concatenate([np.zeros(pad, ids.dtype), ids])
        splits = [len(run)] if splits is None else splits
        self.pieces, self.states, start = {}, {}, 0
        for length in splits:
            self.step(run[start:start + length], start)
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
        x = self.weight("token_embd.weight")[ids]
        self.put("model.embed_tokens", x)
        for i in range(self.layers):
            x = self.layer(i, x, start)
        x = self.norm(x, "output_norm.weight")
        self.put("model.norm", x)
        head = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        self.put("lm_head", self.linear(x, head))

    def layer(self, i, x, start):
        name, g = f"model.layers.{i}", f"blk.{i}"
        h = self.norm(x, f"{g}.attn_norm.weight")
        self.put(f"{name}.input_layernorm", h)
        if f"{g}.ssm_a" in self.tensors:
            x = x + self.delta_net(i, h, f"{name}.linear_attn", g)
        else:
            x = x + self.attention(i, h, f"{name}.self_attn", g, start)
        h = self.norm(x, f"{g}.post_attention_norm.weight")
        self.put(f"{name}.post_attention_layernorm", h)
        x = x + self.experts(h, f"{name}.mlp", g)
        self.put(name, x)
        return x

    # ---- delta net ----

    def delta_net(self, i, x, name, g):
        qkv, z = self.linear(x, f"{g}.attn_qkv.weight"), self.linear(x, f"{g}.attn_gate.weight")
        b, a = self.linear(x, f"{g}.ssm_beta.weight"), self.linear(x, f"{g}.ssm_alpha.weight")
        keys = self.n_k * self.dk
        self.put(f"{name}.in_proj_qkv", np.concatenate([qkv[:, :2 * keys], qkv[:, 2 * keys:].reshape(
            len(x), self.n_v, -1)[:, self.grouped].reshape(len(x), -1)], axis=1))
        self.put(f"{name}.in_proj_z", z, "values")
        self.put(f"{name}.in_proj_b", b, "heads")
        self.put(f"{name}.in_proj_a", a, "heads")
        conv_state, state = self.recurrent(i, qkv)
        qkv = self.conv(qkv, self.weight(f"{g}.ssm_conv1d.weight"), conv_state, keys)
        q, k = (qkv[:, s:s + keys].reshape(len(x), self.n_k, self.dk) for s in (0, keys))
        v = qkv[:, 2 * keys:].reshape(len(x), self.n_v, self.dv)
        q, k = (u / np.sqrt((u * u).sum(-1, keepdims=True) + F(1e-6)) for u in (q, k))
        t = np.arange(self.n_v)
        key_head = t // (self.n_v // self.n_k) if "heads" in self.faults else t % self.n_k
        decay = self.log_decay(a, g)  # [T, value heads]
        out = self.recurrence(q[:, key_head] * F(self.dk ** -0.5), k[:, key_head], v, sigmoid(b), decay,
                              state)
        w = self.weight(f"{g}.ssm_norm.weight")
        mean = np.mean(out * out, -1, keepdims=True, dtype=F)
        y = out / np.sqrt(mean + F(self.eps)) * w * silu(z.reshape(out.shape))
        self.put(f"{name}.norm", y, "values")
        y = self.linear(y.reshape(len(x), -1).astype(F), f"{g}.ssm_out.weight")
        self.put(f"{name}.out_proj", y)
        self.put(name, y)
        return y

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
            rows = weight[2 * keys:].reshape(self.n_v, self.dv, -1)[self.grouped]
            weight = np.concatenate([weight[:2 * keys], rows.reshape(-1, weight.shape[1])])
        taps = weight.shape[1]
        padded = np.concatenate([state, x])
        late = 1 if "decode_conv" in self.faults else 0  # the prefill hands on a window too early
        state[:] = padded[len(x) - late:len(x) - late + taps - 1]
        windows = np.stack([padded[j:j + len(x)] for j in range(taps)], axis=-1)
        return silu((windows * weight).sum(-1, dtype=F))

    def log_decay(self, a, g):
        ssm_a = self.weight(f"{g}.ssm_a").reshape(-1)
        if "ssm_a_as_a_log" in self.faults:
            ssm_a = -np.exp(ssm_a)
        if "a_log_in_bfloat16" in self.faults:
            ssm_a = -np.exp(bfloat16(np.log(-ssm_a)))
        with np.errstate(invalid="ignore"):  # one row plants a NaN
            softplus = np.logaddexp(0, a + self.weight(f"{g}.ssm_dt.bias").reshape(-1))
        return ssm_a * softplus.astype(F)

    def recurrence(self, q, k, v, beta, log_decay, state):
        out = np.empty_like(v)
        for t in range(len(q)):
            if "last_chunk" in self.faults and t and t == len(q) // 16 * 16:
                state[:] = 0  # the short chunk at the end begins anew
            decay = np.exp(log_decay[t])[:, None, None]
            old = state * decay
            read = state if "decay" in self.faults else old
            delta = (v[t] - np.einsum("hkv,hk->hv", read, k[t])) * beta[t][:, None]
            state[:] = old + np.einsum("hk,hv->hkv", k[t], delta)
            out[t] = np.einsum("hkv,hk->hv", state, q[t])
        return out

    # ---- attention ----

    def attention(self, i, x, name, g, start):
        if f"{g}.attn_q.weight" not in self.tensors:
            raise NotImplementedError("fused files")
        full = self.linear(x, f"{g}.attn_q.weight")
        k, v = self.linear(x, f"{g}.attn_k.weight"), self.linear(x, f"{g}.attn_v.weight")
        for part, value in (("q_proj", full), ("k_proj", k), ("v_proj", v)):
            self.put(f"{name}.{part}", value)
        heads = full.reshape(len(x), self.heads, 2 * self.n)
        if "strides" in self.faults:  # two halves of each head, read as if each lay in one piece
            q, gate = (u.reshape(len(x), self.heads, self.n) for u in np.split(full, 2, axis=1))
        else:
            q, gate = heads[..., :self.n], heads[..., self.n:]
        q = self.norm(q, f"{g}.attn_q_norm.weight")
        k = self.norm(k.reshape(len(x), self.kv_heads, self.n), f"{g}.attn_k_norm.weight")
        self.put(f"{name}.q_norm", q)
        self.put(f"{name}.k_norm", k)
        positions = start + np.arange(len(x))
        q, k = self.rope(q, positions), self.rope(k, positions)
        if i in self.states and "state_dropped" not in self.faults:
            past_k, past_v = self.states[i]
            k, v = np.concatenate([past_k, k]), np.concatenate([past_v, v])
        self.states[i] = k, v
        y = self.attend(q, k, v.reshape(len(k), self.kv_heads, self.n)) * sigmoid(gate)
        y = self.linear(y.reshape(len(x), -1), f"{g}.attn_output.weight")
        self.put(f"{name}.o_proj", y)
        self.put(name, y)
        return y

    def rope(self, x, positions):
        width = self.n if "rope_full_width" in self.faults else self.rotary
        freq = (1 / self.theta ** (np.arange(0, width, 2) / width)).astype(F)
        if "rope_sections" in self.faults:  # height and width taken for 0
            freq[self.sections[0]:] = 0
        angle = (positions[:, None] * freq).astype(F)[:, None]
        cos, sin, half, out = np.cos(angle), np.sin(angle), width // 2, x.copy()
        first, second = slice(0, half), slice(half, width)
        if "rope_pairs" in self.faults:
            first, second = slice(0, width, 2), slice(1, width, 2)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def attend(self, q, k, v):
        group = self.heads // self.kv_heads
        score = np.einsum("thn,phn->htp", q, np.repeat(k, group, 1)) * F(self.n ** -0.5)
        seen = np.arange(len(k)) <= len(k) - len(q) + np.arange(len(q))[:, None]
        p = softmax(np.where(seen, score, -np.inf))
        return np.einsum("htp,phn->thn", p, np.repeat(v, group, 1))

    # ---- experts ----

    def experts(self, x, name, g):
        gate = self.linear(x, f"{g}.ffn_gate_shexp.weight")
        up = self.linear(x, f"{g}.ffn_up_shexp.weight")
        shared = self.linear(self.activated(gate, up), f"{g}.ffn_down_shexp.weight")
        for part, value in ((".gate_proj", gate), (".up_proj", up), (".down_proj", shared),
                            ("", shared)):
            self.put(f"{name}.shared_expert{part}", value)
        logits = self.linear(x, f"{g}.ffn_gate_inp.weight")
        weights, chosen = self.route(logits)
        self.put(f"{name}.gate", logits)
        self.put(f"{name}.gate.2", chosen)
        self.put(f"{name}.gate.1", weights)
        routed = np.zeros_like(x)
        for t in range(len(x)):
            for e, w in zip(chosen[t], weights[t]):
                row = x[t:t + 1]
                y = self.activated(self.linear(row, f"{g}.ffn_gate_exps.weight", e),
                                   self.linear(row, f"{g}.ffn_up_exps.weight", e))
                routed[t] += w * self.linear(y, f"{g}.ffn_down_exps.weight", e)[0]
        self.put(f"{name}.experts", routed)
        scale = self.linear(x, f"{g}.ffn_gate_inp_shexp.weight")
        if "shared_gate_shape" in self.faults:  # a vector of weights taken for one of factors
            scale = x * self.weight(f"{g}.ffn_gate_inp_shexp.weight").reshape(-1)
        self.put(f"{name}.shared_expert_gate", scale)
        y = routed + sigmoid(scale) * shared
        self.put(name, y)
        return y

    def activated(self, gate, up):
        return silu(up) * gate if "gate_up_swapped" in self.faults else silu(gate) * up

    def route(self, logits):
        p = softmax(logits)
        chosen = np.argsort(-p, axis=-1, kind="stable")[:, :self.top_k]
        if "softmax_after_top_k" in self.faults:
            return softmax(np.take_along_axis(logits, chosen, -1)), chosen
        weights = np.take_along_axis(p, chosen, -1)
        if "not_renormalised" not in self.faults:
            weights = weights / weights.sum(-1, keepdims=True)
        return weights, chosen
