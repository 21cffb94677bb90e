"""Weights of a checkpoint, quantized."""

from __future__ import annotations

import numpy as np

from ..._core import ffi, lib
from ..call import as_input, as_output, check_status, want
from ..matrices import Matrix
from ..threads import Pool


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
