"""One checked wrapper per operation of the C core: check, allocate, call, check, return.

Contracts (equations, orders of summation, rounding) stand in csrc/pyengine.h.  Arrays are float32
and C-contiguous unless a docstring says otherwise; T is the number of tokens.
"""

from __future__ import annotations

import numpy as np

from .._core import ffi, lib
from .call import as_input, as_output, check_status, run, want, want_out
from .matrices import GROUP, Experts, Matrices, Matrix
from .threads import Pool


class Activations:
    """x [T, cols] as a matmul's input; quantized once, when the first matrix needs it.

    Errors: NonFiniteError naming `name`.
    """

    def __init__(self, pool: Pool, x: np.ndarray, name: str = "input"):
        self.pool, self.x, self.name = pool, x, name
        self.q = self.scales = self.sums = None
        tokens, cols = x.shape
        self.struct = ffi.new("pe_activations *", {"tokens": tokens, "cols": cols, "x": as_input(x)})

    def quantize(self) -> None:
        if self.q is not None:
            return
        self.q, self.scales, self.sums = quantize_activations(self.pool, self.x, self.name)
        self.struct.q, self.struct.scales = as_input(self.q, np.int16, "int16_t[]"), as_input(self.scales)
        self.struct.sums = as_input(self.sums, np.int32, "int32_t[]")

    def for_matrices(self, *matrices: Matrix):
        """The C struct, with the forms that these matrices read."""
        if not all(m.dense for m in matrices):
            self.quantize()
        return self.struct


