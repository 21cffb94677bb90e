"""The text that all reports of a verdict share."""

from __future__ import annotations

from ...tables import table
from ..dataflow import EMBEDDING, listed
from ..dataflow import HEAD as LM_HEAD
from ..names import MTP_AS_LAYER, further_layers
from ..verdict import DIFFERENT, EXACT, GUILTY, INHERITED, NEAR_TIE, OK, SUSPECT, Row, Verdict

ROWS, FLIPS, NAMES = 12, 5, 5  # shown of a long list

HEAD = ("tensor", "error", "end to end", "own inputs", "from token", "")
WORDS = {OK: "", GUILTY: "GUILTY", SUSPECT: "SUSPECT", INHERITED: "inherits", DIFFERENT: "differs"}


# ---- text ------------------------------------------------------------------------------------


def headline(verdict: Verdict) -> str:
    """One line: the outcome, and how many of how many tensors were compared."""
    count = f"{len(verdict.rows)} of {verdict.known} tensors"
    if verdict.ok and verdict.budget == EXACT:
        return f"equal: {count}, every bit{_hardly_a_check(verdict)}"
    if verdict.ok:
        return f"within the {verdict.budget} budget: {count}{_nearest(verdict)}{_hardly_a_check(verdict)}"
    beyond = [row for row in verdict.rows if row.status != OK]
    if verdict.nearest is not None:
        return (
            f"not bit-equal; {_within(verdict)}: {len(beyond)} of {len(verdict.rows)} tensors differ in bits"
        )
    how = "" if verdict.budget == EXACT else f" are beyond the {verdict.budget} budget"
    return f"different: {len(beyond)} of {len(verdict.rows)} tensors{how}; the first is {verdict.first.name}"


def _within(verdict) -> str:
    nearest = verdict.nearest
    if nearest.within:
        return f"within the {nearest.budget} budget ({nearest.share:.2f} of it)"
    times = f"{nearest.share:.2g} times it, " if nearest.share > 1 else ""
    return f"beyond the {nearest.budget} budget as well ({times}first in {nearest.first})"


def _nearest(verdict):
    shares = [(max(row.total_share or 0, row.own_share or 0), row.name) for row in verdict.rows]
    share, name = max(shares)
    return f"; nearest to it: {name}, {share:.2f} of it" if share else ""


def _hardly_a_check(verdict) -> str:
    """Nothing that was computed is among what was compared."""
    if {row.name for row in verdict.rows} <= {EMBEDDING} and verdict.known > 1:
        return f"; only {EMBEDDING} was compared, which is hardly a check"
    return ""


def sentences(verdict: Verdict, detail: bool = True) -> list[str]:
    """What is to be said of it, one line each; detail: also the elements of the tensor that is off."""
    shown = verdict.accused or verdict.first
    details = [shown.detail] if detail and shown is not None and shown.detail else []
    return [*left_out(verdict), *details, *floor_lines(verdict), *findings(verdict), *logits_lines(verdict)]


def left_out(verdict) -> list[str]:
    """The tensors that were not compared, and those that no compared tensor depends on."""
    lines = []
    if verdict.missing:
        lines.append(f"not compared: {len(verdict.missing)} tensors that the candidate does not have")
    if verdict.unchecked:
        lines.append(
            f"not checked: {len(verdict.unchecked)} of them, from {verdict.unchecked[0]} on: "
            "no tensor that was compared is computed from them"
        )
    if verdict.unknown:
        lines.append(
            f"left out: {len(verdict.unknown)} tensors that the reference does not know: "
            + _some(verdict.unknown)
        )
    return lines


def _some(names) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more


def findings(verdict) -> list[str]:
    """The blame, the likeness to a known mistake, the next step; one line each."""
    if verdict.nearest is not None:
        return _without_a_budget(verdict)
    lines = []
    if verdict.accused is not None:
        lines.append(_suspicion(verdict) if verdict.accused.status == SUSPECT else _guilt(verdict))
        lines.append(_likeness(verdict))
    elif verdict.rerun and not verdict.ok:
        lines.append("no operation alone is beyond its budget: the errors add up")
    return lines + extra_layers(verdict) + verdict.hints


