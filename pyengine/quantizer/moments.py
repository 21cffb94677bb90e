"""Second moments of what a linear reads, and rounding that compensates errors by them.

For one linear W [rows, n], over calibration tokens t in their order; x the input that it has in the source,
y the input that it has behind the layers that are quantized already, r what the output is to make up for
beside (the error of the residual stream; of most linears nothing):

    H = sum of y y^T          C = sum of x y^T          R = sum of r y^T
    H + DAMPING * mean of H's diagonal * I  ->  its factors; the diagonal's sum is taken in order
    b = W (C - H) + R:  W + b H^-1 minimizes the sum of |W x + r - V y|^2 over V, but for the damping

and `pe_round_weights` rounds that.  All of it is float64, in the orders that csrc/pyengine.h states: no
thread, processor or split of the tokens changes a bit.  Where every y is 0 the mean is taken for 1.

Sources: Frantar et al., "GPTQ" (2022); Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for
Asymmetric Calibration" (2025), for the inputs of the source as the target.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core import rounding
from ..core.threads import Pool

DAMPING = 2.0**-8

Floats = NDArray[np.float32]
Array = NDArray[np.float64]


class Moments:
    def __init__(self, pool: Pool, columns: int, rows: int | None = None, scale: Floats | None = None):
        """rows: of R; None: there is none.  scale: what `add` divides x by (folds.py); None: nothing."""
        self.pool, self.scale = pool, scale
        self._moments = np.zeros((columns, columns))
        self._cross = np.zeros((columns, columns))
        self._beside = None if rows is None else np.zeros((rows, columns))
        self._factors: Array | None = None

    def add(self, source: Floats, made: Floats, beside: Floats | None = None) -> None:
        """source x, made y [T, n], beside r [T, rows] of some tokens."""
        source, made = (np.ascontiguousarray(values, np.float64) for values in (source, made))
        if self.scale is not None:
            source = source / self.scale
        rounding.add_products(self.pool, made, made, self._moments, lower=True)
        rounding.add_products(self.pool, source, made, self._cross)
        if beside is not None:
            assert self._beside is not None
            rounding.add_products(self.pool, beside, made, self._beside)

    def finish(self) -> Moments:
        """Every token is added -> itself."""
        lower = np.tril(self._moments)
        whole = lower + np.tril(lower, -1).T
        self._cross -= whole
        diagonal = whole.reshape(-1)[:: len(whole) + 1]
        mean = float(np.cumsum(diagonal)[-1]) / len(diagonal)
        diagonal += DAMPING * (mean or 1.0)
        rounding.factor(self.pool, whole)
        self._factors, self._moments = whole, np.empty((0, 0))
        return self

    def round(self, rows: Floats, first: int, largest: int, group: int):
        """rows [m, n] of W from row `first` on -> codes int8 [m, n], scales float16 [m, n_groups].

        NonFiniteError: a value that is not finite, or needs a scale beyond float16.
        """
        assert self._factors is not None
        b = np.zeros(rows.shape)
        rounding.add_products(self.pool, rows.T, self._cross, b)
        if self._beside is not None:
            b += self._beside[first : first + len(rows)]
        return rounding.round_weights(self.pool, rows, self._factors, largest, group, b)
