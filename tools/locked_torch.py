"""The `locked` arithmetic restated in PyTorch, to check the C core bit for bit.

Written from the contracts of csrc/pyengine.h alone: it imports nothing of pyengine, and shares no
code with it.  Each function below named as in the header (without `pe_`) quotes its rule.

How the bits are kept.  One torch operation on float32 tensors is one IEEE operation with one
rounding, so a sum whose order matters is a Python loop over its terms, vectorised over everything
else; no float32 matmul, sum, addcmul or cumsum is used.  Integer sums are float64 matmuls: exact,
because every partial sum is an integer below 2^53.  exp and its kin are computed in float64 and
rounded: within an ulp of float64, hence the nearest float32 save where the exact value lies that
close to a midpoint (tools/exhaustive_math.py says where).

    python tools/locked_torch.py MODEL --ids "1 2 3"      (MODEL: a .gguf or an INT8 folder)

Shapes in comments: T tokens, C columns, R rows of a matrix, G groups, H heads, P positions.
"""

import argparse
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

GROUP = 128  # columns that share one activation scale, and one INT8/INT4 weight scale
BLOCK = 32  # columns that share one Q8_0 weight scale

F32 = torch.float32
F64 = torch.float64


# ---- sums --------------------------------------------------------------------------------------


def ascending(terms, dim):
    """"a sum starts with its first term and adds the others one at a time in that order"."""
    first, *rest = terms.unbind(dim)
    total = first.clone()
    for term in rest:
        total = total + term
    return total


def sum8(terms):
    """"eight float64 accumulators, all +0 at first; term i is added to accumulator i mod 8, i
    ascending; then, with A the accumulators, B[i] = A[i] + A[i+4] for i < 4; C[i] = B[i] + B[i+2]
    for i < 2; result C[0] + C[1]".  Over the last dimension.

    The padding is harmless: an accumulator that started from +0 is never -0, so +0 changes nothing.
    """
    assert terms.dtype == F64
    terms = torch.nn.functional.pad(terms, (0, -terms.shape[-1] % 8))
    terms = terms.unflatten(-1, (-1, 8))  # [..., steps, 8]
    a = torch.zeros_like(terms[..., 0, :])
    for step in range(terms.shape[-2]):
        a = a + terms[..., step, :]
    b = a[..., :4] + a[..., 4:]
    c = b[..., :2] + b[..., 2:]
    return c[..., 0] + c[..., 1]


def squares8(x):
    """sum8(x * x) over the last dimension; the squares are exact in float64."""
    return sum8(x.double() * x.double())


# ---- elementwise -------------------------------------------------------------------------------


def exp(x):
    """"the float32 nearest to the exact value of the function at the float32 argument"."""
    return torch.exp(x.double()).float()


def sigmoid(x):
    """1 / (1 + exp(-x)), rounded once; exp(-x) = inf rightly gives +0."""
    return (1.0 / (1.0 + torch.exp(-x.double()))).float()


def silu(x):
    """x / (1 + exp(-x)), rounded once; exp(-x) = inf rightly gives -0 for finite x."""
    x = x.double()
    return (x / (1.0 + torch.exp(-x))).float()


def softplus(x):
    """"softplus(x) = log(1 + exp(x)), and x itself above 20"."""
    return torch.where(x > 20, x, torch.log1p(torch.exp(x.double())).float())


def silu_mul(gate, up):
    """"y[i] = silu(gate[i]) (*) up[i]"."""
    return silu(gate) * up


def sigmoid_mul(x, gate):
    """"y[r, i] = x[r, i] (*) sigmoid(gate[r, i])"."""
    return x * sigmoid(gate)


def delta_gates(a, b, neg_exp_a_log, dt_bias):
    """"beta = sigmoid(b); log_decay = neg_exp_a_log (*) softplus(a (+) dt_bias);
    decay = exp(log_decay)".  a, b [T, H]; neg_exp_a_log, dt_bias [H]."""
    log_decay = neg_exp_a_log * softplus(a + dt_bias)
    return sigmoid(b), exp(log_decay)


# ---- matmul ------------------------------------------------------------------------------------


def check_finite(x, what):
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"{what}: NaN or infinity")
    return x


def quantize_activations(x):
    """"Activations to int16, per token and group of PE_GROUP columns (the last may be short):
    a = max |x|; s = f32(a / 32767); q = rint(f32(x / s)), ties to even;
    a < 2^-100: s = 0 and q = 0".

    x [T, C] -> q int16 [T, G, 128], zeros from C on; scales float32 [T, G]."""
    check_finite(x, "quantize_activations")
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP))
    x = x.unflatten(-1, (-1, GROUP))  # [T, G, 128]
    a = x.abs().amax(-1)  # [T, G]
    scales = a / torch.tensor(32767.0)
    tiny = a < 2.0**-100
    q = torch.round(x / scales.masked_fill(tiny, 1.0)[..., None])
    q = q.masked_fill(tiny[..., None], 0.0)
    assert q.abs().amax() <= 32767 if q.numel() else True
    return q.to(torch.int16), scales.masked_fill(tiny, 0.0)


