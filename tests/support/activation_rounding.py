"""The activation quantizer in NumPy, with its rule for ties as a parameter."""

import numpy as np

from pyengine.core.matrices import GROUP

PART = 16  # successive codes of one sum


def half_even(ratio):
    return np.rint(ratio)


def half_away(ratio):
    whole = np.trunc(ratio)
    return np.where(np.abs(ratio - whole) >= 0.5, whole + np.copysign(1.0, ratio), whole)


def activation_quantizer(nearest, differing=None):
    """ops.quantize_activations in NumPy; differing: a list that receives how many codes are not
    what ties to even give."""

    def quantize_activations(pool, x, name="input"):
        tokens, cols = x.shape
        groups = np.zeros((tokens, -(-cols // GROUP), GROUP), np.float32)
        groups.reshape(tokens, -1)[:, :cols] = x
        largest = np.abs(groups).max(axis=-1)
        tiny = largest < 2.0**-100
        scales = np.where(tiny, np.float32(0), largest / np.float32(32767))
        ratio = groups / np.where(tiny, np.float32(1), scales)[..., None]  # float32
        q = np.where(tiny[..., None], 0, nearest(ratio))
        if differing is not None:
            differing.append(int((q != np.where(tiny[..., None], 0, np.rint(ratio))).sum()))
        q = q.astype(np.int16).reshape(tokens, -1)
        return q, scales, q.reshape(tokens, -1, PART).sum(axis=-1, dtype=np.int32)

    return quantize_activations
