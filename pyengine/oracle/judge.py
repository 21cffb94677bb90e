"""A candidate's trace against the reference: which tensors differ, which operation is to blame, and what
kind of mistake it looks like.

End to end, a tensor is compared with the reference's.  Then each operation is run again on the
candidate's own inputs.  An operation that is beyond its budget there is guilty if all its inputs are in
the trace.  If some are not, it is a suspect: it or anything before it.  A tensor that is beyond its
budget only end to end has inherited the error.  Where the candidate's router chooses other experts, and
the reference shows that this is a near-tie, the reference goes on with the candidate's choice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InputError
from ..reference import ReferenceModel
from .bits import Comparison, NotFinite, at_token, compare, compare_tensors, first_index
from .budget import Budget, Error
from .dataflow import EMBEDDING, HEAD, covered, is_within, module_inputs, next_to_dump, unknown_before
from .diagnose import SECONDS, Question, diagnose
from .flips import following, with_kind
from .logits import LogitsVerdict, judge_logits
from .rerun import is_choice, own_values, with_cached_weights
from .ties import Tries, explaining_choices, hidden_choices
from .trace import Trace, aligned
from .verdict import (
    DIFFERENT,
    EXACT,
    GUILTY,
    INHERITED,
    NEAR_TIE,
    OK,
    SUSPECT,
    WRONG,
    Flip,
    Place,
    Row,
    Verdict,
)
from .widths import state_inputs

OTHER_MODEL = 0.75  # of the projections, when the trace is taken for another model's
# Modules whose output one matrix makes of their input, and the embedding.
PROJECTIONS = {
    *("embed_tokens", "lm_head", "gate", "shared_expert_gate"),
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba", "out_proj"),
    *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
}


# ---- without the model -----------------------------------------------------------------------


def judge_bits(reference: Trace, candidate: Trace) -> Verdict:
    """Every bit, after rounding to float32.  Errors: InputError (bits.compare)."""
    reference, candidate = aligned(reference, candidate)
    comparison = compare(reference, candidate)
    differences = {d.name: d for d in comparison.differences}
    rows = [
        _plain_row(name, reference.tensors[name], candidate.tensors[name], differences.get(name))
        for name in comparison.compared
    ]
    return Verdict(comparison.equal, EXACT, None, rows, [], comparison.missing, comparison.unknown, False)


def first_in_bits(verdict: Verdict, graph) -> tuple[str, list[str]]:
    """The first tensor that differs though its inputs are equal, as far as both traces have them.

    -> its name, the tensors between it and the inputs that were compared
    """
    differ = {row.name for row in verdict.rows if row.difference}
    compared = [row.name for row in verdict.rows if row.name in graph]
    for name in compared:
        between = unknown_before(name, compared, graph)
        inputs = {other for one in (name, *between) for other in graph[one]} - set(between)
        if name in differ and differ.isdisjoint(inputs):
            return name, [other for other in between if not is_within([other], name)]
    return verdict.first.name, []


def _plain_row(name, truth, value, difference) -> Row:
    """Without a budget; figures only of tensors that differ, so that equal traces stay cheap."""
    error, scale = None, 0.0
    if difference and truth.shape == value.shape and not is_choice(name):
        truth = truth.astype(np.float64)
        error, scale = Error.between(value, truth), _rms(truth)
    status = DIFFERENT if difference else OK
    token = difference.index[0] if difference and difference.index else None
    return Row(name, status, scale, error, None, None, None, difference, token)


def _rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def judge_traces(reference: Trace, candidate: Trace, budget: Budget) -> Verdict:
    """Two traces within a budget, without the model: nothing is run again.  Errors: InputError."""
    budget.check(candidate)
    reference, candidate = aligned(reference, candidate)
    comparison = compare(reference, candidate)
    rows = [
        row_within(
            name,
            reference.tensors[name],
            candidate.tensors[name],
            candidate.tokens_of(name),
            budget.total.get(name),
        )
        for name in comparison.compared
    ]
    ok = all(row.status == OK for row in rows)
    return Verdict(
        ok,
        budget.dtype,
        budget.factor,
        rows,
        [],
        comparison.missing,
        comparison.unknown,
        False,
        logits=_logits(reference, candidate, rows, budget),
    )


def _logits(reference, candidate, rows, budget, model=None) -> LogitsVerdict | None:
    """What lm_head tells, if it was compared and differs; the model is used where it is beyond its budget."""
    row = next((row for row in rows if row.name == HEAD), None)
    if row is None or row.difference is None or row.error is None:
        return None
    if HEAD in candidate.columns:  # of part of the vocabulary
        return None
    truth, value, tokens = reference.tensors[HEAD], candidate.tensors[HEAD], candidate.tokens_of(HEAD)
    return judge_logits(truth, value, budget.total[HEAD], tokens, None if row.status == OK else model)


def row_within(name, truth, value, tokens, budget: Error | None) -> Row:
    """A tensor within a budget end to end, where nothing is run again; tokens: of each row."""
    difference = compare_tensors(name, truth, value, tokens)
    row = _plain_row(name, truth, value, difference)
    if not difference or not row.error or budget is None:
        return row
    share = row.error.share_of(budget)
    place = _place(value, truth, budget, tokens) if share > 1 else None
    return replace(
        row,
        total_share=share,
        status=DIFFERENT if share > 1 else OK,
        token=place and _first_token(place),
        place=place,
        by_token=_by_token(value, truth, budget),
        rows=tuple(tokens.tolist()) if tokens[-1] + 1 != len(tokens) else (),
    )


def _place(value, truth, budget: Error, tokens) -> Place:
    """Where a tensor is beyond a budget; tokens: of each row."""
    with np.errstate(all="ignore"):
        error = np.abs(value.astype(np.float64) - truth)
    error = np.where(~np.isfinite(value) & ~np.isfinite(truth), 0.0, error)
    error = np.where(np.isnan(error), np.inf, error)
    beyond = error > budget.largest
    worst = first_index(error == error.max())
    return Place(
        at_token(first_index(beyond), tokens) if beyond.any() else None,
        at_token(worst, tokens),
        float(truth[worst]),
        float(value[worst]),
        float(error[worst] / budget.largest) if budget.largest else np.inf,
        NotFinite.found(truth, value, tokens),
    )


def _first_token(place: Place) -> int:
    """The first with an element beyond the budget, else that of the worst element."""
    return (place.first or place.worst)[0]


# ---- with the model --------------------------------------------------------------------------


@dataclass
class _Measured:
    """The reference's figures for a candidate, with some choices of experts assumed."""

    reference: Trace
    own: dict[str, np.ndarray]
    comparison: Comparison
    flips: list[Flip]
    rows: list[Row]


