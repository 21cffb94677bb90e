"""Where the candidate's routers choose other experts than the reference: near-ties are followed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .rerun import is_choice, usable, with_choices
from .ties import allowed_margin, margin_of
from .trace import Trace
from .verdict import FOLLOWS, NEAR_TIE, WRONG, Flip


def following(model, candidate, budget, own, choices) -> tuple[Trace, list[Flip]]:
    """The reference's trace, using the candidate's experts at near-ties.

    Experts that the trace does not hold are those of `choices`, else those that the reference chooses on
    the candidate's own inputs.
    """
    reference, flips = Trace(candidate.ids, arithmetic=model.arithmetic), []

    def record(name, value):
        reference.tensors[name] = value
        if not is_choice(name):
            return None
        theirs = usable(candidate, name, value, model.config.num_experts)
        assumed = theirs is None
        if assumed:
            theirs = with_choices(own[name], choices.get(name, {}))
        logits = reference.tensors[name.removesuffix(".2")]
        allowed = allowed_margin(budget, name)
        reference.tensors[name], found = _choice(name, value, theirs, logits, allowed, assumed)
        flips.extend(found)
        return reference.tensors[name]

    model.forward(candidate.ids, record=record)
    return reference, flips


def _choice(name, ours, theirs, logits, allowed, assumed):
    """-> the experts to go on with [T, top_k], flips.  The order among the chosen has no meaning.

    Assumed choices that are not near-ties are no flips: nothing is known of them.
    """
    chosen, flips = theirs.copy(), []
    for token in np.flatnonzero((np.sort(ours) != np.sort(theirs)).any(axis=-1)):
        margin = margin_of(logits[token], ours[token], theirs[token])
        near = margin <= allowed
        if not near:
            chosen[token] = ours[token]
            if assumed:
                continue
        flips.append(
            Flip(
                name,
                int(token),
                ours[token].tolist(),
                theirs[token].tolist(),
                margin,
                allowed,
                NEAR_TIE if near else WRONG,
                assumed,
            )
        )
    return chosen, flips


def with_kind(flip: Flip, candidate, own, budget) -> Flip:
    """A wrong choice may still be the right one among the candidate's own logits."""
    if flip.kind != WRONG:
        return flip
    router = flip.name.removesuffix(".2")
    logits = candidate.tensors[router] if candidate.is_whole(router) else own[router]
    logits = logits[flip.token].astype(np.float64)
    ours, theirs = own[flip.name][flip.token], np.array(flip.candidate)
    same = set(ours.tolist()) == set(flip.candidate)
    slack = budget.own[router].largest if router in budget.own else allowed_margin(budget, flip.name)
    if same or not np.isfinite(logits).all() or margin_of(logits, ours, theirs) <= slack:
        return replace(flip, kind=FOLLOWS)
    return flip
