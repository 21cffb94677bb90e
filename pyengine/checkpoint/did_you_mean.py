"""Tensor names that differ from the ones a reader knows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert

LONGEST, MOST_KINDS = 200, 1000
TWICE = "want this tensor in one form, got it in another as well"  # of a name that is not unknown


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name of `names` that is most like `name`, or None if no name is like it.

    The comparison leaves out the numbers of layers and experts and a last ".weight".  Of names that are
    equally alike, the one with the same numbers is taken, or else the first.  None also where a file has
    longer or more names than a model has: the comparison takes the product of their lengths.
    """
    alike: dict[str, list[str]] = {}
    for other in sorted(other for other in names if len(other) <= LONGEST):
        alike.setdefault(_without_numbers(other), []).append(other)
    if len(name) > LONGEST or len(alike) > MOST_KINDS:
        return None
    close = difflib.get_close_matches(_without_numbers(name), alike, n=1, cutoff=0.6)
    if not close:
        return None
    numbers = _NUMBER.findall(name)
    return min(alike[close[0]], key=lambda other: _NUMBER.findall(other) != numbers)


def _without_numbers(name: str) -> str:
    return _NUMBER.sub("N", name).removesuffix(".weight")


def hint(name: str, names: Iterable[str], what: str) -> str:
    """ "; WHAT: the nearest of names", or nothing."""
    nearest = nearest_name(name, names)
    return "" if nearest is None else f"; {what}: {nearest}"
