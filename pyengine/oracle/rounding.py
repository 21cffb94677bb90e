"""The reference, computed as a narrower dtype would: what rounding alone does.

Every operation of `reference.OPERATIONS` takes float32, computes in float32, and rounds its result to
the dtype; weights and embeddings are rounded to it too.  Sums over a matrix's columns are made in one
of several orders, and the delta rule token by token or in chunks, as prefills do.  That is how
implementations in 16 bits compute: norms, softmax and the delta rule wider inside, results narrow.
"""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np

from ..decoder.state import State
from ..reference import ReferenceModel

ORDERS = 4  # summation orders that a spread is taken over
SEED = 1729
_RUN = 8  # columns summed at once by those orders that go one after another
INT8_BLOCK = 32  # activations a scale, as llama.cpp's Q8_0


def to_float32(x):
    return np.asarray(x, np.float32)


def to_bfloat16(x):
    """float -> the nearest bfloat16, ties to even, as float32.  NaN stays one."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    nearest = ((bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), x, nearest)


def to_float16(x):
    return np.asarray(x, np.float16).astype(np.float32)


def to_int8_and_back(x):
    """[T, columns] in blocks of 32, each with a float16 scale of largest / 127, as llama.cpp's Q8_0."""
    rows, columns = x.shape
    blocks = np.zeros((rows, -(-columns // INT8_BLOCK), INT8_BLOCK), np.float32)
    blocks.reshape(rows, -1)[:, :columns] = x
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks / np.where(scale == 0, np.float32(1), scale))
    return (codes * to_float16(scale)).reshape(rows, -1)[:, :columns]


# dtype: (what results are rounded to, what is done to the left side of a matrix product, the smallest
# relative step of a stored value)
DTYPES = {
    "float32": (to_float32, None, 2.0**-24),
    "bfloat16": (to_bfloat16, None, 2.0**-9),
    "float16": (to_float16, None, 2.0**-12),
    "int8-activations": (to_float32, to_int8_and_back, 2.0**-24),
}


def rounded_model(model: ReferenceModel, dtype: str, order: int) -> ReferenceModel:
    """The model in DTYPES[dtype]; order 0 to ORDERS - 1, of the sums.  Its state is float32."""
    round_, inputs, _ = DTYPES[dtype]
    twin = copy.copy(model)
    operations = {name: _rounded(function, round_) for name, function in vars(model.op).items()}
    operations["linear"] = _rounded(_linear(order, inputs), round_)
    if order % 2:
        sums = (_sums_forward, _sums_backward)[order // 2]
        operations["delta_rule"] = _rounded(partial(chunked_delta_rule, sums=sums), round_)
    operations["attention_mix"] = _rounded(_linear(order, None, transposed=True), round_)
    twin.op = SimpleNamespace(**operations)
    twin.weight = lambda name, expert=None: round_(model.weight(name, expert))
    twin.embed = lambda ids: round_(model.embed(ids))
    twin.new_state = lambda: State(model.config, np.float32)
    return twin


def _rounded(function, round_):
    def operation(*arguments):
        result = function(*(_narrow(a) for a in arguments))
        if isinstance(result, (list, tuple)):
            return [_result(part, round_) for part in result]
        return _result(result, round_)

    return operation


def _narrow(argument):
    """float arrays as float32 (a float32 state stays the same array); others as they are."""
    if isinstance(argument, np.ndarray) and argument.dtype.kind == "f":
        return np.asarray(argument, np.float32)
    return argument


def _result(value, round_):
    return round_(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def _linear(order, inputs, transposed=False):
    """x [T, columns] by weight [rows, columns] -> [T, rows], summed in float32 in that order."""

    def linear(x, weight):
        columns = _columns(order, x.shape[1])
        x, weight = x[:, columns], (weight.T if transposed else weight)[:, columns]
        x = x if inputs is None else inputs(x)
        if order == 0:
            return x @ weight.T
        total = np.zeros((len(x), len(weight)), np.float32)
        for start in range(0, x.shape[1], _RUN):
            total += x[:, start:start + _RUN] @ weight[:, start:start + _RUN].T
        return total

    return linear


def _columns(order, count):
    """As they are, as they are, the last first, shuffled."""
    if order < 2:
        return slice(None)
    if order == 2:
        return slice(None, None, -1)
    return np.random.default_rng([SEED, order]).permutation(count)


def _sums_forward(log_decay):
    return np.cumsum(log_decay, axis=0)


def _sums_backward(log_decay):
    """The same sums, made from the last: their rounding is as large as the chunk's whole decay."""
    later = np.cumsum(log_decay[:0:-1], axis=0)[::-1]
    return log_decay.sum(axis=0) - np.concatenate([later, np.zeros_like(log_decay[:1])])


def chunked_delta_rule(query, key, value, beta, log_decay, recurrent_state, sums=_sums_forward,
                       chunk=64):
    """reference.delta_rule, chunk by chunk: a triangular system in place of the tokens of a chunk.

    With G[t] the sum of log_decay up to t and D[t, s] = exp(G[t] - G[s]) for s <= t, the updates U of a
    chunk obey U[t] = beta[t] (value[t] - exp(G[t]) state key[t] - sum over s < t of D[t, s]
    (key[t] key[s]) U[s]).
    """
    out = np.empty_like(value)
    for start in range(0, len(query), chunk):
        part = slice(start, start + chunk)
        # [value heads, C, n]
        q, k, v = (np.moveaxis(x[part], 1, 0) for x in (query, key, value))
        b, total = beta[part].T[..., None], sums(log_decay[part]).T[..., None]
        lower = np.tril(np.ones((q.shape[1],) * 2, bool))
        decay = np.exp(np.where(lower, total - np.swapaxes(total, 1, 2), -np.inf))
        system = np.where(lower, b * (k @ np.swapaxes(k, 1, 2)) * decay, 0)
        system[:, np.arange(q.shape[1]), np.arange(q.shape[1])] = 1
        update = np.linalg.solve(system, b * (v - np.exp(total) * (k @ recurrent_state)))
        out[part] = np.moveaxis(np.exp(total) * (q @ recurrent_state)
                                + (q @ np.swapaxes(k, 1, 2) * decay) @ update, 0, 1)
        last = total[:, -1:]
        recurrent_state *= np.exp(last)
        recurrent_state += np.swapaxes(k * np.exp(last - total), 1, 2) @ update
    return out
