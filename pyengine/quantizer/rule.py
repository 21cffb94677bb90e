"""The symmetric group quantizer's rule, in NumPy: the definition that the C core is held to.

For one group x of n <= 128 values along a row, and the largest code M (127, or 7 for INT4):

    amax = max |x|;  amax = 0: s = 0 and every code 0
    s = the float16 nearest to amax / M, or the smallest positive one where that is 0; the next
        float16 up if amax / s would round to more than M (only subnormal scales are that coarse)
    code = x / s rounded to the nearest integer, ties to even

The stored scale divides, nothing clips, and |x - code * s| <= s / 2.  amax / M and x / s are taken in
float64, where no quotient of a float32 comes so near a tie that it would be rounded onto it.

`scale="mse"` instead takes, of 65 float16 values from that s down to 3/4 of it, the value with the
least squared error over the group; codes beyond M are clipped.
"""

from __future__ import annotations

import numpy as np

from ..checkpoint.layout import GROUP
from ..errors import InputError

MSE_STEPS = 64

_HALF_INFINITY = np.float16(np.inf)


def group_scales(x: np.ndarray, largest: int = 127, group: int = GROUP) -> np.ndarray:
    """x float32 [rows, cols] -> float16 [rows, n_groups].  InputError beyond float16's range."""
    starts = np.arange(0, x.shape[1], group)
    amax = np.maximum.reduceat(np.abs(x), starts, axis=1).astype(np.float64)
    with np.errstate(over="ignore"):
        scales = (amax / largest).astype(np.float16)
    scales = np.where((scales == 0) & (amax > 0), np.float16(2.0**-24), scales)
    clips = np.rint(amax / _divisors(scales)) > largest
    with np.errstate(over="ignore"):  # of those that do not clip
        scales = np.where(clips, np.nextafter(scales, _HALF_INFINITY), scales)
    if np.isinf(scales).any():
        raise InputError(f"a group's largest value {amax.max():g} wants a scale beyond float16's range")
    return scales


def mse_scales(x: np.ndarray, largest: int = 127, group: int = GROUP) -> np.ndarray:
    """x float32 [rows, cols] -> float16 [rows, n_groups] of least squared error, as stated above."""
    absmax = group_scales(x, largest, group)
    best, least = absmax, _squared_errors(x, absmax, largest, group)
    for i in range(1, MSE_STEPS + 1):
        scales = (absmax.astype(np.float64) * ((256 - i) / 256)).astype(np.float16)
        errors = _squared_errors(x, scales, largest, group)
        better = (errors < least) & (scales > 0)
        best, least = np.where(better, scales, best), np.where(better, errors, least)
    return best


_SCALES = {"absmax": group_scales, "mse": mse_scales}  # by the keys of METHODS


def encode(x: np.ndarray, scales: np.ndarray, largest: int = 127, group: int = GROUP) -> np.ndarray:
    """x [rows, cols], scales [rows, n_groups] -> codes int8 [rows, cols]."""
    quotient = x / _per_column(_divisors(scales), x.shape[1], group)
    return np.clip(np.rint(quotient), -largest, largest).astype(np.int8)


def quantize_groups(
    x: np.ndarray, largest: int = 127, group: int = GROUP, scale: str = "absmax"
) -> tuple[np.ndarray, np.ndarray]:
    """x float32 [rows, cols], finite -> codes int8 [rows, cols], scales float16 [rows, n_groups]."""
    scales = _SCALES[scale](x, largest, group)
    return encode(x, scales, largest, group), scales


def _divisors(scales):
    """float64, with 1 for the scale 0 of a zero group, whose codes are then 0."""
    return np.where(scales == 0, np.float16(1), scales).astype(np.float64)


def _per_column(per_group, cols, group):
    return np.repeat(per_group, group, axis=1)[:, :cols]


def _squared_errors(x, scales, largest, group):
    """float64 [rows, n_groups], each group's terms added in ascending order, as the C core does."""
    rows, cols = x.shape
    codes = encode(x, scales, largest, group).astype(np.float64)
    errors = x - codes * _per_column(scales.astype(np.float64), cols, group)
    padded = np.zeros((rows, -(-cols // group) * group))
    padded[:, :cols] = errors * errors
    return np.cumsum(padded.reshape(rows, -1, group), axis=-1)[..., -1]
