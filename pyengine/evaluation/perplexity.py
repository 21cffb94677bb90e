"""Perplexity, and the distance of a model from its base: llama-perplexity's chunks and statistics.

    chunks = as_chunks(ids, n_ctx=512)
    scores = join(evaluate(model, chunks))
    print(perplexity(scores))

The tokens are cut into chunks of n_ctx; the remainder is not used.  Each chunk starts from an empty
state.  The second half of a chunk is scored: position i of n_ctx / 2 to n_ctx - 2 predicts token i + 1.
A vocabulary with `add_bos_token` puts its BOS in the place of each chunk's first token.

Source: llama.cpp's tools/perplexity/perplexity.cpp.  Sums are float64 throughout, where llama.cpp
takes each exp and logarithm in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from ..files.kld import first_scored, scored_tokens
from ..ids import as_ids
from ..plots import check_plot, new_figure, save_figure
from ..probabilities import log_softmax
from ..text.gguf_vocabulary import GPT2_BOS as GPT2_BOS
from ..text.tokenizer import Tokenizer, prompt_bos

FORWARD_TOKENS = 256  # tokens computed at a time: bounds the logits kept
COMPARED_LOGITS = 1 << 18  # logits compared at a time: float64 scratch that caches hold

PERCENTILES = (99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1)


# ---- tokens ----------------------------------------------------------------------------------


def read_text(path) -> str:
    """A file's text without its last line end, as llama.cpp's -f has it.  InputError: not UTF-8."""
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: want UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None
    return text.removesuffix("\n")


def text_ids(checkpoint, text: str) -> list[int]:
    """Token ids of a text by the checkpoint's tokenizer, behind its BOS if it asks for one."""
    return Tokenizer.open(checkpoint).encode_prompt(text)


def bos_id(checkpoint) -> int | None:
    """The id that replaces each chunk's first one (text/tokenizer.py has the rule); None: no id does."""
    return prompt_bos(checkpoint)


def as_chunks(ids, n_ctx: int, n_chunks: int | None = None) -> np.ndarray:
    """ids [T] -> [n, n_ctx], all chunks or the first n_chunks.

    InputError: n_ctx below 3, or fewer than 2 n_ctx ids, which llama-perplexity refuses too.
    """
    if n_ctx < 3:
        raise InputError(f"context: want at least 3 tokens, got {n_ctx}")
    if len(ids) < 2 * n_ctx:
        raise InputError(f"text: want at least {2 * n_ctx} tokens for a context of {n_ctx}, got {len(ids)}")
    count = len(ids) // n_ctx
    chunks = np.asarray(ids)[: count * n_ctx].reshape(count, n_ctx)
    return chunks[:n_chunks]


# ---- one value per scored token --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scores:
    """One value per scored token, [n]; fields other than nll are None without a base model.

    nll        float64: -ln of the probability that the model gave the token that followed
    nll_base   float64: the base model's
    kld        float64: KL divergence of the base's distribution from the model's, in nats
    delta_p    float64: the probability of the token that followed, the model's less the base's
    same_top   bool: both have the same likeliest token
    """

    nll: np.ndarray
    nll_base: np.ndarray | None = None
    kld: np.ndarray | None = None
    delta_p: np.ndarray | None = None
    same_top: np.ndarray | None = None


def join(scores) -> Scores:
    """Join an iterable of at least one `Scores`, in order."""
    columns = zip(*([getattr(part, field.name) for field in fields(Scores)] for part in scores))
    return Scores(*(None if column[0] is None else np.concatenate(column) for column in columns))


def evaluate(model, chunks, bos: int | None = None, base=None, writer=None):
    """Run the model over chunks [n, n_ctx] -> an iterator of `Scores`, one per chunk.

    bos      see `bos_id`
    base     the base model's log-probabilities of the same chunks: a `files.kld.LogProbs`
    writer   a `files.kld.LogProbsWriter` that gets the logits of every scored token
    Errors: InputError, FileFormatError.
    """
    for index, chunk in enumerate(chunks):
        following = chunk[first_scored(len(chunk)) + 1 :]
        parts, row = [], 0
        for logits in scored_logits(model, chunk, bos):
            rows = slice(row, row + len(logits))
            row = rows.stop
            if writer:
                writer.write(logits)
            if base:
                parts.append(compare(logits, base.log_probs(index, rows), following[rows], base.resolved))
            else:
                parts.append(Scores(_nll(log_softmax(logits), following[rows])))
        yield join(parts)


