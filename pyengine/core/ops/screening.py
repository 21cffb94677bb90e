"""The head, screened: bounds of all rows first, then the few that count."""

from __future__ import annotations

import numpy as np

from ..._core import lib
from ..call import as_input, as_output, check_status, run, want
from ..matrices import Matrix
from ..threads import Pool


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


def top_k(pool: Pool, logits, k: int):
    """logits [T, vocab] -> ids int32 [T, k] of the greatest, falling, the lower id first among equals."""
    tokens, vocab = logits.shape
    ids = np.empty((tokens, k), np.int32)
    run(pool, lib.pe_top_k, "logits", as_input(logits), tokens, vocab, k, as_output(ids, "int32_t[]"))
    return ids
