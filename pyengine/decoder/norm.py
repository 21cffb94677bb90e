"""The zero-centred RMS norm of a hidden state, Hugging Face's `Qwen3_5MoeRMSNorm`."""

from __future__ import annotations

import numpy as np

from ..checkpoint.tensor import Tensor
from ..core import ops
from ..core.threads import Pool


def zero_centred_scale(tensor: Tensor) -> np.ndarray:
    """float32(1 + weight) [n]; for a GGUF, which stores the sum, that is the stored value."""
    return (1.0 + tensor.float64()).astype(np.float32)


class Norm:
    def __init__(self, pool: Pool, tensor: Tensor, eps: float):
        self.pool, self.eps, self.scale = pool, eps, zero_centred_scale(tensor)
        self.name = tensor.name.removesuffix(".weight")

    def __call__(self, x: np.ndarray, record=None) -> ops.Activations:
        """x [T, n] -> the normed x, ready for the matmuls that read it."""
        y = ops.rms_norm(self.pool, x, self.scale, self.eps)
        if record:
            record(self.name, y)
        return ops.Activations(self.pool, y, self.name)