def scored_logits(model, chunk, bos: int | None = None):
    """The logits of a chunk's scored positions, in order: an iterator of float32 [rows, vocab]."""
    ids = as_ids(chunk, model.config.vocab_size)[:-1]
    if bos is not None:
        ids[0] = bos
    state, first = model.new_state(), first_scored(len(chunk))
    model.forward(ids[:first], state, last_only=True)
    rows = max(1, COMPARED_LOGITS // model.config.vocab_size)
    for start in range(first, len(ids), FORWARD_TOKENS):
        logits = model.forward(ids[start : start + FORWARD_TOKENS], state)
        for row in range(0, len(logits), rows):
            yield logits[row : row + rows]


def compare(logits, base, following, resolved: float = -np.inf) -> Scores:
    """logits [n, vocab] against the base's log-probabilities [n, vocab]; following [n] ids.

    resolved: a base's log-probability at or below it counts as probability 0 in the divergence.
    """
    log_q, base = log_softmax(logits), base.astype(np.float64)
    nll, nll_base = _nll(log_q, following), _nll(base, following)
    same_top = logits.argmax(axis=-1) == base.argmax(axis=-1)
    terms = np.exp(base) * np.subtract(base, log_q, out=log_q)
    kld = np.where(base > resolved, terms, 0).sum(axis=-1)
    return Scores(nll, nll_base, kld, np.exp(-nll) - np.exp(-nll_base), same_top)


def _nll(log_probs, following) -> np.ndarray:
    return -np.take_along_axis(log_probs, following[:, None], axis=-1)[:, 0]


# ---- statistics ------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean, or what is computed from one, and its standard error."""

    value: float
    error: float


def mean(values) -> Estimate:
    """Error: the standard deviation over sqrt(n - 1); 0 for one value."""
    return Estimate(float(np.mean(values)), _error(values))


def _error(values) -> float:
    return float(np.std(values) / np.sqrt(max(1, len(values) - 1)))


def perplexity(scores: Scores) -> Estimate:
    return _exp(mean(scores.nll))


def _exp(estimate: Estimate) -> Estimate:
    """Its error to first order, as for the other functions of a mean here."""
    value = float(np.exp(estimate.value))
    return Estimate(value, value * estimate.error)


def same_top(scores: Scores) -> Estimate:
    share, n = float(np.mean(scores.same_top)), len(scores.same_top)
    return Estimate(share, float(np.sqrt(share * (1 - share) / max(1, n - 1))))


def rms_delta_p(scores: Scores) -> Estimate:
    square = mean(scores.delta_p**2)
    rms = float(np.sqrt(square.value))
    return Estimate(rms, 0.5 / rms * square.error if rms else 0.0)


def log_ratio(scores: Scores) -> Estimate:
    """ln(PPL / PPL of the base).  Both saw the same tokens: the error is that of the difference."""
    return mean(scores.nll - scores.nll_base)


def _correlation(a, b) -> float:
    """1 between equal values, even of no variance."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt(np.mean(a * a) * np.mean(b * b))
    return float(np.mean(a * b) / scale) if scale else float(np.array_equal(a, b))


def statistics(scores: Scores) -> dict:
    """All figures by name: floats, `Estimate`s, and percentiles by number; of the base only if there is
    one.  Errors of the ratio and the difference take the correlation into account."""
    figures = {"tokens": len(scores.nll), "perplexity": perplexity(scores)}
    if scores.nll_base is None:
        return figures
    ratio, base = log_ratio(scores), _exp(mean(scores.nll_base))
    value = figures["perplexity"].value
    difference = value * scores.nll - base.value * scores.nll_base
    return figures | {
        "perplexity_base": base,
        "correlation": _correlation(scores.nll, scores.nll_base),
        "log_perplexity_ratio": ratio,
        "perplexity_ratio": _exp(ratio),
        "perplexity_difference": Estimate(value - base.value, _error(difference)),
        "kld": _distribution(scores.kld),
        "delta_p": _distribution(scores.delta_p) | {"rms": rms_delta_p(scores)},
        "same_top": same_top(scores),
    }


def _distribution(values) -> dict:
    return {
        "mean": mean(values),
        "maximum": float(values.max()),
        "percentiles": dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist())),
        "minimum": float(values.min()),
    }


# ---- a plot ----------------------------------------------------------------------------------


def plot(scores: Scores, n_ctx: int, path) -> None:
    """KL divergence by the position in the context: every token, and the mean of each position."""
    path = check_plot(path)
    by_position = scores.kld.reshape(-1, scored_tokens(n_ctx))  # [chunk, position]
    positions = np.arange(first_scored(n_ctx), n_ctx - 1)
    figure = new_figure((7, 4))
    axes = figure.subplots()
    axes.plot(
        np.tile(positions, len(by_position)),
        by_position.reshape(-1),
        ".",
        markersize=2,
        alpha=0.4,
        color="tab:gray",
        rasterized=True,
        label="a token",
    )
    axes.plot(
        positions, by_position.mean(axis=0), color="tab:blue", label=f"mean of {len(by_position)} chunks"
    )
    # Rounded log-probabilities of a base give a divergence that may be a little below 0.
    axes.set(
        xlabel="position in the context",
        ylabel="KL divergence, nats",
        yscale="log" if scores.kld.min() > 0 else "linear",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
