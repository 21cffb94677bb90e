"""The `locked` arithmetic restated in PyTorch, to check the C core bit for bit.

Written from the contracts of csrc/pyengine.h alone: it imports nothing of pyengine, and shares no
code with it.  Each function below named as in the header (without `pe_`) quotes its rule.

How the bits are kept.  One torch operation on float32 tensors is one IEEE operation with one
rounding, so a sum whose order matters is a Python loop over its terms, vectorised over everything
else; no float32 matmul, sum, addcmul or cumsum is used.  Integer sums are float64 matmuls: exact,
because every partial sum is an integer below 2^53.  exp and its kin are computed in float64 and
rounded: within an ulp of float64, hence the nearest float32 save where the exact value lies that
close to a midpoint (tools/check/exhaustive_math.py says where).

    python tools/golden/locked_torch.py MODEL --ids "1 2 3"      (MODEL: a .gguf or an INT8 folder)

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
BLOCK = 32  # columns of a block of Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4

F32 = torch.float32
F64 = torch.float64


# ---- sums --------------------------------------------------------------------------------------


def ascending(terms, dim):
    """ "a sum starts with its first term and adds the others one at a time in that order"."""
    first, *rest = terms.unbind(dim)
    total = first.clone()
    for term in rest:
        total = total + term
    return total


def sum8(terms):
    """ "eight float64 accumulators, all +0 at first; term i is added to accumulator i mod 8, i
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
    """ "the float32 nearest to the exact value of the function at the float32 argument"."""
    return torch.exp(x.double()).float()


def sigmoid(x):
    """1 / (1 + exp(-x)), rounded once; exp(-x) = inf rightly gives +0."""
    return (1.0 / (1.0 + torch.exp(-x.double()))).float()


def silu(x):
    """x / (1 + exp(-x)), rounded once; exp(-x) = inf rightly gives -0 for finite x."""
    x = x.double()
    return (x / (1.0 + torch.exp(-x))).float()


def softplus(x):
    """ "softplus(x) = log(1 + exp(x)), and x itself above 20"."""
    return torch.where(x > 20, x, torch.log1p(torch.exp(x.double())).float())


def silu_mul(gate, up):
    """ "y[i] = silu(gate[i]) (*) up[i]"."""
    return silu(gate) * up


def sigmoid_mul(x, gate):
    """ "y[r, i] = x[r, i] (*) sigmoid(gate[r, i])"."""
    return x * sigmoid(gate)


def delta_gates(a, b, neg_exp_a_log, dt_bias):
    """ "beta = sigmoid(b); log_decay = neg_exp_a_log (*) softplus(a (+) dt_bias);
    decay = exp(log_decay)".  a, b [T, H]; neg_exp_a_log, dt_bias [H]."""
    log_decay = neg_exp_a_log * softplus(a + dt_bias)
    return sigmoid(b), exp(log_decay)


# ---- matmul ------------------------------------------------------------------------------------


def check_finite(x, what):
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"{what}: NaN or infinity")
    return x


def quantize_activations(x):
    """ "Activations to int16, per token and group of PE_GROUP columns (the last may be short):
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


# The bytes of a block, and those of its nibbles' codes that are a table.
BLOCK_TYPES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "IQ4_NL": 18, "MXFP4": 17}
TABLES = {
    "IQ4_NL": [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    "MXFP4": [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12],
}


@dataclass
class Matrix:
    """One matrix [R, C], or a stack of them [E, R, C] (the experts).

    type    F32, F16, BF16: data is the values, widened to float32 (exact); scales is None
            INT8, INT4:     data is the int8 codes (no packing), scales float32 [(E,) G, R]
            BLOCK_TYPES:    data is the int8 codes, scales float32 [(E,) blocks, R]; minimums likewise,
                            of Q4_1 and Q5_1
    """

    type: str
    data: torch.Tensor
    scales: torch.Tensor | None = None
    minimums: torch.Tensor | None = None

    @property
    def dense(self):
        return self.scales is None

    @property
    def shape(self):
        return tuple(self.data.shape)

    def rows(self, start, stop):
        """Rows start:stop, of each matrix of a stack."""
        numbers = (x if x is None else x[..., start:stop] for x in (self.scales, self.minimums))
        return Matrix(self.type, self.data[..., start:stop, :], *numbers)

    def expert(self, e):
        numbers = (x if x is None else x[e] for x in (self.scales, self.minimums))
        return Matrix(self.type, self.data[e], *numbers)

    def row_values(self, index):
        """Those rows dequantised in float32: "its codes times their scales, exact in float32 (Q4_1, Q5_1:
        (code (*) scale) (+) minimum)"."""
        codes = self.data[index].float()  # [T, C]
        if self.dense:
            return codes

        def by_column(numbers):  # [blocks, R] -> [T, C]
            width = BLOCK if self.type in BLOCK_TYPES else GROUP
            return numbers.t()[index].repeat_interleave(width, dim=1)[:, : codes.shape[1]]

        values = codes * by_column(self.scales)
        return values if self.minimums is None else values + by_column(self.minimums)


