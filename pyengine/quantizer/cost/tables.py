"""The report of measure.py as tables, which text, Markdown and the page are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...files.strict_json import finite_or_null
from ...tables import markdown_table, table

Report = dict[str, Any]


class Table(NamedTuple):
    """One table: rows, of which the first is the heading; align: "<" or ">" per column."""

    title: str
    note: str
    rows: list[list[str]]
    align: str


def as_json(report: Report) -> str:
    return json.dumps(finite_or_null(report), indent=2, allow_nan=False)


def as_text(report: Report) -> str:
    parts = [[headline(report)]]
    parts += [
        [one.title, *table(one.rows, one.align), *([one.note] * bool(one.note))] for one in tables(report)
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def as_markdown(report: Report) -> str:
    return in_markdown(headline(report), tables(report), "##")


def in_markdown(first: str, some: Sequence[Table], heading: str) -> str:
    """A paragraph, and tables below it, each under a heading."""
    parts = [[first]]
    for one in some:
        parts.append([f"{heading} {one.title}", "", *markdown_table(one.rows, one.align)])
        if one.note:
            parts.append([one.note])
    return "\n\n".join("\n".join(part) for part in parts)


def headline(report: Report) -> str:
    texts = ", ".join(f"{text['name']} ({text['chunks']} chunks)" for text in report["texts"])
    return (
        f"Against {report['base']['name']}, {report['arithmetic']} arithmetic, chunks of {report['n_ctx']} "
        f"tokens of which the second half counts: {texts}. Each ± is a standard error over the tokens."
    )


def tables(report: Report) -> list[Table]:
    """Those that have rows."""
    made = [_cost(report), _floor(report), _by_layer(report), _other_experts(report), _groups(report)]
    made += [_by_position(report), _weakest(report)]
    return [one for one in made if len(one.rows) > 1]


def _of_texts(report: Report):
    """(candidate, figures of one text)"""
    return ((c, text) for c in report["candidates"] for text in c["texts"])


def _cost(report: Report) -> Table:
    head = ["weights", "bytes", "text", "perplexity", "increase", "KLD", "median", "p99", "max"]
    head += ["routing term", "the rest", "same token"]
    rows = [head]
    for i, text in enumerate(report["texts"]):
        base = report["candidates"][0]["texts"][i]["perplexity_base"]
        name, nbytes = report["base"]["name"], f"{report['base']['bytes']:,}"
        rows.append([name, nbytes, text["name"], _number(base, ".3f"), *[""] * 8])
    for one, text in _of_texts(report):
        kld, routing = text["kld"], text["routing"]
        split = [_small(routing["term"]), _small(routing["rest"])] if routing else ["", _small(kld)]
        rows.append(
            [one["name"], f"{one['bytes']:,}", _name_of(text), _number(text["perplexity"], ".3f")]
            + [_number(text["increase_percent"], "+.3f", ".3f") + " %", _small(kld)]
            + [f"{kld[key]:.1e}" for key in ("median", "p99", "max")]
            + [*split, percent(text["same_top"])]
        )
    note = (
        "KLD: divergence in nats of the source's distribution from the quantized model's. Routing term: KLD "
        "less KLD with the source's experts; the rest is the latter. Increase: of perplexity, paired."
    )
    return Table("What it costs", note, rows, "<><" + ">" * 9)


def _name_of(text: dict) -> str:
    return text["text"] + (" (CALIBRATED ON IT)" if text["calibrated_on"] else "")


def _floor(report: Report) -> Table:
    rows = [["weights", "the arithmetic's own KLD", "tokens", "KLD less it"]]
    for one in report["candidates"]:
        floor = one["floor"]
        if floor is not None:
            above = one["texts"][0]["kld_above_floor"]
            rows.append([one["name"], _small(floor), f"{floor['tokens']:,}", f"{above:.2e}"])
    note = "The quantized model in this arithmetic against itself in float64; 0 of float64."
    return Table("The engine's floor", note, rows, "<>>>")


def _by_layer(report: Report) -> Table:
    rows = [["weights", "layer", "KLD", "p99", "same token"]]
    for one in report["candidates"]:
        for layer in one.get("by_layer", ()):
            rows.append(
                [one["name"], short(layer["layer"]), _small(layer["kld"]), f"{layer['kld']['p99']:.1e}"]
                + [percent(layer["same_top"])]
            )
    return Table("One layer quantized at a time", "The other layers are the source's.", rows, "<<>>>")


def _other_experts(report: Report) -> Table:
    rows = [["weights", "text", "tokens with other experts", "KLD of these", "of the others", "by layer"]]
    for one, text in _of_texts(report):
        routing = text["routing"]
        if routing:
            shares = ", ".join(f"{100 * layer['share']:.2f}" for layer in text["other_experts"])
            both = [routing["kld_of_these"], routing["kld_of_the_others"]]
            rows.append(
                [one["name"], text["text"], f"{100 * routing['tokens_with_other_experts']:.1f} %"]
                + [_small(kld) if kld else "" for kld in both]
                + [f"{shares} %"]
            )
    note = "By layer: the share of the source's choices of experts that the quantized model did not make."
    return Table("Experts chosen differently", note, rows, "<<>>><")


def _groups(report: Report) -> Table:
    rows = [["weights", "text", "experts by use", "experts per layer", "share of choices", "KLD"]]
    for one, text in _of_texts(report):
        for group in text.get("expert_groups", ()):
            rows.append(
                [one["name"], text["text"], GROUP_WORDS[group["group"] - 1]]
                + [f"{group['experts_per_layer']:.1f}", f"{100 * group['share_of_choices']:.1f} %"]
                + ["" if group["kld"] is None else f"{group['kld']:.2e}"]
            )
    note = "KLD: the mean over the choices of a group's experts of the divergence of their tokens."
    return Table("By expert group", note, rows, "<<<>>>")


GROUP_WORDS = ("most used", "second", "third", "least used")


def _by_position(report: Report) -> Table:
    rows: list[list[str]] = []
    for one, text in _of_texts(report):
        if not rows:
            rows.append(["weights", "text", *(f"{p['from']}-{p['to']}" for p in text["by_position"])])
        rows.append([one["name"], text["text"], *(_small(p["kld"]) for p in text["by_position"])])
    return Table("By position in the chunk", "", rows, "<<" + ">" * (len(rows[0]) - 2))


def _weakest(report: Report) -> Table:
    rows = [["weights", "text", "chunk", "KLD", "its scored half begins"]]
    for one, text in _of_texts(report):
        weakest = text["weakest"]
        rows.append(
            [
                one["name"],
                text["text"],
                str(weakest["chunk"]),
                _small(weakest["kld"]),
                weakest["begins"] or "",
            ]
        )
    return Table("The weakest chunk", "", rows, "<<>><")


# ---- cells ---------------------------------------------------------------------------------------


def short(name: str) -> str:
    return name.removeprefix("model.layers.") if name.startswith("model.layers.") else name


def _number(estimate: dict, form: str, error_form: str | None = None) -> str:
    return f"{estimate['value']:{form}} ± {estimate['error']:{error_form or form}}"


def _small(estimate: dict) -> str:
    return f"{estimate['value']:.2e} ± {estimate['error']:.0e}"


def percent(share: dict) -> str:
    return f"{100 * share['value']:.2f} ± {100 * share['error']:.2f} %"
