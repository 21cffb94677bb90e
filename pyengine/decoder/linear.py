"""A linear layer: a stored matrix, and the name its product has in a trace."""

from __future__ import annotations

import numpy as np

from .. import ops
from ..checkpoint import Tensor
from ..files.gguf import codes_q4_0


def as_matrix(tensor: Tensor) -> ops.Matrix:
    """The tensor as the C core reads it: mapped, in the file's order.

    Only Q4_0 is copied: its codes fit Q8_0's blocks, and so its arithmetic is Q8_0's.
    """
    if tensor.type == "Q4_0":
        return ops.Matrix("Q8_0", tensor.shape[-1], _q4_0_as_q8_0(tensor.data))
    return ops.Matrix(tensor.type, tensor.shape[-1], tensor.data, tensor.scales)


def _q4_0_as_q8_0(data: np.ndarray) -> np.ndarray:
    """The same scales and codes: uint8 [.., blocks * 18] -> [.., blocks * 34]."""
    blocks = data.reshape(*data.shape[:-1], -1, 18)
    codes = codes_q4_0(blocks).view(np.uint8)
    return np.concatenate([blocks[..., :2], codes], axis=-1).reshape(*data.shape[:-1], -1)


class Linear:
    def __init__(self, pool: ops.Pool, tensor: Tensor):
        self.pool, self.tensor, self.matrix = pool, tensor, as_matrix(tensor)
        self.name = tensor.name.removesuffix(".weight")

    def __call__(self, x: ops.Activations, record=None) -> np.ndarray:
        """x [T, cols] -> [T, rows], rows in the file's order; recorded in Hugging Face's."""
        y = ops.matmul(self.pool, self.matrix, x)
        if record:
            record(self.name, self.tensor.to_hf_rows(y))
        return y
