"""A verdict as one page that needs no other file: for a browser, light, dark or printed."""

from __future__ import annotations

import json
import shlex
from html import escape
from pathlib import Path

from ..verdict import OK, Verdict
from . import heat_map
from .equations import equations_of
from .summary import HEAD, WORDS, added_lines, cells, flip_lines, headline, legend, printable, sentences

FLIPS = 200  # shown
_TEMPLATE = Path(__file__).with_name("verdict.html")


def as_html(verdict: Verdict, command=(), files: dict[str, str] | None = None) -> str:
    """The page.  command: what repeats it; files: {what: path} to be named in it."""
    sections = [
        _verdict(verdict, files or {}),
        _next(verdict),
        _mistakes(verdict),
        _map(verdict),
        _blocks(verdict),
        _added(verdict),
        _elements(verdict),
        _flips(verdict),
        _command(command),
        _table(verdict),
    ]
    page = _TEMPLATE.read_text(encoding="utf-8")
    # The data last: it is text from the candidate's file, and may hold the marks of the template.
    page = page.replace("@title@", _text(f"pyengine verify: {'passed' if verdict.ok else 'FAILED'}"))
    before, _, after = page.partition("@body@")
    middle, _, end = after.partition("@data@")
    return "".join([before, *filter(None, sections), middle, _script(heat_map.data(verdict)), end])


def _script(value) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _text(text) -> str:
    return escape(printable(str(text)))


def _section(title, *parts) -> str:
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{_text(title)}</h2>\n{inner}\n</section>\n" if inner else ""


def _paragraphs(lines) -> str:
    return "\n".join(f"<p>{_text(line)}</p>" for line in lines)


