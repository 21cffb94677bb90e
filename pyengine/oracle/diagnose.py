"""The known mistake that reproduces an error.

A mistake is tried by running the changed reference from the last point that the candidate's trace holds
to the tensor in question.  That point is the tensor's own inputs in a complete trace, a layer's output
in a trace of layers, and the ids in a trace of logits alone.  Mistakes that the trace does not tell apart
are all named.  Where none gives the candidate's values within the budget, those are named that leave at
most a quarter of its error: another mistake may be there as well, or the mistake rounds, and where a value
lies near a boundary, the candidate's own rounding has gone the other way.

The likely ones come first.  Where the first token is right, these are the mistakes that need a history;
where it is wrong, those are ruled out.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from ..progress import progress
from ..reference import ReferenceModel
from .budget import Error
from .mistakes.catalogue import MISTAKES
from .mistakes.mistake import Mistake
from .rerun import first_tokens, is_choice, last_known_layer, values_until
from .trace import Trace
from .verdict import Match, Search

NEAR = 8  # tokens before the first wrong one at which a state may have been lost
FEW = (1, 4, 16, 64)  # tokens that are tried before all up to the first wrong one
SECONDS = 600.0  # for the search through the known mistakes
LEFT = 0.25  # of the error, that a mistake which explains most of it may leave


@dataclass(frozen=True)
class Fit:
    """How near a mistaken model comes to the candidate: its distance as a share of the budget, and as a part
    of the candidate's distance from the right values."""

    share: float
    left: float


NO_FIT = Fit(np.inf, np.inf)


@dataclass
class Question:
    """A tensor that is wrong on the candidate's own inputs.

    own      what the right operations make of the candidate's inputs, by name
    token    where it goes wrong first
    budget   of the operations between, None for the experts' numbers
    choices  experts that the trace does not hold (rerun.Choices)
    deadline of time.monotonic()
    """

    model: ReferenceModel
    candidate: Trace
    name: str
    token: int
    own: dict[str, np.ndarray]
    budget: Error | None
    choices: dict = field(default_factory=dict)
    deadline: float = float("inf")

    def __post_init__(self):
        layers = self.model.config.num_hidden_layers
        self.start = last_known_layer(self.candidate, self.name, self.own, layers)
        self.value = self.candidate.tensors[self.name]
        self.right = self.candidate.part(self.name, self.own[self.name])

    def values(self, model, candidate=None, **more) -> np.ndarray | None:
        """The tensor as a model computes it from the last known point; the rows that `value` has."""
        candidate = candidate or self.candidate
        try:
            found = values_until(model, candidate, self.name, self.start, self.choices, **more)
        except (ValueError, IndexError, KeyError):
            return None  # the mistake does not fit these shapes
        value = found.get(self.name)
        return value if value is None else self.candidate.part(self.name, value)

    def fit(self, model, looks_ahead=False, first=0, **more) -> Fit:
        """How near a model's values are to the candidate.

        A few tokens are enough to rule most models out, those before `first` not: they are as they were.
        A model that looks ahead has to be run on all of them.
        """
        alone = len(self.value) < len(self.candidate.ids)
        counts = (
            [] if looks_ahead or alone else [*(n for n in FEW if first < n <= self.token), self.token + 1]
        )
        for count in counts:
            few = first_tokens(self.candidate, count)
            if few is not self.candidate and not self._may_be(self.values(model, few, **more)):
                return NO_FIT
        mistaken = self.values(model, **more)
        return Fit(_share(self.value, mistaken, self._allowed), self._left(mistaken))

    def _may_be(self, mistaken) -> bool:
        """Whether no element of the first tokens is beyond the budget, or most of the error is explained."""
        if mistaken is None:
            return False
        value = self.value[: len(mistaken)]
        if self.budget is None or value.shape != mistaken.shape:
            return _share(value, mistaken, lambda _: self.budget) <= 1
        largest = Error.between(value, mistaken.astype(np.float64)).largest
        growth = _growth(mistaken, self.right[: len(mistaken)])
        if largest <= 4 * growth * self.budget.largest:  # other tokens may grow more than the first few
            return True
        return self._left(mistaken) <= LEFT

    def _left(self, mistaken) -> float:
        """The part of the candidate's error that a model's values leave."""
        if mistaken is None or self.budget is None:
            return np.inf
        value, right = self.value[: len(mistaken)], self.right[: len(mistaken)]
        if not value.shape == right.shape == mistaken.shape:
            return np.inf
        error = Error.between(value, right.astype(np.float64)).rms
        left = Error.between(value, mistaken.astype(np.float64)).rms
        return left / error if 0 < error < np.inf else np.inf

    def _allowed(self, mistaken) -> Error | None:
        """What a mistake makes larger is rounded by more."""
        return self.budget and self.budget.times(_growth(mistaken, self.right))


