"""Measurements of quality.py as JSON, as tables of text or Markdown, and as a plot."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import NamedTuple

from ..checkpoint.names import layer_of
from ..files.strict_json import finite_or_null
from ..plots import check_plot, new_figure, save_figure
from ..tables import markdown_table, table
from .quality import Figures, Measurement


def as_json(measurements: list[Measurement]) -> str:
    """An infinite figure is null."""
    document = [
        {
            "label": m.label,
            "whole": _plain(m.whole),
            "quantized": _plain(m.quantized),
            "layers": [_plain(figures) for figures in m.layers],
            "tensors": [_plain(figures) for figures in m.tensors],
        }
        for m in measurements
    ]
    return json.dumps(finite_or_null(document), indent=2, allow_nan=False)


def _plain(figures: Figures) -> dict:
    return {
        "name": figures.name,
        "type": figures.type,
        "values": figures.values,
        "relative_error": figures.relative_error,
        "snr_db": figures.snr_db,
        "worst_group": figures.worst._asdict(),
    }


# ---- tables ----------------------------------------------------------------------------------------


class Section(NamedTuple):
    """One table: its rows, of which the first is the heading, and the alignment of its columns."""

    rows: list[list[str]]
    align: str


def as_table(measurements: list[Measurement]) -> str:
    """Tensors, then layers, then the quantized tensors and the whole.

    Names are without "model." and ".weight".  Tensors that equal the source in every candidate are
    counted in one line.  Of one candidate there is also the place of the worst group, [expert, row]; of
    several, the figures are side by side.
    """
    parts = [_legend(measurements), *(table(*section) for section in sections(measurements))]
    return "\n\n".join("\n".join(part) for part in [*parts, _unchanged(measurements)] if part)


def as_markdown(measurements: list[Measurement]) -> str:
    """The same for a model card."""
    lists = [[f"* {line}" for line in part] for part in (_legend(measurements), _unchanged(measurements))]
    tables = [markdown_table(*section) for section in sections(measurements)]
    return "\n\n".join("\n".join(part) for part in [lists[0], *tables, lists[1]] if part)


def _legend(measurements: list[Measurement]) -> list[str]:
    if len(measurements) == 1:
        return []
    return [f"{number}: {m.label}" for number, m in enumerate(measurements, 1)]


def sections(measurements: list[Measurement]) -> list[Section]:
    """The tables, of which the first cell says the kind: tensor, layer, together."""
    columns = [
        ("tensor", _changed([m.tensors for m in measurements])),
        ("layer", _changed([m.layers for m in measurements])),
        ("together", list(zip(*([m.quantized, m.whole] for m in measurements)))),
    ]
    section = _of_one if len(measurements) == 1 else _of_several
    return [section(title, rows) for title, rows in columns if rows]


def _changed(columns: list[list[Figures]]) -> list[tuple[Figures, ...]]:
    """The rows in which a candidate differs from the source."""
    return [row for row in zip(*columns) if any(figures.relative_error for figures in row)]


def _unchanged(measurements: list[Measurement]) -> list[str]:
    equal = [row for row in zip(*(m.tensors for m in measurements)) if not any(f.relative_error for f in row)]
    if not equal:
        return []
    types = Counter(figures.type for figures, *_ in equal)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items()))
    return [f"{len(equal)} tensors equal the source in every value: {kinds}"]


def _of_one(title: str, rows: list[tuple[Figures, ...]]) -> Section:
    head = [title, "type", "error", "SNR, dB", "worst group", ""]
    lines = [
        [
            short_name(f.name),
            f.type,
            f"{f.relative_error:.3e}",
            f"{f.snr_db:.2f}",
            f"{f.worst.relative_error:.3e}",
            _place(f),
        ]
        for (f,) in rows
    ]
    keep = [i for i in range(len(head)) if head[i] != "type" or title == "tensor"]
    return Section([[row[i] for i in keep] for row in [head, *lines]], "".join("<<>>><"[i] for i in keep))


def _of_several(title: str, rows: list[tuple[Figures, ...]]) -> Section:
    head = [title]
    for number in range(1, len(rows[0]) + 1):
        head += [f"{number}: dB", "worst"]
    lines = [[short_name(row[0].name)] for row in rows]
    for line, row in zip(lines, rows):
        for figures in row:
            if figures.relative_error:
                line += [f"{figures.snr_db:.2f}", f"{figures.worst.relative_error:.1e}"]
            else:
                line += ["equal", ""]
    return Section([head, *lines], "<" + ">>" * len(rows[0]))


def short_name(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def _place(figures: Figures) -> str:
    worst = figures.worst
    if worst.relative_error == 0:
        return ""
    tensor = "" if worst.tensor == figures.name else f"{short_name(worst.tensor)} "
    expert = "" if worst.expert is None else f"{worst.expert}, "
    return f"{tensor}[{expert}{worst.row}] group {worst.group}"


# ---- a plot ----------------------------------------------------------------------------------------


def plot(measurements: list[Measurement], path) -> None:
    """SNR against the layer: a line for the layers, a dot for each of their quantized tensors.

    Tensors equal to the source are not drawn.
    """
    path = check_plot(path)
    figure = new_figure((8, 4.5))
    panel = figure.subplots()
    for i, m in enumerate(measurements):
        dots, line = _points(m.quantized_tensors), _points(m.layers)
        label = f"{m.label}: {m.quantized.snr_db:.1f} dB"
        panel.plot(*zip(*line), color=f"C{i}", marker="_", label=label)
        panel.scatter(*zip(*dots), color=f"C{i}", s=9, alpha=0.5)
    panel.set(xlabel="layer", ylabel="signal to noise, dB")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    panel.legend()
    save_figure(figure, path)


def _points(figures: list[Figures]) -> list[tuple[int, float]]:
    """(layer, SNR)"""
    layers = ((layer_of(f.name), f.snr_db) for f in figures)
    return [(layer, snr) for layer, snr in layers if layer is not None and math.isfinite(snr)] or [
        (0, math.nan)
    ]
