"""Tensor names that differ from the ones a reader knows."""

from __future__ import annotations

import difflib
import re

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert

LONGEST, MOST_KINDS = 200, 1000


def nearest_name(name: str, names) -> str | None:
    """The one of `names` most like `name`, or None if none is like it.

    The numbers of layers and experts do not count, nor does a last ".weight"; but of names alike the
    one with the same numbers is taken, or else the first.  None too where a file has longer or more
    names than a model does: comparing them takes the product of their lengths.
    """
    alike = {}
    for other in sorted(other for other in names if len(other) <= LONGEST):
        alike.setdefault(_what_counts(other), []).append(other)
    if len(name) > LONGEST or len(alike) > MOST_KINDS:
        return None
    close = difflib.get_close_matches(_what_counts(name), alike, n=1, cutoff=0.6)
    if not close:
        return None
    numbers = _NUMBER.findall(name)
    return min(alike[close[0]], key=lambda other: _NUMBER.findall(other) != numbers)


def _what_counts(name):
    return _NUMBER.sub("N", name).removesuffix(".weight")


def hint(name: str, names, what: str) -> str:
    """"; WHAT: the nearest of names", or nothing."""
    nearest = nearest_name(name, names)
    return "" if nearest is None else f"; {what}: {nearest}"