def judge(
    model: ReferenceModel, candidate: Trace, budget: Budget, seconds: float = SECONDS, blame: bool = True
) -> Verdict:
    """A candidate against the model within a budget.

    seconds: for each of two searches: for choices of experts that the trace does not hold, and, with
    blame, for the known mistake.
    Errors: InputError: a budget of another run, nothing in common, a trace of another model.
    """
    budget.check(candidate, model)
    model = with_cached_weights(model)
    graph = graph_of(model, candidate)
    measured, choices = _with_hidden_choices(model, candidate, budget, graph, time.monotonic() + seconds)
    rows, comparison = measured.rows, measured.comparison
    _check_model(measured, candidate, graph)
    verdict = Verdict(
        all(row.status == OK for row in rows),
        budget.dtype,
        budget.factor,
        rows,
        measured.flips,
        comparison.missing,
        comparison.unknown,
        True,
        unchecked=unchecked(comparison.compared, graph),
        logits=_logits(measured.reference, candidate, rows, budget, model if blame else None),
    )
    accused = verdict.accused
    if accused is None or not blame:
        return verdict
    between = unknown_before(accused.name, candidate.known(), graph)
    own = measured.own
    right = candidate.part(accused.name, own[accused.name])
    allowed = _own_budget(accused.name, measured.reference.tensors[accused.name], right, budget)
    until = time.monotonic() + seconds
    question = Question(model, candidate, accused.name, accused.token or 0, own, allowed, choices, until)
    mistakes, search = diagnose(question)
    return replace(
        verdict, between=between, next=next_to_dump(accused.name, between), mistakes=mistakes, search=search
    )


def graph_of(model, candidate) -> dict[str, tuple[str, ...]]:
    """What each tensor is computed from, with the memories that the candidate holds."""
    states = {name: of for name, of in state_inputs(model.config).items() if name in candidate.tensors}
    return module_inputs(model.config) | states


def unchecked(compared, graph) -> list[str]:
    """The tensors of a complete trace that no compared one is computed from."""
    reached = covered([name for name in compared if name in graph], graph)
    return [name for name in graph if name not in reached]


def _with_hidden_choices(model, candidate, budget, graph, deadline):
    """The rows, once near-ties of routers that the trace does not hold are resolved."""
    choices, tries, done = {}, Tries(deadline=deadline), set()
    measured = _measured(model, candidate, budget, graph, choices)
    while True:
        waiting = (row for row in measured.rows if row.name not in done and _may_be_a_tie(row))
        row = next((row for row in waiting if hidden_choices(row.name, candidate, graph)), None)
        if row is None:
            return measured, choices
        own = measured.own
        right = candidate.part(row.name, own[row.name])
        allowed = _own_budget(row.name, measured.reference.tensors[row.name], right, budget)
        found, whole = explaining_choices(
            model, candidate, row.name, own, allowed, budget, graph, choices, tries
        )
        if not whole or found is choices:
            done.add(row.name)
        if found is not choices:
            choices = found
            measured = _measured(model, candidate, budget, graph, choices)


def _may_be_a_tie(row) -> bool:
    return (
        row.status in (GUILTY, SUSPECT)
        and not is_choice(row.name)
        and row.place is not None
        and row.place.not_finite is None
    )


