"""Tables of text: aligned columns for a terminal, or Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[str]


def table(rows: Sequence[Row], align: str) -> list[str]:
    """One line per row, without trailing spaces.  align: "<" or ">" per column."""
    widths = _widths(rows)
    return ["  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths)).rstrip() for row in rows]


def markdown_table(rows: Sequence[Row], align: str) -> list[str]:
    """The first row is the heading.  A "|" in a cell is escaped."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, width) for width in _widths(rows)]
    lines = ["| " + " | ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths)) + " |" for row in rows]
    rule = "|".join("-" * (w + 1) + (":" if a == ">" else "-") for a, w in zip(align, widths))
    return [lines[0], f"|{rule}|", *lines[1:]]


def _widths(rows: Sequence[Row]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows)]
