"""Models beside a base, in step: a piece of a chunk through the base, then through each of the others.

Chunks and scored positions are those of evaluation/perplexity.py: the second half of each chunk counts.  Of
logits, one piece's are in memory: PIECE_BYTES of each of two models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...evaluation import perplexity
from ...evaluation.perplexity import Scores
from ...files.kld import first_scored
from ...ids import as_ids
from ...probabilities import log_softmax
from .routing import Choices, Followed, Noted, changed

PIECE_BYTES = 64 << 20  # of float32 logits

Advance = Callable[[int], object]


@dataclass
class Run:
    """A candidate's values on one text, one a scored token, [n] in the order of the chunks.

    scores         on its own choices of experts: evaluation.perplexity.Scores
    followed       KL divergence on the base's choices; without experts, that of `scores`
    changed        of the base's choices, how many it did not make: int64 [n, layers with experts]
    """

    scores: Scores
    followed: NDArray[np.float64]
    changed: NDArray[np.int64]


@dataclass
class Use:
    """How a text's scored tokens use the base's experts, and what each candidate costs them.

    layers   names of the layers with experts
    tokens   int64 [layers, experts]: how many tokens chose the expert
    kld      for each candidate float64 [layers, experts]: their KL divergence, summed
    """

    layers: list[str] = field(default_factory=list)
    tokens: NDArray[np.int64] | None = None
    kld: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, choices: Choices, experts: int, divergences: Sequence[NDArray[np.float64]]) -> None:
        """choices: of scored tokens alone."""
        if self.tokens is None:
            self.layers = list(choices)
            self.tokens = np.zeros((len(choices), experts), np.int64)
            self.kld = [np.zeros(self.tokens.shape) for _ in divergences]
        for i, chosen in enumerate(choices.values()):
            flat = chosen.reshape(-1)
            self.tokens[i] += np.bincount(flat, minlength=experts)
            for total, kld in zip(self.kld, divergences):
                np.add.at(total[i], flat, np.repeat(kld, chosen.shape[1]))


def run(
    base: Any,
    candidates: Sequence[Any],
    chunks: NDArray[Any],
    bos: int | None = None,
    advance: Advance = lambda tokens: None,
) -> tuple[list[Run], Use]:
    """Every candidate beside the base over chunks [n, n_ctx], with the experts' part in it."""
    use = Use()
    pieces = [
        piece
        for chunk in chunks
        for piece in _routed_chunk(base, candidates, _inputs(base, chunk, bos), chunk, use, advance)
    ]
    return [_joined([piece[i] for piece in pieces]) for i in range(len(candidates))], use


def _joined(runs: Sequence[Run]) -> Run:
    return Run(
        perplexity.join(part.scores for part in runs),
        np.concatenate([part.followed for part in runs]),
        np.concatenate([part.changed for part in runs]),
    )


def divergences(
    base: Any,
    candidates: Sequence[Any],
    chunks: NDArray[Any],
    bos: int | None = None,
    advance: Advance = lambda tokens: None,
) -> list[Scores]:
    """The scores of every candidate beside the base, and nothing of experts."""
    parts: list[list[Scores]] = [[] for _ in candidates]
    for chunk in chunks:
        ids = _inputs(base, chunk, bos)
        states = [model.new_state() for model in (base, *candidates)]
        for piece, following in _pieces(ids, chunk, base.config.vocab_size):
            theirs = base.forward(piece, states[0], last_only=following is None)
            for model, state, scores in zip(candidates, states[1:], parts):
                logits = model.forward(piece, state, last_only=following is None)
                if following is not None:
                    scores.append(_compared(logits, theirs, following))
        advance(len(chunk))
    return [perplexity.join(scores) for scores in parts]


def _routed_chunk(
    base: Any, candidates: Sequence[Any], ids: NDArray[Any], chunk: NDArray[Any], use: Use, advance: Advance
) -> Iterator[list[Run]]:
    """The runs of each piece of one chunk."""
    own = [model.new_state() for model in candidates]
    following_base = [model.new_state() for model in candidates]
    state = base.new_state()
    for piece, following in _pieces(ids, chunk, base.config.vocab_size):
        unscored = following is None
        noted = Noted()
        logits = base.forward(piece, state, last_only=unscored, record=noted)
        theirs, found = noted.choices, []
        for i, model in enumerate(candidates):
            mine = Noted()
            made = model.forward(piece, own[i], last_only=unscored, record=mine)
            scores = None if unscored else _compared(made, logits, following)
            followed = None if scores is None else scores.kld
            if theirs:
                made = model.forward(piece, following_base[i], last_only=unscored, record=Followed(theirs))
                followed = None if unscored else _compared(made, logits, following).kld
            if scores is not None:
                columns = [changed(theirs[name], mine.choices[name]) for name in theirs]
                other = np.stack(columns, axis=1) if columns else np.zeros((len(piece), 0), np.int64)
                found.append(Run(scores, followed, other))
        if found:
            if theirs:
                use.add(theirs, base.config.num_experts, [one.scores.kld for one in found])
            yield found
    advance(len(chunk))


def _inputs(base: Any, chunk: NDArray[Any], bos: int | None) -> NDArray[Any]:
    ids = as_ids(chunk, base.config.vocab_size)[:-1]
    if bos is not None:
        ids[0] = bos
    return ids


def _pieces(ids: NDArray[Any], chunk: NDArray[Any], vocab: int) -> Iterator[tuple[NDArray[Any], Any]]:
    """(ids, the ids that follow each of them); None: they are not scored."""
    first = first_scored(len(chunk))
    yield ids[:first], None
    step = max(1, min(perplexity.FORWARD_TOKENS, PIECE_BYTES // (4 * vocab)))
    for start in range(first, len(ids), step):
        piece = ids[start : start + step]
        yield piece, chunk[start + 1 : start + 1 + len(piece)]


def _compared(logits: NDArray[Any], base: NDArray[Any], following: NDArray[Any]) -> Scores:
    """logits, base [n, vocab], a few rows at a time."""
    rows = max(1, perplexity.COMPARED_LOGITS // logits.shape[1])
    parts = (slice(start, start + rows) for start in range(0, len(logits), rows))
    return perplexity.join(
        perplexity.compare(logits[part], log_softmax(base[part]), following[part]) for part in parts
    )
