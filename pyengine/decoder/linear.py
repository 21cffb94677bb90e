"""A linear layer: a stored matrix, and the name its product has in a trace."""

from __future__ import annotations

import numpy as np

from .. import ops
from ..checkpoint import Tensor
from ..errors import CheckpointError
from ..files.gguf import codes_q4_0


def as_matrix(tensor: Tensor, expert: int | None = None) -> ops.Matrix:
    """The tensor, or one expert of it, as the C core reads it: mapped, in the file's order.

    Copied are only Q4_0, whose codes fit Q8_0's blocks, so that its arithmetic is Q8_0's, and
    experts that lie apart in their file, when all of them are wanted.
    Errors: CheckpointError for scales of other groups than the C core has.
    """
    if tensor.scales is not None and tensor.group != ops.GROUP:
        raise CheckpointError(f"{tensor.file_name}: want groups of {ops.GROUP} columns, which the "
                              f"locked arithmetic has, got {tensor.group} (float64 runs any)")
    data, scales, kind = tensor.data, tensor.scales, tensor.type
    if expert is not None:
        data, scales = data[expert], None if scales is None else scales[expert]
    elif isinstance(data, tuple):
        data = np.stack(data)
    if kind == "Q4_0":
        data, kind = _q4_0_as_q8_0(data), "Q8_0"
    return ops.Matrix(kind, tensor.shape[-1], data, scales)


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
        self.recorded(y, record)
        return y

    def recorded(self, y: np.ndarray, record) -> None:
        if record:
            record(self.name, self.tensor.to_hf_rows(y))


class LinearGroup:
    """Linear layers of the same input, computed as one piece of work: for a single token, handing
    out work and waiting for it take a part of the time that counts."""

    def __init__(self, *layers: Linear):
        self.layers, self.matrices = layers, ops.Matrices(*(layer.matrix for layer in layers))

    def __call__(self, x: ops.Activations, record=None) -> list[np.ndarray]:
        """x [T, cols] -> the y [T, rows] of each layer."""
        outputs = ops.matmul_each(self.layers[0].pool, self.matrices, x)
        for layer, y in zip(self.layers, outputs):
            layer.recorded(y, record)
        return outputs