class Activations:
    """The input of matmuls, quantised once, when the first quantised matrix asks for it."""

    def __init__(self, x):
        self.x = x  # [T, C]
        self._quantized = None

    @property
    def quantized(self):
        if self._quantized is None:
            self._quantized = quantize_activations(self.x)
        return self._quantized

    def rows(self, index):
        """Those tokens alone; quantising is per token, so they keep their values."""
        part = Activations(self.x[index])
        if self._quantized is not None:
            part._quantized = tuple(array[index] for array in self._quantized)
        return part


@dataclass
class Matrix:
    """One matrix [R, C], or a stack of them [E, R, C] (the experts).

    type    F32, F16, BF16: data is the values, widened to float32 (exact); scales is None
            INT8, INT4:     data is the int8 codes (no packing), scales float32 [(E,) G, R]
            Q8_0:           data is the int8 codes, scales float32 [(E,) blocks, R]
    """

    type: str
    data: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def dense(self):
        return self.scales is None

    @property
    def shape(self):
        return tuple(self.data.shape)

    def rows(self, start, stop):
        """Rows start:stop, of each matrix of a stack."""
        scales = None if self.dense else self.scales[..., start:stop]
        return Matrix(self.type, self.data[..., start:stop, :], scales)

    def expert(self, e):
        return Matrix(self.type, self.data[e], None if self.dense else self.scales[e])

    def row_values(self, index):
        """Those rows dequantised in float32: code (*) scale, one rounding (none in effect)."""
        codes = self.data[index].float()  # [T, C]
        if self.dense:
            return codes
        width = BLOCK if self.type == "Q8_0" else GROUP
        scales = self.scales.t()[index].repeat_interleave(width, dim=1)  # [T, >= C]
        return codes * scales[:, : codes.shape[1]]


def matmul(w, a):
    """"y[t, r] = sum over c of x[t, c] * w[r, c]", by the type of w -> [T, R] float32."""
    assert w.data.shape[-1] == a.x.shape[-1], (w.shape, a.x.shape)
    if w.dense:
        return matmul_dense(w.data, a.x)
    if w.type == "Q8_0":
        return matmul_q8_0(w, *a.quantized)
    return matmul_int8(w, *a.quantized)


