"""Weights, activations and states as quantized candidates hold them: narrowed, and wide again.

Each function is what a plain quantizer of that format does (nearest codes, no data).  A candidate's own may
choose other codes; its errors are of the same size, which is what a budget measures.
"""

from __future__ import annotations

import numpy as np

from ..quantizer.rule import quantize_groups
from .formats import to_e4m3, to_float16, to_int8_and_back

GROUP = 128  # columns to a scale: of INT4, of fp8 activations; rows and columns to a scale of fp8 weights
SUPER_BLOCK, SUB_BLOCK = 256, 32  # of Q4_K
LARGEST_E4M3 = np.float32(448)


def to_q4_k_and_back(x):
    """float32 [rows, columns]: 4 bits and 32 values to a scale and a minimum, which are 6-bit numbers times
    two float16 numbers of 256 columns, as llama.cpp's Q4_K.  A row's end may be a shorter block."""
    x = np.asarray(x, np.float32)
    out = np.empty_like(x)
    for start in range(0, x.shape[1], SUPER_BLOCK):
        block = x[:, start : start + SUPER_BLOCK]
        padded = np.zeros((len(x), -(-block.shape[1] // SUB_BLOCK), SUB_BLOCK), np.float32)
        flat = padded.reshape(len(x), -1)
        flat[:, : block.shape[1]] = block
        low = np.minimum(padded.min(axis=-1), 0)  # a minimum above 0 is stored as 0
        scale, least = _six_bits((padded.max(axis=-1) - low) / 15), -_six_bits(-low)
        steps = np.where(scale == 0, np.float32(1), scale)[..., None]
        codes = np.clip(np.rint((padded - least[..., None]) / steps), 0, 15)
        wide = (codes * scale[..., None] + least[..., None]).reshape(len(x), -1)
        out[:, start : start + SUPER_BLOCK] = wide[:, : block.shape[1]]
    return out


def _six_bits(x):
    """[rows, blocks], not negative -> codes from 0 to 63 times a float16 of each row."""
    unit = to_float16(x.max(axis=-1, keepdims=True) / 63)
    return np.clip(np.rint(x / np.where(unit == 0, np.float32(1), unit)), 0, 63) * unit


def to_int4_and_back(x):
    """float32 [rows, columns]: codes from -7 to 7, a float16 scale to 128 columns (quantizer/rule.py)."""
    codes, scales = quantize_groups(np.asarray(x, np.float32), 7, GROUP)
    return codes * np.repeat(scales.astype(np.float32), GROUP, axis=1)[:, : x.shape[1]]


def to_fp8_and_back(x):
    """float32 [rows, columns]: e4m3, a float32 scale to 128 rows and 128 columns."""
    x = np.asarray(x, np.float32)
    rows, columns = np.arange(0, x.shape[0], GROUP), np.arange(0, x.shape[1], GROUP)
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(x), rows, axis=0), columns, axis=1)
    scale = np.repeat(np.repeat(_scale(largest), GROUP, axis=0)[: len(x)], GROUP, axis=1)[:, : x.shape[1]]
    return to_e4m3(x / scale) * scale


def to_fp8_rows_and_back(x):
    """float32 [T, columns]: e4m3, a float32 scale to 128 columns of a row."""
    x = np.asarray(x, np.float32)
    largest = np.maximum.reduceat(np.abs(x), np.arange(0, x.shape[1], GROUP), axis=1)
    scale = np.repeat(_scale(largest), GROUP, axis=1)[:, : x.shape[1]]
    return to_e4m3(x / scale) * scale


def _scale(largest):
    return np.where(largest == 0, np.float32(1), largest / LARGEST_E4M3)


# {format: (what is done to a matrix, whether to the embeddings and lm_head too)}
WEIGHTS = {
    "q8_0": (to_int8_and_back, True),
    "q4_k": (to_q4_k_and_back, True),
    "int4": (to_int4_and_back, False),
    "fp8": (to_fp8_and_back, False),
}
_ENDS = ("model.embed_tokens.weight", "lm_head.weight")
_WIDE = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")  # no format quantizes a router


def narrowed_weight(values, name: str, weights: str):
    """A parameter as WEIGHTS[weights] holds it: matrices alone, no router."""
    narrow, ends = WEIGHTS[weights]
    if values.ndim != 2 or name.endswith(_WIDE) or (name in _ENDS and not ends):
        return values
    return narrow(values.astype(np.float32))
