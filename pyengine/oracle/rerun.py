"""Each operation of the reference, run on the candidate's own inputs."""

from __future__ import annotations

import contextlib
import copy

import numpy as np

from ..checkpoint.config import LINEAR
from ..reference import ReferenceModel
from .trace import Trace, is_state

# {"model.layers.I.mlp.gate.2": {token: experts [top_k]}}: choices that a trace does not hold
Choices = dict[str, dict[int, np.ndarray]]

CACHED_BYTES = 1 << 28  # of float64 weights that are kept between two runs


def with_cached_weights(model) -> ReferenceModel:
    """The model, with the float64 weights of earlier runs kept, as far as they are small."""
    cached, left, stored = {}, [CACHED_BYTES], model.weight
    model = copy.copy(model)

    def weight(name, expert=None):
        if (name, expert) in cached:
            return cached[name, expert]
        values = stored(name, expert)
        if values.nbytes <= left[0]:
            left[0] -= values.nbytes
            values.flags.writeable = False
            cached[name, expert] = values
        return values

    model.weight = weight
    return model


class Reached(Exception):
    """The tensor that a run was made for has been computed."""


def own_values(model: ReferenceModel, candidate: Trace, visit, choices=None) -> None:
    """Call visit(name, own) for every module: the reference's operation on the candidate's tensors.

    Where the candidate has no usable tensor, the reference's own value goes on.  choices: experts that
    are taken where the candidate holds none: {name: array [T, top_k]} or Choices.
    """
    with np.errstate(all="ignore"):
        model.forward(candidate.ids, record=_following(candidate, visit, model, choices or {}))


def values_until(
    model: ReferenceModel, candidate: Trace, name: str, start: int, choices=None, pads=(), pads_attended=True
) -> dict[str, np.ndarray]:
    """own_values' values up to `name`, the last; only the layers after `start` are run.

    start: a layer whose output the candidate holds, or -1: the embedding, the candidate's or the model's.
    pads: ids before the first; of start -1 only.  Attention sees them if pads_attended, delta nets do.
    Without `name` where the model computes no such tensor.
    """
    found: dict[str, np.ndarray] = {}

    def visit(reached, value):
        found[reached] = value
        if reached == name:
            raise Reached

    record = _following(candidate, visit, model, choices or {})
    with np.errstate(all="ignore"), contextlib.suppress(Reached):
        _run_from(model, candidate, start, record, pads, pads_attended)
    return found


def _run_from(model, candidate, start, record, pads, pads_attended):
    """The layers after `start` and the head, as `forward` runs them from an empty state."""
    hidden = model.embed(candidate.ids) if start < 0 else candidate.tensors[f"model.layers.{start}"]
    hidden = hidden.astype(np.float64)
    if start < 0:
        theirs = record("model.embed_tokens", hidden)
        hidden = hidden if theirs is None else theirs
    before = model.embed(pads).astype(np.float64) if len(pads) else hidden[:0]
    for index in range(start + 1, model.config.num_hidden_layers):
        if len(before) and (pads_attended or model.config.layer_types[index] == LINEAR):
            both = model.run_layer(index, np.concatenate([before, hidden]), _behind(len(before), record))
            before, hidden = both[: len(before)], both[len(before) :]
        else:
            before = model.run_layer(index, before, None) if len(before) else before
            hidden = model.run_layer(index, hidden, record)
    model.run_head(hidden, record)


def _behind(count, record):
    """A record of the rows after the first `count`, which stay as they are."""

    def both(name, value):
        theirs = record(name, value[count:])
        return None if theirs is None else np.concatenate([value[:count], theirs])

    return both


def last_known_layer(candidate: Trace, name: str, own: dict, layers: int) -> int:
    """The last layer before a tensor whose whole output the candidate holds; -1: none."""
    known = (
        i for i in range(layer_of(name, layers) - 1, -1, -1) if _holds(candidate, f"model.layers.{i}", own)
    )
    return next(known, -1)


def first_tokens(candidate: Trace, count: int) -> Trace:
    """The trace of the first tokens alone.  What holds part of a tensor, or a state, is left out."""
    if count >= len(candidate.ids):
        return candidate
    tensors = {
        name: array[:count]
        for name, array in candidate.tensors.items()
        if candidate.is_whole(name) and not is_state(name)
    }
    return Trace(candidate.ids[:count], tensors, candidate.arithmetic)


def _holds(candidate, name, own):
    return name in candidate.tensors and candidate.tensors[name].shape == own[name].shape


def layer_of(name: str, after: int) -> int:
    """The number of a tensor's layer; -1 of the embedding, `after` behind the layers."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2])
    return -1 if name == "model.embed_tokens" else after


def _following(candidate, visit, model, choices):
    def record(name, own):
        visit(name, own)
        theirs = usable(candidate, name, own, model.config.num_experts)
        if theirs is None and name in choices:
            return with_choices(own, choices[name])
        return theirs

    return record


def with_choices(own: np.ndarray, chosen) -> np.ndarray:
    """The experts [T, top_k] with other ones for some tokens, or for all."""
    if isinstance(chosen, np.ndarray):
        return chosen
    own = own.copy()
    for token, experts in chosen.items():
        if token < len(own):
            own[token] = experts
    return own


def usable(candidate: Trace, name: str, own: np.ndarray, experts: int) -> np.ndarray | None:
    """The candidate's tensor as the reference can go on with it, or None."""
    value = candidate.tensors.get(name) if candidate.is_known(name) else None
    if value is None or value.shape[1:] != own.shape[1:] or len(value) not in (len(own), 1):
        return None
    if own.dtype.kind == "f":
        return _with_last_row(value, own) if value.dtype.kind == "f" else None
    if value.dtype.kind not in "iu" or value.min() < 0 or value.max() >= experts or len(value) != len(own):
        return None
    return value.astype(np.int64)


def _with_last_row(value, own):
    if len(value) == len(own):
        return value.astype(own.dtype)
    own = own.copy()
    own[-1:] = value
    return own


def is_choice(name: str) -> bool:
    """Whether a tensor holds the routed experts' numbers."""
    return name.endswith(".mlp.gate.2")
