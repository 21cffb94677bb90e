"""A linear layer: a stored matrix, and the name of its product in a trace."""

from __future__ import annotations

import numpy as np

from ..checkpoint.tensor import Tensor
from ..core import ops
from ..core.matrices import Matrices, as_matrix
from ..core.threads import Pool


class Linear:
    def __init__(self, pool: Pool, tensor: Tensor):
        self.pool, self.tensor, self.matrix = pool, tensor, as_matrix(tensor)
        self.name = tensor.name.removesuffix(".weight")

    def __call__(self, x: ops.Activations, record=None) -> np.ndarray:
        """x [T, cols] -> [T, rows], rows in the file's order; recorded in Hugging Face's."""
        y = ops.matmul(self.pool, self.matrix, x)
        self.recorded(y, record)
        return y

    def recorded(self, y: np.ndarray, record) -> None:
        if record:
            record(self.name, self.tensor.to_hf_rows(y))


class LinearGroup:
    """Linear layers of the same input, computed as one piece of work: for one token, dispatch overhead is
    significant."""

    def __init__(self, *layers: Linear):
        self.layers, self.matrices = layers, Matrices(*(layer.matrix for layer in layers))

    def __call__(self, x: ops.Activations, record=None) -> list[np.ndarray]:
        """x [T, cols] -> the y [T, rows] of each layer."""
        outputs = ops.matmul_shared_input(self.layers[0].pool, self.matrices, x)
        for layer, y in zip(self.layers, outputs):
            layer.recorded(y, record)
        return outputs
