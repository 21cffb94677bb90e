"""The reference led along a candidate: each operation on the candidate's own inputs."""

from __future__ import annotations

import numpy as np

from ..reference import ReferenceModel
from ..trace import Trace


def own_values(model: ReferenceModel, candidate: Trace, visit) -> None:
    """Call visit(name, own) for every module: what the reference makes of what the candidate recorded
    before it.  Where the candidate has no usable tensor, the reference's own value goes on."""

    def record(name, own):
        visit(name, own)
        return usable(candidate, name, own, model.config.num_experts)

    with np.errstate(all="ignore"):
        model.forward(candidate.ids, record=record)


def layer_values(model: ReferenceModel, candidate: Trace, index: int, hidden, visit) -> None:
    """own_values of one decoder layer, whose input [T, H] is given."""

    def record(name, own):
        visit(name, own)
        return usable(candidate, name, own, model.config.num_experts)

    with np.errstate(all="ignore"):
        model.run_layer(index, hidden, record)


def usable(candidate: Trace, name: str, own: np.ndarray, experts: int) -> np.ndarray | None:
    """The candidate's tensor as the reference can go on with it, or None."""
    value = candidate.tensors.get(name)
    if value is None or value.shape != own.shape:
        return None
    if own.dtype.kind == "f":
        return value.astype(own.dtype) if value.dtype.kind == "f" else None
    if value.dtype.kind not in "iu" or value.min() < 0 or value.max() >= experts:
        return None
    return value.astype(np.int64)


def is_choice(name: str) -> bool:
    """Whether a tensor holds the routed experts' numbers."""
    return name.endswith(".mlp.gate.2")
