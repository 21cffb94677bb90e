"""Narrower number formats: each function gives the nearest value of a format, as float32."""

from __future__ import annotations

import numpy as np

from ..files.numbers import float32_in_bfloat16

INT8_BLOCK = 32  # values a scale, as llama.cpp's Q8_0


def to_float32(x):
    return np.asarray(x, np.float32)


def to_bfloat16(x):
    """float -> the nearest bfloat16, ties to even, as float32.  NaN stays one."""
    return float32_in_bfloat16(x)


def to_float16(x):
    return np.asarray(x, np.float16).astype(np.float32)


def to_e4m3(x):
    """float -> the nearest 8-bit float of 4 exponent and 3 mantissa bits, ties to even, as float32.

    What is larger than 448, the largest, becomes 448.  Source: OCP 8-bit floating point specification,
    E4M3 (torch.float8_e4m3fn), saturating.
    """
    x = np.asarray(x, np.float32)
    exponent = np.maximum(np.frexp(np.abs(x))[1] - 1, -6)
    step = np.ldexp(np.float32(1), exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448).astype(np.float32)


def to_int8_and_back(x):
    """[T, columns] in blocks of 32, each with a float16 scale of largest / 127, as llama.cpp's Q8_0."""
    rows, columns = x.shape
    blocks = np.zeros((rows, -(-columns // INT8_BLOCK), INT8_BLOCK), np.float32)
    blocks.reshape(rows, -1)[:, :columns] = x
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks / np.where(scale == 0, np.float32(1), scale))
    return (codes * to_float16(scale)).reshape(rows, -1)[:, :columns]
