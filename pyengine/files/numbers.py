"""bfloat16, for which NumPy has no type: its bits as uint16, widened and rounded."""

import numpy as np


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 values -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits of the nearest bfloat16, ties to even; NaN stays NaN, its payload may not."""
    nearest = finite_to_bfloat16(x)
    nan = np.isnan(x)
    if nan.any():
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        nearest = np.where(nan, (bits >> 16).astype(np.uint16) | np.uint16(0x40), nearest)
    return nearest


def finite_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The same of float32 without NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = bits >> 16
    nearest &= 1
    nearest += 0x7FFF
    nearest += bits
    nearest >>= 16
    return nearest.astype(np.uint16)


def float32_in_bfloat16(x: np.ndarray) -> np.ndarray:
    """Any floats -> the nearest bfloat16 values of their float32 ones, as float32."""
    return bfloat16_to_float32(float32_to_bfloat16(np.asarray(x, np.float32)))
