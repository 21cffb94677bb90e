"""The bytes that a plan takes, by what the parameters are for: known before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoint.names import purpose_of
from ..tables import table
from .plan import PlannedParameter


@dataclass(frozen=True)
class Size:
    """What parameters of one purpose take.

    purpose     "attention", "routed experts"; "total" of all
    types       {INT8, INT4 or the dtype of floats: parameters}
    nbytes      of codes and scales, or of floats
    """

    purpose: str
    types: dict[str, int]
    nbytes: int

    @property
    def parameters(self) -> int:
        return sum(self.types.values())


def sizes(plan: Iterable[PlannedParameter]) -> list[Size]:
    """By purpose in the order of the forward pass, and the total last."""
    found: dict[str, list[PlannedParameter]] = {}
    for parameter in plan:
        found.setdefault(purpose_of(parameter.entries[0].name), []).append(parameter)
    every = [parameter for parameters in found.values() for parameter in parameters]
    return [_size(purpose, parameters) for purpose, parameters in [*found.items(), ("total", every)]]


def _size(purpose: str, parameters: list[PlannedParameter]) -> Size:
    types: dict[str, int] = {}
    for parameter in parameters:
        kind = f"INT{parameter.bits}" if parameter.bits else parameter.entries[0].dtype
        count = sum(math.prod(source.shape) for source in parameter.sources)
        types[kind] = types.get(kind, 0) + count
    return Size(purpose, types, sum(parameter.nbytes for parameter in parameters))


def as_table(title: str, found: list[Size]) -> list[str]:
    """One line a purpose."""
    rows = [[title, "stored as", "parameters", "bytes", "bits each"]]
    for size in found:
        each = 8 * size.nbytes / size.parameters
        types = " ".join(sorted(size.types))
        rows.append([size.purpose, types, f"{size.parameters:,}", f"{size.nbytes:,}", f"{each:.2f}"])
    return table(rows, "<<>>>")