def _measured(model, candidate, budget, graph, choices) -> _Measured:
    own: dict[str, np.ndarray] = {}
    own_values(model, candidate, own.__setitem__, choices)
    reference, flips = following(model, candidate, budget, own, choices)
    reference, candidate = aligned(reference, candidate)
    comparison = compare(reference, candidate)
    flips = [with_kind(flip, candidate, own, budget) for flip in flips]
    wrong = {flip.name: flip.kind for flip in flips if flip.kind != NEAR_TIE}
    wrong |= {flip.name: WRONG for flip in flips if flip.kind == WRONG}
    rows, known = [], candidate.known()
    for name in comparison.compared:
        between = unknown_before(name, known, graph)
        blame = GUILTY if is_within(between, name) else SUSPECT
        rows.append(_row(name, reference, candidate, own, budget, wrong.get(name), blame))
    return _Measured(reference, own, comparison, flips, rows)


def _row(name, reference, candidate, own, budget: Budget, choice, blame) -> Row:
    """blame: the status if the operation is beyond its budget on the candidate's own inputs."""
    truth, value, tokens = reference.tensors[name], candidate.tensors[name], candidate.tokens_of(name)
    difference = compare_tensors(name, truth, value, tokens)
    if value.shape != truth.shape or (value.dtype.kind == "f") != (truth.dtype.kind == "f"):
        return Row(name, GUILTY, 0.0, None, None, np.inf, np.inf, difference, None)
    if is_choice(name):
        status = {None: OK, WRONG: blame}.get(choice, INHERITED)
        return Row(name, status, 0.0, None, None, None, None, difference if choice else None, None)
    truth, right = truth.astype(np.float64), candidate.part(name, own[name]).astype(np.float64)
    error, alone = Error.between(value, truth), Error.between(value, right)
    allowed = _own_budget(name, truth, right, budget)
    total_share, own_share = error.share_of(budget.total[name]), alone.share_of(allowed)
    status, place = OK, None
    if own_share > 1:
        status, place = blame, _place(value, right, allowed, tokens)
    elif total_share > 1:
        status, place = INHERITED, _place(value, truth, budget.total[name], tokens)
    token = None if place is None else _first_token(place)
    return Row(
        name,
        status,
        _rms(truth),
        error,
        alone,
        total_share,
        own_share,
        difference,
        token,
        place,
        _by_token(value, truth, budget.total[name]),
        _by_token(value, right, allowed),
        _rows_of(candidate, name),
        Error.between(right, truth).share_of(budget.total[name]),
    )


def _by_token(value, truth, budget: Error) -> tuple[float, ...]:
    """The largest error of each row, as part of the budget's."""
    with np.errstate(all="ignore"):
        error = np.abs(value.astype(np.float64) - truth)
        error = np.where(~np.isfinite(value) & ~np.isfinite(truth), 0.0, error).max(axis=-1)
        share = np.where(error == 0, 0.0, error / budget.largest)
    return tuple(np.where(np.isnan(share), np.inf, share).tolist())


def _rows_of(candidate, name) -> tuple[int, ...]:
    tokens = candidate.tokens_of(name)
    return () if len(tokens) == len(candidate.ids) else tuple(tokens.tolist())


def _own_budget(name, truth, right, budget: Budget) -> Error | None:
    """Of an operation alone.  Measured on the reference's values, it grows with the candidate's: an
    error before may have made them larger, and their rounding errors as well."""
    if name not in budget.own or truth.shape != right.shape:
        return budget.own.get(name)
    with np.errstate(all="ignore"):
        growth = _rms(right) / _rms(truth)
    return budget.own[name].times(growth if 1 < growth < np.inf else 1)


def _check_model(measured, candidate, graph) -> None:
    """InputError where nearly no projection has to do with this model's weights."""
    names = [
        name
        for name in measured.comparison.compared
        if name.rpartition(".")[2] in PROJECTIONS and candidate.known() >= set(graph[name])
    ]
    if len(names) < (2 if EMBEDDING in names else 8):
        return
    other = [
        name for name in names if _unlike(candidate.tensors[name], candidate.part(name, measured.own[name]))
    ]
    if len(other) > OTHER_MODEL * len(names) and (EMBEDDING in other or EMBEDDING not in names):
        raise InputError(
            f"traces: want one of this model, got one of another, or of weights that were read wrongly: "
            f"{len(other)} of {len(names)} projections, from {other[0]} on, are unlike this model's on the "
            "same inputs"
        )


def _unlike(value, own) -> bool:
    """Whether two tensors have no direction in common."""
    own = own.astype(np.float64)
    if value.shape != own.shape or value.dtype.kind != "f":
        return False
    with np.errstate(all="ignore"):
        value = value.astype(np.float64)
        cosine = np.sum(value * own) / np.sqrt(np.sum(value * value) * np.sum(own * own))
    return bool(abs(cosine) < 0.5)
