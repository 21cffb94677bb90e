"""Values of scored tokens as figures: plain dicts for JSON, of which a "value" has its standard "error".

KL divergences are in nats, of the base's distribution from the candidate's.

    routing   kld minus kld on the base's choices of experts: what the other choices cost.  Its error is that
              of the differences, token by token.
    rest      kld on the base's choices
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...evaluation import perplexity
from ...evaluation.perplexity import Estimate, Scores
from ...files.kld import first_scored
from .compare import Run, Use

PERCENTILES = {"median": 50, "p99": 99}
POSITIONS = 8  # parts of a chunk's scored positions
GROUPS = 4  # of experts, by share of use

Figures = dict[str, Any]


def of_scores(scores: Scores) -> Figures:
    """perplexity, perplexity of the base, the ratio in percent, kld, same_top, tokens."""
    said = perplexity.statistics(scores)
    ratio = said["perplexity_ratio"]
    kld: Figures = plain(said["kld"]["mean"])
    for name, percent in PERCENTILES.items():
        kld[name] = said["kld"]["percentiles"][percent]
    return {
        "tokens": said["tokens"],
        "perplexity": plain(said["perplexity"]),
        "perplexity_base": plain(said["perplexity_base"]),
        "increase_percent": plain(Estimate(100 * (ratio.value - 1), 100 * ratio.error)),
        "kld": kld | {"max": said["kld"]["maximum"]},
        "same_top": plain(said["same_top"]),
    }


def of_run(run: Run, n_ctx: int) -> Figures:
    """Of one text: `of_scores`, routing, by position, the weakest chunk's number and divergence."""
    kld = run.scores.kld
    assert kld is not None
    by_chunk = kld.reshape(-1, n_ctx - 1 - first_scored(n_ctx))  # [chunks, positions]
    means = by_chunk.mean(axis=1)
    weakest = int(means.argmax())
    return of_scores(run.scores) | {
        "routing": _routing(run) if run.changed.shape[1] else None,
        "by_position": _by_position(by_chunk, first_scored(n_ctx)),
        "weakest": {"chunk": weakest, "kld": plain(perplexity.mean(by_chunk[weakest]))},
    }


def _routing(run: Run) -> Figures:
    kld, other = run.scores.kld, run.changed.sum(axis=1) > 0
    return {
        "term": plain(perplexity.mean(kld - run.followed)),
        "rest": plain(perplexity.mean(run.followed)),
        "tokens_with_other_experts": float(other.mean()),
        "kld_of_these": plain(perplexity.mean(kld[other])) if other.any() else None,
        "kld_of_the_others": plain(perplexity.mean(kld[~other])) if not other.all() else None,
    }


def _by_position(by_chunk: NDArray[np.float64], first: int) -> list[Figures]:
    """A few equal parts of the scored positions; "from" and "to" count from the chunk's beginning."""
    parts = np.array_split(np.arange(by_chunk.shape[1]), min(POSITIONS, by_chunk.shape[1]))
    return [
        {"from": first + int(part[0]), "to": first + int(part[-1])}
        | {"kld": plain(perplexity.mean(by_chunk[:, part].reshape(-1)))}
        for part in parts
    ]


def other_experts(run: Run, use: Use, top_k: int) -> list[Figures]:
    """By layer: the share of the base's choices that the candidate did not make."""
    shares = run.changed.mean(axis=0) / top_k
    return [
        {"layer": name.removesuffix(".mlp.gate.2"), "share": float(share)}
        for name, share in zip(use.layers, shares)
    ]


def by_expert_group(use: Use, candidate: int) -> list[Figures]:
    """The divergence of tokens by how much used the experts are that the base chose for them.

    In each layer the experts are ranked by use, most used first, and cut where the share of the choices
    passes 1/4, 2/4, 3/4.  A group's kld is the mean over its choices of the divergence of their tokens, so
    that the groups' mean, weighted by choices, is the text's.
    """
    assert use.tokens is not None
    order = np.argsort(-use.tokens, axis=1, kind="stable")
    ranked = np.take_along_axis(use.tokens, order, axis=1)
    before = ranked.cumsum(axis=1) - ranked
    groups = np.minimum(GROUPS * before // np.maximum(1, ranked.sum(axis=1, keepdims=True)), GROUPS - 1)
    sums = np.take_along_axis(use.kld[candidate], order, axis=1)
    found = []
    for group in range(GROUPS):
        here = groups == group
        choices = int(ranked[here].sum())
        found.append(
            {
                "group": group + 1,
                "experts_per_layer": float(here.sum() / len(groups)),
                "share_of_choices": choices / int(use.tokens.sum()),
                "kld": float(sums[here].sum() / choices) if choices else None,
            }
        )
    return found


def plain(estimate: Estimate) -> Figures:
    return {"value": float(estimate.value), "error": float(estimate.error)}
