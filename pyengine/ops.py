"""One checked wrapper per operation of the C core: check, allocate, call, check, return.

Contracts (equations, orders of summation, rounding) stand in csrc/pyengine.h.  Arrays are float32
and C-contiguous unless a docstring says otherwise; T is the number of tokens.
"""

from __future__ import annotations

import contextlib
import os
import threading

import numpy as np

from ._core import ffi, lib
from .errors import InputError, PyengineError

GROUP = lib.PE_GROUP
TYPES = {"F32": lib.PE_F32, "F16": lib.PE_F16, "BF16": lib.PE_BF16, "Q8_0": lib.PE_Q8_0,
         "INT8": lib.PE_INT8, "INT4": lib.PE_INT4}
DENSE = ("F32", "F16", "BF16")


class NonFiniteError(PyengineError):
    """A NaN or an infinity turned up in the forward pass."""


# ---- instruction sets and threads ------------------------------------------------------------


def available_isas() -> list[str]:
    """The instruction sets of this build and processor, lowest first."""
    names, i = [], 0
    while lib.pe_isa_name(i) != ffi.NULL:
        names.append(ffi.string(lib.pe_isa_name(i)).decode())
        i += 1
    return names


def active_isa() -> str:
    return ffi.string(lib.pe_isa_active()).decode()


def select_isa(name: str) -> None:
    """Use that level.  InputError if this build or processor lacks it."""
    if lib.pe_isa_select(name.encode()) != lib.PE_OK:
        raise InputError(f"PYENGINE_ISA: want one of {', '.join(available_isas())}, got {name!r}")


def _select_from_environment() -> None:
    """PYENGINE_ISA=scalar|avx2|avx512vnni|neon|...: a level no higher than that one."""
    name = os.environ.get("PYENGINE_ISA")
    if name:
        select_isa(name)


_select_from_environment()


