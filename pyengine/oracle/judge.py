"""A candidate's trace against the reference: what differs, which operation is to blame, and what kind
of mistake it looks like.

End to end, a tensor is compared with the reference's.  Then each operation is run again on the
candidate's own inputs: one that is beyond its budget there is guilty, another that is beyond it end to
end has inherited the error.  Where the router of the candidate chooses other experts, and the reference
shows that this was a near-tie, the reference goes on with the candidate's choice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from ..reference import ReferenceModel
from ..trace import Trace
from ..verify import Comparison, Difference, compare, compare_tensors
from .budget import Budget, Error, measure
from .mistakes import Match, diagnose
from .rerun import is_choice, own_values, usable

EXACT = "exact"
OK, GUILTY, INHERITED, DIFFERENT = "ok", "guilty", "inherited", "different"
NEAR_TIE, FOLLOWS, WRONG = "near-tie", "follows its logits", "wrong"


@dataclass(frozen=True)
class Flip:
    """A token for which the router of the candidate chose other experts than the reference.

    margin    how far apart the two choices are in the reference's logits: 0 is a tie
    allowed   the margin that the budget explains
    kind      "near-tie"; "follows its logits": they are wrong, the choice among them is right; "wrong"
    """

    name: str
    token: int
    reference: list[int]
    candidate: list[int]
    margin: float
    allowed: float
    kind: str

    def __str__(self):
        return (f"{self.name} token {self.token}: experts {self.candidate}, want {self.reference}: "
                f"{self.kind}, margin {self.margin:.2g}, allowed {self.allowed:.2g}")


@dataclass(frozen=True)
class Row:
    """One tensor.  status: ok, guilty, inherited, or different where no operation was run again.

    error, own            from the reference, end to end and of the operation on the candidate's inputs
    total_share, own_share  of the budget: more than 1 is beyond it; None without a budget
    scale                 root mean square of the reference's values
    difference            in bits, where they differ
    token                 the first that is beyond the budget, or None
    """

    name: str
    status: str
    scale: float
    error: Error | None
    own: Error | None
    total_share: float | None
    own_share: float | None
    difference: Difference | None
    token: int | None


@dataclass(frozen=True)
class Verdict:
    """ok; rows in the order of execution; flips; names only one side has; what the mistake looks like.

    budget is "exact" or the dtype of the budget; rerun says whether operations were run again.
    """

    ok: bool
    budget: str
    factor: float | None
    rows: list[Row]
    flips: list[Flip]
    missing: list[str]
    unknown: list[str]
    rerun: bool
    mistakes: list[Match] = field(default_factory=list)

    @property
    def first(self) -> Row | None:
        """The first tensor that is not ok."""
        return next((row for row in self.rows if row.status != OK), None)

    @property
    def guilty(self) -> list[Row]:
        return [row for row in self.rows if row.status == GUILTY]

    def as_dict(self) -> dict:
        """For JSON: what is not finite is None."""
        differences = [row.difference for row in self.rows if row.difference]
        return _finite({
            "ok": self.ok, "equal": not differences, "compared": len(self.rows),
            "budget": self.budget, "factor": self.factor, "rerun": self.rerun,
            "first": self.first.name if self.first else None,
            "guilty": [row.name for row in self.guilty],
            "mistakes": [asdict(match) for match in self.mistakes],
            "flips": [asdict(flip) for flip in self.flips], "missing": self.missing,
            "unknown": self.unknown, "differences": [asdict(d) for d in differences],
            "tensors": [asdict(row) for row in self.rows]})


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def judge_bits(reference: Trace, candidate: Trace, model: ReferenceModel | None = None) -> Verdict:
    """Every bit, after rounding to float32.  With a model, and where they differ, the operations are
    run again and judged by the float32 budget.  Errors: InputError (verify.compare)."""
    comparison = compare(reference, candidate)
    if comparison.equal or model is None:
        return Verdict(comparison.equal, EXACT, None, _rows_in_bits(comparison, reference, candidate),
                       [], comparison.missing, comparison.unknown, False)
    verdict = judge(model, candidate, measure(model, candidate.ids, "float32", candidate.tensors))
    differences = {d.name: d for d in comparison.differences}
    status = {row.name: row.status for row in verdict.rows}
    rows = [Row(**{**vars(row), "difference": differences.get(row.name),
                   "status": _status_in_bits(row.name, differences, status)}) for row in verdict.rows]
    return Verdict(False, EXACT, verdict.factor, rows, verdict.flips, comparison.missing,
                   comparison.unknown, True, verdict.mistakes)


def _status_in_bits(name, differences, status):
    if name not in differences:
        return OK
    return DIFFERENT if status[name] == OK else status[name]


def _rows_in_bits(comparison: Comparison, reference, candidate) -> list[Row]:
    differences = {d.name: d for d in comparison.differences}
    return [_plain_row(name, reference.tensors[name], candidate.tensors[name], differences.get(name))
            for name in comparison.compared]


def _plain_row(name, truth, value, difference) -> Row:
    """Without a budget; figures only of what differs, so that equal traces stay cheap."""
    error, scale = None, 0.0
    if difference and truth.shape == value.shape and not is_choice(name):
        truth = truth.astype(np.float64)
        error, scale = Error.between(value, truth), _rms(truth)
    return Row(name, DIFFERENT if difference else OK, scale, error, None, None, None, difference,
               difference.index[0] if difference and difference.index else None)


def _rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def judge_traces(reference: Trace, candidate: Trace, budget: Budget) -> Verdict:
    """Two traces within a budget, without the model: nothing is run again.  Errors: InputError."""
    comparison = compare(reference, candidate)
    budget.check(candidate)
    rows = []
    for name in comparison.compared:
        truth, value = reference.tensors[name], candidate.tensors[name]
        difference = compare_tensors(name, truth, value)
        row = _plain_row(name, truth, value, difference)
        if difference and row.error and name in budget.total:
            share = row.error.share_of(budget.total[name])
            row = Row(**{**vars(row), "total_share": share, "status": DIFFERENT if share > 1 else OK,
                         "token": _first_token(value, truth, budget.total[name])})
        rows.append(row)
    return Verdict(all(row.status == OK for row in rows), budget.dtype, budget.factor, rows, [],
                   comparison.missing, comparison.unknown, False)


def _first_token(value, truth, budget: Error) -> int | None:
    """The first row with a difference beyond the budget, else the first of the largest."""
    if not len(value):
        return None
    with np.errstate(all="ignore"):
        worst = np.abs(value.astype(np.float64) - truth).max(axis=-1)
    beyond = ~(worst <= budget.largest)
    return int(beyond.argmax()) if beyond.any() else int(worst.argmax())


# ---- with the model --------------------------------------------------------------------------


def judge(model: ReferenceModel, candidate: Trace, budget: Budget) -> Verdict:
    """A candidate against the model within a budget.  Errors: InputError."""
    budget.check(candidate, model)
    reference, flips = _following(model, candidate, budget)
    comparison = compare(reference, candidate)
    own: dict[str, np.ndarray] = {}
    own_values(model, candidate, own.__setitem__)
    flips = [_with_kind(flip, candidate, own, budget) for flip in flips]
    wrong = {flip.name: flip.kind for flip in flips if flip.kind != NEAR_TIE}
    wrong |= {flip.name: WRONG for flip in flips if flip.kind == WRONG}
    rows = [_row(name, reference.tensors[name], candidate.tensors[name], own[name], budget,
                 wrong.get(name)) for name in comparison.compared]
    first = next((row for row in rows if row.status == GUILTY), None)
    mistakes = []
    if first:
        allowed = _own_budget(first.name, reference.tensors[first.name], own[first.name], budget)
        mistakes = diagnose(model, candidate, first.name, first.token or 0, own, allowed)
    return Verdict(all(row.status == OK for row in rows), budget.dtype, budget.factor, rows, flips,
                   comparison.missing, comparison.unknown, True, mistakes)


def _row(name, truth, value, own, budget: Budget, choice) -> Row:
    difference = compare_tensors(name, truth, value)
    if value.shape != truth.shape or (value.dtype.kind == "f") != (truth.dtype.kind == "f"):
        return Row(name, GUILTY, 0.0, None, None, np.inf, np.inf, difference, None)
    if is_choice(name):
        status = {None: OK, WRONG: GUILTY}.get(choice, INHERITED)
        return Row(name, status, 0.0, None, None, None, None, difference if choice else None, None)
    truth, own = truth.astype(np.float64), own.astype(np.float64)
    error, alone = Error.between(value, truth), Error.between(value, own)
    allowed = _own_budget(name, truth, own, budget)
    total_share, own_share = error.share_of(budget.total[name]), alone.share_of(allowed)
    status = GUILTY if own_share > 1 else INHERITED if total_share > 1 else OK
    token = {GUILTY: lambda: _first_token(value, own, allowed), OK: lambda: None,
             INHERITED: lambda: _first_token(value, truth, budget.total[name])}[status]()
    return Row(name, status, _rms(truth), error, alone, total_share, own_share, difference, token)


def _own_budget(name, truth, own, budget: Budget) -> Error | None:
    """Of an operation alone.  Measured on the reference's values, it grows with the candidate's: an
    error before may have made them larger, and what rounds them as well."""
    if name not in budget.own or truth.shape != own.shape:
        return budget.own.get(name)
    with np.errstate(all="ignore"):
        growth = _rms(own) / _rms(truth)
    return budget.own[name].times(growth if 1 < growth < np.inf else 1)


def _following(model, candidate, budget) -> tuple[Trace, list[Flip]]:
    """The reference's trace, gone on with the candidate's experts where that is a near-tie."""
    reference, flips = Trace(candidate.ids, arithmetic=model.arithmetic), []

    def record(name, value):
        reference.tensors[name] = value
        if not is_choice(name):
            return None
        theirs = usable(candidate, name, value, model.config.num_experts)
        if theirs is None:
            return None
        logits = reference.tensors[name.removesuffix(".2")]
        allowed = 2 * budget.total[name.removesuffix(".2")].largest
        reference.tensors[name], found = _choice(name, value, theirs, logits, allowed)
        flips.extend(found)
        return reference.tensors[name]

    model.forward(candidate.ids, record=record)
    return reference, flips


def _choice(name, ours, theirs, logits, allowed):
    """-> the experts to go on with [T, top_k], flips.  The order among the chosen has no meaning."""
    chosen, flips = theirs.copy(), []
    for token in np.flatnonzero((np.sort(ours) != np.sort(theirs)).any(axis=-1)):
        margin = margin_of(logits[token], ours[token], theirs[token])
        if margin > allowed:
            chosen[token] = ours[token]
        flips.append(Flip(name, int(token), ours[token].tolist(), theirs[token].tolist(), margin,
                          allowed, NEAR_TIE if margin <= allowed else WRONG))
    return chosen, flips


def margin_of(logits, ours, theirs) -> float:
    """How much larger the largest logit that `theirs` leaves out is than the smallest it takes instead;
    infinite if it names an expert twice."""
    ours, theirs = set(ours.tolist()), set(theirs.tolist())
    left_out, taken = ours - theirs, theirs - ours
    if len(left_out) != len(taken) or not taken:
        return float("inf")
    return float(logits[list(left_out)].max() - logits[list(taken)].min())


def _with_kind(flip: Flip, candidate, own, budget) -> Flip:
    """A wrong choice may still be the right one among the candidate's own logits."""
    logits = candidate.tensors.get(flip.name.removesuffix(".2"))
    if flip.kind == NEAR_TIE or logits is None:
        return flip
    ours, theirs = own[flip.name][flip.token], np.array(flip.candidate)
    same = set(ours.tolist()) == set(flip.candidate)
    slack = budget.own[flip.name.removesuffix(".2")].largest
    if same or margin_of(logits[flip.token].astype(np.float64), ours, theirs) <= slack:
        return Flip(**{**vars(flip), "kind": FOLLOWS})
    return flip
