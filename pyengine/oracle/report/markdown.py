"""A verdict as Markdown."""

from __future__ import annotations

import re

from ..verdict import GUILTY, OK, SUSPECT, Verdict
from .summary import HEAD, ROWS, cells, flip_lines, headline, legend, printable, sentences


def as_markdown(verdict: Verdict) -> str:
    """A summary for a pull request."""
    count = f"{len(verdict.rows)} of {verdict.known} tensors compared"
    lines = [
        f"### pyengine verify: {'passed' if verdict.ok else 'FAILED'} ({count})",
        "",
        _escaped(headline(verdict)),
        "",
    ]
    lines += [f"- {_escaped(line)}" for line in sentences(verdict)]
    lines += [f"- {_escaped(line.strip())}" for line in flip_lines(verdict)]
    rows = [row for row in verdict.rows if row.status != OK]
    if rows:
        blamed = [row for row in rows if row.status in (GUILTY, SUSPECT)]
        shown = blamed[:ROWS] or rows[:ROWS]
        lines += ["", f"| {' | '.join(HEAD)} |", "|---|--:|--:|--:|--:|---|"]
        lines += ["| " + " | ".join(map(_escaped, cells(row))) + " |" for row in shown]
        if len(rows) > len(shown):
            lines += ["", f"... and {len(rows) - len(shown)} more (`pyengine verify --all` shows them)."]
        lines += ["", *(f"{_escaped(line)}.  " for line in legend(verdict, shown))]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    # Names come from the candidate's file.
    return re.sub(r"([|<>`\\\[\]])", r"\\\1", printable(text))