def logits_lines(verdict) -> list[str]:
    """How far off they are; where nothing before them is accused, the kind of mistake and what to dump."""
    logits = verdict.logits
    if logits is None:
        return []
    other = "" if logits.other_top is None else f", first another at token {logits.other_top}"
    lines = [
        f"logits: KL divergence {logits.kld_mean:.3g} a token, at most {logits.kld_largest:.3g} at token "
        f"{logits.kld_token}; the likeliest id is the same at {logits.same_top} of {logits.tokens} "
        f"tokens{other}; worst at token {logits.worst_token}"
    ]
    if logits.advice and verdict.accused in (None, verdict.row(LM_HEAD)):
        lines += [f"the error's shape: {logits.sentence}", f"next: {logits.advice}"]
    return lines


def floor_lines(verdict) -> list[str]:
    floor = verdict.floor
    if floor is None:
        return []
    name = f"{floor.path}: " if floor.path else ""
    if floor.first is None:
        return [f"floor: {name}at most {floor.share:.2f} of the budget ({floor.tensor}); it is subtracted"]
    return [
        f"floor: {name}beyond the budget itself in {floor.beyond} tensors, the first is {floor.first}, at "
        f"most {floor.share:.2g} times ({floor.tensor}): that is the engine's, quantized or not; it is "
        "subtracted"
    ]


BLOCKS = ("output of", "block", "adds", "inherits", "end to end")


def added_lines(verdict) -> list[str]:
    """Which blocks add the error: a sentence, the routing, a table of those that add most."""
    added = verdict.added
    if added is None:
        return []
    beyond, count = added.beyond, len(added.blocks)
    lines = [f"added: none of {count} blocks adds more than its budget"]
    if beyond:
        worst = "; ".join(f"{b.name} {b.added:.2g} times" for b in beyond[:3])
        lines = [f"added: {len(beyond)} of {count} blocks add more than their budget: {worst}"]
    tokens = [token for token in added.tokens if token.added > 1]
    if tokens:
        most = max(tokens, key=lambda token: token.added)
        lines.append(
            f"by token: more than a budget is added at {len(tokens)} of {len(added.tokens)} tokens, from "
            f"token {tokens[0].token} ({tokens[0].name}) on; most at token {most.token} ({most.name})"
        )
    routing = added.routing
    if routing is not None:
        lines.append(
            f"routing: {routing.tensor} is at {routing.as_it_is:.2g} x, with near-ties followed at "
            f"{routing.near_ties:.2g} x, with every choice of the candidate's at {routing.every_choice:.2g} x"
        )
    most = sorted(added.blocks, key=lambda b: -b.added)[:ROWS]
    shown = [block for block in added.blocks if block in most]
    cells = [(b.name, b.block, *(f"{s:.2g} x" for s in (b.added, b.inherited, b.total))) for b in shown]
    lines += table([BLOCKS, *cells], "<<>>>")
    return [
        *lines,
        "adds: on the candidate's own input, in units of the block's budget; inherits: what the right block "
        "makes of that input, in units of the budget end to end",
    ]


def _without_a_budget(verdict):
    nearest = verdict.nearest
    does = "accepts this trace" if nearest.within else "names the operation"
    return [
        f"bits were compared, as no budget was asked for: --budget {nearest.budget} {does}",
        *extra_layers(verdict),
        *verdict.hints,
    ]


def _suspicion(verdict) -> str:
    missing, count = verdict.between, len(verdict.between)
    tensors = "1 tensor is" if count == 1 else f"{count} tensors are"
    after = (
        ""
        if verdict.search is None or verdict.search.start == "the ids"
        else f", back to {verdict.search.start}"
    )
    return (
        f"{verdict.accused.name}, or anything before it{after}: {tensors} not in the trace; "
        f"dump {listed(verdict.next or missing)} next"
    )


def _guilt(verdict) -> str:
    names = [row.name for row in verdict.guilty]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    text = f"guilty, on the candidate's own inputs: {', '.join(names[:3])}{more}"
    if verdict.between:
        text += f"; dump {listed(verdict.next)} next to see which part"
    return text


