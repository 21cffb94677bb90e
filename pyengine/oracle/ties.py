"""Near-ties of routers whose choice a trace does not hold.

Where two experts are all but equal, rounding decides, and one of them is as right as the other.  A trace
that holds the choice is followed.  Of one that does not, the choices are tried that rounding explains:
the one that makes the first wrong token right is taken for the candidate's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from .budget import Budget, Error
from .dataflow import unknown_before
from .rerun import Choices, first_tokens, is_choice, last_known_layer, values_until

TRIES = 64  # runs of the reference, each from the last known point to one tensor


@dataclass
class Tries:
    """How many runs are left, and until when."""

    left: int = TRIES
    deadline: float = float("inf")

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0 and time.monotonic() < self.deadline


def margin_of(logits, ours, theirs) -> float:
    """How much larger the largest logit that `theirs` leaves out is than the smallest it takes instead;
    infinite if it names an expert twice."""
    ours, theirs = set(ours.tolist()), set(theirs.tolist())
    left_out, taken = ours - theirs, theirs - ours
    if len(left_out) != len(taken) or not taken:
        return float("inf")
    return float(logits[list(left_out)].max() - logits[list(taken)].min())


def allowed_margin(budget: Budget, name: str) -> float:
    """The margin between two logits that rounding explains; name: of the choice."""
    return 2 * budget.total[name.removesuffix(".2")].largest


def hidden_choices(name: str, candidate, graph) -> list[str]:
    """The choices before a tensor that the trace neither holds nor determines."""
    known = candidate.known()
    between = unknown_before(name, known, graph)
    return [n for n in between if is_choice(n) and n.removesuffix(".2") not in known]


def explaining_choices(
    model, candidate, name: str, own, allowed: Error, budget, graph, choices: Choices, tries: Tries
) -> tuple[Choices, bool]:
    """Choices of experts that rounding explains and that make the tensor right.

    -> the choices, with those given; whether the whole tensor is within `allowed` now.  A choice is taken
    where the row of the first wrong token is right with it, or with it and others.
    """
    hidden = hidden_choices(name, candidate, graph)
    if not hidden or candidate.tensors[name].shape != candidate.part(name, own[name]).shape:
        return choices, False
    run = _Run(model, candidate, name, last_known_layer(candidate, name, own, model.config.num_hidden_layers))
    trial, reached = choices, -1
    while tries.take():
        values = run.values(trial, len(candidate.ids))
        error = run.error(values[name])
        if Error.between(*run.pair(values[name])).share_of(allowed) <= 1:
            return trial, True
        beyond = np.flatnonzero(~(error <= allowed.largest))
        row = int(beyond[0]) if beyond.size else int(error.argmax())
        token = int(candidate.tokens_of(name)[row])
        if token > reached >= 0:
            choices = trial  # every row before is right
        reached = token
        found = _best_tie(run, values, hidden, token, trial, allowed, budget, tries)
        if found is None:
            break
        trial = _with(trial, *found)
    return choices, False


def _with(choices: Choices, name, token, experts) -> Choices:
    return {**choices, name: {**choices.get(name, {}), token: experts}}


def _best_tie(run, values, hidden, token, choices, allowed, budget, tries):
    """(name, token, experts) that makes the row of `token` right, or at least twice as near."""
    best, least = None, run.error(values[run.name])[_row(run, token)] / 2
    for place, at, experts in _near_ties(values, hidden, token, choices, budget):
        if not tries.take():
            break
        trial = _with(choices, place, at, experts)
        error = run.error(run.values(trial, token + 1)[run.name])[_row(run, token)]
        if error <= least:
            best, least = (place, at, experts), error
        if error <= allowed.largest:
            break
    return best


def _row(run, token):
    return int(np.searchsorted(run.candidate.tokens_of(run.name), token))


def _near_ties(values, hidden, token, choices, budget):
    """Other choices at a token or before it that rounding explains: those of the token itself first."""
    found = []
    for name in hidden:
        logits, chosen = values[name.removesuffix(".2")], values[name]
        allowed = allowed_margin(budget, name)
        for at in range(token + 1):
            if at in choices.get(name, {}):
                continue
            for experts in _alternatives(logits[at], chosen[at], allowed):
                margin = margin_of(logits[at], chosen[at], experts)
                found.append((at != token, margin, name, at, experts))
    found.sort(key=lambda tie: tie[:2])
    return [tie[2:] for tie in found]


def _alternatives(logits, chosen, allowed):
    """The choice with one expert exchanged for one whose logit is nearly as large."""
    left_out = np.setdiff1d(np.arange(len(logits)), chosen)
    for i, expert in enumerate(chosen):
        for other in left_out[logits[left_out] >= logits[expert] - allowed]:
            yield np.concatenate([chosen[:i], [other], chosen[i + 1 :]])


@dataclass
class _Run:
    """The reference from the last known layer to one tensor."""

    model: object
    candidate: object
    name: str
    start: int

    def values(self, choices, tokens):
        few = first_tokens(self.candidate, tokens)
        return values_until(self.model, few, self.name, self.start, choices)

    def pair(self, values):
        ours = self.candidate.part(self.name, values).astype(np.float64)
        return self.candidate.tensors[self.name][: len(ours)], ours

    def error(self, values) -> np.ndarray:
        """The largest of each row."""
        theirs, ours = self.pair(values)
        with np.errstate(all="ignore"):
            error = np.abs(theirs.astype(np.float64) - ours).max(axis=-1)
        return np.where(np.isnan(error), np.inf, error)
