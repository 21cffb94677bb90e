"""A verdict in words: for people, for a pull request, as JUnit XML, as a plot."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from ..figure import check_plot, new_figure, save_figure
from .judge import DIFFERENT, EXACT, GUILTY, INHERITED, NEAR_TIE, OK, Row, Verdict

ROWS, FLIPS = 12, 5  # what is listed of a long table

_HEAD = ("tensor", "error", "end to end", "own inputs", "from token", "")
_WORDS = {OK: "", GUILTY: "GUILTY", INHERITED: "inherits", DIFFERENT: "differs"}


# ---- text ------------------------------------------------------------------------------------


def headline(verdict: Verdict) -> str:
    """One line: what came of it."""
    count = len(verdict.rows)
    if verdict.ok and verdict.budget == EXACT:
        return f"equal: {count} tensors, every bit"
    if verdict.ok:
        return f"within the {verdict.budget} budget: {count} tensors{_nearest(verdict)}"
    beyond = [row for row in verdict.rows if row.status != OK]
    how = "" if verdict.budget == EXACT else f" are beyond the {verdict.budget} budget"
    return f"different: {len(beyond)} of {count} tensors{how}; the first is {verdict.first.name}"


def _nearest(verdict):
    shares = [(max(row.total_share or 0, row.own_share or 0), row.name) for row in verdict.rows]
    share, name = max(shares)
    return f"; nearest to it: {name}, {share:.2f} of it" if share else ""


def as_text(verdict: Verdict, every: bool = False) -> str:
    """The headline, what to look at, and a table of what is not ok (or of every tensor)."""
    lines = [headline(verdict), *_left_out(verdict)]
    if verdict.first and verdict.first.difference:
        lines.append(str(verdict.first.difference))
    lines += _findings(verdict) + _flip_lines(verdict)
    rows = verdict.rows if every else [row for row in verdict.rows if row.status != OK]
    if rows:
        lines += ["", *_table(rows if every else rows[:ROWS])]
    if not every and len(rows) > ROWS:
        lines.append(f"... and {len(rows) - ROWS} more")
    return "\n".join(lines)


def _left_out(verdict) -> list[str]:
    if not verdict.missing and not verdict.unknown:
        return []
    return [f"not compared: {len(verdict.missing)} tensors that only the reference has, "
            f"{len(verdict.unknown)} that only the candidate has"]


def _findings(verdict) -> list[str]:
    lines = []
    blame = " (by the float32 budget)" if verdict.budget == EXACT else ""
    if verdict.guilty:
        lines.append(f"guilty, on the candidate's own inputs{blame}: "
                     + ", ".join(row.name for row in verdict.guilty[:3])
                     + (f" and {len(verdict.guilty) - 3} more" if len(verdict.guilty) > 3 else ""))
    elif verdict.rerun and not verdict.ok:
        lines.append("no operation alone is beyond its budget: the errors add up")
    if verdict.mistakes:
        lines.append("looks like: " + "; or: ".join(match.name for match in verdict.mistakes[:3]))
    elif verdict.guilty:
        lines.append("looks like no known mistake")
    return lines + extra_layers(verdict)


def extra_layers(verdict) -> list[str]:
    """A hint that needs no values: layers behind the last."""
    layers = sorted({int(m[1]) for name in verdict.unknown
                     if (m := re.match(r"model\.layers\.(\d{1,6})(\.|$)", name))})
    known = {m[1] for row in verdict.rows if (m := re.match(r"model\.layers\.(\d+)", row.name))}
    if not layers or not known or layers[0] != max(map(int, known)) + 1:
        return []
    return [f"looks like: a layer too many: the candidate has model.layers.{layers[0]}, as if the "
            "next-token-prediction block were a layer"]


def _flip_lines(verdict) -> list[str]:
    if not verdict.flips:
        return []
    near = sum(flip.kind == NEAR_TIE for flip in verdict.flips)
    lines = [f"routing: {len(verdict.flips)} choices of experts differ, {near} of them near-ties"]
    ordered = sorted(verdict.flips, key=lambda flip: flip.kind == NEAR_TIE)
    return lines + [f"  {flip}" for flip in ordered[:FLIPS]]


def _cells(row: Row) -> tuple[str, ...]:
    def share(value):
        return "" if value is None else f"{value:.2g} x"

    error = ""
    if row.error is not None:
        error = f"{row.error.rms / row.scale:.1e}" if row.scale else f"{row.error.rms:.1e} abs"
    return (row.name, error, share(row.total_share), share(row.own_share),
            "" if row.token is None else str(row.token), _WORDS[row.status])


def _table(rows) -> list[str]:
    cells = [_HEAD, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
            for line in cells]


# ---- Markdown --------------------------------------------------------------------------------


def as_markdown(verdict: Verdict) -> str:
    """A summary for a pull request."""
    lines = [f"### pyengine verify: {'passed' if verdict.ok else 'FAILED'}", "",
             _escaped(headline(verdict)), ""]
    lines += [f"- {_escaped(line)}" for line in [*_left_out(verdict), *_findings(verdict)]]
    lines += [f"- {_escaped(line.strip())}" for line in _flip_lines(verdict)]
    rows = [row for row in verdict.rows if row.status != OK]
    if rows:
        shown = [row for row in rows if row.status == GUILTY][:ROWS] or rows[:ROWS]
        lines += ["", "| tensor | error | end to end | own inputs | from token | |",
                  "|---|--:|--:|--:|--:|---|"]
        lines += ["| " + " | ".join(map(_escaped, _cells(row))) + " |" for row in shown]
        if len(rows) > len(shown):
            lines += ["", f"{len(rows) - len(shown)} more tensors are beyond the budget."]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    # Names come from the candidate's file.
    return re.sub(r"([|<>`\\\[\]])", r"\\\1", _printable(text))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


# ---- JUnit XML -------------------------------------------------------------------------------


def as_junit(verdict: Verdict) -> str:
    """A test case a tensor.  What only inherits an error is skipped, so that CI counts the guilty."""
    inherited_fails = not any(row.status in (GUILTY, DIFFERENT) for row in verdict.rows)
    suite = ElementTree.Element("testsuite", name="pyengine verify", tests=str(len(verdict.rows)))
    failures = skipped = 0
    for row in verdict.rows:
        case = ElementTree.SubElement(suite, "testcase", classname=f"pyengine.{verdict.budget}",
                                      name=_printable(row.name), time="0")
        if row.status == OK:
            continue
        if row.status == INHERITED and not inherited_fails:
            skipped += 1
            ElementTree.SubElement(case, "skipped", message="inherits the error of an earlier tensor")
            continue
        failures += 1
        failure = ElementTree.SubElement(case, "failure", type=row.status,
                                         message=_printable("; ".join(_describe(row, verdict))))
        failure.text = _printable(str(row.difference or ""))
    suite.set("failures", str(failures))
    suite.set("skipped", str(skipped))
    suite.set("errors", "0")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, "unicode") + "\n"


def _describe(row: Row, verdict: Verdict) -> list[str]:
    _, error, total, own, token, word = _cells(row)
    parts = [word]
    parts += [f"error {error}"] if error else []
    parts += [f"{total} the budget end to end"] if total else []
    parts += [f"{own} the budget on its own inputs"] if own else []
    parts += [f"from token {token}"] if token else []
    if verdict.guilty and row is verdict.guilty[0] and verdict.mistakes:
        parts.append(f"looks like: {verdict.mistakes[0]}")
    return parts


# ---- plot ------------------------------------------------------------------------------------


def plot(verdict: Verdict, path) -> None:
    """Each tensor's relative error by its layer, and what the budget allows the layers' outputs."""
    path = check_plot(path)
    figure = new_figure((9, 4.5))
    panel = figure.subplots()
    drawn = [row for row in verdict.rows if row.error and row.scale and row.error.rms > 0]
    for status, colour in ((OK, "tab:gray"), (INHERITED, "tab:orange"), (DIFFERENT, "tab:orange"),
                           (GUILTY, "tab:red")):
        rows = [row for row in drawn if row.status == status]
        if rows:
            panel.scatter([_place(row, verdict) for row in rows],
                          [row.error.rms / row.scale for row in rows], s=14, c=colour,
                          label=_WORDS[status] or "ok")
    layers = [row for row in drawn if re.fullmatch(r"model\.layers\.\d+", row.name)]
    panel.plot([_place(row, verdict) for row in layers], [row.error.rms / row.scale for row in layers],
               c="tab:blue", lw=1, label="the layer's output")
    if layers and all(row.total_share for row in layers):
        panel.plot([_place(row, verdict) for row in layers],
                   [row.error.rms / row.scale / row.total_share for row in layers], c="black", lw=1,
                   ls="--", label=f"{verdict.budget} budget")
    panel.set(yscale="log", xlabel="layer", ylabel="error, relative to the reference's size")
    panel.set_title(headline(verdict), fontsize="small", wrap=True)
    panel.grid(alpha=0.3)
    if drawn:
        panel.legend()
    save_figure(figure, path)


def _place(row: Row, verdict: Verdict) -> float:
    """The layer's number, its tensors spread over the one before; -1 and the last + 1 beside them."""
    numbers = [int(m[1]) for r in verdict.rows if (m := re.match(r"model\.layers\.(\d+)", r.name))]
    match = re.match(r"model\.layers\.(\d+)(\.|$)", row.name)
    if not match:
        return -1.0 if row.name == "model.embed_tokens" else max(numbers, default=-1) + 1.0
    same = [r.name for r in verdict.rows if r.name.startswith(f"{match[0].rstrip('.')}.")
            or r.name == match[0].rstrip(".")]
    return int(match[1]) - 1 + (same.index(row.name) + 1) / len(same)
