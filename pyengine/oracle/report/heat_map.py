"""The pictures of a verdict's page: errors by layer and token, and by module and layer, as SVG."""

from __future__ import annotations

import math
from html import escape

from ..rerun import layer_of
from ..verdict import EXACT, Verdict
from .summary import WORDS

BOUNDS = (0.1, 0.5, 1, 3, 10, 100, 1e4, 1e8)  # shares of the budget: one colour up to each, one behind
COLUMNS = 128  # at most, of tokens
_TEXTS = ("0.1", "0.5", "1", "3", "10", "100", "10,000", "10^8")
_LABELS = 150  # width of the names
_SIZE = 14  # of a cell, at least


def level(share: float | None) -> str:
    """The class of a colour."""
    if share is None:
        return "e"
    return f"c{sum(share > bound for bound in BOUNDS)}"


def key() -> str:
    """What the colours mean."""
    texts = [f"up to {text} x" for text in _TEXTS] + ["more, or not a number"]
    swatches = "".join(
        f"<span class=key><span class=swatch><svg viewBox='0 0 1 1' preserveAspectRatio=none>"
        f"<rect class=c{i} width=1 height=1 /></svg></span>{text}</span> "
        for i, text in enumerate(texts)
    )
    return f"<p class=soft>{swatches}</p>"


def groups(verdict: Verdict) -> list[tuple[str, list[int]]]:
    """(name, indices of rows): the embedding, each layer, the last norm and the head."""
    after = max((layer_of(row.name, -1) for row in verdict.rows), default=-1) + 1
    found: dict[tuple[int, str], list[int]] = {}
    for at, row in enumerate(verdict.rows):
        if row.by_token:
            layer = layer_of(row.name, after)
            name = f"layer {layer}" if 0 <= layer < after else row.name.removeprefix("model.")
            found.setdefault((layer, name), []).append(at)
    return [(name, rows) for (_, name), rows in sorted(found.items(), key=lambda item: item[0][0])]


def tokens_of(verdict: Verdict) -> int:
    """How many tokens the run had, as far as the rows say."""
    most = max((len(row.by_token) for row in verdict.rows), default=0)
    return max([most, *(row.rows[-1] + 1 for row in verdict.rows if row.rows)], default=0)


def data(verdict: Verdict) -> dict:
    """What the page's script needs.  -1: not finite."""

    def shares(values):
        return [-1 if not math.isfinite(x) else float(f"{x:.3g}") for x in values]

    tensors = [
        {
            "name": row.name,
            "word": WORDS[row.status],
            "total": shares(row.by_token),
            "own": shares(row.own_by_token),
            **({"rows": list(row.rows)} if row.rows else {}),
        }
        for row in verdict.rows
    ]
    layers = [{"name": name, "tensors": rows} for name, rows in groups(verdict)]
    return {"bounds": list(BOUNDS), "tokens": tokens_of(verdict), "layers": layers, "tensors": tensors}


# ---- pictures --------------------------------------------------------------------------------


def layers_by_tokens(verdict: Verdict) -> str:
    """An SVG, or nothing where no errors by token are known."""
    rows, tokens = groups(verdict), tokens_of(verdict)
    if not rows or not tokens or verdict.budget == EXACT and verdict.nearest is None:
        return ""
    count = min(tokens, COLUMNS)
    edges = [tokens * i // count for i in range(count + 1)]
    names = [name for name, _ in rows]
    cells = []
    for at, (name, members) in enumerate(rows):
        shares = _by_token(verdict, members)
        for first, last in zip(edges, edges[1:]):
            most = max((shares[t] for t in range(first, last) if t in shares), default=None)
            where = f"token {first}" if last == first + 1 else f"tokens {first} to {last - 1}"
            cells.append(
                (at, edges.index(first), most, f"{at} {first} {last}", f"{name}, {where}: {_said(most)}")
            )
    ticks = {i: str(edges[i]) for i in range(0, count, max(1, -(-count // 16)))}
    return _grid("map", names, count, cells, ticks, "token")


def modules_by_layers(verdict: Verdict) -> str:
    """What each operation adds, modules down and layers across; nothing where no operation was run again."""
    after = max((layer_of(row.name, -1) for row in verdict.rows), default=-1) + 1
    layers = [
        row for row in verdict.rows if row.own_share is not None and 0 <= layer_of(row.name, after) < after
    ]
    if not layers:
        return ""
    parts = list(
        dict.fromkeys(_part(row.name) for row in sorted(layers, key=lambda row: _part(row.name) == ""))
    )
    cells = []
    for row in layers:
        layer, part = layer_of(row.name, after), _part(row.name)
        cells.append((parts.index(part), layer, row.own_share, "", f"{row.name}: {_said(row.own_share)}"))
    ticks = {i: str(i) for i in range(0, after, max(1, -(-after // 20)))}
    return _grid("added", [part or "(the layer's sum)" for part in parts], after, cells, ticks, "layer")


def _part(name: str) -> str:
    return ".".join(name.split(".")[3:])


def _by_token(verdict, members) -> dict[int, float]:
    tokens, found = tokens_of(verdict), {}
    for at in members:
        row = verdict.rows[at]
        places = row.rows or range(tokens - len(row.by_token), tokens)
        for token, share in zip(places, row.by_token):
            found[token] = max(found.get(token, 0.0), share)
    return found


def _said(share) -> str:
    return "not compared" if share is None else f"{share:.2g} of the budget"


def _grid(name, rows, count, cells, ticks, axis) -> str:
    """cells: (row, column, share, data-cell, title)."""
    width = max(_SIZE / 2, min(_SIZE * 2, 900 / max(1, count)))
    top, labels = 18, max(_LABELS, 7 * max(map(len, rows)) + 12)
    height = top + _SIZE * len(rows) + 20
    parts = [
        f"<svg id={name} viewBox='0 0 {labels + width * count + 8:.0f} {height}' "
        f"width='{labels + width * count + 8:.0f}' role=img aria-label='errors by {axis}'>"
    ]
    step = max(1, -(-len(rows) // 60))
    for at, text in enumerate(rows):
        if at % step == 0:
            parts.append(
                f"<text x='{labels - 6}' y='{top + _SIZE * at + 11}' text-anchor=end>{escape(text)}</text>"
            )
    for row, column, share, where, title in cells:
        more = f" data-cell='{where}' tabindex=0" if where else ""
        parts.append(
            f"<rect class={level(share)} x='{labels + width * column:.1f}' y='{top + _SIZE * row}' "
            f"width='{width - 0.5:.1f}' height='{_SIZE - 0.5}'{more}><title>{escape(title)}</title></rect>"
        )
    for column, text in ticks.items():
        parts.append(f"<text x='{labels + width * column:.1f}' y='12'>{text}</text>")
    parts.append(f"<text x='{labels}' y='{height - 4}'>{axis}</text></svg>")
    return "".join(parts)
