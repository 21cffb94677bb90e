"""A verdict in words, for people."""

from __future__ import annotations

from ...tables import table
from ..verdict import OK, Verdict
from .summary import HEAD, ROWS, added_lines, cells, flip_lines, headline, legend, sentences


def as_text(verdict: Verdict, every: bool = False) -> str:
    """The headline, the first tensor that is off, and a table of those that are not ok (or of every one)."""
    lines = [headline(verdict), *sentences(verdict), *flip_lines(verdict)]
    if verdict.added is not None:
        lines += ["", *added_lines(verdict)]
    rows = verdict.rows if every else [row for row in verdict.rows if row.status != OK]
    if rows:
        lines += [
            "",
            *table([HEAD, *map(cells, rows if every else rows[:ROWS])], "<" + ">" * (len(HEAD) - 1)),
        ]
        if not every and len(rows) > ROWS:
            lines.append(f"... and {len(rows) - ROWS} more (--all shows them)")
        lines += ["", *legend(verdict, rows)]
    return "\n".join(lines)