# The bytes of a block of 256 columns, and where its fields start, in storage order.
SUPER_TYPES = {
    "Q2_K": (84, {"x": 0, "q": 16, "d": 80, "dmin": 82}),
    "Q3_K": (110, {"h": 0, "q": 32, "l": 96, "u": 104, "d": 108}),
    "Q4_K": (144, {"d": 0, "dmin": 2, "k": 4, "q": 16}),
    "Q5_K": (176, {"d": 0, "dmin": 2, "k": 4, "h": 16, "q": 48}),
    "Q6_K": (210, {"q": 0, "h": 128, "s": 192, "d": 208}),
    "IQ4_XS": (136, {"d": 0, "h": 2, "l": 4, "q": 8}),
}
PART = 16  # columns that share one scale


@dataclass
class SuperMatrix:
    """One matrix of blocks of 256 columns, B in a row, or a stack of them.

    codes int8 [(E,) R, B, 256]; s int64 [(E,) R, B, 16], m likewise or None; d float32 [(E,) R, B], dmin
    likewise or None."""

    type: str
    codes: torch.Tensor
    s: torch.Tensor
    m: torch.Tensor | None
    d: torch.Tensor
    dmin: torch.Tensor | None

    dense = False

    @property
    def fields(self):
        return self.codes, self.s, self.m, self.d, self.dmin

    @property
    def shape(self):
        *stack, blocks, width = self.codes.shape
        return (*stack, blocks * width)

    def at(self, index):
        """Of each field the entries of an index."""
        return SuperMatrix(self.type, *(x if x is None else x[index] for x in self.fields))

    def rows(self, start, stop):
        stack = self.codes.dim() - 3
        return self.at((slice(None),) * stack + (slice(start, stop),))

    def expert(self, e):
        return self.at(e)

    def row_values(self, index):
        """ "its codes times their scales, exact in float32 (Q2_K, Q4_K, Q5_K: ((d (*) s) (*) code) (-)
        (dmin (*) m))"."""
        w = self.at(index)
        values = (w.d[..., None] * w.s.float()).repeat_interleave(PART, dim=-1) * w.codes.float()
        if w.m is not None:
            values = values - (w.dmin[..., None] * w.m.float()).repeat_interleave(PART, dim=-1)
        return values.flatten(-2)


