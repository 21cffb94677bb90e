"""Stored weight matrices as the C core reads them."""

from __future__ import annotations

import numpy as np

from .._core import ffi, lib
from ..checkpoint.layout import GROUP
from ..checkpoint.tensor import Tensor
from ..errors import CheckpointError
from ..files.ggml_blocks import DENSE_TYPES, ROWS
from .call import want

if lib.PE_GROUP != GROUP:
    raise ImportError(f"pyengine._core: want groups of {GROUP} columns, got {lib.PE_GROUP}: build it again")

TYPES = {
    name: getattr(lib, f"PE_{name}")
    for name in (*(row.name for row in ROWS), "INT8", "INT4")
    if hasattr(lib, f"PE_{name}")
}


class Matrix:
    """A stored weight matrix, or a stack of them, as the C core sees it; keeps its arrays alive.

    kind    one of TYPES
    data    [rows, width] or [experts, rows, width]; rows contiguous, experts at any distance.  A tuple of
            [rows, width]: experts that lie apart, for `Experts` alone
    scales  INT8, INT4: float16 [n_groups, rows] or [experts, n_groups, rows], rows contiguous
    """

    def __init__(
        self,
        kind: str,
        cols: int,
        data: np.ndarray | tuple[np.ndarray, ...],
        scales: np.ndarray | None = None,
    ):
        self.apart = isinstance(data, tuple)
        stacked = not self.apart and data.ndim == 3
        first = data[0] if self.apart or stacked else data
        rows = first.shape[0]
        want(first.flags.c_contiguous, "matrix: want contiguous rows")
        self.kind, self.rows, self.cols = kind, rows, cols
        self.experts = len(data) if self.apart or stacked else 1
        self.data, self.scales = data, scales
        fields = {
            "type": TYPES[kind],
            "rows": rows,
            "cols": cols,
            "data": ffi.NULL if self.apart else _address(data),
            "expert_stride": data.strides[0] if stacked else 0,
        }
        if scales is not None:
            want(
                scales.strides[-1] == 2
                and scales.shape[-1] == rows
                and scales.shape[-2] == -(-cols // GROUP),
                "matrix: want scales [n_groups, rows]",
            )
            fields |= {
                "scales": ffi.cast("uint16_t *", _address(scales)),
                "scale_ld": scales.strides[-2] // 2,
                "scale_expert_stride": scales.strides[0] // 2 if stacked else 0,
            }
        self.struct = ffi.new("pe_matrix *", fields)

    @property
    def dense(self) -> bool:
        return self.kind in DENSE_TYPES

    def of_expert(self, expert: int) -> Matrix:
        """The matrix of one expert of a stack."""
        want(0 <= expert < self.experts, f"expert: want below {self.experts}, got {expert}")
        scales = None if self.scales is None else self.scales[expert]
        return Matrix(self.kind, self.cols, self.data[expert], scales)


def _address(array):
    return ffi.cast("void *", array.__array_interface__["data"][0])


class Matrices:
    """Up to PE_MAX_SHARED matrices with the same number of columns, multiplied as one piece of work."""

    def __init__(self, *matrices: Matrix):
        want(len(matrices) <= lib.PE_MAX_SHARED, f"matrices: want at most {lib.PE_MAX_SHARED}")
        self.matrices = matrices
        self.pointers = ffi.new("pe_matrix *[]", [m.struct for m in matrices])
        self.rows = [m.rows for m in matrices]


class Experts:
    """The matrices of a sparse MoE block: routed stacks, and the shared expert."""

    def __init__(self, gate, up, down, shared_gate, shared_up, shared_down):
        self.routed = (gate, up, down)
        self.num_experts = gate.experts
        matrices = (*self.routed, shared_gate, shared_up, shared_down)
        self.struct = ffi.new("pe_experts_weights *", {"num_experts": gate.experts})
        for name, matrix in zip(("gate", "up", "down", "shared_gate", "shared_up", "shared_down"), matrices):
            setattr(self.struct, name, matrix.struct[0])
        self.inputs = (gate, up, shared_gate, shared_up)
        self.shared = (shared_gate, shared_up, shared_down)
        self.shared_ff = shared_gate.rows
        self.places = self._places() if any(matrix.apart for matrix in self.routed) else None
        if self.places is not None:
            self.struct.places = self.places

    def _places(self):
        """pe_expert_place of each expert."""
        places = ffi.new("pe_expert_place[]", self.num_experts)
        for i, matrix in enumerate(self.routed):
            for expert, place in enumerate(places):
                place.data[i] = _address(matrix.data[expert])
                if matrix.scales is not None:
                    place.scales[i] = ffi.cast("uint16_t *", _address(matrix.scales[expert]))
        return places

    def read_from(self, cache, layer: int) -> None:
        """Routed experts are those of a layer of an `ExpertCache`."""
        self.cache = cache
        self.struct.cache, self.struct.cache_layer = cache.pointer, layer


def as_matrix(tensor: Tensor, expert: int | None = None) -> Matrix:
    """The tensor, or one expert of it, as the C core reads it: mapped, in the file's order.

    Errors: CheckpointError for scales of other groups than the C core has, for a type that it lacks, and for
    a tensor with a factor.
    """
    if tensor.scales is not None and tensor.group != GROUP:
        raise CheckpointError(
            f"{tensor.file_name}: want groups of {GROUP} columns, which the "
            f"locked arithmetic has, got {tensor.group} (float64 runs any)"
        )
    data, scales, kind = tensor.data, tensor.scales, tensor.type
    if expert is not None:
        data, scales = data[expert], None if scales is None else scales[expert]
    if kind not in TYPES:
        raise CheckpointError(
            f"{tensor.file_name}: want {' or '.join(TYPES)}, which the locked arithmetic has, got {kind} "
            "(float64 runs it)"
        )
    if tensor.factor is not None:
        raise CheckpointError(
            f"{tensor.file_name}: want no scale beside it, which the locked arithmetic lacks, got one "
            "(float64 runs it)"
        )
    return Matrix(kind, tensor.shape[-1], data, scales)