def matmul_dense(w, x):
    """"F32, F16, BF16: y = f32(sum8(x[c] * w[c]))".  w [R, C], x [T, C], float32.

    sum8 with the accumulators in front, [8, T, R], over slices of the rows to bound memory."""
    pad = -x.shape[1] % 8
    x = torch.nn.functional.pad(x, (0, pad)).double().t().contiguous()  # [C, T]
    out = []
    for part in w.split(max(1, (1 << 18) // (8 * x.shape[1]))):
        part = torch.nn.functional.pad(part, (0, pad)).double().t().contiguous()  # [C, R']
        acc = torch.zeros(8, x.shape[1], part.shape[1], dtype=F64)
        for c in range(0, x.shape[0], 8):
            acc = acc + x[c : c + 8, :, None] * part[c : c + 8, None, :]  # the products are exact
        b = acc[:4] + acc[4:]
        c = b[:2] + b[2:]
        out.append((c[0] + c[1]).float())
    return torch.cat(out, dim=1)


def exact_dot(q, codes):
    """f32 of the exact integers sum over c of q[t, c] * codes[r, c]: [T, n], [R, n] -> [T, R].

    By way of int32, as the contract has it, so that 0 is +0."""
    return (q.double() @ codes.double().t()).to(torch.int32).float()


def matmul_int8(w, q, s_x):
    """"INT8, INT4: with d[g] = sum over the group's columns of q * code, exact in int32,
    y = 0; for g ascending: y = y (+) (f32(d[g]) (*) (f32(s_w[g]) (*) s_x[g]))"."""
    y = torch.zeros(q.shape[0], w.data.shape[0])
    for g in range(q.shape[1]):
        codes = w.data[:, g * GROUP : (g + 1) * GROUP]  # [R, 128 or the rest]
        d = exact_dot(q[:, g, : codes.shape[1]], codes)  # [T, R]
        y = y + d * (w.scales[g][None, :] * s_x[:, g, None])
    return y


def matmul_q8_0(w, q, s_x):
    """"Q8_0: each group holds up to four blocks; with d[b] the exact sum over block b,
    p[b] = f32(d[b]) (*) f32(s_w[b]), and p[b] = +0 for blocks past the last column;
    y = 0; for g ascending: y = y (+) (((p[0] (+) p[1]) (+) (p[2] (+) p[3])) (*) s_x[g])"."""
    rows, cols = w.data.shape
    y = torch.zeros(q.shape[0], rows)
    for g in range(q.shape[1]):
        p = []
        for b in range(GROUP // BLOCK):
            start = g * GROUP + b * BLOCK
            if start < cols:
                codes = w.data[:, start : start + BLOCK]
                d = exact_dot(q[:, g, b * BLOCK : (b + 1) * BLOCK], codes)
                p.append(d * w.scales[start // BLOCK][None, :])
            else:
                p.append(torch.zeros(q.shape[0], rows))
        y = y + ((p[0] + p[1]) + (p[2] + p[3])) * s_x[:, g, None]
    return y


# ---- norms -------------------------------------------------------------------------------------


def inverse_rms(x, eps):
    """"inv = 1 / sqrt(sum8(x * x) / n + eps), in float64, each operation rounded to float64"."""
    n = torch.tensor(float(x.shape[-1]), dtype=F64)
    return torch.ones((), dtype=F64) / torch.sqrt(squares8(x) / n + eps)


def times_inverse(x, inv):
    """f32(x * inv): the product in float64, then rounded to float32."""
    return (x.double() * inv[..., None]).float()


def rms_norm(x, scale, eps):
    """"y = f32(x * inv) (*) scale, with scale = f32(1 + weight)".  Over the last dimension."""
    return times_inverse(x, inverse_rms(x, eps)) * scale


def rms_norm_gated(x, z, weight, eps):
    """"y = (weight (*) f32(x * inv)) (*) silu(z)"; weight is plain."""
    return (weight * times_inverse(x, inverse_rms(x, eps))) * silu(z)


def l2_norm(x, scale):
    """"inv = 1 / sqrt(sum8(x * x) + 1e-6), in float64; y = f32(x * inv) (*) scale"."""
    inv = torch.ones((), dtype=F64) / torch.sqrt(squares8(x) + 1e-6)
    return times_inverse(x, inv) * torch.tensor(scale, dtype=F32)


# ---- rotary positions --------------------------------------------------------------------------


def inverse_frequencies(base, dim):
    """inv_freq [dim / 2] as Hugging Face computes it, in float32 throughout."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=F32) / dim))


def rope_table(start, tokens, inv_freq):
    """"cos and sin [tokens, half] of position * inv_freq[i] (exact in float64), position =
    start + t: float64 values [...], rounded once to float32"."""
    position = torch.arange(start, start + tokens, dtype=F64)
    angle = position[:, None] * inv_freq.double()[None, :]
    return torch.cos(angle).float(), torch.sin(angle).float()


def rope(x, cos, sin):
    """"x1 = x[i], x2 = x[i + half]: x[i] = (x1 (*) cos) (-) (x2 (*) sin);
    x[i + half] = (x2 (*) cos) (+) (x1 (*) sin).  Entries from 2 * half on stay."

    x [T, H, n]; cos, sin [T, half]."""
    half = cos.shape[1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


# ---- mixers ------------------------------------------------------------------------------------


def causal_conv1d(x, weight, conv_state):
    """"y[t] = silu(sum over j ascending of weight[j] (*) input[t - (taps - 1) + j])".

    x [T, channels], weight [taps, channels] (tap taps-1 meets the newest token), conv_state
    [taps - 1, channels] the inputs before x, oldest first -> y, the new conv_state."""
    taps, tokens = weight.shape[0], x.shape[0]
    inputs = torch.cat([conv_state, x])  # [taps - 1 + T, channels]
    terms = torch.stack([weight[j] * inputs[j : j + tokens] for j in range(taps)])
    return silu(ascending(terms, 0)), inputs[tokens:].clone()


def delta_rule(query, key, value, beta, decay, key_head, recurrent_state):
    """"Per token and value head, S its state, k and q of its key head:
    S[i, j]   = S[i, j] (*) decay
    kv_mem[j] = sum over i ascending of S[i, j] (*) k[i]
    delta[j]  = (v[j] (-) kv_mem[j]) (*) beta
    S[i, j]   = S[i, j] (+) (k[i] (*) delta[j])
    out[j]    = sum over i ascending of S[i, j] (*) q[i]".

    query, key [T, key heads, dk]; value [T, value heads, dv]; beta, decay [T, value heads];
    key_head [value heads]; recurrent_state [value heads, dk, dv] -> out [T, value heads, dv],
    the new recurrent_state."""
    state, out = recurrent_state, []
    for t in range(query.shape[0]):
        q = query[t][key_head][:, :, None]  # [H, dk, 1]
        k = key[t][key_head][:, :, None]
        state = state * decay[t][:, None, None]
        kv_mem = ascending(state * k, 1)  # [H, dv]
        delta = (value[t] - kv_mem) * beta[t][:, None]
        state = state + k * delta[:, None, :]
        out.append(ascending(state * q, 1))
    return torch.stack(out), state


def dot16(query, key):
    """"sixteen float32 accumulators, all +0 at first; term i (a float32 product, rounded) is added
    to accumulator i mod 16, i ascending; then B[i] = A[i] + A[i+8], i < 8; C[i] = B[i] + B[i+4],
    i < 4; D[i] = C[i] + C[i+2], i < 2; result D[0] + D[1]".  [T, n], [P, n] -> [T, P]."""
    pad = -query.shape[1] % 16
    query = torch.nn.functional.pad(query, (0, pad)).t().contiguous()  # [n, T]
    key = torch.nn.functional.pad(key, (0, pad)).t().contiguous()  # [n, P]
    a = torch.zeros(16, query.shape[1], key.shape[1])
    for i in range(0, query.shape[0], 16):
        a = a + query[i : i + 16, :, None] * key[i : i + 16, None, :]
    b = a[:8] + a[8:]
    c = b[:4] + b[4:]
    d = c[:2] + c[2:]
    return d[0] + d[1]


def attention(query, key_cache, value_cache, start, scale):
    """"Per token (positions p = 0 .. its own) and head:
    score[p] = dot16(query[i] (*) key[p, i]) (*) scale
    m = max score; e[p] = exp(score[p] (-) m); total = f32(sum8(e[p])), p ascending
    out[j] = (sum over p ascending of e[p] (*) value[p, j]) (/) total".

    query [T, H, n]; key_cache, value_cache [P = start + T, key-value heads, n] -> [T, H, n].
    "head h reads key-value head h / (heads / kv_heads)"."""
    tokens, heads, _ = query.shape
    positions, kv_heads, n = key_cache.shape
    own = torch.arange(start, start + tokens)
    future = torch.arange(positions)[None, :] > own[:, None]  # [T, P]
    out = torch.empty(tokens, heads, n)
    for h in range(heads):
        kv = h // (heads // kv_heads)
        score = dot16(query[:, h], key_cache[:, kv]) * torch.tensor(scale, dtype=F32)  # [T, P]
        check_finite(score.masked_fill(future, 0.0), "attention")
        score = score.masked_fill(future, -math.inf)
        e = exp(score - score.amax(1, keepdim=True))  # +0 for the future: nothing to sum8
        total = sum8(e.double()).float()
        acc = e[:, :1] * value_cache[:1, kv]  # p = 0 is every token's first term
        for p in range(1, positions):
            t = max(0, p - start)  # the first token that sees p
            acc[t:] = acc[t:] + e[t:, p, None] * value_cache[p, kv]
        out[:, h] = acc / total[:, None]
    return out


# ---- mixture of experts ------------------------------------------------------------------------


def router(logits, top_k):
    """"m = max logit; e = exp(logit (-) m); total = sum8(e), in float64; p = f32(e / total);
    the top_k greatest p, equal ones by ascending expert index;
    routing_weight = f32(p / sum of the chosen p, float64, in the order chosen)".

    logits [T, E] -> routing_weights float32, selected_experts int64, [T, top_k]."""
    check_finite(logits, "router")
    e = exp(logits - logits.amax(1, keepdim=True)).double()
    p = (e / sum8(e)[:, None]).float()
    p, index = torch.sort(p, dim=1, descending=True, stable=True)
    chosen = p[:, :top_k].double()
    return (chosen / ascending(chosen, 1)[:, None]).float(), index[:, :top_k].contiguous()


def mlp(gate, up, down, a):
    """"expert(x) = down(silu(gate x) (*) (up x))", "h quantised anew" -> the steps, by name."""
    step = SimpleNamespace(gate=matmul(gate, a), up=matmul(up, a))
    h = check_finite(silu_mul(step.gate, step.up), "experts")
    step.down = matmul(down, Activations(h))
    return step


def experts(w, a, selected_experts, routing_weights, shared_expert_gate):
    """"routed = +0; for the token's experts by ascending index:
        routed = routed (+) (expert(x) (*) routing_weight)
    y = routed (+) (sigmoid(shared_expert_gate) (*) shared(x))".

    w: gate, up, down (stacks), shared_gate, shared_up, shared_down; selected_experts,
    routing_weights [T, k]; shared_expert_gate [T, 1] -> y [T, hidden], routed, the shared steps."""
    routed = torch.zeros(a.x.shape[0], w.down.shape[1])
    for e in sorted(set(selected_experts.flatten().tolist())):
        token, slot = torch.where(selected_experts == e)
        step = mlp(w.gate.expert(e), w.up.expert(e), w.down.expert(e), a.rows(token))
        routed[token] = routed[token] + step.down * routing_weights[token, slot][:, None]
    shared = mlp(w.shared_gate, w.shared_up, w.shared_down, a)
    y = routed + sigmoid(shared_expert_gate) * shared.down
    return check_finite(y, "experts"), routed, shared


# ---- the weights -------------------------------------------------------------------------------


def untile(x, n_k, n_v):
    """[T, n_v * d] from a GGUF's order of value heads (tiled, t = j * n_k + k) to Hugging Face's
    (grouped, k * r + j, r = n_v / n_k)."""
    x = x.reshape(x.shape[0], n_v // n_k, n_k, -1)
    return x.transpose(1, 2).reshape(x.shape[0], -1)


class Weights:
    """A model's matrices and vectors, in the order of the file they came from.

    c (sizes), tiled (value heads in a GGUF's order), embed, lm_head, norm, layers[N] with
    kind ("linear" or "full"), the norms' float32 scales, and the parts of the mixer and the MoE."""

    def __init__(self, config, tiled):
        self.c = config
        self.tiled = tiled
        self.layers = []
        heads = torch.arange(config.n_v)
        self.key_head = heads % config.n_k if tiled else heads // (config.n_v // config.n_k)
        self.inv_freq = inverse_frequencies(config.rope_base, config.rope_dim)

    def to_hf(self, x):
        """Value heads, [T, n_v * d], in Hugging Face's order (for the trace)."""
        return untile(x, self.c.n_k, self.c.n_v) if self.tiled else x

    @classmethod
    def load(cls, path):
        return cls.from_int8(path) if Path(path).is_dir() else cls.from_gguf(path)

    # -- GGUF --

    @classmethod
    def from_gguf(cls, path):
        tensors, meta = read_gguf(Path(path))

        def get(name, default=None):
            value = meta.get("qwen35moe." + name, default)
            if value is None:
                raise KeyError(f"{path}: no qwen35moe.{name}")
            return value

        def count(name):  # one number, or one a layer (0 where the layer has none)
            value = get(name)
            return max(value) if isinstance(value, list) else value

        layers = get("block_count") - get("nextn_predict_layers", 0)
        interval = get("full_attention_interval", 4)
        recurrent = get("recurrent_layers", [(n + 1) % interval != 0 for n in range(layers)])
        recurrent = get("attention.recurrent_layers", recurrent)
        head_dim = get("attention.key_length")
        n_v = get("ssm.time_step_rank")
        config = SimpleNamespace(
            hidden=get("embedding_length"),
            heads=count("attention.head_count"),
            kv_heads=count("attention.head_count_kv"),
            head_dim=head_dim,
            n_k=get("ssm.group_count"),
            n_v=n_v,
            dk=get("ssm.state_size"),
            dv=get("ssm.inner_size") // n_v,
            top_k=get("expert_used_count"),
            eps=shortest_decimal(get("attention.layer_norm_rms_epsilon")),
            rope_base=get("rope.freq_base"),
            rope_dim=get("rope.dimension_count", head_dim),
        )
        weights = cls(config, tiled=True)
        key_dim, value_dim = config.n_k * config.dk, config.n_v * config.dv

        def matrix(name):
            return gguf_matrix(tensors[name + ".weight"])

        def vector(name):
            return gguf_matrix(tensors[name]).data.flatten()

        weights.embed = matrix("token_embd")
        weights.lm_head = matrix("output") if "output.weight" in tensors else weights.embed
        weights.norm = vector("output_norm.weight")  # GGUF stores 1 + weight: the scale itself
        for n in range(layers):
            blk = f"blk.{n}."
            layer = SimpleNamespace(kind="linear" if recurrent[n] else "full")
            layer.input_layernorm = vector(blk + "attn_norm.weight")
            layer.post_attention_layernorm = vector(blk + "post_attention_norm.weight")
            if layer.kind == "linear":
                layer.in_proj_qkv = matrix(blk + "attn_qkv")
                layer.in_proj_z = matrix(blk + "attn_gate")
                layer.in_proj_a = matrix(blk + "ssm_alpha")
                layer.in_proj_b = matrix(blk + "ssm_beta")
                layer.conv1d = gguf_matrix(tensors[blk + "ssm_conv1d.weight"]).data.t().contiguous()
                layer.neg_exp_a_log = vector(blk + "ssm_a")
                layer.dt_bias = vector(blk + "ssm_dt.bias")
                layer.norm = vector(blk + "ssm_norm.weight")
                layer.out_proj = matrix(blk + "ssm_out")
                assert layer.in_proj_qkv.shape[0] == 2 * key_dim + value_dim
            else:
                q_rows, kv_rows = 2 * config.heads * head_dim, config.kv_heads * head_dim
                if blk + "attn_qkv.weight" in tensors:  # fused, rows q | k | v
                    fused = matrix(blk + "attn_qkv")
                    layer.q_proj = fused.rows(0, q_rows)
                    layer.k_proj = fused.rows(q_rows, q_rows + kv_rows)
                    layer.v_proj = fused.rows(q_rows + kv_rows, q_rows + 2 * kv_rows)
                else:
                    layer.q_proj = matrix(blk + "attn_q")
                    layer.k_proj = matrix(blk + "attn_k")
                    layer.v_proj = matrix(blk + "attn_v")
                layer.q_norm = vector(blk + "attn_q_norm.weight")
                layer.k_norm = vector(blk + "attn_k_norm.weight")
                layer.o_proj = matrix(blk + "attn_output")
            layer.router = matrix(blk + "ffn_gate_inp")
            layer.shared_expert_gate = matrix(blk + "ffn_gate_inp_shexp")
            layer.shared_expert_gate.data = layer.shared_expert_gate.data.reshape(1, -1)
            if blk + "ffn_gate_up_exps.weight" in tensors:  # fused, gate rows first
                fused = matrix(blk + "ffn_gate_up_exps")
                ff = fused.shape[1] // 2
                gate, up = fused.rows(0, ff), fused.rows(ff, 2 * ff)
            else:
                gate, up = matrix(blk + "ffn_gate_exps"), matrix(blk + "ffn_up_exps")
            layer.experts = SimpleNamespace(
                gate=gate,
                up=up,
                down=matrix(blk + "ffn_down_exps"),
                shared_gate=matrix(blk + "ffn_gate_shexp"),
                shared_up=matrix(blk + "ffn_up_shexp"),
                shared_down=matrix(blk + "ffn_down_shexp"),
            )
            weights.layers.append(layer)
        return weights

    # -- the INT8 checkpoint (and its INT4 twin) --

    @classmethod
    def from_int8(cls, folder):
        tensors = read_safetensors(Path(folder))
        raw = json.loads((Path(folder) / "config.json").read_text())
        raw = raw.get("text_config", raw)
        rope_parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        partial = raw.get("partial_rotary_factor", 1.0)
        partial = rope_parameters.get("partial_rotary_factor", partial)
        head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        config = SimpleNamespace(
            hidden=raw["hidden_size"],
            heads=raw["num_attention_heads"],
            kv_heads=raw["num_key_value_heads"],
            head_dim=head_dim,
            n_k=raw["linear_num_key_heads"],
            n_v=raw["linear_num_value_heads"],
            dk=raw["linear_key_head_dim"],
            dv=raw["linear_value_head_dim"],
            top_k=raw["num_experts_per_tok"],
            eps=float(raw["rms_norm_eps"]),
            rope_base=rope_parameters.get("rope_theta", raw.get("rope_theta")),
            rope_dim=int(head_dim * partial),
        )
        weights = cls(config, tiled=False)
        interval = raw.get("full_attention_interval", 4)
        kinds = raw.get("layer_types") or [
            "linear_attention" if (n + 1) % interval else "full_attention"
            for n in range(raw["num_hidden_layers"])
        ]

        def matrix(name):
            for bits in (8, 4):
                codes = tensors.get(f"{name}.weight_i{bits}")
                if codes is not None:
                    return coded_matrix(bits, codes, tensors[f"{name}.weight_scale_i{bits}"])
            return dense_matrix(tensors[name + ".weight"])

        def stack(name):
            for bits in (8, 4):
                codes = tensors.get(f"{name}_q{bits}")
                if codes is not None:
                    return coded_matrix(bits, codes, tensors[f"{name}_scale_q{bits}"])
            return dense_matrix(tensors[name])

        def vector(name):
            return tensors[name].float().flatten()

        def zero_centred(name):  # scale = f32(1 + weight)
            return 1.0 + vector(name + ".weight")

        weights.embed = matrix("model.embed_tokens")
        tied = "lm_head.weight" not in tensors and "lm_head.weight_i8" not in tensors
        weights.lm_head = weights.embed if tied else matrix("lm_head")
        weights.norm = zero_centred("model.norm")
        for n in range(raw["num_hidden_layers"]):
            at = f"model.layers.{n}."
            layer = SimpleNamespace(kind="full" if kinds[n] == "full_attention" else "linear")
            layer.input_layernorm = zero_centred(at + "input_layernorm")
            layer.post_attention_layernorm = zero_centred(at + "post_attention_layernorm")
            if layer.kind == "linear":
                for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"):
                    setattr(layer, name, matrix(at + "linear_attn." + name))
                conv1d = tensors[at + "linear_attn.conv1d.weight"].float()  # [channels, 1, taps]
                layer.conv1d = conv1d.flatten(1).t().contiguous()
                layer.neg_exp_a_log = -exp(vector(at + "linear_attn.A_log"))
                layer.dt_bias = vector(at + "linear_attn.dt_bias")
                layer.norm = vector(at + "linear_attn.norm.weight")
            else:
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    setattr(layer, name, matrix(at + "self_attn." + name))
                layer.q_norm = zero_centred(at + "self_attn.q_norm")
                layer.k_norm = zero_centred(at + "self_attn.k_norm")
            layer.router = matrix(at + "mlp.gate")
            layer.shared_expert_gate = matrix(at + "mlp.shared_expert_gate")
            fused = stack(at + "mlp.experts.gate_up_proj")
            ff = fused.shape[1] // 2
            layer.experts = SimpleNamespace(
                gate=fused.rows(0, ff),
                up=fused.rows(ff, 2 * ff),
                down=stack(at + "mlp.experts.down_proj"),
                shared_gate=matrix(at + "mlp.shared_expert.gate_proj"),
                shared_up=matrix(at + "mlp.shared_expert.up_proj"),
                shared_down=matrix(at + "mlp.shared_expert.down_proj"),
            )
            weights.layers.append(layer)
        return weights


def shortest_decimal(value):
    """The float64 meant by a float32 that a GGUF stores: the shortest decimal that rounds to it
    (9.99999997e-07 is 1e-6, the rms_norm_eps of the config.json that the file came from)."""
    return float(str(np.float32(value)))


def read_gguf(path):
    """(tensors by name, metadata without the tokenizer) of a file, or of all files of a split."""
    import gguf

    split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    paths = [path]
    if split:
        name, of = split.groups()
        paths = [path.with_name(f"{name}-{n:05}-of-{of}.gguf") for n in range(1, int(of) + 1)]
    tensors, meta = {}, {}
    for part in paths:
        reader = gguf.GGUFReader(part)
        tensors.update((t.name, t) for t in reader.tensors)
        for key, field in reader.fields.items():
            if key.startswith("qwen35moe."):
                meta.setdefault(key, field.contents())
    return tensors, meta


def gguf_matrix(tensor):
    """A ReaderTensor as a Matrix; GGUF's first dimension is the columns."""
    kind = tensor.tensor_type.name
    shape = [int(n) for n in reversed(tensor.shape)]  # [(E,) R, C]
    raw = np.array(tensor.data)  # a copy, out of the memory map
    if kind in ("F32", "F16"):
        return Matrix(kind, torch.from_numpy(raw.astype(np.float32)).reshape(shape))
    raw = raw.view(np.uint8)
    if kind == "BF16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return Matrix(kind, torch.from_numpy(values).reshape(shape))
    blocks = raw.reshape(*shape[:-1], shape[-1] // BLOCK, -1)  # [(E,) R, blocks, bytes]
    scales = blocks[..., :2].copy().view("<f2")[..., 0].astype(np.float32)
    if kind == "Q8_0":
        codes = blocks[..., 2:].view(np.int8)
    elif kind == "Q4_0":  # the low nibbles are columns 0 .. 15, the high ones 16 .. 31
        nibbles = blocks[..., 2:]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.int8) - 8
    else:
        raise ValueError(f"{tensor.name}: {kind} is not in the locked arithmetic")
    scales = torch.from_numpy(scales).transpose(-1, -2).contiguous()  # [(E,) blocks, R]
    return Matrix("Q8_0", torch.from_numpy(np.ascontiguousarray(codes)).reshape(shape), scales)


def read_safetensors(folder):
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def dense_matrix(values):
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[values.dtype]
    return Matrix(kind, values.float())


def coded_matrix(bits, codes, scales):
    """codes int8 [(E,) R, C], or uint8 [(E,) R, C / 2]: "low nibble = even column, nibble = code +
    8"; scales float16 [(E,) G, R]."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
    return Matrix(f"INT{bits}", codes, scales.float())


# ---- the forward pass --------------------------------------------------------------------------


def linear_attention(weights, layer, x, state, record):
    """Qwen3_5MoeGatedDeltaNet.forward on the normed hidden states x [T, hidden]."""
    c, tokens = weights.c, x.shape[0]
    key_dim, value_dim = c.n_k * c.dk, c.n_v * c.dv
    a = Activations(x)
    mixed_qkv = matmul(layer.in_proj_qkv, a)  # [T, 2 * key_dim + value_dim]
    in_hf_order = weights.to_hf(mixed_qkv[:, 2 * key_dim :])
    record("linear_attn.in_proj_qkv", torch.cat([mixed_qkv[:, : 2 * key_dim], in_hf_order], dim=1))
    z = matmul(layer.in_proj_z, a)  # [T, value_dim]
    record("linear_attn.in_proj_z", weights.to_hf(z))
    gate_b = matmul(layer.in_proj_b, a)  # [T, n_v]
    record("linear_attn.in_proj_b", weights.to_hf(gate_b))
    gate_a = matmul(layer.in_proj_a, a)
    record("linear_attn.in_proj_a", weights.to_hf(gate_a))

    if not state:
        state["conv_state"] = torch.zeros(layer.conv1d.shape[0] - 1, layer.conv1d.shape[1])
        state["recurrent_state"] = torch.zeros(c.n_v, c.dk, c.dv)
    mixed_qkv, state["conv_state"] = causal_conv1d(mixed_qkv, layer.conv1d, state["conv_state"])
    query, key, value = mixed_qkv.split([key_dim, key_dim, value_dim], dim=1)
    query = l2_norm(query.reshape(tokens, c.n_k, c.dk), c.dk**-0.5)
    key = l2_norm(key.reshape(tokens, c.n_k, c.dk), 1.0)
    value = value.reshape(tokens, c.n_v, c.dv)
    beta, decay = delta_gates(gate_a, gate_b, layer.neg_exp_a_log, layer.dt_bias)
    out, state["recurrent_state"] = delta_rule(
        query, key, value, beta, decay, weights.key_head, state["recurrent_state"]
    )
    out = rms_norm_gated(out, z.reshape(out.shape), layer.norm, c.eps).flatten(1)
    record("linear_attn.norm", weights.to_hf(out))
    out = matmul(layer.out_proj, Activations(out))
    record("linear_attn.out_proj", out)
    record("linear_attn", out)
    return out


def full_attention(weights, layer, x, state, start, record):
    """Qwen3_5MoeAttention.forward on the normed hidden states x [T, hidden]."""
    c, tokens = weights.c, x.shape[0]
    a = Activations(x)
    q_proj = matmul(layer.q_proj, a)  # [T, H * (query | gate)]
    record("self_attn.q_proj", q_proj)
    query, gate = q_proj.reshape(tokens, c.heads, 2 * c.head_dim).chunk(2, dim=-1)  # [T, H, n]
    query = rms_norm(query, layer.q_norm, c.eps)
    record("self_attn.q_norm", query.flatten(1))
    key = matmul(layer.k_proj, a)
    record("self_attn.k_proj", key)
    key = rms_norm(key.reshape(tokens, c.kv_heads, c.head_dim), layer.k_norm, c.eps)
    record("self_attn.k_norm", key.flatten(1))
    value = matmul(layer.v_proj, a)
    record("self_attn.v_proj", value)
    value = value.reshape(tokens, c.kv_heads, c.head_dim)

    cos, sin = rope_table(start, tokens, weights.inv_freq)
    query, key = rope(query, cos, sin), rope(key, cos, sin)
    if state:
        key = torch.cat([state["key_cache"], key])
        value = torch.cat([state["value_cache"], value])
    state["key_cache"], state["value_cache"] = key, value
    out = attention(query, key, value, start, c.head_dim**-0.5)
    out = sigmoid_mul(out, gate).flatten(1)
    out = matmul(layer.o_proj, Activations(out))
    record("self_attn.o_proj", out)
    record("self_attn", out)
    return out


def sparse_moe(weights, layer, x, record):
    """Qwen3_5MoeSparseMoeBlock.forward on the normed hidden states x [T, hidden]."""
    a = Activations(x)
    logits = matmul(layer.router, a)
    routing_weights, selected_experts = router(logits, weights.c.top_k)
    shared_expert_gate = matmul(layer.shared_expert_gate, a)  # [T, 1]
    y, routed, shared = experts(
        layer.experts, a, selected_experts, routing_weights, shared_expert_gate
    )
    record("mlp.shared_expert.gate_proj", shared.gate)
    record("mlp.shared_expert.up_proj", shared.up)
    record("mlp.shared_expert.down_proj", shared.down)
    record("mlp.shared_expert", shared.down)
    record("mlp.gate", logits)
    record("mlp.gate.1", routing_weights)
    record("mlp.gate.2", selected_experts)
    record("mlp.experts", routed)
    record("mlp.shared_expert_gate", shared_expert_gate)
    record("mlp", y)
    return y


@torch.no_grad()
def forward(weights, ids, state=None):
    """The model over ids, after whatever state has seen -> (trace, state).

    trace: module path -> numpy [T, features] (float32; mlp.gate.2 int64), in the order in which
    Hugging Face's modules finish.  state is what a later forward continues from; the one given is
    left as it was."""
    start = state["position"] if state else 0
    layer_states = [dict(s) for s in state["layers"]] if state else [{} for _ in weights.layers]
    c, trace = weights.c, {}

    def record(name, value):
        trace[name] = value.detach().contiguous().numpy().copy()

    hidden = weights.embed.row_values(torch.as_tensor(ids, dtype=torch.int64))  # [T, hidden]
    record("model.embed_tokens", hidden)
    for n, layer in enumerate(weights.layers):
        at = f"model.layers.{n}"

        def record_in_layer(name, value, at=at):
            record(f"{at}.{name}", value)

        x = rms_norm(hidden, layer.input_layernorm, c.eps)
        record_in_layer("input_layernorm", x)
        if layer.kind == "linear":
            x = linear_attention(weights, layer, x, layer_states[n], record_in_layer)
        else:
            x = full_attention(weights, layer, x, layer_states[n], start, record_in_layer)
        hidden = hidden + x
        x = rms_norm(hidden, layer.post_attention_layernorm, c.eps)
        record_in_layer("post_attention_layernorm", x)
        hidden = hidden + sparse_moe(weights, layer, x, record_in_layer)
        record(at, hidden)
    x = rms_norm(hidden, weights.norm, c.eps)
    record("model.norm", x)
    record("lm_head", matmul(weights.lm_head, Activations(x)))
    return trace, {"position": start + len(ids), "layers": layer_states}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="a .gguf file, or the folder of an INT8 or INT4 checkpoint")
    parser.add_argument("--ids", required=True, help='token ids, as in "1 2 3"')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids = [int(word) for word in arguments.ids.replace(",", " ").split()]
    trace, _ = forward(Weights.load(arguments.model), ids)
    logits = trace["lm_head"]
    print("argmax", *logits.argmax(1))
    print("sha256", hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest())


if __name__ == "__main__":
    main()
