"""The contracts of csrc/pyengine.h restated in NumPy, for tests/kernels.

Written from the header alone; function names are the header's without `pe_`.  One NumPy operation
on float32 arrays is one IEEE operation with one rounding, so a sum whose order matters is a loop
over its terms.  exp and its kin are float64 rounded to float32: right unless the exact value lies
within about an ulp of float64 of a midpoint between two float32 (tests/kernels has such
arguments apart, against `decimal`).
"""

from dataclasses import dataclass

import blocks256
import numpy as np

GROUP = 128
BLOCK = 32
PART = 16
F32 = np.float32
F64 = np.float64


# ---- sums ----------------------------------------------------------------------------------------


def ascending(terms):
    """Over the first axis: "starts with its first term and adds the others one at a time"."""
    total = terms[0].copy()
    for term in terms[1:]:
        total = total + term
    return total


def lanes(terms, width):
    """Over the last axis: term i is added to accumulator i mod width, i ascending -> [..., width].

    The padding is harmless: an accumulator that started at +0 is never -0, so +0 leaves it alone."""
    pad = [(0, 0)] * (terms.ndim - 1) + [(0, -terms.shape[-1] % width)]
    terms = np.pad(terms, pad)
    steps = terms.reshape(*terms.shape[:-1], terms.shape[-1] // width, width)
    total = np.zeros((*terms.shape[:-1], width), terms.dtype)
    for step in range(steps.shape[-2]):
        total = total + steps[..., step, :]
    return total


def halve(sums):
    """The tree: add the upper half of the accumulators to the lower until one is left."""
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def sum8(terms):
    return halve(lanes(np.asarray(terms, F64), 8))


def dot16(a, b):
    return halve(lanes(np.asarray(a, F32) * np.asarray(b, F32), 16))


# ---- elementwise -----------------------------------------------------------------------------------


def exp(x):
    return np.exp(x.astype(F64)).astype(F32)


def sigmoid(x):
    return (1.0 / (1.0 + np.exp(-x.astype(F64)))).astype(F32)


def silu(x):
    x64 = x.astype(F64)
    y = x64 / (1.0 + np.exp(-x64))
    # x/2 + x^2/4 - ...: float64 holds only x/2, which for a subnormal x may be a midpoint.
    small = (np.abs(x64) < 2.0**-60) & (x64 != 0)
    y = np.where(small, np.nextafter(x64 / 2, np.inf), y)
    return np.where(x == -np.inf, -0.0, y).astype(F32)  # the limit, where the formula has no value


def softplus(x):
    y = np.log1p(np.exp(np.minimum(x.astype(F64), 30.0))).astype(F32)
    return np.where(x > 20, x, y)


def add(a, b):
    return a + b


def silu_mul(gate, up):
    return silu(gate) * up


def sigmoid_mul(x, gate):
    return x * sigmoid(gate)


def delta_gates(a, b, neg_exp_a_log, dt_bias):
    return sigmoid(b), exp(neg_exp_a_log * softplus(a + dt_bias))


# ---- matmul ----------------------------------------------------------------------------------------


def groups_of(cols):
    return -(-cols // GROUP)


def quantize_activations(x):
    """x [tokens, cols] -> q int16 [tokens, groups * 128], scales [tokens, groups]."""
    tokens, cols = x.shape
    groups = groups_of(cols)
    padded = np.pad(x, [(0, 0), (0, groups * GROUP - cols)]).reshape(tokens, groups, GROUP)
    a = np.abs(padded).max(-1)
    zero = a < F32(2.0**-100)
    s = a / F32(32767)
    q = np.rint(padded / np.where(zero, F32(1), s)[..., None])
    q[zero] = 0
    return q.astype(np.int16).reshape(tokens, groups * GROUP), np.where(zero, F32(0), s)


def sums_of(q):
    """q int16 [tokens, groups * 128] -> int32 [tokens, groups * 8]."""
    tokens, cols = q.shape
    return q.reshape(tokens, cols // PART, PART).sum(-1, dtype=np.int32)


# Of each type of blocks of 32 columns: its codes by the number that is stored (Q8_0: as int8), ascending
# but for the tables.
BLOCK_CODES = {
    "Q8_0": range(-128, 128),
    "Q4_0": range(-8, 8),
    "Q4_1": range(16),
    "Q5_0": range(-16, 16),
    "Q5_1": range(32),
    "IQ4_NL": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "MXFP4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}
WITH_MINIMUM = ("Q4_1", "Q5_1")


@dataclass
class Matrix:
    """type: F32, F16, BF16: codes are the stored numbers (BF16: uint16), scales None.
    INT8, INT4: codes int8 [rows, cols], scales float16 [groups, rows].
    BLOCK_CODES: codes int8 [rows, cols], scales [rows, blocks]: float16, of MXFP4 uint8; minimums
    float16 [rows, blocks] of Q4_1 and Q5_1."""

    type: str
    codes: np.ndarray
    scales: np.ndarray | None = None
    minimums: np.ndarray | None = None

    @property
    def shape(self):
        return self.codes.shape

    @property
    def dense(self):
        return self.scales is None

    def block_scales(self, block):
        """float32 [rows]; "the scale is 2^(e - 128)"."""
        scales = self.scales[:, block]
        return np.ldexp(F32(1), scales.astype(np.int32) - 128) if self.type == "MXFP4" else scales.astype(F32)

    def values(self):
        """float32 values of a dense matrix; exact."""
        if self.type == "BF16":
            return (self.codes.astype(np.uint32) << 16).view(F32)
        return self.codes.astype(F32)


def matmul(w, x=None, q=None, s_x=None):
    if w.dense:
        return matmul_dense(w, x)
    if w.type in blocks256.LAYOUTS:
        return blocks256.matmul(w, q, s_x)
    return matmul_blocks(w, q, s_x) if w.type in BLOCK_CODES else matmul_grouped(w, q, s_x)


def matmul_dense(w, x):
    values = w.values().astype(F64)
    y = np.zeros((len(x), len(values)), F32)
    for t, row in enumerate(x.astype(F64)):
        y[t] = sum8(row * values)
    return y


def exact_dot(q, codes):
    """f32 of the exact integer sums: int64, then one rounding."""
    return (q.astype(np.int64) @ codes.T.astype(np.int64)).astype(F32)


def matmul_grouped(w, q, s_x):
    rows, cols = w.shape
    y = np.zeros((len(q), rows), F32)
    for g in range(groups_of(cols)):
        columns = slice(g * GROUP, min(cols, (g + 1) * GROUP))
        d = exact_dot(q[:, columns], w.codes[:, columns])
        y = y + d * (w.scales[g].astype(F32)[None, :] * s_x[:, g, None])
    return y


def matmul_blocks(w, q, s_x):
    rows, cols = w.shape
    y = np.zeros((len(q), rows), F32)
    for g in range(groups_of(cols)):
        p = [np.zeros((len(q), rows), F32) for _ in range(GROUP // BLOCK)]
        for b in range(GROUP // BLOCK):
            first = g * GROUP + b * BLOCK
            if first < cols:
                columns, block = slice(first, first + BLOCK), first // BLOCK
                p[b] = exact_dot(q[:, columns], w.codes[:, columns]) * w.block_scales(block)[None, :]
                if w.minimums is not None:
                    total = q[:, columns].astype(np.int64).sum(1).astype(F32)
                    p[b] = p[b] + total[:, None] * w.minimums[:, block].astype(F32)[None, :]
        y = y + ((p[0] + p[1]) + (p[2] + p[3])) * s_x[:, g, None]
    return y


# ---- norms -----------------------------------------------------------------------------------------


def squares8(x):
    return sum8(x.astype(F64) * x.astype(F64))


def times_inverse(x, inv):
    return (x.astype(F64) * inv[..., None]).astype(F32)


def rms_norm(x, scale, eps):
    inv = 1.0 / np.sqrt(squares8(x) / F64(x.shape[-1]) + F64(eps))
    return times_inverse(x, inv) * scale


def rms_norm_gated(x, z, weight, eps):
    return rms_norm(x, weight, eps) * silu(z)


def l2_norm(x, scale):
    return times_inverse(x, 1.0 / np.sqrt(squares8(x) + 1e-6)) * F32(scale)


# ---- rotary positions --------------------------------------------------------------------------------


def rope_table(start, tokens, inv_freq):
    """The steps of rope.c: pi/2 taken off in three parts, then Taylor about 0."""
    position = np.arange(start, start + tokens, dtype=F64)
    angle = position[:, None] * inv_freq.astype(F64)[None, :]
    k = (angle * float.fromhex("0x1.45f306dc9c883p-1") + 0.5).astype(np.int64)
    hi = angle - k * float.fromhex("0x1.921fb54p+0")
    mid = k * float.fromhex("0x1.10b461p-30")
    r = hi - mid
    r = r + (((hi - r) - mid) - k * float.fromhex("0x1.a62633145c06ep-58"))
    s = r + r * taylor(r, 17)
    c = 1.0 + taylor(r, 18)
    cos = np.choose(k & 3, [c, -s, -c, s]).astype(F32)
    sin = np.choose(k & 3, [s, c, -s, -c]).astype(F32)
    return cos, sin


def taylor(r, highest):
    p = np.zeros_like(r)
    for n in range(highest, 1, -2):
        p = (p + 1.0) * (-(r * r) / float(n * (n - 1)))
    return p


def rope(x, cos, sin):
    """x [tokens, heads, n]; cos, sin [tokens, half]."""
    half = cos.shape[1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, x[..., 2 * half :]], -1)


# ---- mixers --------------------------------------------------------------------------------------------


def causal_conv1d(x, weight, conv_state):
    """-> y, the new conv_state."""
    taps, tokens = len(weight), len(x)
    inputs = np.concatenate([conv_state, x])
    y = silu(ascending(np.stack([weight[j] * inputs[j : j + tokens] for j in range(taps)])))
    return y, inputs[tokens:].copy()


def delta_rule(query, key, value, beta, decay, key_head, recurrent_state):
    """query, key [tokens, key heads, dk]; value [tokens, value heads, dv] -> out, the new state."""
    state, out = recurrent_state, np.zeros(value.shape, F32)
    for t in range(len(query)):
        q, k = query[t, key_head], key[t, key_head]  # [value heads, dk]
        state = state * decay[t][:, None, None]
        kv_mem = ascending(np.moveaxis(state * k[:, :, None], 1, 0))
        delta = (value[t] - kv_mem) * beta[t][:, None]
        state = state + k[:, :, None] * delta[:, None, :]
        out[t] = ascending(np.moveaxis(state * q[:, :, None], 1, 0))
    return out, state


def attention(query, key_cache, value_cache, start, scale):
    tokens, heads, _ = query.shape
    per_kv = heads // key_cache.shape[1]
    out = np.zeros(query.shape, F32)
    for t in range(tokens):
        seen = start + t + 1
        for h in range(heads):
            score = dot16(query[t, h], key_cache[:seen, h // per_kv]) * F32(scale)
            e = exp(score - score.max())
            mixed = ascending(e[:, None] * value_cache[:seen, h // per_kv])
            out[t, h] = mixed / sum8(e).astype(F32)
    return out


# ---- mixture of experts ----------------------------------------------------------------------------------


def router(logits, top_k):
    """-> routing_weights, selected_experts."""
    weights, selected = [], []
    for row in logits:
        e = exp(row - row.max())
        p = (e.astype(F64) / sum8(e)).astype(F32)
        chosen = np.argsort(-p, kind="stable")[:top_k]  # equal ones keep their order
        total = ascending(p[chosen].astype(F64))
        weights.append((p[chosen].astype(F64) / total).astype(F32))
        selected.append(chosen.astype(np.int32))
    return np.stack(weights), np.stack(selected)


def routing_weights(logits, selected):
    """Of experts that are given."""
    weights = []
    for row, chosen in zip(logits, selected):
        e = exp(row - row.max())
        p = (e.astype(F64) / sum8(e)).astype(F32)[chosen].astype(F64)
        weights.append((p / ascending(p)).astype(F32))
    return np.stack(weights)


# ---- soft labels -----------------------------------------------------------------------------------


def top_k(logits, k):
    return np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)


def exps(row, power=1):
    shifted = row - row.max()
    return exp(shifted if power == 1 else F32(power) * shifted)


def exp_sums(logits, ids):
    """-> total, rest float64 [T]."""
    total, rest = [], []
    for row, chosen in zip(logits, ids):
        e = exps(row)
        total.append(sum8(e))
        e[chosen[chosen >= 0]] = 0
        rest.append(sum8(e))
    return np.array(total), np.array(rest)


def draw(logits, power, uniforms, block=256):
    """-> ids int32 [T, draws], total float64 [T]."""
    ids, total = np.empty(uniforms.shape, np.int32), np.empty(len(logits))
    for t, row in enumerate(logits):
        e = exps(row, power)
        sums = np.cumsum([sum8(e[start : start + block]) for start in range(0, len(e), block)])
        total[t] = sums[-1]
        for d, u in enumerate(uniforms[t]):
            goal = u * sums[-1]
            j = int(np.argmax(sums > goal))
            terms = e[j * block : (j + 1) * block].astype(F64)
            running = np.cumsum([sums[j - 1] if j else 0.0, *terms])[1:]
            above = np.flatnonzero(running > goal)
            ids[t, d] = j * block + (above[0] if above.size else np.flatnonzero(terms)[-1])
    return ids, total


def product(w, x):
    """matmul of float32 rows, quantised first if w wants it."""
    return matmul(w, x) if w.dense else matmul(w, None, *quantize_activations(x))


def feed_forward(gate, up, down, x):
    return product(down, silu_mul(product(gate, x), product(up, x)))


def experts(stack, shared, x, selected_experts, routing_weights, shared_expert_gate):
    """stack: (gate, up, down) of each expert; shared: the shared one's -> y, and the trace."""
    routed = np.zeros(x.shape, F32)
    for t in range(len(x)):
        for k in np.argsort(selected_experts[t], kind="stable"):
            y = feed_forward(*stack[selected_experts[t, k]], x[t : t + 1])[0]
            routed[t] = routed[t] + y * routing_weights[t, k]
    shared_y = feed_forward(*shared, x)
    trace = {
        "routed": routed,
        "shared_gate": product(shared[0], x),
        "shared_up": product(shared[1], x),
        "shared": shared_y,
    }
    return routed + sigmoid(shared_expert_gate)[:, None] * shared_y, trace
