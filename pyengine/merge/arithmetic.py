"""The arithmetic of a merge.  Names and semantics are mergekit 0.1.5's; its rounding is stated here.

Every value is a float32 and every operation below is one IEEE operation, rounded to nearest even.  Inputs
are the sources' values in float32: exact for every type of file (a vector of a GGUF is decoded in float64
and rounded).  The result is rounded once more, to the dtype of the output.

A tensor is one of Hugging Face's parameters.  Of a stack of experts each expert's gate_proj, up_proj and
down_proj is a tensor by itself, whether its file has the stack fused, stacked or apart.

b is the base model's value and x[m] that of model m, in the order of the list of models, without the
base.  weight, lambda and 1e-7 are rounded to float32 first.  A sum over m starts from +0 and adds in
ascending order.

    linear            r = 0;  for each m:  r = fma(x[m], weight[m], r), one rounding, as torch.addcmul
                      normalize:  r = r / (sum over m of weight[m]).  The base model, if there is one, is
                      a model like any other.
    all others        d[m] = x[m] - b
                      d[m] = sparse(d[m])                         ties, dare_linear, dare_ties
                      d[m] = d[m] * weight[m]
                      with consensus (ties, dare_ties):
                          s = sum of d[m];  a[m] = 1 where d[m] > 0 and s >= 0, or d[m] < 0 and s < 0;
                          else 0
                          n = sum of d[m] * a[m];  divisor = sum of weight[m] * a[m], 1 where that is 0
                      without (task_arithmetic, dare_linear):
                          n = sum of d[m];  divisor = sum of weight[m]
                      normalize:    n = n / divisor
                      lambda != 1:  n = n * lambda
                      r = b + n

sparse(d), with density 1: d.  Below 1, with keep an array of 0 and 1:

    ties              keep = 1 for the k elements of greatest magnitude, k = max(1, floor(density * n)) of n
                      elements, density * n in float64; of equal magnitudes those that come first in
                      row-major order.  Density 0: none.
    dare_*            keep: the draw of masks.py
    d = d * keep
    rescale: density  d = d / density
    rescale: l1       before = f32(sum |d|), after = f32(sum |d * keep|), over the tensor.  A sum is the
                      exact one, rounded to float64, then to float32.  Where both are at least 1e-7:
                      d = d * (before / after)

A transplant takes no part in this: it is the model's own value.

One difference from mergekit: dtype names the output's dtype; the arithmetic is float32 in every case, while
mergekit computes all methods but linear in dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Mask = NDArray[np.bool_]

LEAST_NORM = np.float32(1e-7)
LEAST_DIVISOR = 1e-8  # mergekit's: a sum of weights that is smaller counts as zero
MAGNITUDE = np.uint32(0x7FFFFFFF)


@dataclass(frozen=True)
class Method:
    """sparsify   None, "magnitude" or "random"
    consensus  whether the models elect a sign
    base       whether a base model is needed
    normalize, rescale   mergekit's defaults
    """

    sparsify: str | None
    consensus: bool
    base: bool
    normalize: bool
    rescale: str | None


METHODS = {
    "linear": Method(None, False, False, True, None),
    "task_arithmetic": Method(None, False, True, False, None),
    "ties": Method("magnitude", True, True, True, None),
    "dare_linear": Method("random", False, True, False, "l1"),
    "dare_ties": Method("random", True, True, False, "l1"),
}
RESCALES = ("l1", "density")


@dataclass(frozen=True)
class Recipe:
    """What one tensor is made by: weights and densities in the order of the models without the base (of
    linear: of all models); rescale: a name of RESCALES or None."""

    method: str
    weights: tuple[float, ...]
    densities: tuple[float, ...] = ()
    normalize: bool = False
    rescale: str | None = None
    scale: float = 1.0  # lambda


# ---- sums --------------------------------------------------------------------------------------


def exact_partials(magnitudes: Values, keep: Mask) -> tuple[list[float], list[float]]:
    """float32 values >= 0 -> numbers whose exact sums are that of all values and that of the kept ones.

    Values are split into a multiple of a step so coarse that float64 adds them all without rounding, in any
    order, and a rest, which few of them have.
    """
    all_of: list[float] = []
    of_kept: list[float] = []
    left: NDArray[np.float64] = magnitudes.astype(np.float64)
    greatest = float(left.max(initial=0.0))
    while left.size:
        if not math.isfinite(greatest):
            return [math.nan], [math.nan]
        if greatest == 0.0:
            break
        # |left| < 2^top and there are up to 2^bits of them: multiples of 2^(top + bits - 52), which is what
        # adding and subtracting rounds to, have a sum below 2^53 such steps.
        top, bits = math.frexp(greatest)[1], max(1, (left.size - 1).bit_length())
        shift = math.ldexp(1.5, top + bits)
        coarse = left + shift
        coarse -= shift
        left -= coarse
        all_of.append(float(coarse.sum()))
        coarse *= keep
        of_kept.append(float(coarse.sum()))
        rest = np.flatnonzero(left)
        left, keep = left[rest], keep[rest]
        greatest = float(np.abs(left).max(initial=0.0))
    return all_of, of_kept


def rounded_sum(partials: list[float]) -> np.float32:
    """The exact sum to float64, then to float32; NaN or infinity where a term is not finite."""
    if not all(map(math.isfinite, partials)):
        return np.float32(np.nan)
    return np.float32(math.fsum(partials))


def l1_factor(before: np.float32, after: np.float32) -> np.float32 | None:
    """What `rescale: l1` multiplies by; None: nothing."""
    if before < LEAST_NORM or after < LEAST_NORM:
        return None
    return np.float32(before / after)


# ---- the elements of greatest magnitude --------------------------------------------------------


def bits_of(values: Values) -> NDArray[np.uint32]:
    """The magnitudes' bits, which have the magnitudes' order."""
    return np.bitwise_and(values.view(np.uint32), MAGNITUDE)


def kept_count(density: float, size: int) -> int:
    return max(1, int(density * size)) if density > 0 else 0


@dataclass(frozen=True)
class Threshold:
    """Kept: magnitudes whose bits are above `bits`, and those equal to it up to element `last`.

    last: the tensor's last element where no equal one is cut.
    """

    bits: int
    last: int

    def keep(self, values: Values, start: int) -> Mask:
        """values: the elements from `start` on, contiguous."""
        magnitudes = bits_of(values)
        if self.last >= start + values.size - 1:
            all_equal: Mask = magnitudes >= self.bits
            return all_equal
        kept: Mask = magnitudes > self.bits
        if start <= self.last:
            equal = magnitudes == self.bits
            equal[self.last + 1 - start :] = False
            kept |= equal
        return kept


def select_threshold(magnitudes: NDArray[np.uint32], wanted: int) -> Threshold:
    """magnitudes: the bits of a whole tensor."""
    place = magnitudes.size - wanted
    bits = int(np.partition(magnitudes, place)[place])
    cut = int(np.count_nonzero(magnitudes >= bits)) - wanted
    if not cut:
        return Threshold(bits, magnitudes.size - 1)
    return Threshold(bits, int(np.flatnonzero(magnitudes == bits)[-1 - cut]))


def high_counts(values: Values) -> NDArray[np.int64]:
    """How many magnitudes have each upper half of their bits: int64 [2^15]."""
    return np.bincount((bits_of(values) >> np.uint32(16)).astype(np.intp), minlength=1 << 15)


def low_counts(values: Values, high: int) -> NDArray[np.int64]:
    """The same of the lower halves, of the magnitudes with this upper half: int64 [2^16]."""
    magnitudes = bits_of(values)
    chosen = magnitudes[(magnitudes >> np.uint32(16)) == high] & np.uint32(0xFFFF)
    return np.bincount(chosen.astype(np.intp), minlength=1 << 16)


def from_the_top(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin that holds the wanted-th greatest, counted from 1, and how many of the bin are wanted."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, wanted))
    left = wanted - (int(above[place - 1]) if place else 0)
    return len(counts) - 1 - place, left


# ---- elements ----------------------------------------------------------------------------------


def fused_multiply_add(x: Values, weight: np.float32, total: Values) -> Values:
    """x * weight + total, rounded once.

    The product is exact in float64.  The sum is rounded to float64 and then to float32, which differs from
    one rounding only where the float64 lies midway between two float32: there the sum's own error decides.
    """
    product = x.astype(np.float64)
    product *= np.float64(weight)
    wide = product + total
    result: Values = wide.astype(np.float32)
    beyond = wide - result
    away = beyond != 0
    beyond *= 2.0
    beyond += result
    away &= beyond.astype(np.float32) == beyond  # the neighbour is as near as the result
    if away.any():
        places = np.flatnonzero(away)
        a, b, s = product.flat[places], total.flat[places].astype(np.float64), wide.flat[places]
        part = s - a
        error = (a - (s - part)) + (b - part)
        near, far = result.flat[places], beyond.flat[places].astype(np.float32)
        wrong = error * (far.astype(np.float64) - near) > 0
        result.flat[places] = np.where(wrong, far, near)
    return result


def linear(models: Sequence[Values], recipe: Recipe) -> Values:
    """[n] of each model -> [n]."""
    weights = np.array(recipe.weights, np.float32)
    total: Values = models[0] * weights[0] + np.float32(0)  # one rounding; the sum with +0 is exact
    for x, weight in zip(models[1:], weights[1:]):
        total = fused_multiply_add(x, weight, total)
    if recipe.normalize:
        total /= sum_in_order(weights)
    return total


def combine(base: Values, deltas: list[Values], recipe: Recipe) -> Values:
    """The steps after `sparse`: base [n], deltas [n] of each model, which are overwritten -> [n]."""
    weights = np.array(recipe.weights, np.float32)
    for delta, weight in zip(deltas, weights):
        if weight != 1:
            delta *= weight
    mixed, divisor = (_elected if METHODS[recipe.method].consensus else _added)(deltas, weights, recipe)
    if recipe.normalize:
        mixed /= divisor
    if recipe.scale != 1:
        mixed *= np.float32(recipe.scale)
    mixed += base
    return mixed


def _added(deltas: list[Values], weights: Values, recipe: Recipe) -> tuple[Values, Any]:
    return _sum(deltas), sum_in_order(weights)


def _elected(deltas: list[Values], weights: Values, recipe: Recipe) -> tuple[Values, Any]:
    if len(deltas) == 1 and not recipe.normalize:  # a model by itself has the elected sign everywhere
        return _sum(deltas), None
    positive = _sum(deltas) >= 0
    divisor = np.zeros(positive.shape, np.float32) if recipe.normalize else None
    for delta, weight in zip(deltas, weights):
        agrees = (delta > 0) == positive
        agrees &= delta != 0
        delta *= agrees
        if divisor is not None:
            divisor += agrees * weight
    if divisor is not None:
        divisor += divisor == 0
    return _sum(deltas), divisor


def _sum(deltas: list[Values]) -> Values:
    total = deltas[0] + np.float32(0)
    for delta in deltas[1:]:
        total += delta
    return total


def sum_in_order(weights: Values) -> np.float32:
    total = np.float32(0)
    for weight in weights:
        total = np.float32(total + weight)
    return total