def _growth(mistaken, right) -> float:
    with np.errstate(all="ignore"):
        growth = np.sqrt(np.mean(np.square(mistaken)) / np.mean(np.square(right)))
    return float(growth) if 1 < growth < np.inf else 1.0


def _share(value, mistaken, allowed) -> float:
    """Of the budget; of experts' numbers, which have none: 0 for the same choice."""
    if mistaken is None or mistaken.shape != value.shape:
        return np.inf
    budget = allowed(mistaken)
    if budget is None:
        return 0.0 if np.array_equal(np.sort(value), np.sort(mistaken)) else np.inf
    return Error.between(value, mistaken.astype(np.float64)).share_of(budget)


# ---- diagnosis -------------------------------------------------------------------------------


def diagnose(question: Question) -> tuple[list[Match], Search]:
    """The mistakes that turn the candidate's last known values into the tensor; the nearest first."""
    start = f"model.layers.{question.start}" if question.start >= 0 else "the ids"
    if question.value.shape != question.right.shape:
        return [], Search(0, len(MISTAKES), start, False)
    if question.name == "model.embed_tokens":
        found = _other_ids(question) if question.candidate.is_whole(question.name) else []
        found = found or _in_the_values(question.value, question.right, question.budget)
        return found, Search(0, len(MISTAKES), start, False)
    matches = []
    if not is_choice(question.name):
        matches = _in_the_values(question.value, question.right, question.budget)
    tried, near, order = 0, [], _in_order(question)
    with np.errstate(all="ignore"), progress(len(order), "known mistakes", "mistake") as bar:
        if question.token == 0 and time.monotonic() < question.deadline:
            matches += _left_padding(question)
        used = _operations_between(question)
        for mistake in order:
            if time.monotonic() >= question.deadline:
                break
            found = _reproduced(question, mistake, used)
            if found is not None:
                (matches if found.share <= 1 else near).append(found)
            tried += 1
            bar.update()
    stopped = tried < len(order)  # else the others are ruled out
    search = Search(tried if stopped else len(MISTAKES), len(MISTAKES), start, stopped)
    return sorted(matches, key=lambda match: match.share) or _nearest_of(near), search


def _in_order(question) -> list[Mistake]:
    """The likely mistakes first; without those that leave the first token as it is, where that is wrong."""
    if question.token == 0:
        return [mistake for mistake in MISTAKES if not mistake.needs_history]
    return sorted(MISTAKES, key=lambda mistake: not mistake.needs_history)


def _nearest_of(near: list[Match]) -> list[Match]:
    """Those that leave least of the error, and what leaves at most twice as much."""
    near = sorted(near, key=lambda match: match.left)
    return [match for match in near if match.left <= 2 * near[0].left]


def _reproduced(question, mistake, used) -> Match | None:
    """The mistake, if it gives the candidate's values, or most of their error."""
    model, token = question.model, question.token
    changed = _changed_operations(mistake.made(model, 1), model)
    if changed.isdisjoint(used) or mistake.at_token and not changed <= used:
        return None
    places = range(token, max(0, token - NEAR), -1) if mistake.at_token else (0,)
    best, at = NO_FIT, 0
    for place in places:
        fit = question.fit(mistake.made(model, place), mistake.looks_ahead, place)
        if fit.left < best.left or fit.share <= 1:
            best, at = fit, place
        if fit.share <= 1:
            break
    if best.share > 1 and best.left > LEFT:
        return None
    name = f"{mistake.name} at token {at}" if mistake.at_token else mistake.name
    return Match(name, best.share, 0.0 if best.share <= 1 else best.left)