def _likeness(verdict) -> str:
    if verdict.mistakes:
        return likeness(verdict.mistakes)
    search = verdict.search
    if search is not None and search.stopped:
        return (
            f"looks like none of the {search.tried} known mistakes tried, of {search.known}: the time was up"
        )
    return "looks like no known mistake"


def likeness(mistakes) -> str:
    """A mistake, or those that the trace does not tell apart; or the one that explains most of the error."""
    names, count = "; ".join(match.name for match in mistakes[:NAMES]), len(mistakes)
    more = f"; and {count - NAMES} more" if count > NAMES else ""
    best = mistakes[0]
    if best.left:
        which = "" if count == 1 else f"one of {count}: "
        return f"looks most like {which}{names}{more} (explains {1 - best.left:.0%} of the error, not all)"
    if count == 1:
        return f"looks like: {names}"
    return f"looks like one of {count}, which these tensors do not tell apart: {names}{more}"


def extra_layers(verdict) -> list[str]:
    """A hint that needs no values: one layer behind the last."""
    layers = further_layers(verdict.unknown, [row.name for row in verdict.rows] + verdict.missing)
    if len(layers) != 1:
        return []
    return [f"looks like: the candidate has model.layers.{layers[0]}: {MTP_AS_LAYER}"]


def flip_lines(verdict) -> list[str]:
    if not verdict.flips:
        return []
    near = sum(flip.kind == NEAR_TIE for flip in verdict.flips)
    lines = [f"routing: other experts were chosen {len(verdict.flips)} times, {near} of them in near-ties"]
    ordered = sorted(verdict.flips, key=lambda flip: flip.kind == NEAR_TIE)
    return lines + [f"  {flip}" for flip in ordered[:FLIPS]]


def legend(verdict, rows) -> list[str]:
    """The meaning of the columns and words of a table."""
    budget = verdict.nearest.budget if verdict.nearest else verdict.budget
    lines = ["error: root mean square of the difference, as a part of the reference's"]
    if any(row.total_share is not None for row in rows):
        lines.append(
            f"end to end, own inputs: the error in units of the {budget} budget (1 x is allowed); "
            "own inputs: of the operation alone, on the candidate's inputs"
        )
    if any(row.token is not None for row in rows):
        beyond = "beyond the budget" if any(row.total_share is not None for row in rows) else "that differs"
        lines.append(f"from token: the first with an element {beyond}")
    statuses = {row.status for row in rows}
    lines += [text for status, text in _MEANINGS.items() if status in statuses]
    return lines


_MEANINGS = {
    GUILTY: "GUILTY: the operation is beyond its budget on inputs that are in the trace",
    SUSPECT: "SUSPECT: beyond the budget, but inputs of it are not in the trace: it, or anything before it",
    INHERITED: "inherits: beyond the budget end to end, within it on the candidate's own inputs",
    DIFFERENT: "differs: in bits, or beyond the budget where no operation was run again",
}


def cells(row: Row) -> tuple[str, ...]:
    def share(value):
        return "" if value is None else f"{value:.2g} x"

    return (
        row.name,
        _error(row),
        share(row.total_share),
        share(row.own_share),
        "" if row.token is None else str(row.token),
        WORDS[row.status],
    )


def _error(row) -> str:
    if row.error is None:
        return ""
    found = row.place.not_finite if row.place else row.difference and row.difference.not_finite
    if found:
        return found.kind
    return f"{row.error.rms / row.scale:.1e}" if row.scale else f"{row.error.rms:.1e} abs"


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def describe(row: Row, verdict: Verdict) -> list[str]:
    _, error, total, own, _, word = cells(row)
    parts = [word]
    parts += [f"error {error}"] if error else []
    parts += [f"{total} the budget end to end"] if total else []
    parts += [f"{own} the budget on its own inputs"] if own else []
    parts += [str(row.place)] if row.place else []
    if row is verdict.accused:
        if row.status == SUSPECT:
            parts.append(_suspicion(verdict))
        if verdict.mistakes:
            parts.append(f"looks like: {verdict.mistakes[0]}")
    return parts
