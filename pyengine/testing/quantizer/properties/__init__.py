"""The properties of a symmetric group quantizer, one function each.

A property takes the quantizer and one example, and returns None where it holds, or what is wrong, in
words.  Its docstring's first line is its equation, in these letters: x float32 [rows, cols], q its
codes, s its scales (of the group that an element is in), M the largest code, D = q * s.

Sums, products and comparisons are exact in float64 here: x has 24 bits, q 8 and s at most 24.
"""

from __future__ import annotations

from . import calibrated, groups, one_matrix, stored  # noqa: F401  each adds its properties to the list
from .registry import PROPERTIES, Property, merged

__all__ = ["PROPERTIES", "Property", "merged"]
