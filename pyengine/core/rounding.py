"""Checked wrappers of the C core's error-compensated rounding: contracts stand in csrc/pyengine.h.

Arrays are C-contiguous; T is the number of tokens.
"""

from __future__ import annotations

import numpy as np

from .._core import ffi, lib
from .call import as_input, as_output, check_status, want
from .threads import Pool

PIECE_BYTES = 16 << 20  # of activations that are widened to float64 at a time


def add_products(pool: Pool, a: np.ndarray, b: np.ndarray, out: np.ndarray, lower: bool = False) -> None:
    """out float64 [m, n] += the sum over t of a[t]^T b[t]; a [T, m], b [T, n] float32 or float64.

    lower: of a square out, the part on and below the diagonal alone; the rest is undefined.
    """
    want(a.shape[0] == b.shape[0] and out.shape == (a.shape[1], b.shape[1]), "add_products: want one T")
    step = max(1, PIECE_BYTES // (8 * (a.shape[1] + b.shape[1])))
    for start in range(0, len(a), step):
        x = np.ascontiguousarray(a[start : start + step], np.float64)
        y = x if b is a else np.ascontiguousarray(b[start : start + step], np.float64)
        check_status(
            lib.pe_add_products(
                pool.pointer, _doubles(x), _doubles(y), len(x), *out.shape, int(lower), _output(out)
            ),
            "add_products",
        )


def add_squares(pool: Pool, x: np.ndarray, sums: np.ndarray) -> None:
    """sums float64 [n] += the squares of x float32 [T, n], token by token."""
    want(sums.shape == x.shape[1:], "add_squares: want a sum per column")
    check_status(
        lib.pe_add_squares(pool.pointer, as_input(np.ascontiguousarray(x)), *x.shape, _output(sums)),
        "add_squares",
    )


def factor(pool: Pool, h: np.ndarray) -> None:
    """h float64 [n, n], symmetric, to its factors in place.  NonFiniteError: not positive definite."""
    want(h.ndim == 2 and h.shape[0] == h.shape[1], "factor: want a square matrix")
    check_status(lib.pe_factor(pool.pointer, _output(h), len(h)), "second moments")


def round_weights(
    pool: Pool,
    w: np.ndarray,
    factors: np.ndarray,
    largest: int,
    group_size: int,
    correction: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """w float32 [rows, n] -> codes int8 [rows, n], scales float16 [rows, n_groups].

    factors      float64 [n, n] as `factor` leaves them; or [n], above 0: a weight for each column
    correction   float64 [rows, n]: b of the contract; of a matrix of factors only
    NonFiniteError: a value that is not finite, or needs a scale beyond float16.
    """
    rows, n = w.shape
    whole = factors.ndim == 2
    want(factors.shape == ((n, n) if whole else (n,)), "round_weights: want factors of the columns")
    want(correction is None or correction.shape == w.shape, "round_weights: want a correction per weight")
    codes, scales = np.empty((rows, n), np.int8), np.empty((rows, -(-n // group_size)), np.float16)
    check_status(
        lib.pe_round_weights(
            pool.pointer,
            as_input(w),
            ffi.NULL if correction is None else _doubles(correction),
            _doubles(factors) if whole else ffi.NULL,
            ffi.NULL if whole else _doubles(factors),
            rows,
            n,
            group_size,
            largest,
            as_output(codes, "int8_t[]"),
            as_output(scales, "uint16_t[]"),
        ),
        "round_weights",
    )
    return codes, scales


def _doubles(array: np.ndarray):
    return as_input(array, np.float64, "double[]")


def _output(array: np.ndarray):
    if array.dtype != np.float64:
        raise TypeError(f"want float64, got {array.dtype}")
    return as_output(array, "double[]")
