"""Who adds the error: block by block, what each adds on the candidate's own inputs, and what it inherits.

A block is the embedding, a layer's mixer (its norm, its attention or delta net), a layer's MLP (the sum
before it, its norm, the router, the experts), the residual (the sum of a layer's output), the head (the last
norm, lm_head).  Of a trace of layers alone, a layer is one block.  Each block of the reference is run on the
candidate's own input; what the candidate's output is away from that, the block adds.  What that is away from
the reference, the block inherits.  Both are in units of budgets: of the block alone, and end to end.
"""

from __future__ import annotations

import numpy as np

from ..reference import ReferenceModel
from .budget import Error
from .dataflow import EMBEDDING, HEAD
from .rerun import is_choice, layer_of, usable
from .trace import Trace
from .verdict import ENDS, LAYER, MIXER, MLP, RESIDUAL, Added, BlockError, Routing, TokenError, Verdict


def blocks_alone(candidate: Trace, layers: int) -> Trace:
    """The trace with what blocks put out, and the routers' choices."""
    return candidate.kept(
        [name for name in candidate.tensors if _block(name, layers, candidate) or is_choice(name)]
    )


def _block(name: str, layers: int, candidate: Trace) -> str | None:
    if name in (EMBEDDING, HEAD):
        return ENDS
    if not name.startswith("model.layers."):
        return None
    part = name.split(".", 3)[3:]
    if part:
        return {"linear_attn": MIXER, "self_attn": MIXER, "mlp": MLP}.get(part[0])
    known = candidate.tensors
    mixer = f"{name}.linear_attn" in known or f"{name}.self_attn" in known
    return RESIDUAL if mixer and f"{name}.mlp" in known else LAYER


def who_adds(model: ReferenceModel, alone: Trace, judged: Verdict, budget) -> Added:
    """judged: the verdict on `blocks_alone`, by `budget`, which was measured for it."""
    layers = model.config.num_hidden_layers
    blocks = [
        BlockError(
            layer_of(row.name, layers),
            _block(row.name, layers, alone),
            row.name,
            row.own_share,
            row.inherited_share,
            row.total_share,
        )
        for row in judged.rows
        if row.own_share is not None and row.inherited_share is not None
    ]
    routing = _routing(model, alone, judged, budget) if judged.flips else None
    return Added(blocks, _by_token(judged.rows, len(alone.ids)), routing)


def _by_token(rows, count) -> list[TokenError]:
    """Of each token, the block that adds most."""
    most: dict[int, TokenError] = {}
    for row in rows:
        tokens = row.rows or range(count - len(row.own_by_token), count)
        for token, share in zip(tokens, row.own_by_token):
            if token not in most or share > most[token].added:
                most[token] = TokenError(token, row.name, share)
    return [most[token] for token in sorted(most)]


def _routing(model, alone, judged, budget) -> Routing | None:
    last = next((row for row in reversed(judged.rows) if row.total_share is not None), None)
    if last is None:
        return None
    shares = [_share(model, alone, last.name, follow, budget) for follow in (False, True)]
    return Routing(last.name, shares[0], last.total_share, shares[1])


def _share(model, candidate, name, follow, budget) -> float:
    """Of a tensor, where the reference goes on with its own choices or with the candidate's."""
    found = {}

    def record(reached, value):
        found[reached] = value
        if follow and is_choice(reached):
            return usable(candidate, reached, value, model.config.num_experts)
        return None

    with np.errstate(all="ignore"):
        model.forward(candidate.ids, record=record)
    truth = candidate.part(name, found[name])
    return Error.between(candidate.tensors[name], truth.astype(np.float64)).share_of(budget.total[name])