def quantize_activations(pool: Pool, x: np.ndarray, name: str = "input"):
    """x [T, cols] -> q int16 [T, n_groups * 128] zero-padded, scales [T, n_groups], sums int32
    [T, n_groups * 8] of 16 successive q."""
    tokens, cols = x.shape
    groups = -(-cols // GROUP)
    q, scales = np.empty((tokens, groups * GROUP), np.int16), np.empty((tokens, groups), np.float32)
    sums = np.empty((tokens, groups * (GROUP // lib.PE_PART)), np.int32)
    run(
        pool,
        lib.pe_quantize_activations,
        name,
        as_input(x),
        tokens,
        cols,
        as_output(q, "int16_t[]"),
        as_output(scales),
        as_output(sums, "int32_t[]"),
    )
    return q, scales, sums


def matmul(pool: Pool, matrix: Matrix, x: Activations, expert: int = 0) -> np.ndarray:
    """x [T, cols] times one matrix [rows, cols], transposed -> [T, rows]."""
    want(0 <= expert < matrix.experts, f"expert: want below {matrix.experts}, got {expert}")
    y = np.empty((x.x.shape[0], matrix.rows), np.float32)
    run(
        pool,
        lib.pe_matmul,
        f"matmul of {x.name}",
        matrix.struct,
        expert,
        x.for_matrices(matrix),
        as_output(y),
        matrix.rows,
        keep=(x, matrix),
    )
    return y


def matmul_shared_input(pool: Pool, group: Matrices, x: Activations) -> list[np.ndarray]:
    """matmul with every matrix of the group: x [T, cols] -> [T, rows] of each."""
    tokens = x.x.shape[0]
    y = np.empty(tokens * sum(group.rows), np.float32)
    run(
        pool,
        lib.pe_matmul_shared_input,
        f"matmul of {x.name}",
        group.pointers,
        len(group.rows),
        x.for_matrices(*group.matrices),
        as_output(y),
        keep=(x, group),
    )
    parts, start = [], 0
    for rows in group.rows:
        parts.append(y[start : start + tokens * rows].reshape(tokens, rows))
        start += tokens * rows
    return parts


# ---- elementwise -----------------------------------------------------------------------------


def exp(pool: Pool, x):
    return _each(lib.pe_exp, pool, x)


def sigmoid(pool: Pool, x):
    return _each(lib.pe_sigmoid, pool, x)


def silu(pool: Pool, x):
    return _each(lib.pe_silu, pool, x)


def softplus(pool: Pool, x):
    return _each(lib.pe_softplus, pool, x)


def _each(function, pool, x):
    """Correctly rounded, element by element; any shape."""
    y = np.empty_like(x)
    run(pool, function, "elementwise", as_input(x), x.size, as_output(y))
    return y


def add(pool: Pool, a, b):
    """a + b, of one shape."""
    want(a.shape == b.shape, "add: want equal shapes")
    y = np.empty_like(a)
    run(pool, lib.pe_add, "add", as_input(a), as_input(b), a.size, as_output(y))
    return y


def silu_mul(pool: Pool, gate, up):
    """silu(gate) * up, any shape."""
    want(gate.shape == up.shape, "silu_mul: want equal shapes")
    y = np.empty_like(gate)
    run(pool, lib.pe_silu_mul, "silu_mul", as_input(gate), as_input(up), gate.size, as_output(y))
    return y


def sigmoid_mul(pool: Pool, x, query_gate):
    """x [T, heads, n] * sigmoid(the second half of query_gate [T, heads, 2 n])."""
    tokens, heads, n = x.shape
    want(query_gate.shape == (tokens, heads, 2 * n), "sigmoid_mul: want [T, heads, 2 n]")
    y = np.empty_like(x)
    run(
        pool,
        lib.pe_sigmoid_mul,
        "sigmoid_mul",
        as_input(x),
        as_input(query_gate.reshape(-1)[n:]),
        2 * n,
        tokens * heads,
        n,
        as_output(y),
    )
    return y


def delta_gates(pool: Pool, a, b, neg_exp_a_log, dt_bias):
    """a, b [T, heads] -> beta, decay [T, heads]."""
    tokens, heads = a.shape
    beta, decay = np.empty_like(a), np.empty_like(a)
    run(
        pool,
        lib.pe_delta_gates,
        "delta_gates",
        as_input(a),
        as_input(b),
        as_input(neg_exp_a_log),
        as_input(dt_bias),
        tokens,
        heads,
        as_output(beta),
        as_output(decay),
    )
    return beta, decay


# ---- norms -----------------------------------------------------------------------------------


def rms_norm(pool: Pool, x, scale, eps: float):
    """x [T, n] -> [T, n]; scale = 1 + weight [n]."""
    tokens, n = x.shape
    want(scale.shape == (n,), f"rms_norm: want {n} weights, got {scale.shape}")
    y = np.empty_like(x)
    run(
        pool, lib.pe_rms_norm, "rms_norm", as_input(x), tokens, n, 1, n, n, as_input(scale), eps, as_output(y)
    )
    return y


def head_rms_norm(pool: Pool, x, n: int, scale, eps: float):
    """The first n entries of every head of x [T, heads, >= n] -> [T, heads, n]."""
    tokens, heads, width = x.shape
    want(n <= width and scale.shape == (n,), f"head_rms_norm: want {n} weights")
    y = np.empty((tokens, heads, n), np.float32)
    run(
        pool,
        lib.pe_rms_norm,
        "rms_norm",
        as_input(x),
        tokens,
        heads * width,
        heads,
        width,
        n,
        as_input(scale),
        eps,
        as_output(y),
    )
    return y


def rms_norm_gated(pool: Pool, x, z, weight, eps: float):
    """x, z [.., n], weight [n] -> shape of x."""
    n = x.shape[-1]
    want(x.shape == z.shape and weight.shape == (n,), "rms_norm_gated: want equal shapes")
    y = np.empty_like(x)
    run(
        pool,
        lib.pe_rms_norm_gated,
        "rms_norm_gated",
        as_input(x),
        as_input(z),
        x.size // n,
        n,
        as_input(weight),
        eps,
        as_output(y),
    )
    return y


def l2_norm(pool: Pool, x, start: int, heads: int, n: int, scale: float):
    """heads vectors of n, from column start of every row of x [T, width] -> [T, heads, n]."""
    tokens, width = x.shape
    want(start >= 0 and start + heads * n <= width, "l2_norm: want heads inside the row")
    y = np.empty((tokens, heads, n), np.float32)
    run(
        pool,
        lib.pe_l2_norm,
        "l2_norm",
        as_input(x.reshape(-1)[start:]),
        tokens,
        width,
        heads,
        n,
        scale,
        as_output(y),
    )
    return y


# ---- rotary positions ------------------------------------------------------------------------


def rope_table(start: int, tokens: int, inv_freq, out=None, *, scale: float = 1.0):
    """cos, sin [T, half] of positions start, start + 1, ...; out: such a pair to write to.

    scale: YaRN's attention factor; rounded to float32, it multiplies both in float32, as in Hugging Face.
    """
    half = inv_freq.size
    cos, sin = (np.empty((tokens, half), np.float32) for _ in range(2)) if out is None else out
    want_out(cos, (tokens, half))
    want_out(sin, (tokens, half))
    check_status(
        lib.pe_rope_table(start, tokens, as_input(inv_freq), half, as_output(cos), as_output(sin)),
        "rope_table",
    )
    if scale != 1:
        cos *= np.float32(scale)
        sin *= np.float32(scale)
    return cos, sin


def rope(pool: Pool, x, table) -> None:
    """Rotates x [T, heads, n] in place."""
    tokens, heads, n = x.shape
    cos, sin = table
    want(cos.shape[0] == tokens, "rope: want one row of the table per token")
    run(pool, lib.pe_rope, "rope", as_output(x), tokens, heads, n, cos.shape[1], as_input(cos), as_input(sin))


# ---- mixers ----------------------------------------------------------------------------------


def causal_conv1d(pool: Pool, x, weight, conv_state, out=None):
    """x [T, channels], weight [taps, channels] -> [T, channels], silu included; updates
    conv_state [taps - 1, channels].  out: an array to write to."""
    tokens, channels = x.shape
    taps = weight.shape[0]
    want(
        weight.shape == (taps, channels) and conv_state.shape == (taps - 1, channels),
        "causal_conv1d: want as many channels everywhere",
    )
    out = np.empty_like(x) if out is None else out
    want_out(out, x.shape)
    run(
        pool,
        lib.pe_causal_conv1d,
        "causal_conv1d",
        as_input(x),
        tokens,
        channels,
        as_input(weight),
        taps,
        as_output(conv_state),
        as_output(out),
    )
    return out


def delta_rule(
    pool: Pool, query, key, qkv, value_start: int, beta, decay, key_head, recurrent_state, out=None
):
    """query, key [T, key heads, dk]; the values of a token are qkv [T, width] from value_start on;
    beta, decay [T, value heads] -> [T, value heads, dv]; updates recurrent_state.  out: an array to
    write to."""
    tokens, key_heads, dk = key.shape
    heads, _, dv = recurrent_state.shape
    want(
        recurrent_state.shape[1] == dk
        and beta.shape == decay.shape == (tokens, heads)
        and qkv.shape[1] == value_start + heads * dv
        and key_head.shape == (heads,),
        "delta_rule: want shapes that fit the state",
    )
    shape = (tokens, heads, dv)
    out = np.empty(shape, np.float32) if out is None else out
    want_out(out, shape)
    run(
        pool,
        lib.pe_delta_rule,
        "delta_rule",
        as_input(query),
        as_input(key),
        as_input(qkv.reshape(-1)[value_start:]),
        qkv.shape[1],
        as_input(beta),
        as_input(decay),
        tokens,
        key_heads,
        heads,
        dk,
        dv,
        as_input(key_head, np.int32, "int32_t[]"),
        as_output(recurrent_state),
        as_output(out),
    )
    return out


def attention(pool: Pool, query, keys, values, scale: float, out=None, name: str = "attention"):
    """query [T, heads, n] over keys, values [start + T, kv heads, n] -> [T, heads, n].

    keys and values are both float32 or both float16, and lie alike: heads and positions may be at any
    distance, the n elements are next to each other.  out: an array to write to.
    """
    tokens, heads, n = query.shape
    positions, kv_heads, _ = keys.shape
    want(
        values.shape == keys.shape == (positions, kv_heads, n) and positions >= tokens,
        "attention: want a cache that holds the queries' own positions",
    )
    half = keys.dtype == np.float16
    item = 2 if half else 4
    want(
        keys.dtype == values.dtype
        and (half or keys.dtype == np.float32)
        and keys.strides == values.strides
        and (n == 1 or keys.strides[2] == item)
        and min(keys.strides) >= 0,
        "attention: want keys and values of one type and layout, a head's elements next to each other",
    )
    function, kind = (lib.pe_attention_f16, "uint16_t *") if half else (lib.pe_attention, "float *")
    out = np.empty_like(query) if out is None else out
    want_out(out, query.shape)
    run(
        pool,
        function,
        f"{name}: scores",
        as_input(query),
        ffi.cast(kind, keys.ctypes.data),
        ffi.cast(kind, values.ctypes.data),
        keys.strides[0] // item,
        keys.strides[1] // item,
        positions - tokens,
        tokens,
        heads,
        kv_heads,
        n,
        scale,
        as_output(out),
        keep=(keys, values),
    )
    return out


# ---- mixture of experts ----------------------------------------------------------------------


def router(pool: Pool, logits, top_k: int, name: str = "router logits"):
    """logits [T, experts] -> routing_weights float32, selected_experts int32, both [T, top_k]."""
    tokens, experts = logits.shape
    weights = np.empty((tokens, top_k), np.float32)
    selected = np.empty((tokens, top_k), np.int32)
    run(
        pool,
        lib.pe_router,
        name,
        as_input(logits),
        tokens,
        experts,
        top_k,
        as_output(weights),
        as_output(selected, "int32_t[]"),
    )
    return weights, selected


def routing_weights(pool: Pool, logits, selected_experts, name: str = "router logits"):
    """logits [T, experts], selected_experts int32 [T, top_k], chosen by another -> their weights float32
    [T, top_k].  InputError: a number that is no expert's."""
    tokens, experts = logits.shape
    top_k = selected_experts.shape[1]
    want(len(selected_experts) == tokens, f"{name}: want experts of {tokens} tokens")
    weights = np.empty((tokens, top_k), np.float32)
    run(
        pool,
        lib.pe_routing_weights,
        name,
        as_input(logits),
        tokens,
        experts,
        top_k,
        as_input(selected_experts, np.int32, "int32_t[]"),
        as_output(weights),
    )
    return weights


def experts(
    pool: Pool,
    weights: Experts,
    x: Activations,
    selected_experts,
    routing_weights,
    shared_expert_gate,
    trace: bool = False,
):
    """The sparse MoE block's output [T, hidden]; with trace also {name: array} of the steps inside.

    selected_experts, routing_weights [T, top_k]; shared_expert_gate [T, 1], before sigmoid.
    """
    tokens, hidden = x.x.shape
    y = np.empty((tokens, hidden), np.float32)
    inside, struct = {}, ffi.NULL
    if trace:
        inside = {
            "routed": np.empty_like(y),
            "shared": np.empty_like(y),
            "shared_gate": np.empty((tokens, weights.shared_ff), np.float32),
            "shared_up": np.empty((tokens, weights.shared_ff), np.float32),
        }
        struct = ffi.new("pe_experts_trace *", {k: as_output(v) for k, v in inside.items()})
    run(
        pool,
        lib.pe_experts,
        f"experts of {x.name}",
        weights.struct,
        x.for_matrices(*weights.inputs),
        as_input(selected_experts, np.int32, "int32_t[]"),
        as_input(routing_weights),
        selected_experts.shape[1],
        as_input(shared_expert_gate),
        as_output(y),
        struct,
        keep=(x, weights),
    )
    return (y, inside) if trace else y


# ---- the head, screened ------------------------------------------------------------------------


def screen_rows(pool: Pool, matrix: Matrix, start: int, stop: int, data, error, norm) -> None:
    """Writes rows [start, stop) of a float or Q8_0 matrix in a smaller form, and their bounds.

    data uint8 [rows, blocks * 22], Q5_0; error, norm float32 [rows]: arrays for all rows of the matrix.
    NonFiniteError: a weight that is not finite, or a row's norm of 2^60 or more.
    """
    want(0 <= start <= stop <= matrix.rows == len(data), "screen_rows: want rows of the matrix")
    for array, width in ((data, matrix.cols // lib.PE_BLOCK * 22), (error, None), (norm, None)):
        want(array.shape[1:] == (() if width is None else (width,)), "screen_rows: want shapes that fit")
    check_status(
        lib.pe_screen_rows(
            pool.pointer,
            matrix.struct,
            start,
            stop,
            as_output(data[start:stop], "uint8_t[]"),
            as_output(error[start:stop]),
            as_output(norm[start:stop]),
        ),
        "screen_rows",
    )


def screen(pool: Pool, y, error, norm, a: float, b: float, c: float, low: float):
    """y, error, norm float32 [rows] -> uint8 [rows]: whether y + (error * a + norm * b + c) >= low."""
    want(y.shape == error.shape == norm.shape, "screen: want equal shapes")
    keep = np.empty(y.shape, np.uint8)
    check_status(
        lib.pe_screen(
            pool.pointer,
            as_input(y),
            as_input(error),
            as_input(norm),
            y.size,
            a,
            b,
            c,
            low,
            as_output(keep, "uint8_t[]"),
        ),
        "screen",
    )
    return keep


# ---- soft labels -----------------------------------------------------------------------------


def top_k(pool: Pool, logits, k: int):
    """logits [T, vocab] -> ids int32 [T, k] of the greatest, falling, the lower id first among equals."""
    tokens, vocab = logits.shape
    ids = np.empty((tokens, k), np.int32)
    run(pool, lib.pe_top_k, "logits", as_input(logits), tokens, vocab, k, as_output(ids, "int32_t[]"))
    return ids


def exp_sums(pool: Pool, logits, ids):
    """Sums of exp(logit - the row's greatest): of all ids, and of all but `ids` int32 [T, n].

    -> total, rest: float64 [T].
    """
    tokens, vocab = logits.shape
    total, rest = np.empty(tokens), np.empty(tokens)
    run(
        pool,
        lib.pe_exp_sums,
        "logits",
        as_input(logits),
        tokens,
        vocab,
        as_input(ids, np.int32, "int32_t[]"),
        ids.shape[1],
        as_output(total, "double[]"),
        as_output(rest, "double[]"),
    )
    return total, rest


def draw(pool: Pool, logits, power: float, uniforms):
    """Ids drawn in proportion to exp(power * (logit - the row's greatest)); uniforms float64 [T, draws].

    -> ids int32 [T, draws], total float64 [T], the sum of what they are in proportion to.
    """
    tokens, vocab = logits.shape
    ids, total = np.empty(uniforms.shape, np.int32), np.empty(tokens)
    run(
        pool,
        lib.pe_draw,
        "logits",
        as_input(logits),
        tokens,
        vocab,
        power,
        as_input(uniforms, np.float64, "double[]"),
        uniforms.shape[1],
        as_output(ids, "int32_t[]"),
        as_output(total, "double[]"),
    )
    return ids, total


# ---- scratch ---------------------------------------------------------------------------------


def experts_scratch_bytes(
    tokens: int, hidden: int, num_experts: int, top_k: int, ff: int, shared_ff: int
) -> int:
    """Memory of the pool that `experts` needs; the pool keeps it."""
    return lib.pe_experts_scratch_bytes(tokens, hidden, num_experts, top_k, ff, shared_ff)


def attention_scratch_bytes(positions: int, heads: int, kv_heads: int, n: int) -> int:
    """The most memory that each thread takes in `attention`, for that many positions of a cache."""
    return lib.pe_attention_scratch_bytes(positions, heads, kv_heads, n)


def attention_shared_bytes(threads: int, positions: int, heads: int, kv_heads: int) -> int:
    """Memory of the pool that `attention` needs for a token at that many positions; the pool keeps it."""
    return lib.pe_attention_shared_bytes(threads, positions, heads, kv_heads)


def router_scratch_bytes(experts: int) -> int:
    """Memory that each thread takes in `router`."""
    return lib.pe_router_scratch_bytes(experts)


def labels_scratch_bytes(vocab: int) -> int:
    """The most memory that each thread takes in `exp_sums` and `draw`."""
    return lib.pe_labels_scratch_bytes(vocab)


# ---- quantizing weights ----------------------------------------------------------------------


def quantize_weights(
    pool: Pool,
    matrix: Matrix,
    row_order,
    col_order,
    start: int,
    stop: int,
    largest: int,
    group_size: int,
    scale: str,
):
    """Rows [start, stop) of a single float or Q8_0 matrix -> codes int8 [rows, cols], scales
    float16 [rows, n_groups].

    row_order, col_order: int64 or None: row r is stored row row_order[r].  largest: 127 or 7.
    scale: a key of METHODS.  NonFiniteError: a NaN, an infinity, or a scale beyond float16.
    """
    want(0 <= start <= stop <= matrix.rows, "quantize_weights: want rows of the matrix")
    codes = np.empty((stop - start, matrix.cols), np.int8)
    scales = np.empty((stop - start, -(-matrix.cols // group_size)), np.float16)
    method = getattr(lib, f"PE_SCALE_{scale.upper()}")
    check_status(
        lib.pe_quantize_weights(
            pool.pointer,
            matrix.struct,
            0,
            _order(row_order, matrix.rows),
            _order(col_order, matrix.cols),
            start,
            stop,
            largest,
            group_size,
            method,
            as_output(codes, "int8_t[]"),
            as_output(scales, "uint16_t[]"),
        ),
        "quantize_weights",
    )
    return codes, scales


def pack_int4(pool: Pool, codes):
    """`layout.pack_int4` of int8 codes [rows, cols], cols even -> uint8 [rows, cols / 2]."""
    rows, cols = codes.shape
    want(cols % 2 == 0, f"pack_int4: want an even number of columns, got {cols}")
    packed = np.empty((rows, cols // 2), np.uint8)
    check_status(
        lib.pe_pack_int4(
            pool.pointer, as_input(codes, np.int8, "int8_t[]"), packed.size, as_output(packed, "uint8_t[]")
        ),
        "pack_int4",
    )
    return packed


def _order(order, n):
    if order is None:
        return ffi.NULL
    want(order.shape == (n,) and order.min() >= 0 and order.max() < n, "order: want a permutation")
    return as_input(order, np.int64, "int64_t[]")
