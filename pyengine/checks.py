"""Checks of plain values.  To Python True is an int; here a bool is not a number."""

from __future__ import annotations

import math

import numpy as np

from .errors import InputError, quote


def is_integer(value: object) -> bool:
    """An int, or a NumPy integer; not a bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """An integer, or a float, also of NumPy; not a bool."""
    return is_integer(value) or isinstance(value, (float, np.floating))


def integer(name: str, value: object, low: int) -> int:
    """The value as an int.  InputError naming it: not an integer, or below low."""
    if not is_integer(value) or value < low:  # type: ignore[operator]
        raise InputError(f"{name}: want an integer of at least {low}, got {quote(value)}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """The value as a finite float.  InputError naming it: not a number, not finite, or out of range."""
    try:
        found = float(value) if is_number(value) else math.nan  # type: ignore[arg-type]
    except OverflowError:  # an int of more than 300 digits
        found = math.nan
    if not (low <= found <= high and math.isfinite(found)):
        raise InputError(f"{name}: want a number {_span(low, high)}, got {quote(value)}")
    return found


def _span(low: float, high: float) -> str:
    if math.isfinite(high):
        return f"from {low} to {high}"
    return f"of at least {low}" if math.isfinite(low) else "that is finite"
