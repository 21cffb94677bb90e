"""The tables of parameters in README.md, made from requests.py: `python -m pyengine.server.tables`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pydantic import BaseModel

from .body import wanted
from .requests import ChatRequest, CompletionRequest, Harmless


def tables() -> list[str]:
    """Markdown: parameters that are done, harmless ones, and those with values that turn a method off."""
    rows = list(_rows())
    done = [row for row in rows if row[0] not in Harmless.model_fields and not row[4]]
    harmless = [row for row in rows if row[0] in Harmless.model_fields]
    neutral = [row for row in rows if row[4]]
    return [
        _table(
            "parameter | of | values | meaning", [(f"`{n}`", of, want, text) for n, of, want, text, _ in done]
        ),
        _table("parameter | values | meaning", [(f"`{n}`", want, text) for n, _, want, text, _ in harmless]),
        _table(
            "parameter | of | accepted | meaning",
            [(f"`{n}`", of, want.partition(": nothing")[0], text) for n, of, want, text, _ in neutral],
        ),
    ]


def _rows() -> Iterator[tuple[str, str, str, str, bool]]:
    """(parameter, the kinds that have it, values, meaning, whether only these values are done)."""
    kinds: list[tuple[str, type[BaseModel]]] = [("completions", CompletionRequest), ("chat", ChatRequest)]
    names = dict.fromkeys(name for _, kind in kinds for name in kind.model_fields)
    for name in names:
        having = [(of, kind) for of, kind in kinds if name in kind.model_fields]
        of = "both" if len(having) == 2 else having[0][0]
        wants = dict.fromkeys(wanted(kind, name) for _, kind in having)
        meanings = dict.fromkeys(str(kind.model_fields[name].description) for _, kind in having)
        extra = having[0][1].model_fields[name].json_schema_extra
        only = isinstance(extra, dict) and "enum" in extra
        yield name, of, "; ".join(wants), "; ".join(meanings), only


def _table(head: str, rows: list[tuple[str, ...]]) -> str:
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|---" * columns + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(tables()) + "\n")
