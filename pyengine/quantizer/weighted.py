"""Codes by statistics of columns alone: `weighted` of METHODS.

`weighted` takes the scale of least error with each column weighed by its mean square
(`Statistics.weights`); a code is the nearest.  Statistics of any imatrix do.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from ..calibration.statistics import FEW, Statistics
from ..checkpoint.layout import MAX_CODE
from ..checkpoint.names import layer_of
from ..checkpoint.tensor import Tensor
from ..core import rounding
from ..core.threads import Pool
from ..errors import NonFiniteError, PyengineWarning
from .quantize_pass import name_nonfinite

Floats = NDArray[np.float32]
Rounded = tuple[NDArray[np.int8], NDArray[np.float16]]  # codes [rows, cols], scales [rows, n_groups]

ROWS = 512  # rounded at a time


def warn_of_few(layer: int | None, few: list[int]) -> None:
    if few:
        shown = ", ".join(map(str, few[:8])) + (f" and {len(few) - 8} more" if len(few) > 8 else "")
        warnings.warn(
            f"calibration: layer {layer}: experts with fewer than {FEW:g} of the mean of tokens, which "
            f"stand by the whole layer: {shown}",
            PyengineWarning,
            stacklevel=3,
        )


class WeightedRounding:
    def __init__(self, pool: Pool, statistics: Statistics, bits: dict[str, int], group: int):
        self.pool, self.statistics, self.bits, self.group = pool, statistics, bits, group
        missing = [name for name in bits if name not in statistics.sums]
        if missing:
            warnings.warn(
                f"{statistics.path}: {len(missing)} of {len(bits)} weights have no statistics, so their "
                f"columns weigh alike: {missing[0]}{' and others' if len(missing) > 1 else ''}",
                PyengineWarning,
                stacklevel=3,
            )
        for name in bits:
            if name.endswith("experts.down_proj") and name in statistics.counts:
                warn_of_few(layer_of(name), statistics.few(name))

    def plain(self, tensor: Tensor) -> Tensor:
        return tensor

    def pass_over(self, tensor: Tensor, expert: int | None) -> None:
        """Each matrix is rounded by itself."""

    def matrix(self, tensor: Tensor, expert: int | None) -> Rounded:
        weights = self.statistics.weights(tensor.name, expert, tensor.shape[-1])
        largest = MAX_CODE[self.bits[tensor.name]]

        def some(rows: Floats, first: int) -> Rounded:
            return rounding.round_weights(self.pool, rows, weights, largest, self.group)

        return by_rows(tensor, expert, self.group, some)


def by_rows(tensor: Tensor, expert: int | None, group: int, some) -> Rounded:
    """some(rows float32 [m, cols], first row) -> codes, scales, for the rows of a matrix one piece at a time.

    Errors: CheckpointError naming the row and group of a value that is not finite, or too great.
    """
    count, parts = tensor.shape[-2], []
    for first in range(0, count, ROWS):
        stop = min(first + ROWS, count)
        try:
            parts.append(some(np.ascontiguousarray(tensor.rows_float32(expert, first, stop)), first))
        except NonFiniteError:
            raise name_nonfinite(tensor, expert, first, stop, group) from None
    codes, scales = zip(*parts)
    return np.concatenate(codes), np.concatenate(scales)
