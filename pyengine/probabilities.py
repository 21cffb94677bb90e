"""Softmax in float64, along the last axis.  (The reference model has its own: it is the specification.)"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities of logits / temperature, of the shape of logits; temperature > 0."""
    shifted = np.array(logits, np.float64)
    # Shifted before the division: a tiny temperature then gives -inf and 0, not NaN.
    with np.errstate(over="ignore"):
        shifted -= shifted.max(axis=-1, keepdims=True)
        shifted /= temperature
    weights = np.exp(shifted, out=shifted)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Logarithms of the probabilities, of the shape of logits."""
    shifted = np.array(logits, np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
