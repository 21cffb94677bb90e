"""Norms of rows and of heads."""

from __future__ import annotations

import numpy as np

from ..._core import lib
from ..call import as_input, as_output, run, want
from ..threads import Pool


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
