"""One tensor merged: its statistics over all of it, then any of its rows.

A tensor is read a few rows at a time, so that neither the tensors nor their differences are in memory as a
whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.tensor import Tensor
from ..errors import CheckpointError
from . import arithmetic
from .arithmetic import METHODS, Mask, Recipe, Threshold, Values
from .masks import kept, mask_key

PIECE = 1 << 17  # elements computed at a time, so that they stay in a processor's cache
BLOCK = 1 << 21  # elements that one thread computes at a time

Rows = tuple[int, int]
Map = Callable[[Callable[[Rows], Any], Iterable[Rows]], Iterable[Any]]


class Source(NamedTuple):
    """A tensor of one model; expert: of a stack, or None."""

    model: str
    tensor: Tensor
    expert: int | None

    def rows(self, start: int, stop: int) -> Values:
        """float32 [stop - start, columns], Hugging Face's values; a vector is one row."""
        if _is_matrix(self.tensor):
            values = self.tensor.rows_float32(self.expert, start, stop)
        else:
            values = self.tensor.float64().astype(np.float32).reshape(1, -1)
        return np.ascontiguousarray(values)


def _is_matrix(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1 and tensor.decode is None and not tensor.name.endswith("conv1d.weight")


def shape_of(tensor: Tensor) -> tuple[int, int]:
    """(rows, columns) of a matrix, or of one of a stack; a vector, and a convolution, are one row."""
    if _is_matrix(tensor):
        return tensor.shape[-2], tensor.shape[-1]
    return 1, math.prod(tensor.shape)


@dataclass(eq=False)
class Sparse:
    """What `sparse` of arithmetic.py does to one model's differences."""

    density: float
    key: tuple[int, int] | None  # of a random draw
    threshold: Threshold | None = None
    multiplier: np.float32 | None = None
    divisor: np.float32 | None = None
    _saved: dict[Rows, Mask] = field(default_factory=dict)

    def keep(self, delta: Values, start: int, save: bool = False) -> Mask:
        """The mask of the elements from `start` on; save: for the next call, which forgets it."""
        known = self._saved.pop((start, delta.size), None)
        mask = self._keep(delta, start) if known is None else known
        if save:
            self._saved[start, delta.size] = mask
        return mask

    def _keep(self, delta: Values, start: int) -> Mask:
        if self.density <= 0:
            return np.zeros(delta.size, np.bool_)
        if self.key is not None:
            return kept(self.key, self.density, start, start + delta.size)
        assert self.threshold is not None, "want the statistics first"
        return self.threshold.keep(delta, start)

    def apply(self, delta: Values, start: int) -> None:
        """delta float32 [n], the elements from `start` on; overwritten."""
        delta *= self.keep(delta, start)
        if self.multiplier is not None:
            delta *= self.multiplier
        if self.divisor is not None:
            delta /= self.divisor


@dataclass(eq=False)
class TensorMerge:
    """One tensor of the output.

    sources   of each model that the recipe names, in its order; of a transplant one
    base      the base model's, where the method has one
    recipe    None: a transplant
    most      the bits of the greatest magnitude that the output's dtype holds
    """

    name: str
    rows: int
    cols: int
    sources: tuple[Source, ...]
    base: Source | None
    recipe: Recipe | None
    keys: tuple[tuple[int, int], ...]
    most: int
    _sparse: list[Sparse | None] = field(default_factory=list)
    _ready: bool = False

    @property
    def blocks(self) -> list[Rows]:
        """The rows that one thread computes at a time."""
        return list(_ranges(0, self.rows, max(1, BLOCK // self.cols)))

    def prepare(self, map_: Map = map) -> None:
        """The statistics over the whole tensor; map_ may call its function in several threads."""
        if self._ready:
            return
        recipe = self.recipe
        self._sparse = [] if recipe is None or recipe.method == "linear" else self._new_sparse(recipe)
        chosen = [s for s in self._sparse if s is not None]
        if any(s.density > 0 and s.key is None for s in chosen):
            self._find_thresholds(map_)
        if recipe is not None and recipe.rescale == "l1" and chosen:
            self._find_multipliers(map_)
        self._ready = True

    def _new_sparse(self, recipe: Recipe) -> list[Sparse | None]:
        found: list[Sparse | None] = []
        for i in range(len(self.sources)):
            if not recipe.densities or recipe.densities[i] >= 1:
                found.append(None)
                continue
            drawn = METHODS[recipe.method].sparsify == "random"
            sparse = Sparse(recipe.densities[i], self.keys[i] if drawn else None)
            if recipe.rescale == "density" and sparse.density > 0:
                sparse.divisor = np.float32(sparse.density)
            found.append(sparse)
        return found

    # ---- statistics -------------------------------------------------------------------------

    def _find_thresholds(self, map_: Map) -> None:
        wanted = {
            i: arithmetic.kept_count(s.density, self.rows * self.cols)
            for i, s in enumerate(self._sparse)
            if s is not None and s.density > 0 and s.key is None
        }

        if len(self.blocks) == 1:
            return self._select_thresholds(wanted)

        def high(rows: Rows) -> Any:
            return self._totals(rows, wanted, lambda i, delta: arithmetic.high_counts(delta))

        bins = {i: arithmetic.from_the_top(n, wanted[i]) for i, n in _add(map_(high, self.blocks)).items()}

        def low(rows: Rows) -> Any:
            return self._totals(rows, wanted, lambda i, delta: arithmetic.low_counts(delta, bins[i][0]))

        for i, counts in _add(map_(low, self.blocks)).items():
            low_bits, ties = arithmetic.from_the_top(counts, bins[i][1])
            bits = bins[i][0] << 16 | low_bits
            last = self._last_tie(i, bits, ties) if ties < counts[low_bits] else self.rows * self.cols - 1
            self._set_threshold(i, Threshold(bits, last))

    def _select_thresholds(self, wanted: dict[int, int]) -> None:
        """The same of a tensor whose magnitudes are in memory at once."""
        pieces = list(self._deltas(self.blocks[0], wanted))
        for i, count in wanted.items():
            magnitudes = np.concatenate([arithmetic.bits_of(deltas[i]) for _, deltas in pieces])
            self._set_threshold(i, arithmetic.select_threshold(magnitudes, count))

    def _set_threshold(self, model: int, threshold: Threshold) -> None:
        sparse = self._sparse[model]
        assert sparse is not None
        sparse.threshold = threshold

    def _totals(self, rows: Rows, models: Iterable[int], count: Callable[[int, Values], Any]) -> Any:
        return _add(
            {i: count(i, delta)} for _, deltas in self._deltas(rows, models) for i, delta in deltas.items()
        )

    def _last_tie(self, model: int, bits: int, ties: int) -> int:
        """The element that is the ties-th of those whose magnitude has these bits."""
        for start, deltas in self._deltas((0, self.rows), [model]):
            equal = np.flatnonzero(arithmetic.bits_of(deltas[model]) == bits)
            if ties <= equal.size:
                return start + int(equal[ties - 1])
            ties -= equal.size
        raise AssertionError("the ties that were counted are not there")

    def _find_multipliers(self, map_: Map) -> None:
        chosen = {i: s for i, s in enumerate(self._sparse) if s is not None}
        save = len(self.blocks) == 1  # its values are computed at once, from the same pieces

        def norms(rows: Rows) -> dict[int, tuple[list[float], list[float]]]:
            found: dict[int, tuple[list[float], list[float]]] = {i: ([], []) for i in chosen}
            for start, deltas in self._deltas(rows, chosen):
                for i, delta in deltas.items():
                    keep = chosen[i].keep(delta, start, save)
                    for total, partials in zip(found[i], arithmetic.exact_partials(np.abs(delta), keep)):
                        total += partials
            return found

        partials: dict[int, tuple[list[float], list[float]]] = {i: ([], []) for i in chosen}
        for block in map_(norms, self.blocks):
            for i, pair in block.items():
                for total, part in zip(partials[i], pair):
                    total += part
        for i, (before, after) in partials.items():
            norm, kept_norm = arithmetic.rounded_sum(before), arithmetic.rounded_sum(after)
            chosen[i].multiplier = arithmetic.l1_factor(norm, kept_norm)

    def _deltas(self, rows: Rows, models: Iterable[int]) -> Iterator[tuple[int, dict[int, Values]]]:
        """(first element, {model: its differences, float32 [n]}), piece by piece."""
        for start, stop in _ranges(*rows, max(1, PIECE // self.cols)):
            base = self._base(start, stop)
            yield start * self.cols, {i: self._delta(i, base, start, stop) for i in models}

    def _base(self, start: int, stop: int) -> Values:
        assert self.base is not None
        return self.base.rows(start, stop).reshape(-1)

    def _delta(self, model: int, base: Values, start: int, stop: int) -> Values:
        values = self.sources[model].rows(start, stop).reshape(-1)
        with np.errstate(all="ignore"):  # what is not finite is found in the result
            return np.subtract(values, base, out=values)

    # ---- values -----------------------------------------------------------------------------

    def merged(
        self, start: int, stop: int, encode: Callable[[Values], Any] | None = None, dtype: Any = np.float32
    ) -> Any:
        """Rows [start, stop), [rows, columns]: float32, or what encode makes of them, an array of dtype.

        Errors: CheckpointError: a value of a source that is not finite, naming model and tensor, or one of
        the merge that the output's dtype does not hold.
        """
        self.prepare()
        out = np.empty((stop - start, self.cols), dtype)
        with np.errstate(all="ignore"):
            for first, last in _ranges(start, stop, max(1, PIECE // self.cols)):
                values = self._piece(first, last)
                if values.size and int(arithmetic.bits_of(values).max()) > self.most:
                    raise self._name_fault(values, first, last)
                stored = values if encode is None else encode(values)
                out[first - start : last - start] = stored.reshape(-1, self.cols)
        return out

    def _piece(self, start: int, stop: int) -> Values:
        recipe = self.recipe
        if recipe is None:
            return self.sources[0].rows(start, stop).reshape(-1)
        if recipe.method == "linear":
            return arithmetic.linear([s.rows(start, stop).reshape(-1) for s in self.sources], recipe)
        base, deltas = self._base(start, stop), []
        for i, sparse in enumerate(self._sparse):
            delta = self._delta(i, base, start, stop)
            if sparse is not None:
                sparse.apply(delta, start * self.cols)
            deltas.append(delta)
        return arithmetic.combine(base, deltas, recipe)

    def _name_fault(self, values: Values, start: int, stop: int) -> CheckpointError:
        for source in (*((self.base,) if self.base else ()), *self.sources):
            bad = np.argwhere(~np.isfinite(source.rows(start, stop)))
            if len(bad):
                row, col = (int(n) for n in bad[0])
                expert = "" if source.expert is None else f"expert {source.expert}, "
                return CheckpointError(
                    f"{source.model}: {source.tensor.file_name}: {expert}row {start + row}, column {col}: "
                    "want a finite value, got NaN or infinity"
                )
        place = int(np.argmax(arithmetic.bits_of(values) > self.most))
        row, col = start + place // self.cols, place % self.cols
        return CheckpointError(
            f"{self.sources[0].model}: {self.name}: row {row}, column {col}: want a merged value in the "
            f"range of the output's dtype, got {values[place]:g}"
        )


def new_keys(seed: int, positions: Iterable[int], name: str) -> tuple[tuple[int, int], ...]:
    return tuple(mask_key(seed, position, name) for position in positions)


def _ranges(start: int, stop: int, step: int) -> Iterator[Rows]:
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def _add(parts: Iterable[dict[int, Any]]) -> dict[int, Any]:
    total: dict[int, Any] = {}
    for part in parts:
        for i, counts in part.items():
            total[i] = total[i] + counts if i in total else counts
    return total
