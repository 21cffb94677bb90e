"""Rotary position embeddings: the frequencies, and YaRN, which stretches them for longer contexts.

The frequencies are Hugging Face's, bit for bit where those are well defined: float32 in each step that
Hugging Face takes in float32, Python's float64 in each step that it takes in Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = np.float32


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters, each with its value; the names are Hugging Face's.

    The attention factor multiplies cos and sin.

    Source: `_compute_yarn_parameters` in transformers' modeling_rope_utils.py.
    """

    factor: float  # how many times longer the context becomes, from 1 on
    original_max_position_embeddings: int  # the context that the model was trained with
    attention_factor: float
    beta_fast: float = 32.0  # rotations in that context from which a frequency stays as it is
    beta_slow: float = 1.0  # rotations up to which a frequency is divided by the factor
    truncate: bool = True  # the two bounds between them become whole numbers

    @property
    def context(self) -> int:
        """The positions that the stretched frequencies are for."""
        return int(self.factor * self.original_max_position_embeddings)


def attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """The attention factor of a file that does not give one.  Both of the two others count, or none."""

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1)


def inverse_frequencies(rotary_dim: int, theta: float, yarn: Yarn | None = None) -> NDArray[np.float32]:
    """float32 [rotary_dim / 2].

    Source: Qwen3_5MoeTextRotaryEmbedding.compute_default_rope_parameters, `_compute_yarn_parameters`.
    The power is rounded once from float64.  torch has no single answer to hold it against: its float32
    power gives other last bits on plain, AVX2 and AVX-512 processors, for some (theta, width);
    all three equal this for the 35B-A3B's (1e7, 64).
    """
    exponent = np.arange(0, rotary_dim, 2, dtype=F32) / F32(rotary_dim)
    with np.errstate(over="ignore", under="ignore"):  # a Config has no frequency of 0
        power = np.power(np.float64(F32(theta)), exponent.astype(np.float64)).astype(F32)
        if yarn is None:
            return F32(1) / power
        kept = F32(1) - _ramp(*_bounds(rotary_dim, theta, yarn), rotary_dim // 2)
        stretched = F32(1) / (F32(yarn.factor) * power)
        return stretched * (F32(1) - kept) + F32(1) / power * kept


def _bounds(rotary_dim: int, theta: float, yarn: Yarn) -> tuple[float, float]:
    """The indices between which the frequencies go from kept to divided."""

    def index(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(theta))

    low, high = index(yarn.beta_fast), index(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, rotary_dim - 1)


def _ramp(low: float, high: float, size: int) -> NDArray[np.float32]:
    """float32 [size]: 0 up to `low`, 1 from `high` on, a line between them."""
    if low == high:
        high += 0.001
    line = (np.arange(size, dtype=F32) - F32(low)) / F32(high - low)
    ramp: NDArray[np.float32] = np.clip(line, F32(0), F32(1))
    return ramp
