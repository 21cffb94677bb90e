"""Functions of one array that `peer.py` and its faults compute with, in float32."""

import numpy as np

F = np.float32


def sigmoid(x):
    return (1 / (1 + np.exp(-np.clip(x, -80, 80)))).astype(F)


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def bfloat16(x):
    bits = np.ascontiguousarray(x, F).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(F)


def int8_blocks(x, nearest=np.rint):
    """[T, n] -> codes [T, blocks, 32] int32, scales [T, blocks, 1]."""
    blocks = x.reshape(len(x), -1, 32)
    scale = (np.abs(blocks).max(-1, keepdims=True) / F(127)).astype(F)
    codes = nearest(blocks / np.where(scale == 0, F(1), scale)).astype(np.int32)
    return codes, scale.astype(np.float16).astype(F)  # as llama.cpp's Q8_0 keeps it


def e4m3(x):
    """The nearest of the 8-bit floats, by search in the list of all of them."""
    above = np.clip(np.searchsorted(_E4M3, x), 1, len(_E4M3) - 1)
    low, high = _E4M3[above - 1], _E4M3[above]
    return np.where(x - low < high - x, low, high)


def _all_e4m3():
    codes = np.arange(127)  # 127 is NaN
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.concatenate([-values[:0:-1], values]).astype(F)


_E4M3 = _all_e4m3()
