"""The reference, computed in a narrower arithmetic: the effect of rounding alone.

Every operation of `reference.OPERATIONS` takes float32, computes in float32, and rounds its result to
the dtype; weights and embeddings are rounded to it too.  Sums over a matrix's columns use one of several
orders.  The delta rule runs token by token, or in chunks, as prefills do.  Implementations in 16 bits compute
in this way: norms, softmax and the delta rule in float32 inside, their results in 16 bits.

An arithmetic has up to four parts, joined by `+`: the dtype of results (float32 where none is named), the
format of weights, that of a product's left side, that of what is kept between two tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np

from ..decoder.state import State
from ..errors import InputError, quote
from ..reference import ReferenceModel
from ..seed import SEED
from .formats import to_bfloat16, to_float16, to_float32, to_int8_and_back
from .quantized import WEIGHTS, narrowed_weight, to_fp8_rows_and_back

ORDERS = 4  # summation orders that a spread is taken over
CHUNK = 64  # tokens that a prefill takes at once
_RUN = 8  # columns summed at once by those orders that go one after another

# {dtype of results: (what rounds to it, the smallest relative step of a stored value)}
RESULTS = {
    "float32": (to_float32, 2.0**-24),
    "bfloat16": (to_bfloat16, 2.0**-9),
    "float16": (to_float16, 2.0**-12),
}
# What is done to the left side of a matrix product.
INPUTS = {"int8-activations": to_int8_and_back, "fp8-activations": to_fp8_rows_and_back}
# What recurrent and convolution states, keys and values are kept in.
STATES = {"bfloat16-state": to_bfloat16}
PARTS = (*RESULTS, *INPUTS, *WEIGHTS, *STATES)
# The arithmetics that a candidate is tried with where none was asked for.
DTYPES = ("float32", "bfloat16", "float16", "int8-activations")


@dataclass(frozen=True)
class Arithmetic:
    """The parts, by their names; None: nothing is narrowed there."""

    results: str = "float32"
    inputs: str | None = None
    weights: str | None = None
    state: str | None = None

    @classmethod
    def named(cls, name: str) -> Arithmetic:
        """Of `fp8+fp8-activations+bfloat16`, say.  Errors: InputError."""
        parts = {}
        for part in name.split("+"):
            field = next((field for field, names in _FIELDS.items() if part in names), None)
            if field is None or field in parts:
                raise InputError(
                    f"budget: want {', '.join(PARTS)}, or one of each kind joined by +, got {quote(name)}"
                )
            parts[field] = part
        return cls(**parts)

    @property
    def step(self) -> float:
        """The smallest relative step of a stored value."""
        return RESULTS[self.results][1]

    def weight(self, values, name: str):
        """A parameter as it is held: in its format, if it has one, and in the dtype of results."""
        if self.weights:
            values = narrowed_weight(values, name, self.weights)
        return RESULTS[self.results][0](values)


_FIELDS = {"results": RESULTS, "inputs": INPUTS, "weights": WEIGHTS, "state": STATES}


def is_arithmetic(name) -> bool:
    try:
        return isinstance(name, str) and bool(Arithmetic.named(name))
    except InputError:
        return False


def rounded_model(model: ReferenceModel, name: str, order: int) -> ReferenceModel:
    """The model in the arithmetic of that name; order 0 to ORDERS - 1, of the sums.  Its state is float32."""
    arithmetic = Arithmetic.named(name)
    round_, inputs = RESULTS[arithmetic.results][0], INPUTS.get(arithmetic.inputs)
    twin = copy.copy(model)
    operations = vars(model.op) | {
        "linear": _linear(order, inputs),
        "attention_mix": _linear(order, None, transposed=True),
    }
    if order % 2:
        sums = (_sums_forward, _sums_backward)[order // 2]
        operations["delta_rule"] = partial(chunked_delta_rule, sums=sums)
    if arithmetic.state:
        operations = operations | _kept(operations, STATES[arithmetic.state], CHUNK if order % 2 else 1)
    twin.op = SimpleNamespace(**{name: _rounded(function, round_) for name, function in operations.items()})
    twin.weight = lambda name, expert=None: arithmetic.weight(model.weight(name, expert), name)
    twin.embed = lambda ids: arithmetic.weight(model.embed(ids), "model.embed_tokens.weight")
    twin.new_state = lambda: State(model.config, np.float32)
    return twin


def _kept(operations, narrow, chunk):
    """The operations that read what was kept: the recurrent state is narrowed after each chunk."""

    def delta_rule(query, key, value, beta, log_decay, recurrent_state):
        out = np.empty_like(value)
        for start in range(0, len(query), chunk):
            part = slice(start, start + chunk)
            out[part] = operations["delta_rule"](
                query[part], key[part], value[part], beta[part], log_decay[part], recurrent_state
            )
            recurrent_state[:] = narrow(recurrent_state)
        return out

    return {
        "delta_rule": delta_rule,
        "causal_conv1d": lambda x, weight, state: operations["causal_conv1d"](narrow(x), weight, state),
        "attention_scores": lambda query, keys: operations["attention_scores"](query, narrow(keys)),
        "attention_mix": lambda p, values: operations["attention_mix"](p, narrow(values)),
    }


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
            total += x[:, start : start + _RUN] @ weight[:, start : start + _RUN].T
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


def chunked_delta_rule(query, key, value, beta, log_decay, recurrent_state, sums=_sums_forward, chunk=CHUNK):
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
        out[part] = np.moveaxis(
            np.exp(total) * (q @ recurrent_state) + (q @ np.swapaxes(k, 1, 2) * decay) @ update, 0, 1
        )
        last = total[:, -1:]
        recurrent_state *= np.exp(last)
        recurrent_state += np.swapaxes(k * np.exp(last - total), 1, 2) @ update
    return out
