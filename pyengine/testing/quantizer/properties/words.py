"""What is wrong with a matrix, in words."""

from __future__ import annotations

import numpy as np

from ..subject import Quantized


def first_where(wrong, x, q: Quantized, what: str, **others) -> str | None:
    """The first place where `wrong` is true, with its x, q and s."""
    places = np.argwhere(wrong)
    if not len(places):
        return None
    row, column = (int(i) for i in places[0])
    more = "".join(f", {name} = {_number(a[row, column])}" for name, a in others.items())
    return (
        f"row {row}, column {column}: {what}: x = {_number(x[row, column])}, "
        f"q = {q.codes[row, column]}, s = {_number(q.s[row, column])}, "
        f"x / s = {quotient(x[row, column], q.s[row, column])}{more}"
    )


def compare(x, expected, got, sign=1, where=True, slack=0) -> str | None:
    """The first place whose code is not sign * the expected one, or whose scale is another."""
    differ = (got.codes != sign * expected.codes) | ~(
        (abs(got.s - expected.s) <= slack) | (np.isnan(got.s) & np.isnan(expected.s))
    )
    places = np.argwhere(differ & where)
    if not len(places):
        return None
    row, column = (int(i) for i in places[0])
    return (
        f"row {row}, column {column}: x = {_number(x[row, column])}: want "
        f"q = {sign * expected.codes[row, column]}, s = {_number(expected.s[row, column])}, "
        f"got q = {got.codes[row, column]}, s = {_number(got.s[row, column])}"
    )


def _number(value) -> str:
    return f"{float(value):.9g}"


def quotient(x, s) -> str:
    return f"{float(x) / float(s):.9g}" if s else "none"