def _rows(head, rows, numbers=()) -> str:
    """A table; numbers: columns to the right."""

    def line(tag, row):
        found = "".join(
            f"<{tag}{' class=number' if i in numbers else ''}>{_text(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )
        return f"<tr>{found}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class=scroll><table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table></div>"


# ---- the parts -------------------------------------------------------------------------------


def _verdict(verdict, files) -> str:
    word = "passed" if verdict.ok else "FAILED"
    lines = [f"<h1>pyengine verify</h1>\n<div class='verdict{' ok' if verdict.ok else ''}' id=verdict>"]
    lines.append(f"<p><b>{word}</b>: {_text(headline(verdict))}</p></div>")
    named = ", ".join(f"{what} <code>{_text(path)}</code>" for what, path in files.items())
    if named:
        lines.append(f"<p class=soft>{named}</p>")
    return "\n".join([*lines, _paragraphs(sentences(verdict, detail=False))]) + "\n"


def _next(verdict) -> str:
    names = verdict.next or verdict.between
    if not names:
        return ""
    text = "The tensors that narrow the error most, and that the trace does not hold:"
    return _section("Dump next", f"<p>{text}</p>", f"<pre id=next>{_text_lines(names)}</pre>")


def _text_lines(lines) -> str:
    return "\n".join(_text(line) for line in lines)


def _map(verdict) -> str:
    picture = heat_map.layers_by_tokens(verdict)
    if not picture:
        return ""
    choice = (
        "<p class=screen><label>Error <select id=kind><option value=total>end to end</option>"
        "<option value=own>of the operation alone, on the candidate's inputs</option></select></label>"
        "<span class=soft>A click on a cell shows its modules.</span></p>"
    )
    chosen = "<div id=chosen class=screen><span class=soft>no cell is chosen</span></div>"
    return _section(
        "Error by layer and token",
        "<p>The largest error of an element among the layer's tensors, in units of the budget.</p>",
        choice,
        f"<figure>{picture}</figure>",
        heat_map.key(),
        chosen,
    )


def _added(verdict) -> str:
    picture = heat_map.modules_by_layers(verdict)
    text = (
        "What each operation adds on the candidate's own inputs, in units of the budget. What it inherits is "
        "not in it: a module that is beyond 1 x here makes an error itself."
    )
    return (
        _section("Error added by module", f"<p>{text}</p><figure>{picture}</figure>{heat_map.key()}")
        if picture
        else ""
    )


def _elements(verdict) -> str:
    rows = [row for row in verdict.rows if row.status != OK and (row.place or row.difference)]
    found = []
    for row in rows[:12]:
        place, difference = row.place, row.difference
        if place is not None:
            first = "" if place.first is None else str(list(place.first))
            values = (
                first,
                str(list(place.worst)),
                f"{place.want:.9g}",
                f"{place.got:.9g}",
                f"{place.share:.2g} x",
            )
            found.append((row.name, WORDS[row.status], *values, str(place.not_finite or "")))
        elif difference.worst is not None:
            worst, want, got = difference.worst
            text = f"{difference.count} of {difference.size} differ"
            found.append(
                (
                    row.name,
                    WORDS[row.status],
                    str(list(difference.index)),
                    str(list(worst)),
                    want,
                    got,
                    "",
                    text,
                )
            )
    if not found:
        return ""
    head = ("tensor", "", "first", "worst", "want", "got", "of the budget", "")
    text = (
        "First: the first element beyond the budget, or that differs, [token, feature]. "
        "Worst: the one that is furthest off."
    )
    more = f"<p class=soft>... and {len(rows) - 12} more tensors</p>" if len(rows) > 12 else ""
    return _section("First and worst elements", f"<p>{text}</p>", _rows(head, found, (4, 5, 6)), more)


def _mistakes(verdict) -> str:
    parts = []
    for match in verdict.mistakes[:3]:
        parts.append(
            f"<p><b>{_text(match.name)}</b> <span class=soft>{match.share:.2g} of the budget away</span></p>"
        )
        for equation in equations_of(match.name):
            right = equation.right or "as the reference has it"
            parts.append(
                f"<div class=equations><div><p class=soft>{_text(equation.step)}, as it should be</p>"
                f"<pre>{_code(right)}</pre></div><div><p class=soft>with the mistake</p>"
                f"<pre>{_code(equation.wrong)}</pre></div></div>"
            )
    return _section("The mistake that fits", *parts)


def _code(text) -> str:
    return _text_lines(text.split("\n"))


def _flips(verdict) -> str:
    if not verdict.flips:
        return ""
    head = ("router", "token", "experts", "want", "", "margin", "allowed", "")
    rows = [
        (
            f.name,
            f.token,
            f.candidate,
            f.reference,
            f.kind,
            f"{f.margin:.2g}",
            f"{f.allowed:.2g}",
            "assumed" * f.assumed,
        )
        for f in verdict.flips[:FLIPS]
    ]
    text = (
        "Margin: how far apart the two choices are in the reference's logits. Within the allowed margin, "
        "rounding decides: the reference follows the candidate there. Assumed: the choice is not in the "
        "trace; it is the one that explains the tensors after it."
    )
    return _section(
        "Routing", _paragraphs(flip_lines(verdict)[:1]), f"<p>{text}</p>", _rows(head, rows, (1, 5, 6))
    )


def _blocks(verdict) -> str:
    """Who adds the error, block by block, where that was asked for."""
    lines = added_lines(verdict)
    return _section("Who adds the error", f"<pre>{_text_lines(lines)}</pre>") if lines else ""


def _command(command) -> str:
    return _section("Again", f"<pre id=command>{_text(shlex.join(command))}</pre>") if command else ""


def _table(verdict) -> str:
    rows = [cells(row) for row in verdict.rows]
    text = _paragraphs(legend(verdict, verdict.rows))
    opened = "" if len(rows) > 40 else " open"
    summary = f"{len(rows)} tensors, in the order of execution"
    inner = f"<summary>{summary}</summary>{_rows(HEAD, rows, (1, 2, 3, 4))}"
    table = f"<details{opened}>{inner}</details>"
    return _section("Every tensor", text, table)