def physical_cores() -> int:
    """Processors that this process may use, counting the threads of one core once."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                cores.add(file.read())
        except OSError:
            cores.add(cpu)
    return len(cores) or 1


class Pool:
    """Threads of the C core; freed with the object."""

    def __init__(self, threads: int | None = None, pin: bool = False):
        threads = physical_cores() if threads is None else threads
        if not 1 <= threads <= 1024:
            raise InputError(f"threads: want 1 to 1024, got {threads}")
        pointer = lib.pe_pool_new(threads, int(pin))
        if pointer == ffi.NULL:
            raise PyengineError(f"threads: {threads} threads could not be started")
        self.pointer = ffi.gc(pointer, lib.pe_pool_free)
        self.threads = threads
        self.lock = threading.Lock()  # a pool serves one caller at a time
        self.tape = None  # a `Tape` that notes the calls down, while there is one

    @property
    def scratch_bytes(self) -> int:
        return lib.pe_pool_scratch_bytes(self.pointer)


# ---- arguments -------------------------------------------------------------------------------


def _in(array, dtype=np.float32, kind="float[]"):
    if array.dtype != dtype:
        raise TypeError(f"want {np.dtype(dtype)}, got {array.dtype}")
    return ffi.from_buffer(kind, array, require_writable=False)


def _out(array, kind="float[]"):
    return ffi.from_buffer(kind, array, require_writable=True)


_REASONS = {
    lib.PE_ERROR_NONFINITE: (NonFiniteError, "want finite values, got NaN or infinity"),
    lib.PE_ERROR_ARGUMENT: (InputError, "a size or type that the operation excludes"),
    lib.PE_ERROR_MEMORY: (MemoryError, "no memory for scratch"),
}


def _check(status, what):
    if status != lib.PE_OK:
        kind, reason = _REASONS[status]
        raise kind(f"{what}: {reason}")


def _run(pool: Pool, function, what: str, *arguments, keep=()) -> None:
    """An operation of the C core on the pool; noted down if the pool's calls are being recorded.

    The arguments hold the arrays that `_in` and `_out` were given; keep holds what structs point to.
    """
    _check(function(pool.pointer, *arguments), what)
    if pool.tape is not None:
        pool.tape.add_call(function, what, arguments, keep)


def _want(condition, what):
    if not condition:
        raise InputError(what)


def _want_out(out, shape) -> None:
    _want(out.shape == shape and out.dtype == np.float32, f"out: want float32 {shape}, got {out.dtype} "
          f"{out.shape}")


# ---- recording -------------------------------------------------------------------------------


class Tape:
    """Calls of the C core as they were made, to be made again on the same arrays: one token's are the
    last token's, but for what stands in the arrays.

        with tape.recording(pool):
            ...                     # operations of this module
            by_python(pool, f)      # what is no such operation, or wants other arrays each time
        tape.replay(pool)           # as often as wanted; the results are in the same arrays

    What NumPy computes in between is not recorded.  The tape holds the arrays.
    Errors: InputError at the end of the recording for an operation that csrc/replay.c does not list.
    """

    def __init__(self):
        self._parts: list = []  # in order: a function, or (calls, what each is, what they point to)
        self._calls: list = []  # since the last part: (function, what, arguments, keep)

    @contextlib.contextmanager
    def recording(self, pool: Pool):
        pool.tape = self
        try:
            yield
        finally:
            pool.tape = None
        self._end_calls()

    def add_call(self, function, what: str, arguments: tuple, keep) -> None:
        self._calls.append((function, what, arguments, keep))

    def add_function(self, function) -> None:
        self._end_calls()
        self._parts.append(function)

    def replay(self, pool: Pool) -> None:
        failed = ffi.new("int64_t *")
        for part in self._parts:
            if callable(part):
                part()
                continue
            calls, whats, _ = part
            status = lib.pe_replay(pool.pointer, calls, len(calls), failed)
            if status != lib.PE_OK:
                _check(status, whats[failed[0]])

    def _end_calls(self) -> None:
        if not self._calls:
            return
        calls, recorded, self._calls = ffi.new("pe_call[]", len(self._calls)), self._calls, []
        for call, (function, _, arguments, _) in zip(calls, recorded):
            _fill_call(call, function, arguments)
        self._parts.append((calls, [what for _, what, *_ in recorded], recorded))


def _fill_call(call, function, arguments) -> None:
    call.operation = lib.pe_operation(function.__name__.encode())
    _want(call.operation >= 0, f"{function.__name__}: cannot be replayed")
    kinds = ffi.typeof(function).args[1:]  # without the pool
    _want(len(kinds) <= lib.PE_CALL_WORDS, f"{function.__name__}: too many arguments for a call")
    for word, kind, value in zip(call.words, kinds, arguments):
        if kind.kind == "pointer":
            word.p = ffi.cast("void *", value)
        elif kind.cname in ("float", "double"):
            word.d = value
        else:
            word.i = value


def by_python(pool: Pool, function) -> None:
    """Call function(), whose operations are not recorded; it is called again in every replay."""
    tape, pool.tape = pool.tape, None
    try:
        function()
    finally:
        pool.tape = tape
    if tape is not None:
        tape.add_function(function)


# ---- matrices --------------------------------------------------------------------------------


class Matrix:
    """A stored weight matrix, or a stack of them, as the C core sees it; holds on to its arrays.

    kind    F32, F16, BF16, Q8_0, INT8 or INT4
    data    [rows, width] or [experts, rows, width]; rows contiguous, experts at any distance
    scales  INT8, INT4: float16 [n_groups, rows] or [experts, n_groups, rows], rows contiguous
    """

    def __init__(self, kind: str, cols: int, data: np.ndarray, scales: np.ndarray | None = None):
        *stack, rows, _ = data.shape
        _want((data[0] if stack else data).flags.c_contiguous, "matrix: want contiguous rows")
        self.kind, self.rows, self.cols = kind, rows, cols
        self.experts = stack[0] if stack else 1
        self.arrays = (data, scales)
        fields = {"type": TYPES[kind], "rows": rows, "cols": cols, "data": _address(data),
                  "expert_stride": data.strides[0] if stack else 0}
        if scales is not None:
            _want(scales.strides[-1] == 2 and scales.shape[-1] == rows
                  and scales.shape[-2] == -(-cols // GROUP), "matrix: want scales [n_groups, rows]")
            fields |= {"scales": ffi.cast("uint16_t *", _address(scales)),
                       "scale_ld": scales.strides[-2] // 2,
                       "scale_expert_stride": scales.strides[0] // 2 if stack else 0}
        self.struct = ffi.new("pe_matrix *", fields)

    @property
    def dense(self) -> bool:
        return self.kind in DENSE


def _address(array):
    return ffi.cast("void *", array.__array_interface__["data"][0])


class Activations:
    """x [T, cols] as a matmul's input; quantised once, when a matrix first wants it.

    Errors: NonFiniteError naming `name`.
    """

    def __init__(self, pool: Pool, x: np.ndarray, name: str = "input"):
        self.pool, self.x, self.name = pool, x, name
        self.q = self.scales = None
        tokens, cols = x.shape
        self.struct = ffi.new("pe_activations *", {"tokens": tokens, "cols": cols, "x": _in(x)})

    def quantize(self) -> None:
        if self.q is not None:
            return
        self.q, self.scales = quantize_activations(self.pool, self.x, self.name)
        self.struct.q, self.struct.scales = _in(self.q, np.int16, "int16_t[]"), _in(self.scales)

    def for_matrices(self, *matrices: Matrix):
        """The C struct, with the forms that these matrices read."""
        if not all(m.dense for m in matrices):
            self.quantize()
        return self.struct


def quantize_activations(pool: Pool, x: np.ndarray, name: str = "input"):
    """x [T, cols] -> q int16 [T, n_groups * 128] zero-padded, scales [T, n_groups]."""
    tokens, cols = x.shape
    groups = -(-cols // GROUP)
    q, scales = np.empty((tokens, groups * GROUP), np.int16), np.empty((tokens, groups), np.float32)
    _run(pool, lib.pe_quantize_activations, name, _in(x), tokens, cols, _out(q, "int16_t[]"),
         _out(scales))
    return q, scales


def matmul(pool: Pool, matrix: Matrix, x: Activations, expert: int = 0) -> np.ndarray:
    """x [T, cols] times one matrix [rows, cols], transposed -> [T, rows]."""
    _want(0 <= expert < matrix.experts, f"expert: want below {matrix.experts}, got {expert}")
    y = np.empty((x.x.shape[0], matrix.rows), np.float32)
    _run(pool, lib.pe_matmul, f"matmul of {x.name}", matrix.struct, expert, x.for_matrices(matrix),
         _out(y), matrix.rows, keep=(x, matrix))
    return y


class Matrices:
    """Up to PE_EACH single matrices of as many columns, which are multiplied as one piece of work."""

    def __init__(self, *matrices: Matrix):
        _want(len(matrices) <= lib.PE_EACH, f"matrices: want at most {lib.PE_EACH}")
        self.matrices = matrices
        self.pointers = ffi.new("pe_matrix *[]", [m.struct for m in matrices])
        self.rows = [m.rows for m in matrices]


def matmul_each(pool: Pool, group: Matrices, x: Activations) -> list[np.ndarray]:
    """matmul with every matrix of the group: x [T, cols] -> [T, rows] of each."""
    tokens = x.x.shape[0]
    y = np.empty(tokens * sum(group.rows), np.float32)
    _run(pool, lib.pe_matmul_each, f"matmul of {x.name}", group.pointers, len(group.rows),
         x.for_matrices(*group.matrices), _out(y), keep=(x, group))
    parts, start = [], 0
    for rows in group.rows:
        parts.append(y[start:start + tokens * rows].reshape(tokens, rows))
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
    _run(pool, function, "elementwise", _in(x), x.size, _out(y))
    return y


def add(pool: Pool, a, b):
    """a + b, of one shape."""
    _want(a.shape == b.shape, "add: want equal shapes")
    y = np.empty_like(a)
    _run(pool, lib.pe_add, "add", _in(a), _in(b), a.size, _out(y))
    return y


def silu_mul(pool: Pool, gate, up):
    """silu(gate) * up, any shape."""
    _want(gate.shape == up.shape, "silu_mul: want equal shapes")
    y = np.empty_like(gate)
    _run(pool, lib.pe_silu_mul, "silu_mul", _in(gate), _in(up), gate.size, _out(y))
    return y


def sigmoid_mul(pool: Pool, x, query_gate):
    """x [T, heads, n] * sigmoid(the second half of query_gate [T, heads, 2 n])."""
    tokens, heads, n = x.shape
    _want(query_gate.shape == (tokens, heads, 2 * n), "sigmoid_mul: want [T, heads, 2 n]")
    y = np.empty_like(x)
    _run(pool, lib.pe_sigmoid_mul, "sigmoid_mul", _in(x), _in(query_gate.reshape(-1)[n:]), 2 * n,
         tokens * heads, n, _out(y))
    return y


def delta_gates(pool: Pool, a, b, neg_exp_a_log, dt_bias):
    """a, b [T, heads] -> beta, decay [T, heads]."""
    tokens, heads = a.shape
    beta, decay = np.empty_like(a), np.empty_like(a)
    _run(pool, lib.pe_delta_gates, "delta_gates", _in(a), _in(b), _in(neg_exp_a_log), _in(dt_bias),
         tokens, heads, _out(beta), _out(decay))
    return beta, decay


# ---- norms -----------------------------------------------------------------------------------


def rms_norm(pool: Pool, x, scale, eps: float):
    """x [T, n] -> [T, n]; scale = 1 + weight [n]."""
    tokens, n = x.shape
    _want(scale.shape == (n,), f"rms_norm: want {n} weights, got {scale.shape}")
    y = np.empty_like(x)
    _run(pool, lib.pe_rms_norm, "rms_norm", _in(x), tokens, n, 1, n, n, _in(scale), eps, _out(y))
    return y


def head_rms_norm(pool: Pool, x, n: int, scale, eps: float):
    """The first n entries of every head of x [T, heads, >= n] -> [T, heads, n]."""
    tokens, heads, width = x.shape
    _want(n <= width and scale.shape == (n,), f"head_rms_norm: want {n} weights")
    y = np.empty((tokens, heads, n), np.float32)
    _run(pool, lib.pe_rms_norm, "rms_norm", _in(x), tokens, heads * width, heads, width, n,
         _in(scale), eps, _out(y))
    return y


def rms_norm_gated(pool: Pool, x, z, weight, eps: float):
    """x, z [.., n], weight [n] -> shape of x."""
    n = x.shape[-1]
    _want(x.shape == z.shape and weight.shape == (n,), "rms_norm_gated: want equal shapes")
    y = np.empty_like(x)
    _run(pool, lib.pe_rms_norm_gated, "rms_norm_gated", _in(x), _in(z), x.size // n, n,
         _in(weight), eps, _out(y))
    return y


def l2_norm(pool: Pool, x, start: int, heads: int, n: int, scale: float):
    """heads vectors of n, from column start of every row of x [T, width] -> [T, heads, n]."""
    tokens, width = x.shape
    _want(0 <= start and start + heads * n <= width, "l2_norm: want heads inside the row")
    y = np.empty((tokens, heads, n), np.float32)
    _run(pool, lib.pe_l2_norm, "l2_norm", _in(x.reshape(-1)[start:]), tokens, width, heads, n, scale,
         _out(y))
    return y


# ---- rotary positions ------------------------------------------------------------------------


def rope_table(start: int, tokens: int, inv_freq, out=None):
    """cos, sin [T, half] of positions start, start + 1, ...; out: such a pair to write to."""
    half = inv_freq.size
    cos, sin = (np.empty((tokens, half), np.float32) for _ in range(2)) if out is None else out
    _want_out(cos, (tokens, half))
    _want_out(sin, (tokens, half))
    _check(lib.pe_rope_table(start, tokens, _in(inv_freq), half, _out(cos), _out(sin)),
           "rope_table")
    return cos, sin


def rope(pool: Pool, x, table) -> None:
    """Rotates x [T, heads, n] in place."""
    tokens, heads, n = x.shape
    cos, sin = table
    _want(cos.shape[0] == tokens, "rope: want one row of the table per token")
    _run(pool, lib.pe_rope, "rope", _out(x), tokens, heads, n, cos.shape[1], _in(cos), _in(sin))


# ---- mixers ----------------------------------------------------------------------------------


def causal_conv1d(pool: Pool, x, weight, conv_state):
    """x [T, channels], weight [taps, channels] -> [T, channels], silu included; updates
    conv_state [taps - 1, channels]."""
    tokens, channels = x.shape
    taps = weight.shape[0]
    _want(weight.shape == (taps, channels) and conv_state.shape == (taps - 1, channels),
          "causal_conv1d: want as many channels everywhere")
    y = np.empty_like(x)
    _run(pool, lib.pe_causal_conv1d, "causal_conv1d", _in(x), tokens, channels, _in(weight), taps,
         _out(conv_state), _out(y))
    return y


def delta_rule(pool: Pool, query, key, qkv, value_start: int, beta, decay, key_head,
               recurrent_state):
    """query, key [T, key heads, dk]; the values of a token are qkv [T, width] from value_start on;
    beta, decay [T, value heads] -> [T, value heads, dv]; updates recurrent_state."""
    tokens, key_heads, dk = key.shape
    heads, _, dv = recurrent_state.shape
    _want(recurrent_state.shape[1] == dk and beta.shape == decay.shape == (tokens, heads)
          and qkv.shape[1] == value_start + heads * dv and key_head.shape == (heads,),
          "delta_rule: want shapes that fit the state")
    out = np.empty((tokens, heads, dv), np.float32)
    _run(pool, lib.pe_delta_rule, "delta_rule", _in(query), _in(key),
         _in(qkv.reshape(-1)[value_start:]), qkv.shape[1], _in(beta), _in(decay), tokens, key_heads,
         heads, dk, dv, _in(key_head, np.int32, "int32_t[]"), _out(recurrent_state), _out(out))
    return out


def attention(pool: Pool, query, keys, values, scale: float, out=None, name: str = "attention"):
    """query [T, heads, n] over keys, values [start + T, kv heads, n] -> [T, heads, n].

    keys and values are both float32 or both float16; out: an array to write to.
    """
    tokens, heads, n = query.shape
    positions, kv_heads, _ = keys.shape
    _want(values.shape == keys.shape == (positions, kv_heads, n) and positions >= tokens,
          "attention: want a cache that holds the queries' own positions")
    if keys.dtype == np.float16:
        function, form = lib.pe_attention_f16, (np.float16, "uint16_t[]")
    else:
        function, form = lib.pe_attention, (np.float32, "float[]")
    out = np.empty_like(query) if out is None else out
    _want_out(out, query.shape)
    _run(pool, function, f"{name}: scores", _in(query), _in(keys, *form), _in(values, *form),
         positions - tokens, tokens, heads, kv_heads, n, scale, _out(out))
    return out


# ---- mixture of experts ----------------------------------------------------------------------


def router(pool: Pool, logits, top_k: int, name: str = "router logits"):
    """logits [T, experts] -> routing_weights float32, selected_experts int32, both [T, top_k]."""
    tokens, experts = logits.shape
    weights = np.empty((tokens, top_k), np.float32)
    selected = np.empty((tokens, top_k), np.int32)
    _run(pool, lib.pe_router, name, _in(logits), tokens, experts, top_k, _out(weights),
         _out(selected, "int32_t[]"))
    return weights, selected


class Experts:
    """The matrices of a sparse MoE block: routed stacks, and the shared expert."""

    def __init__(self, gate, up, down, shared_gate, shared_up, shared_down):
        self.matrices = (gate, up, down, shared_gate, shared_up, shared_down)
        self.struct = ffi.new("pe_experts_weights *", {"num_experts": gate.experts})
        for name, matrix in zip(("gate", "up", "down", "shared_gate", "shared_up", "shared_down"),
                                self.matrices):
            setattr(self.struct, name, matrix.struct[0])
        self.inputs = (gate, up, shared_gate, shared_up)
        self.shared_ff = shared_gate.rows


def experts(pool: Pool, weights: Experts, x: Activations, selected_experts, routing_weights,
            shared_expert_gate, trace: bool = False):
    """The sparse MoE block's output [T, hidden]; with trace also {name: array} of what lies inside.

    selected_experts, routing_weights [T, top_k]; shared_expert_gate [T, 1], before sigmoid.
    """
    tokens, hidden = x.x.shape
    y = np.empty((tokens, hidden), np.float32)
    inside, struct = {}, ffi.NULL
    if trace:
        inside = {"routed": np.empty_like(y), "shared": np.empty_like(y),
                  "shared_gate": np.empty((tokens, weights.shared_ff), np.float32),
                  "shared_up": np.empty((tokens, weights.shared_ff), np.float32)}
        struct = ffi.new("pe_experts_trace *", {k: _out(v) for k, v in inside.items()})
    _run(pool, lib.pe_experts, f"experts of {x.name}", weights.struct,
         x.for_matrices(*weights.inputs), _in(selected_experts, np.int32, "int32_t[]"),
         _in(routing_weights), selected_experts.shape[1], _in(shared_expert_gate), _out(y), struct,
         keep=(x, weights))
    return (y, inside) if trace else y


# ---- quantizing weights ----------------------------------------------------------------------


def quantize_weights(pool: Pool, matrix: Matrix, row_order, col_order, start: int, stop: int,
                     largest: int, group_size: int, scale: str):
    """Rows [start, stop) of a single float or Q8_0 matrix -> codes int8 [rows, cols], scales
    float16 [rows, n_groups].

    row_order, col_order: int64 or None: row r is stored row row_order[r].  largest: 127 or 7.
    scale: "absmax" or "mse".  NonFiniteError: a NaN, an infinity, or a scale beyond float16.
    """
    _want(0 <= start <= stop <= matrix.rows, "quantize_weights: want rows of the matrix")
    codes = np.empty((stop - start, matrix.cols), np.int8)
    scales = np.empty((stop - start, -(-matrix.cols // group_size)), np.float16)
    method = {"absmax": lib.PE_SCALE_ABSMAX, "mse": lib.PE_SCALE_MSE}[scale]
    _check(lib.pe_quantize_weights(pool.pointer, matrix.struct, 0, _order(row_order, matrix.rows),
                                   _order(col_order, matrix.cols), start, stop, largest, group_size,
                                   method, _out(codes, "int8_t[]"), _out(scales, "uint16_t[]")),
           "quantize_weights")
    return codes, scales


def pack_int4(pool: Pool, codes):
    """`codes.pack_int4` of int8 codes [rows, cols], cols even -> uint8 [rows, cols / 2]."""
    rows, cols = codes.shape
    _want(cols % 2 == 0, f"pack_int4: want an even number of columns, got {cols}")
    packed = np.empty((rows, cols // 2), np.uint8)
    _check(lib.pe_pack_int4(pool.pointer, _in(codes, np.int8, "int8_t[]"), packed.size,
                            _out(packed, "uint8_t[]")), "pack_int4")
    return packed


def _order(order, n):
    if order is None:
        return ffi.NULL
    _want(order.shape == (n,) and order.min() >= 0 and order.max() < n, "order: want a permutation")
    return _in(order, np.int64, "int64_t[]")
