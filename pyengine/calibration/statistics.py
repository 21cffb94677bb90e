"""Activation statistics: how great the inputs of each linear are on a text.

    sums    {Hugging Face's parameter name: float64 [n], or [experts, n]}: sums of squares by column
    counts  {the same name: float64 [1], or [experts]}: tokens that were added up

What a column weighs is its mean square.  Where text says nothing:

    a routed expert with no token    the mean over its layer's experts: all their sums over all their counts
    a parameter without statistics   1 for every column
    a column that is always zero     the least mean square of the others' that is above 0, or 1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ids import Ids

FEW = 0.05  # of the mean of a layer's experts: an expert with fewer tokens is listed, and stands by its layer

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Run:
    """The text that statistics come from, by which they can be made again.

    model        `Checkpoint.fingerprint`
    ids          int32 [T], all texts one after another
    texts        [{name, sha256, bytes, tokens}], as `Text.describe` has them
    context      tokens of a window, which starts from an empty state; windows do not cross texts
    all_experts  every token went through every expert
    """

    model: str
    ids: Ids
    texts: list[dict[str, Any]]
    context: int
    all_experts: bool = False

    def windows(self) -> list[slice]:
        found, start = [], 0
        for text in self.texts:
            stop = start + text["tokens"]
            found += [slice(at, min(at + self.context, stop)) for at in range(start, stop, self.context)]
            start = stop
        return found


@dataclass(frozen=True, eq=False)
class Statistics:
    """chunks, chunk_tokens, datasets: as a file says; run: None of a file that another program wrote."""

    path: Path
    sha256: str
    sums: dict[str, Array]
    counts: dict[str, Array]
    chunks: int = 0
    chunk_tokens: int = 0
    datasets: list[str] = field(default_factory=list)
    run: Run | None = None

    def describe(self) -> dict[str, Any]:
        """For a provenance."""
        if self.run is None:
            return {"sha256": self.sha256}
        run = self.run
        said = {"texts": run.texts, "context": run.context, "all_experts": run.all_experts}
        return {"sha256": self.sha256, **said}

    def weights(self, name: str, expert: int | None, columns: int) -> Array:
        """What each column of a linear weighs, float64 [columns], above 0 and finite."""
        if name not in self.sums:
            return np.ones(columns)
        sums, counts = np.atleast_2d(self.sums[name]), self.counts[name]
        of = 0 if expert is None else expert
        if counts[of] > 0:
            mean = sums[of] / counts[of]
        else:
            total = np.zeros(columns)
            for one in sums:  # one after another: one order, whatever the processor
                total += one
            mean = total / max(1.0, float(counts.sum()))
        return above_zero(mean)

    def few(self, name: str, share: float = FEW) -> list[int]:
        """The experts of a stack with fewer tokens than `share` of the mean."""
        return few_experts(self.counts[name], share)


def few_experts(counts: NDArray[Any], share: float = FEW) -> list[int]:
    mean = float(counts.sum()) / len(counts)
    return [e for e, count in enumerate(counts.tolist()) if count < share * mean or count == 0]


def above_zero(mean: Array) -> Array:
    positive = mean[mean > 0]
    least = float(positive.min()) if len(positive) else 1.0
    return np.where(mean > 0, mean, least)