def _changed_operations(mistaken, model) -> set[str]:
    """The operations that a mistake replaces; all of them if it changes something else too."""
    ours, theirs, names = vars(model), vars(mistaken), vars(model.op)
    others = {n for n in ours.keys() | theirs.keys() if theirs.get(n) is not ours.get(n)} - {"op"}
    if others - {"inv_freq", "rope_scale"}:
        return set(names)
    return {n for n in names if vars(mistaken.op)[n] is not names[n]} | ({"rotate"} if others else set())


def _operations_between(question) -> set[str]:
    """The operations that run between the last known point and the tensor."""
    used, model = set(), copy.copy(question.model)

    def noted(operation, function):
        def call(*arguments):
            used.add(operation)
            return function(*arguments)

        return call

    model.op = SimpleNamespace(**{n: noted(n, function) for n, function in vars(model.op).items()})
    question.values(model, first_tokens(question.candidate, 1))
    return used


def _left_padding(question) -> list[Match]:
    """Unmasked tokens before the first, where delta nets see the ids."""
    c = question.model.config
    if question.start >= 0 or "model.layers.0.linear_attn.norm" not in question.own:
        return []
    known = question.candidate.tensors
    if "model.layers.0.linear_attn.norm" in known and question.name != "model.layers.0.linear_attn.norm":
        return []
    pads = dict.fromkeys(
        token for token in (c.pad_token_id, *c.eos_token_ids, 0) if token is not None and token < c.vocab_size
    )
    for attended, where in ((True, ""), (False, " in the delta nets")):
        for pad in pads:
            for count in range(1, NEAR + 1):
                fit = question.fit(question.model, pads=[pad] * count, pads_attended=attended)
                if fit.share <= 1:
                    text = f"left padding is not masked{where}: {count} tokens {pad} before the first"
                    return [Match(text, fit.share)]
    return []


def _in_the_values(value, own, budget: Error) -> list[Match]:
    """What can be seen without running anything: another scale, rows of other tokens."""

    def share(value, own, allowed=budget):
        return _share(value, own, lambda _: allowed)

    matches = []
    with np.errstate(all="ignore"):
        scale = float(np.sum(value * own) / np.sum(own * own))
    if np.isfinite(scale) and abs(scale - 1) > 1e-3:
        part = share(value, own * scale, budget.times(max(1.0, abs(scale))))
        if part <= 1 and np.any(own):
            matches.append(Match(f"the values are {scale:.6g} times what they should be", part))
    if len(value) > 2 and share(value[1:], own[:-1]) <= 1:
        matches.append(Match("each row is that of the token before", 0.0))
    if len(value) > 2 and share(value[:-1], own[1:]) <= 1:
        matches.append(Match("each row is that of the token after", 0.0))
    return matches


def _other_ids(question) -> list[Match]:
    """Embeddings of other tokens: another vocabulary, or ids that were shifted."""
    model, candidate, own = question.model, question.candidate, question.right
    table = model.embed(np.arange(model.config.vocab_size)).astype(np.float32)
    rows = {row.tobytes(): token for token, row in enumerate(table)}
    value = np.ascontiguousarray(candidate.tensors["model.embed_tokens"], np.float32)
    wrong = np.flatnonzero((value != own.astype(np.float32)).any(axis=-1))
    found = [(int(candidate.ids[i]), rows.get(value[i].tobytes())) for i in wrong]
    if not found or None in [row for _, row in found]:
        return []
    id_, row = found[0]
    return [
        Match(
            f"the embeddings are those of other ids ({row} for {id_}): another vocabulary, or "
            "ids that were changed",
            0.0,
        )
    ]
