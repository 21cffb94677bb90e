"""Matrices times inputs."""

from __future__ import annotations

import numpy as np

from ..._core import ffi, lib
from ..call import as_input, as_output, run, want
from ..matrices import GROUP, Matrices, Matrix
from ..threads import Pool


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