def super_matrix(kind, blocks):
    """uint8 [(E,) R, B, bytes] as a SuperMatrix, by the letters of the header."""
    _, starts = SUPER_TYPES[kind]
    byte = torch.from_numpy(blocks.astype(np.int64))
    halves = {
        name: torch.from_numpy(
            np.ascontiguousarray(blocks[..., starts[name] : starts[name] + 2])
            .view("<f2")[..., 0]
            .astype(np.float32)
        )
        for name in ("d", "dmin")
        if name in starts
    }

    def field(name, index):
        return byte[..., starts[name] + index]

    def nibble(x, high):
        return torch.where(high, x >> 4, x & 15)

    def pair(x, n):  # "x:n is the n-th lowest pair of bits"
        return (x >> 2 * n) & 3

    c = torch.arange(256)  # "column c is 128 g + 32 j + i"
    g, j, i, b = c // 128, c // 32 % 4, c % 32, c // 32
    p = torch.arange(16)
    sub = p // 2  # the sub-block b of parts 2 b and 2 b + 1
    m = None
    if kind == "Q2_K":
        codes = pair(field("q", 32 * g + i), j)
        s, m = field("x", p) & 15, field("x", p) >> 4
    elif kind == "Q3_K":
        codes = pair(field("q", 32 * g + i), j) + 4 * ((field("h", i) >> b) & 1) - 4
        s = nibble(field("l", p % 8), p >= 8) + 16 * pair(field("u", p % 4), p // 4) - 32
    elif kind in ("Q4_K", "Q5_K"):
        codes = nibble(field("q", 64 * g + 32 * (j // 2) + i), j % 2 == 1)
        if kind == "Q5_K":
            codes = codes + 16 * ((field("h", i) >> b) & 1)
        first = sub < 4
        before = (sub - 4).clamp(min=0)
        later_s = (field("k", sub + 4) & 15) + 16 * pair(field("k", before), 3)
        later_m = (field("k", sub + 4) >> 4) + 16 * pair(field("k", sub), 3)
        s = torch.where(first, field("k", sub) % 64, later_s)
        m = torch.where(first, field("k", sub + 4) % 64, later_m)
    elif kind == "Q6_K":
        codes = (
            nibble(field("q", 64 * g + 32 * (j % 2) + i), j >= 2) + 16 * pair(field("h", 32 * g + i), j) - 32
        )
        s = field("s", p)
        s = torch.where(s > 127, s - 256, s)  # int8
    else:
        table = torch.tensor(TABLES["IQ4_NL"])
        codes = table[nibble(field("q", 16 * b + i % 16), i >= 16)]
        h = field("h", torch.tensor([0])) + 256 * field("h", torch.tensor([1]))
        s = nibble(field("l", sub // 2), sub % 2 == 1) + 16 * pair(h, sub) - 32
    return SuperMatrix(kind, codes.to(torch.int8), s, m, halves["d"], halves.get("dmin"))


def matmul_super(w, q, s_x):
    """ "with P[p] = s[p] * (sum of q * code over part p) for the parts p < 8 of the group, and S[p] the sum
    of q over part p, all exact in int32, ...
    y = 0; for g ascending: y = y (+) (((D (*) d) (-) (M (*) dmin)) (*) s_x[g])"."""
    y = torch.zeros(q.shape[0], w.codes.shape[0])
    for g in range(q.shape[1]):
        block, first = g // 2, g % 2 * 8
        parts = q[:, g].double().unflatten(-1, (8, PART))  # [T, 8, 16]
        codes = w.codes[:, block].double().unflatten(-1, (16, PART))[:, first : first + 8]  # [R, 8, 16]
        s = w.s[:, block, first : first + 8].double()  # [R, 8]
        P = [s[:, p] * (parts[:, p] @ codes[:, p].t()) for p in range(8)]  # [T, R] each
        value = sum_of_parts(w.type, P) * w.d[:, block]
        if w.m is not None:
            M = sum_to_f32(
                *(parts[:, p].sum(-1)[:, None] * w.m[:, block, first + p].double() for p in range(8))
            )
            value = value - M * w.dmin[:, block]
        y = y + value * s_x[:, g, None]
    return y


def sum_to_f32(*terms):
    """f32 of an exact sum of integers, by way of int32."""
    total = sum(terms)
    assert (total.abs() < 2.0**31).all()
    return total.to(torch.int32).float()


def sum_of_parts(kind, P):
    """ "Q2_K, Q3_K: D = f32(P[0] + ... + P[7])
    Q4_K: D = f32(P[0] + P[1] + P[4] + P[5]) (+) f32(P[2] + P[3] + P[6] + P[7])
    Q5_K: A[i] = f32(P[2 i] + P[2 i + 1]), i < 4; B[i] = A[i] (+) A[i + 2], i < 2; D = B[0] (+) B[1]
    Q6_K, IQ4_XS: A[i] = f32(P[i]) (+) f32(P[i + 4]), i < 4; B and D as of Q5_K"."""
    if kind in ("Q2_K", "Q3_K"):
        return sum_to_f32(*P)
    if kind == "Q4_K":
        return sum_to_f32(P[0], P[1], P[4], P[5]) + sum_to_f32(P[2], P[3], P[6], P[7])
    if kind == "Q5_K":
        A = [sum_to_f32(P[2 * i], P[2 * i + 1]) for i in range(4)]
    else:
        A = [sum_to_f32(P[i]) + sum_to_f32(P[i + 4]) for i in range(4)]
    return (A[0] + A[2]) + (A[1] + A[3])


def matmul(w, a):
    """ "y[t, r] = sum over c of x[t, c] * w[r, c]", by the type of w -> [T, R] float32."""
    assert w.shape[-1] == a.x.shape[-1], (w.shape, a.x.shape)
    if w.dense:
        return matmul_dense(w.data, a.x)
    if w.type in BLOCK_TYPES:
        return matmul_blocks(w, *a.quantized)
    if w.type in SUPER_TYPES:
        return matmul_super(w, *a.quantized)
    return matmul_int8(w, *a.quantized)


def matmul_dense(w, x):
    """ "F32, F16, BF16: y = f32(sum8(x[c] * w[c]))".  w [R, C], x [T, C], float32.

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
    """ "INT8, INT4: with d[g] = sum over the group's columns of q * code, exact in int32,
    y = 0; for g ascending: y = y (+) (f32(d[g]) (*) (f32(s_w[g]) (*) s_x[g]))"."""
    y = torch.zeros(q.shape[0], w.data.shape[0])
    for g in range(q.shape[1]):
        codes = w.data[:, g * GROUP : (g + 1) * GROUP]  # [R, 128 or the rest]
        d = exact_dot(q[:, g, : codes.shape[1]], codes)  # [T, R]
        y = y + d * (w.scales[g][None, :] * s_x[:, g, None])
    return y


def matmul_blocks(w, q, s_x):
    """ "Q8_0, Q4_0, Q5_0, IQ4_NL, MXFP4: each group holds up to four blocks; with d[b] the exact sum of
    q * code over block b, p[b] = f32(d[b]) (*) f32(s_w[b]), and p[b] = +0 for blocks past the last
    column; y = 0; for g ascending: y = y (+) (((p[0] (+) p[1]) (+) (p[2] (+) p[3])) (*) s_x[g]).
    Q4_1, Q5_1: the same y; with S[b] the exact sum of q over block b and m[b] its minimum,
    p[b] = (f32(d[b]) (*) f32(s_w[b])) (+) (f32(S[b]) (*) f32(m[b])), +0 past the last column"."""
    rows, cols = w.data.shape
    y = torch.zeros(q.shape[0], rows)
    for g in range(q.shape[1]):
        p = []
        for b in range(GROUP // BLOCK):
            start = g * GROUP + b * BLOCK
            if start < cols:
                codes = w.data[:, start : start + BLOCK]
                q_b = q[:, g, b * BLOCK : (b + 1) * BLOCK]
                part = exact_dot(q_b, codes) * w.scales[start // BLOCK][None, :]
                if w.minimums is not None:
                    total = q_b.to(torch.int32).sum(1, dtype=torch.int32).float()  # [T]
                    part = part + total[:, None] * w.minimums[start // BLOCK][None, :]
                p.append(part)
            else:
                p.append(torch.zeros(q.shape[0], rows))
        y = y + ((p[0] + p[1]) + (p[2] + p[3])) * s_x[:, g, None]
    return y


# ---- norms -------------------------------------------------------------------------------------


def inverse_rms(x, eps):
    """ "inv = 1 / sqrt(sum8(x * x) / n + eps), in float64, each operation rounded to float64"."""
    n = torch.tensor(float(x.shape[-1]), dtype=F64)
    return torch.ones((), dtype=F64) / torch.sqrt(squares8(x) / n + eps)


def times_inverse(x, inv):
    """f32(x * inv): the product in float64, then rounded to float32."""
    return (x.double() * inv[..., None]).float()


def rms_norm(x, scale, eps):
    """ "y = f32(x * inv) (*) scale, with scale = f32(1 + weight)".  Over the last dimension."""
    return times_inverse(x, inverse_rms(x, eps)) * scale


def rms_norm_gated(x, z, weight, eps):
    """ "y = (weight (*) f32(x * inv)) (*) silu(z)"; weight is plain."""
    return (weight * times_inverse(x, inverse_rms(x, eps))) * silu(z)


def l2_norm(x, scale):
    """ "inv = 1 / sqrt(sum8(x * x) + 1e-6), in float64; y = f32(x * inv) (*) scale"."""
    inv = torch.ones((), dtype=F64) / torch.sqrt(squares8(x) + 1e-6)
    return times_inverse(x, inv) * torch.tensor(scale, dtype=F32)


# ---- rotary positions --------------------------------------------------------------------------


def inverse_frequencies(base, dim):
    """inv_freq [dim / 2] as Hugging Face computes it, in float32 throughout."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=F32) / dim))


def yarn_frequencies(base, dim, yarn):
    """inv_freq [dim / 2] of YaRN as Hugging Face computes it: float32 of tensors, float64 of numbers.

    Between the dimension that turns beta_fast times in the original context and the one that turns
    beta_slow times, from the frequency itself to the frequency divided by the factor."""
    powers = base ** (torch.arange(0, dim, 2, dtype=F32) / dim)

    def dimension(turns):
        wanted = yarn.original / (turns * 2 * math.pi)
        return (dim * math.log(wanted)) / (2 * math.log(base))

    first, last = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last = last + 0.001 if first == last else last
    ramp = torch.clamp((torch.arange(dim // 2, dtype=F32) - first) / (last - first), 0, 1)
    kept = 1 - ramp
    return 1.0 / (yarn.factor * powers) * (1 - kept) + 1.0 / powers * kept


def yarn_of(values):
    """YaRN's numbers from Hugging Face's names: factor, original, scale, beta_fast, beta_slow, truncate."""
    factor = values["factor"]
    scale = values.get("attention_factor")
    mscale, mscale_all_dim = values.get("mscale"), values.get("mscale_all_dim")

    def of_paper(m):
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scale is None:
        both = mscale and mscale_all_dim
        scale = of_paper(mscale) / of_paper(mscale_all_dim) if both else of_paper(1)
    return SimpleNamespace(
        factor=factor,
        original=values["original_max_position_embeddings"],
        scale=scale,
        beta_fast=values.get("beta_fast") or 32,
        beta_slow=values.get("beta_slow") or 1,
        truncate=values.get("truncate", True),
    )


def rope_table(start, tokens, inv_freq, scale=1.0):
    """ "cos and sin [tokens, half] of position * inv_freq[i] (exact in float64), position =
    start + t: float64 values [...], rounded once to float32"; of YaRN, "cos (*) f32(attention
    factor), sin likewise"."""
    position = torch.arange(start, start + tokens, dtype=F64)
    angle = position[:, None] * inv_freq.double()[None, :]
    cos, sin, scale = torch.cos(angle).float(), torch.sin(angle).float(), torch.tensor(scale, dtype=F32)
    return cos * scale, sin * scale


def rope(x, cos, sin):
    """ "x1 = x[i], x2 = x[i + half]: x[i] = (x1 (*) cos) (-) (x2 (*) sin);
    x[i + half] = (x2 (*) cos) (+) (x1 (*) sin).  Entries from 2 * half on stay."

    x [T, H, n]; cos, sin [T, half]."""
    half = cos.shape[1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


# ---- mixers ------------------------------------------------------------------------------------


def causal_conv1d(x, weight, conv_state):
    """ "y[t] = silu(sum over j ascending of weight[j] (*) input[t - (taps - 1) + j])".

    x [T, channels], weight [taps, channels] (tap taps-1 meets the newest token), conv_state
    [taps - 1, channels] the inputs before x, oldest first -> y, the new conv_state."""
    taps, tokens = weight.shape[0], x.shape[0]
    inputs = torch.cat([conv_state, x])  # [taps - 1 + T, channels]
    terms = torch.stack([weight[j] * inputs[j : j + tokens] for j in range(taps)])
    return silu(ascending(terms, 0)), inputs[tokens:].clone()


def delta_rule(query, key, value, beta, decay, key_head, recurrent_state):
    """ "Per token and value head, S its state, k and q of its key head:
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
    """ "sixteen float32 accumulators, all +0 at first; term i (a float32 product, rounded) is added
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
    """ "Per token (positions p = 0 .. its own) and head:
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
    """ "m = max logit; e = exp(logit (-) m); total = sum8(e), in float64; p = f32(e / total);
    the top_k greatest p, equal ones by ascending expert index;
    routing_weight = f32(p / sum of the chosen p, float64, in the order chosen)".

    logits [T, E] -> routing_weights float32, selected_experts int64, [T, top_k]."""
    check_finite(logits, "router")
    e = exp(logits - logits.amax(1, keepdim=True)).double()
    p = (e / sum8(e)[:, None]).float()
    p, index = torch.sort(p, dim=1, descending=True, stable=True)
    chosen = p[:, :top_k].double()
    return (chosen / ascending(chosen, 1)[:, None]).float(), index[:, :top_k].contiguous()


def routing_weights(logits, selected):
    """pe_routing_weights: "of experts that are given, in place of the greatest".

    logits [T, E], selected int64 [T, top_k] -> float32 [T, top_k]."""
    check_finite(logits, "router")
    e = exp(logits - logits.amax(1, keepdim=True)).double()
    p = (e / sum8(e)[:, None]).float()
    chosen = torch.gather(p, 1, selected).double()
    return (chosen / ascending(chosen, 1)[:, None]).float()


# ---- soft labels ---------------------------------------------------------------------------------


def label_exps(logits, power=1.0):
    """ "m = the greatest of the row; e[i] = exp(power (*) (logit[i] (-) m)), where power (*) is left out if
    it is 1".  logits [T, V] float32 -> the same."""
    check_finite(logits, "logits")
    shifted = logits - logits.amax(1, keepdim=True)
    return exp(shifted if power == 1 else torch.tensor(power, dtype=F32) * shifted)


def top_k(logits, k):
    """ "by falling logit, the lower id first among equals (+0 and -0 are equal)" -> int64 [T, k]."""
    check_finite(logits, "logits")
    return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k]


def exp_sums(logits, ids):
    """ "total[t] = sum8(e), i ascending; rest[t] = sum8(e'), e' = e with +0 in place of the ids' terms",
    "a negative one is no id" -> two float64 [T]."""
    e = label_exps(logits)
    without = torch.cat([e, torch.zeros_like(e[:, :1])], 1)  # one more place, for what is no id
    without.scatter_(1, torch.where(ids < 0, e.shape[1], ids), 0.0)
    return sum8(e.double()), sum8(without[:, :-1].double())


def draw(logits, power, uniforms, block=256):
    """ "b[j] = sum8 of block j; B[j] the sum of b[0..j], ascending; goal = u * B[last]; j the least with
    B[j] > goal; the least i of block j for which B[j - 1] + e[first of j] + ... + e[i], added one at a
    time, is > goal; where there is none, the last i of the block with e[i] > 0".

    uniforms float64 [T, D] -> ids int64 [T, D], total float64 [T]."""
    e = label_exps(logits, power).double()
    blocks = [sum8(part) for part in e.split(block, dim=1)]
    sums = [blocks[0]]
    for b in blocks[1:]:
        sums.append(sums[-1] + b)
    ids = torch.empty(uniforms.shape, dtype=torch.int64)
    for t in range(len(e)):
        for d in range(uniforms.shape[1]):
            goal = uniforms[t, d] * sums[-1][t]
            j = next(j for j in range(len(sums)) if sums[j][t] > goal)
            running = sums[j - 1][t] if j else torch.zeros((), dtype=F64)
            for i in range(j * block, min((j + 1) * block, e.shape[1])):
                running = running + e[t, i]
                if e[t, i] > 0:
                    ids[t, d] = i
                if running > goal:
                    ids[t, d] = i
                    break
    return ids, sums[-1]


def mlp(gate, up, down, a):
    """ "expert(x) = down(silu(gate x) (*) (up x))", "h quantised anew" -> the steps, by name."""
    step = SimpleNamespace(gate=matmul(gate, a), up=matmul(up, a))
    h = check_finite(silu_mul(step.gate, step.up), "experts")
    step.down = matmul(down, Activations(h))
    return step


def experts(w, a, selected_experts, routing_weights, shared_expert_gate):
    """ "routed = +0; for the token's experts by ascending index:
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


def gguf_yarn(meta):
    """YaRN of a GGUF's metadata, or None."""
    scaling = "rope.scaling."
    if meta.get(scaling + "type") != "yarn":
        return None
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "attention_factor": "yarn_attn_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    values = {name: meta[scaling + key] for name, key in names.items() if scaling + key in meta}
    return yarn_of({name: shortest_decimal(v) if isinstance(v, float) else v for name, v in values.items()})


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
        if config.yarn is None:
            self.inv_freq, self.rope_scale = inverse_frequencies(config.rope_base, config.rope_dim), 1.0
        else:
            self.inv_freq = yarn_frequencies(config.rope_base, config.rope_dim, config.yarn)
            self.rope_scale = config.yarn.scale

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
            value = meta.get(name, default)
            if value is None:
                raise KeyError(f"{path}: no {name}")
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
            top_k=get("expert_used_count", 0),
            eps=shortest_decimal(get("attention.layer_norm_rms_epsilon")),
            rope_base=get("rope.freq_base"),
            rope_dim=get("rope.dimension_count", head_dim),
            yarn=gguf_yarn(meta),
        )
        weights = cls(config, tiled=meta["general.architecture"] != "qwen3next")
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
                if blk + "ssm_in.weight" in tensors:
                    layer.in_proj_qkvz = matrix(blk + "ssm_in")
                else:
                    layer.in_proj_qkv = matrix(blk + "attn_qkv")
                    layer.in_proj_z = matrix(blk + "attn_gate")
                    assert layer.in_proj_qkv.shape[0] == 2 * key_dim + value_dim
                if blk + "ssm_ba.weight" in tensors:
                    layer.in_proj_ba = matrix(blk + "ssm_ba")
                else:
                    layer.in_proj_a = matrix(blk + "ssm_alpha")
                    layer.in_proj_b = matrix(blk + "ssm_beta")
                layer.conv1d = gguf_matrix(tensors[blk + "ssm_conv1d.weight"]).data.t().contiguous()
                layer.neg_exp_a_log = vector(blk + "ssm_a")
                layer.dt_bias = vector(blk + "ssm_dt.bias")
                layer.norm = vector(blk + "ssm_norm.weight")
                layer.out_proj = matrix(blk + "ssm_out")
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
            weights.layers.append(layer)
            if not config.top_k:  # dense
                layer.mlp = [matrix(blk + name) for name in ("ffn_gate", "ffn_up", "ffn_down")]
                continue
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
            top_k=raw.get("num_experts_per_tok", 0),
            eps=float(raw["rms_norm_eps"]),
            rope_base=rope_parameters.get("rope_theta", raw.get("rope_theta")),
            rope_dim=int(head_dim * partial),
            yarn=yarn_of(rope_parameters) if rope_parameters.get("rope_type") == "yarn" else None,
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
                joint = f"{at}linear_attn.in_proj_ba.weight" in tensors
                in_proj = ("qkvz", "ba") if joint else ("qkv", "z", "b", "a")
                for name in (*(f"in_proj_{part}" for part in in_proj), "out_proj"):
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
            weights.layers.append(layer)
            if any(name.startswith(f"{at}mlp.gate_proj.weight") for name in tensors):  # dense
                layer.mlp = [matrix(f"{at}mlp.{name}_proj") for name in ("gate", "up", "down")]
                continue
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
        architecture = reader.fields["general.architecture"].contents()
        meta["general.architecture"], prefix = architecture, f"{architecture}."
        for key, field in reader.fields.items():
            if key.startswith(prefix):
                meta.setdefault(key.removeprefix(prefix), field.contents())
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
    if kind in SUPER_TYPES:
        return super_matrix(kind, raw.reshape(*shape[:-1], shape[-1] // 256, SUPER_TYPES[kind][0]))
    if kind not in BLOCK_TYPES:
        raise ValueError(f"{tensor.name}: {kind} is not in the locked arithmetic")
    blocks = raw.reshape(*shape[:-1], shape[-1] // BLOCK, BLOCK_TYPES[kind])  # [(E,) R, blocks, bytes]
    return Matrix(kind, block_codes(kind, blocks).reshape(shape), *block_scales(kind, blocks))


def block_codes(kind, blocks):
    """int8 [.., blocks, 32] of uint8 [.., blocks, bytes], as the header says of each type."""
    if kind == "Q8_0":
        return torch.from_numpy(blocks[..., 2:].copy().view(np.int8))
    nibbles = torch.from_numpy(blocks[..., -16:].copy()).to(torch.int64)
    n = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)  # "the low nibbles are columns 0 to 15"
    if kind in ("Q5_0", "Q5_1"):  # "bits: uint32, little endian; bit c belongs to column c"
        bits = torch.from_numpy(blocks[..., -20:-16].copy().view("<u4").astype(np.int64))
        n = n + 16 * ((bits >> torch.arange(BLOCK)) & 1)
    if kind in TABLES:
        return torch.tensor(TABLES[kind], dtype=torch.int8)[n]
    return (n - {"Q4_0": 8, "Q5_0": 16}.get(kind, 0)).to(torch.int8)


def block_scales(kind, blocks):
    """float32 [.., blocks, R] of uint8 [.., R, blocks, bytes]: the scales, and the minimums."""
    if kind == "MXFP4":  # "the scale is 2^(e - 128)"
        e = torch.from_numpy(blocks[..., 0].astype(np.int64))
        numbers = [torch.ldexp(torch.ones(e.shape, dtype=F64), e - 128).float()]
    else:
        halves = blocks[..., :4].copy().view("<f2").astype(np.float32)
        numbers = [torch.from_numpy(halves[..., i]) for i in range(2 if kind in ("Q4_1", "Q5_1") else 1)]
    return [values.transpose(-1, -2).contiguous() for values in numbers]


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
    if hasattr(layer, "in_proj_ba"):
        mixed_qkv, z, gate_b, gate_a = joint_projections(c, layer, a, record)
    else:
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


def joint_projections(c, layer, a, record):
    """Qwen3NextGatedDeltaNet.fix_query_key_value_ordering: in_proj_qkvz has, for each key head, query, key,
    its value heads' values and their z; in_proj_ba b and a.  A GGUF may have the rows sorted: attn_qkv is all
    queries, all keys, all values; attn_gate all z.
    -> query, key and value [T, 2 * key_dim + value_dim], z [T, value_dim], b, a [T, n_v]."""
    tokens, share = a.x.shape[0], c.n_v // c.n_k
    if hasattr(layer, "in_proj_qkvz"):
        qkvz = matmul(layer.in_proj_qkvz, a).reshape(tokens, c.n_k, -1)
        parts = qkvz.split([c.dk, c.dk, share * c.dv, share * c.dv], dim=2)
    else:
        qkv = matmul(layer.in_proj_qkv, a).split([c.n_k * c.dk, c.n_k * c.dk, c.n_v * c.dv], dim=1)
        parts = [part.reshape(tokens, c.n_k, -1) for part in (*qkv, matmul(layer.in_proj_z, a))]
        qkvz = torch.cat(parts, dim=2)
    record("linear_attn.in_proj_qkvz", qkvz.flatten(1))
    ba = matmul(layer.in_proj_ba, a)
    record("linear_attn.in_proj_ba", ba)
    b, gate_a = ba.reshape(tokens, c.n_k, 2 * share).split(share, dim=2)
    mixed_qkv = torch.cat([part.flatten(1) for part in parts[:3]], dim=1)
    return mixed_qkv, parts[3].flatten(1), b.flatten(1).contiguous(), gate_a.flatten(1).contiguous()


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

    cos, sin = rope_table(start, tokens, weights.inv_freq, weights.rope_scale)
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
    y, routed, shared = experts(layer.experts, a, selected_experts, routing_weights, shared_expert_gate)
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


def dense_mlp(layer, x, record):
    """Qwen3_5MLP.forward on the normed hidden states x [T, hidden]."""
    step = mlp(*layer.mlp, Activations(x))
    record("mlp.gate_proj", step.gate)
    record("mlp.up_proj", step.up)
    record("mlp.down_proj", step.down)
    record("mlp", step.down)
    return step.down


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
        if not hasattr(layer, "mlp"):
            hidden = hidden + sparse_moe(weights, layer, x, record_in_layer)
        else:
            hidden = hidden + dense_mlp(layer, x, record_in_layer)
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
