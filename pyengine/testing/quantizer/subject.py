"""The quantizer under test, and what it returns, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .format import Format


class Fault(Exception):
    """What a quantizer returned cannot be looked at as codes and scales."""


class Quantized(NamedTuple):
    """codes int64 [rows, cols]; scales float64 [rows, n_groups]; s float64 [rows, cols];
    raw: the codes and scales as the quantizer returned them."""

    codes: np.ndarray
    scales: np.ndarray
    s: np.ndarray
    raw: tuple

    @property
    def values(self) -> np.ndarray:
        """D = q * s, exact."""
        return self.codes * self.s


@dataclass(frozen=True)
class Subject:
    """A quantizer with everything that it comes with; see `check_quantizer` for the arguments.

    The suite sees rows of groups whatever the format's axis: what is given and returned is
    transposed on the way.
    """

    quantize: Callable
    dequantize: Callable
    format: Format
    pack: Callable | None = None
    unpack: Callable | None = None
    save: Callable | None = None
    load: Callable | None = None
    from_q8_0: Callable | None = None
    native: Mapping[str, Callable] = field(default_factory=dict)
    calibrated: Callable | None = None

    def __call__(self, x: np.ndarray) -> Quantized:
        return self.run(self.quantize, np.ascontiguousarray(self.turn(x)))

    def run(self, quantize: Callable, given: np.ndarray) -> Quantized:
        """Codes and scales that `quantize` makes of an array in the quantizer's own orientation."""
        return self.read(self.turn(given).shape, *pair(quantize(given)))

    def calibrate(self, x: np.ndarray, samples: np.ndarray) -> Quantized:
        """Codes and scales that `calibrated` makes of x, for samples [n, cols]."""
        assert self.calibrated is not None
        return self.run(lambda given: self.calibrated(given, samples), np.ascontiguousarray(self.turn(x)))

    def read(self, shape, codes, scales) -> Quantized:
        """The quantizer's own codes and scales, checked for their shapes."""
        q, per_group = self.turn(np.asarray(codes)), self.turn(np.asarray(scales))
        wanted = (shape[0], self.format.n_groups(shape[1]))
        if q.shape != tuple(shape) or per_group.shape != wanted:
            turned = "" if self.format.axis == 1 else ", all of them transposed"
            raise Fault(
                f"want codes {tuple(shape)} and scales {wanted}{turned}, got {q.shape} and {per_group.shape}"
            )
        if q.dtype.kind not in "iu":
            raise Fault(f"want codes of an integer dtype, got {q.dtype}")
        per_group = per_group.astype(np.float64)
        return Quantized(
            q.astype(np.int64), per_group, self.format.per_column(per_group, shape[1]), (codes, scales)
        )

    def values(self, q: Quantized) -> np.ndarray:
        """What dequantize makes of it, float64 [rows, cols]."""
        values = self.turn(np.asarray(self.dequantize(*q.raw)))
        if values.shape != q.codes.shape:
            raise Fault(f"dequantize: want {q.codes.shape}, got {values.shape}")
        return values.astype(np.float64)

    def turn(self, a: np.ndarray) -> np.ndarray:
        return a if self.format.axis == 1 else a.T


def pair(result):
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Fault(f"want (codes, scales), got a {type(result).__name__}")
    return result
