"""The report as one HTML page: tables, and charts as SVG inside it.  It loads nothing and links nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .tables import GROUP_WORDS, Report, Table, headline, short, tables

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { text-align: left; } .r { text-align: right; } .note { color: #666; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #222; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
"""
COLORS = ("#3366aa", "#cc6633", "#449955", "#8855aa", "#aa8822", "#557788")
WIDTH, BAR, GAP, LEFT, RIGHT = 720, 16, 6, 190, 90  # pixels


def as_html(report: Report) -> str:
    return in_html("What quantizing costs", "", headline(report), tables(report), charts_of(report))


def in_html(title: str, before: str, first: str, some: Sequence[Table], charts: dict[str, Chart]) -> str:
    """The page: HTML before the figures; a paragraph; tables, each below the chart that has its title."""
    parts = [f"<h1>{escape(title)}</h1>", before, f"<p>{escape(first)}</p>"]
    for one in some:
        parts += [f"<h2>{escape(one.title)}</h2>", _chart_of(charts, one), _html_table(one)]
        if one.note:
            parts.append(f'<p class="note">{escape(one.note)}</p>')
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html_table(one: Table) -> str:
    marks = ["" if a == "<" else ' class="r"' for a in one.align]
    head, *rows = (
        "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(row, marks))
        for tag, row in zip(["th", *["td"] * (len(one.rows) - 1)], one.rows)
    )
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>"


# ---- charts --------------------------------------------------------------------------------------


class Chart:
    """Horizontal bars of values, each of one or two parts one behind the other.

    bars: [(label, parts, color)]
    """

    def __init__(self, title: str, bars: Sequence[tuple[str, Sequence[float], str]]):
        self.title, self.bars = title, bars

    def svg(self) -> str:
        height = len(self.bars) * (BAR + GAP) + GAP
        most = max((sum(parts) for _, parts, _ in self.bars), default=0.0) or 1.0
        lines = [
            f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
            f'aria-label="{escape(self.title)}">'
        ]
        for i, (label, parts, color) in enumerate(self.bars):
            y, x = GAP + i * (BAR + GAP), float(LEFT)
            middle = y + BAR - 4
            lines.append(f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(label)}</text>')
            for part, opacity in zip(parts, (1, 0.45)):
                width = max(0.0, part) / most * (WIDTH - LEFT - RIGHT)
                lines.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}" '
                    f'fill-opacity="{opacity}"/>'
                )
                x += width
            lines.append(f'<text x="{x + 6:.1f}" y="{middle}">{sum(parts):.2e}</text>')
        return "\n".join([*lines, "</svg>"])


def _chart_of(charts: dict[str, Chart], one: Table) -> str:
    return charts[one.title].svg() if one.title in charts else ""


def charts_of(report: Report) -> dict[str, Chart]:
    """{title: chart} of each table that has one."""
    colors = {one["name"]: COLORS[i % len(COLORS)] for i, one in enumerate(report["candidates"])}
    cost, layers, groups, positions = [], [], [], []
    for one in report["candidates"]:
        name, color = one["name"], colors[one["name"]]
        for text in one["texts"]:
            label = f"{name}, {text['text']}"
            cost.append((_fit(label), _parts(text), color))
            groups += [
                (_fit(f"{name}, {GROUP_WORDS[group['group'] - 1]}"), [group["kld"] or 0.0], color)
                for group in text.get("expert_groups", ())
            ]
            positions += [
                (_fit(f"{name}, {part['from']}-{part['to']}"), [part["kld"]["value"]], color)
                for part in text["by_position"]
            ]
        layers += [
            (_fit(f"{name}, {short(layer['layer'])}"), [layer["kld"]["value"]], color)
            for layer in one.get("by_layer", ())
        ]
    charts = [
        Chart("What it costs", cost),
        Chart("One layer quantized at a time", layers),
        Chart("By expert group", groups),
        Chart("By position in the chunk", positions),
    ]
    return {one.title: one for one in charts}


def _parts(text: dict[str, Any]) -> list[float]:
    """The rest, and behind it the routing term."""
    routing = text["routing"]
    return [routing["rest"]["value"], routing["term"]["value"]] if routing else [text["kld"]["value"]]


def _fit(label: str) -> str:
    most = LEFT // 7
    return label if len(label) <= most else "..." + label[3 - most :]
