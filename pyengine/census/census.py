"""The experts of a model on given texts.

    counts = take_census(model, texts, context=512)
    said = describe(model, texts, counts, context=512, dead=0.05)

An expert is dead where fewer tokens chose it than `dead` times the mean of its layer's experts.  (The mean is
tokens * experts per token / experts.)  A census knows its own texts alone: what is rare on them may be a
specialist of others.

Saliency is REAP's: the mean, over the tokens that chose the expert, of routing weight times the Euclidean
norm of the expert's output.  Source: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE
Compression" (2025), equation 9.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, InputError, PyengineWarning
from ..merge.census_file import BELOW as BELOW
from ..merge.census_file import dead_experts
from ..merge.sources import open_models
from .counts import Counts, Observer
from .texts import Text, windows

CONTEXT = 512
PAIRS = 5  # of a layer, in the figures
DEAD_RULE = (
    "an expert is dead where fewer tokens chose it than dead_below times the mean of its layer's experts"
)
NOTE = "counted on these texts alone: an expert that is rare here may be a specialist of other texts"


# ---- counting ----------------------------------------------------------------------------------


def check_experts(model: Any) -> None:
    """CheckpointError: a dense model."""
    if not model.config.num_experts:
        raise CheckpointError(f"{model.checkpoint.path}: census: want a model with experts, got a dense one")


def check_alike(first: Any, second: Any) -> None:
    """CheckpointError naming the field: two models that are not one model with other weights."""
    names = (str(first.checkpoint.path), str(second.checkpoint.path))
    open_models(names, names[0])


def take_census(
    model: Any,
    texts: list[Text],
    *,
    context: int = CONTEXT,
    chunk: int | None = None,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Counts:
    """Run a model over texts, in windows of `context` tokens that each start from an empty state.

    chunk: tokens computed at a time; in the locked arithmetic it changes no bit
    advance: called with numbers of tokens
    Errors: CheckpointError, a dense model; InputError, no text; those of `forward`.
    """
    check_experts(model)
    if not texts:
        raise InputError("texts: want at least one, got none")
    observer = Observer(model)
    for ids in windows(texts, context):
        model.forward(ids, chunk=chunk, last_only=True, record=observer)
        advance(len(ids))
    return observer.counts


# ---- figures -----------------------------------------------------------------------------------


def describe(model: Any, texts: list[Text], counts: Counts, *, context: int, dead: float) -> dict[str, Any]:
    """The JSON of `pyengine census`; README.md has its keys.  A mean over no token is None."""
    config, tokens = model.config, sum(len(text.ids) for text in texts)
    mean = tokens * config.num_experts_per_tok / config.num_experts
    if dead * mean < 1:
        warnings.warn(
            f"census: {tokens} tokens are {mean:.3g} per expert of a layer: on so few, dead is what was not "
            "chosen once",
            PyengineWarning,
            stacklevel=2,
        )
    return {
        "format": "pyengine census",
        "version": 1,
        "model": str(model.checkpoint.path),
        "arithmetic": model.arithmetic,
        "texts": [text.describe() for text in texts],
        "tokens": tokens,
        "context": context,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "mean_tokens": mean,
        "dead_below": dead,
        "dead_rule": DEAD_RULE,
        "note": NOTE,
        "layers": describe_layers(model, counts, tokens, dead),
    }


def describe_layers(model: Any, counts: Counts, tokens: int, dead: float) -> list[dict[str, Any]]:
    by_layer = tuple(map(tuple, counts.tokens.tolist()))
    layers = []
    for i, dead_here in enumerate(dead_experts(str(model.checkpoint.path), by_layer, dead)):
        n = counts.tokens[i]
        entropy = _entropy(n / n.sum())
        experts = [
            {
                "expert": e,
                "tokens": int(n[e]),
                "share": float(n[e] / n.sum()),
                "mean_weight": _mean(counts.weight[i, e], n[e]),
                "mean_norm": _mean(counts.norm[i, e], n[e]),
                "saliency": _mean(counts.saliency[i, e], n[e]),
                "dead": e in dead_here,
            }
            for e in range(len(n))
        ]
        layers.append(
            {
                "layer": i,
                "dead": sorted(dead_here),
                "entropy_bits": entropy,
                "effective_experts": 2**entropy,
                "router_entropy_bits": float(counts.router_entropy[i] / tokens),
                "experts": experts,
                "pairs": _top_pairs(counts.pairs[i], n, tokens),
            }
        )
    return layers


def _mean(total: float, count: int) -> float | None:
    return float(total / count) if count else None


def _entropy(share: NDArray[np.float64]) -> float:
    """In bits."""
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum()) + 0.0  # no -0


def _top_pairs(pairs: NDArray[np.int64], n: NDArray[np.int64], tokens: int) -> list[dict[str, Any]]:
    """The pairs that most tokens chose, equal ones by their numbers.

    lift: their tokens over what they would be if the two were chosen independently of each other.
    """
    order = np.argsort(-pairs, axis=None, kind="stable")
    chosen = (divmod(int(flat), len(n)) for flat in order)
    return [
        {
            "experts": [a, b],
            "tokens": int(pairs[a, b]),
            "lift": float(pairs[a, b] * tokens / (int(n[a]) * int(n[b]))),
        }
        for a, b in islice(chosen, PAIRS)
        if pairs[a, b]
    ]


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Two descriptions -> per layer the distance of the shares, and the experts that are dead in both or one.

    distance: half the sum of |share - share|, the part of the tokens' choices that went elsewhere: 0 to 1.
    """
    compared = []
    for one, other in zip(first["layers"], second["layers"], strict=True):
        a, b = set(one["dead"]), set(other["dead"])
        shares = zip(one["experts"], other["experts"], strict=True)
        compared.append(
            {
                "layer": one["layer"],
                "distance": sum(abs(x["share"] - y["share"]) for x, y in shares) / 2,
                "dead_in_both": sorted(a & b),
                "dead_in_first": sorted(a - b),
                "dead_in_second": sorted(b - a),
            }
        )
    return compared
