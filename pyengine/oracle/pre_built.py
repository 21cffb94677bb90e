"""A reference made beforehand: part of a reference's trace with its budgets, for machines without the model.

The file is a trace (trace.py) of float64 with sampled tokens and features, drawn with the seed 1729, the last
token among them.  The routers' logits and choices are there for every token.  Its metadata has one more text:

    budgets   JSON: {dtype: {"factor": .., "total": {NAME: [root mean square, largest, elements]}}}, end to
              end, of the whole tensors

`judge_pre_built` compares a candidate with it.  Nothing is run again, so no operation is accused.  Where
a router's choice is a near-tie, rounding decides, and what follows may rightly differ: the layer's experts at
that token, and every later token of the layers behind.  Those elements are not judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import FileFormatError, InputError
from ..files.safetensors import SafetensorsFile
from ..ids import as_ids
from ..seed import SEED
from .bits import compare
from .budget import FACTOR, Error
from .dataflow import EMBEDDING, HEAD
from .judge import row_within
from .layerwise import measure_by_layer
from .rerun import is_choice, layer_of
from .ties import margin_of
from .trace import Trace, aligned
from .verdict import DIFFERENT, NEAR_TIE, OK, WRONG, Flip, Verdict

ROWS, FEATURES = 16, 512  # sampled
BUDGETS = "budgets"
_OF_EXPERTS = (
    "mlp.experts",
    "mlp",
    "",
    "mlp.gate.1",
    "mlp.gate.2",
)  # what another choice changes at its token


# ---- making one --------------------------------------------------------------------------------


def make_reference(
    model,
    ids,
    dtypes: Sequence[str],
    *,
    rows: int = ROWS,
    features: int = FEATURES,
    factor: float = FACTOR,
    on_layer: Callable[[int, float], None] | None = None,
) -> tuple[Trace, dict[str, PreBuilt]]:
    """Run the reference layer by layer -> the sampled trace, the budgets of whole tensors.

    rows, features: at most so many of each tensor; lm_head keeps every feature.
    """
    ids = as_ids(ids, model.config.vocab_size)
    rng = np.random.default_rng(SEED)
    last = len(ids) - 1
    drawn = rng.permutation(last)[: max(0, rows - 1)]
    tokens = np.sort(np.append(drawn, last))
    trace, chosen, sizes = Trace(ids, arithmetic="float64"), {}, {}

    def cut(name, value):
        if not _is_router(name):
            value = value[tokens] if len(tokens) < len(ids) else value
        if name != HEAD and value.shape[1] > features and not _is_router(name):
            width = value.shape[1]
            if width not in chosen:
                chosen[width] = np.sort(np.random.default_rng([SEED, width]).permutation(width)[:features])
            value = value[:, chosen[width]]
        return value

    def keep(name, value):
        part, sizes[name] = cut(name, value), value.size
        trace.tensors[name] = np.array(part, np.int64 if is_choice(name) else np.float32)
        if len(part) < len(ids):
            trace.rows[name] = tokens
        if part.shape[1] < value.shape[1]:
            trace.columns[name] = chosen[value.shape[1]]

    budgets = measure_by_layer(model, ids, dtypes, factor=factor, keep=keep, on_layer=on_layer)
    return trace, {dtype: PreBuilt(dtype, factor, b.total, sizes) for dtype, b in budgets.items()}


def _is_router(name: str) -> bool:
    return name.endswith((".mlp.gate", ".mlp.gate.1", ".mlp.gate.2"))


def save_reference(path, trace: Trace, budgets: dict[str, PreBuilt]) -> None:
    """Written whole or not at all."""
    fields = {
        dtype: {
            "factor": budget.factor,
            "total": {n: [error.rms, error.largest, budget.sizes[n]] for n, error in budget.total.items()},
        }
        for dtype, budget in budgets.items()
    }
    trace.save(path, {BUDGETS: json.dumps(fields)})


def budgets_of(path) -> dict[str, PreBuilt]:
    """{dtype: PreBuilt} of a reference's file; none of a plain trace.  Errors: FileFormatError."""
    text = SafetensorsFile.open(path).metadata.get(BUDGETS)
    if text is None:
        return {}
    try:
        return {dtype: PreBuilt.of(dtype, fields) for dtype, fields in json.loads(text).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FileFormatError(path, f"metadata {BUDGETS}", "want what `pyengine reference` writes") from None


@dataclass(frozen=True)
class PreBuilt:
    """A budget end to end, of whole tensors; sizes: their elements."""

    dtype: str
    factor: float
    total: dict[str, Error]
    sizes: dict[str, int]

    @classmethod
    def of(cls, dtype, fields) -> PreBuilt:
        rows = {str(name): row for name, row in fields["total"].items()}
        total = {name: Error(float(rms), float(largest)) for name, (rms, largest, _) in rows.items()}
        sizes = {name: int(size) for name, (_, _, size) in rows.items()}
        return cls(str(dtype), float(fields["factor"]), total, sizes)

    def of_part(self, name: str, held: int) -> Error | None:
        """For so many elements of a tensor; None: there is no budget for it."""
        found = self.total.get(name)
        return None if found is None else found.of_part(max(self.sizes[name], held), held)


# ---- judging by one ----------------------------------------------------------------------------


def judge_pre_built(reference: Trace, candidate: Trace, budget: PreBuilt, resolution: float = 0.0) -> Verdict:
    """A candidate against a reference made beforehand.  Errors: InputError: nothing that can be judged."""
    flips, tainted = _flips(reference, candidate, budget)
    ours, theirs = aligned(reference, candidate)
    comparison = compare(ours, theirs)
    last, rows, left, judged = _layers(reference), [], 0, False
    for name in comparison.compared:
        truth, value, tokens = ours.tensors[name], theirs.tensors[name], theirs.tokens_of(name)
        if is_choice(name):
            rows.append(_choice_row(name, truth, value, tokens, flips))
            continue
        sound = ~_is_tainted(name, tokens, tainted, last)
        left += int((~sound).sum())
        if sound.any():
            part = _rows(truth, value, tokens, sound)
            allowed = budget.of_part(name, part[0].size)
            if allowed is not None and resolution:
                allowed = allowed.plus(Error(resolution, resolution))
            rows.append(row_within(name, *part, allowed))
            judged = judged or name != EMBEDDING
    if not judged:
        raise InputError(
            "reference: want elements that can be judged, got none: each lies behind a near-tie of a router; "
            "let the trace hold the choices (mlp.gate.2), or take a narrower budget or other ids"
        )
    ok = all(row.status == OK for row in rows)
    missing = [*comparison.missing, *(n for n in comparison.compared if n not in {row.name for row in rows})]
    verdict = Verdict(ok, budget.dtype, budget.factor, rows, flips, missing, comparison.unknown, False)
    near = sum(flip.kind == NEAR_TIE for flip in flips)
    hints = []
    if left:
        hints.append(
            f"not judged: {left} rows of tensors, behind near-ties of routers ({near} other choices seen; "
            "where the trace does not hold the choice, every near-tie counts)"
        )
    return replace(verdict, hints=hints)


def _rows(truth, value, tokens, sound):
    """Those that can be judged; a tensor of another shape as it is."""
    if len(truth) != len(sound) or len(value) != len(sound):
        return truth, value, tokens
    return truth[sound], value[sound], tokens[sound]


def _layers(reference) -> int:
    return max((layer_of(name, -1) for name in reference.tensors), default=-1) + 1


def _is_tainted(name, tokens, tainted, layers) -> np.ndarray:
    """Of each row, whether another choice of experts before it may have changed it."""
    layer, part = layer_of(name, layers), ".".join(name.split(".")[3:])
    found = np.zeros(len(tokens), bool)
    if name == EMBEDDING:
        return found
    for at, token in tainted:
        if at < layer:
            found |= tokens >= token
        elif at == layer and part in _OF_EXPERTS:
            found |= tokens == token
    return found


def _flips(reference, candidate, budget) -> tuple[list[Flip], list[tuple[int, int]]]:
    """-> other choices than the reference's; (layer, token) of those that rounding may explain."""
    flips, tainted = [], []
    for name in reference.tensors:
        router = name.removesuffix(".2")
        if not is_choice(name) or router not in budget.total or not reference.is_whole(router):
            continue
        allowed, layer = 2 * budget.total[router].largest, layer_of(name, -1)
        logits, ours = reference.tensors[router].astype(np.float64), reference.tensors[name]
        theirs = candidate.tensors.get(name) if candidate.is_whole(name) else None
        if theirs is not None and theirs.shape != ours.shape:
            theirs = None
        if theirs is None:
            margins = _own_margins(logits, ours)
            tainted += [(layer, int(token)) for token in np.flatnonzero(margins <= allowed)]
            continue
        for token in np.flatnonzero((np.sort(ours) != np.sort(theirs)).any(axis=-1)):
            margin = margin_of(logits[token], ours[token], theirs[token])
            kind = NEAR_TIE if margin <= allowed else WRONG
            if kind == NEAR_TIE:
                tainted.append((layer, int(token)))
            flips.append(
                Flip(name, int(token), ours[token].tolist(), theirs[token].tolist(), margin, allowed, kind)
            )
    return flips, tainted


def _own_margins(logits, chosen) -> np.ndarray:
    """How far the smallest logit that was chosen lies above the largest that was not."""
    least = np.take_along_axis(logits, chosen, axis=-1).min(axis=-1)
    others = logits.copy()
    np.put_along_axis(others, chosen, -np.inf, axis=-1)
    return least - others.max(axis=-1)


def _choice_row(name, truth, value, tokens, flips):
    wrong = [flip for flip in flips if flip.name == name and flip.kind == WRONG]
    row = row_within(name, truth, value, tokens, None)
    if not wrong:
        return replace(row, status=OK, difference=None, token=None)
    return replace(row, status=DIFFERENT, token=wrong[0].token)
