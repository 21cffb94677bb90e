"""Operations on each element by itself, and gates of an attention and of a delta net."""

from __future__ import annotations

import numpy as np

from ..._core import lib
from ..call import as_input, as_output, run, want
from ..threads import Pool


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
