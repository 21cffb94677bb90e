"""Soft labels of one sequence of tokens: NumPy arrays, by the C core's steps (layout.py has their meaning).

    labeller = Labeller(model, LabelOptions(top_k=50))
    labels = labeller.label(ids, "a name")

The bits depend on the model, the arithmetic, the ids and the options alone: not on threads, on the
instruction set, on what was computed before, or on the machine that computes them.

Arithmetic.  y = logits (float32); with a temperature, y = logits / temperature, one float32 division. m is
the greatest of a row, and `total`, `rest` are pe_exp_sums' (csrc/pyengine.h), float64.  In float64:
    ln_total = natural_log(total);  log-probability of id i = (y[i] - m) - ln_total
    logsumexp = m + ln_total;  outside = rest / total
each rounded to float32 at the end.  Against sums in exact arithmetic, total is off by less than 2^-23 of
itself plus 2^-24 |y[i] - m| of each term, so a log-probability is off by less than 1e-6 before it is rounded.

Sampled labels (Sparse Logit Sampling, arXiv 2503.16870).  N ids are drawn, with replacement, from the
proposal q = softmax(power * y), power = 1 / proposal_temperature.  The weight of an id that was drawn c
times is c / N * p / q, with p its probability: the mean of the weight over all draws is p, for every id.
With power 1 it is c / N, and no p or q is computed.  The uniforms of a row are keyed by its document's name
and its place in the document (`uniforms`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import integer, number
from ..core import ops
from ..core.threads import Pool
from ..errors import InputError, NonFiniteError
from ..seed import SEED

DEFAULT_K = 50
LOGITS_AT_ONCE = 1 << 25  # 128 MB of float32
LARGEST_SEED = 2**64 - 1

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LabelOptions:
    """Which labels; see layout.py.

    top_k    the likeliest ids of each row; or
    draws    ids drawn from each row
    temperature  of the teacher's softmax
    proposal_temperature, seed   of the draws
    """

    top_k: int | None = DEFAULT_K
    draws: int | None = None
    temperature: float = 1.0
    proposal_temperature: float = 1.0
    seed: int = SEED

    def check(self, vocab_size: int) -> LabelOptions:
        """InputError for values that no model with this vocabulary can be labelled with."""
        if (self.top_k is None) == (self.draws is None):
            raise InputError(
                "labels: want either top_k or draws, got " + ("both" if self.top_k else "neither")
            )
        for name in ("temperature", "proposal_temperature"):
            # Below 1e-6 a quotient may be beyond float32.
            number(name, getattr(self, name), 1e-6, 1e6)
        if self.top_k is not None and integer("top_k", self.top_k, 1) > vocab_size:
            raise InputError(f"top_k: want at most {vocab_size}, the vocabulary's size, got {self.top_k}")
        if self.draws is not None and integer("draws", self.draws, 1) > 65535:
            raise InputError(f"draws: want at most 65535, got {self.draws}")
        if integer("seed", self.seed, 0) > LARGEST_SEED:
            raise InputError(f"seed: want at most {LARGEST_SEED}, got {self.seed}")
        return self

    def describe(self) -> dict[str, Any]:
        if self.draws is None:
            return {"kind": "top-k", "k": self.top_k}
        return {
            "kind": "sample",
            "draws": self.draws,
            "proposal_temperature": self.proposal_temperature,
            "seed": self.seed,
        }


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of T tokens: shapes, dtypes and meaning stand in layout.py."""

    ids: NDArray[np.int32]
    logprobs: Floats
    weights: Floats | None
    true_logprob: Floats
    logsumexp: Floats
    outside: Floats

    def __len__(self) -> int:
        return len(self.ids)


class _Drawn(NamedTuple):
    """ids [T, draws]: those drawn from each row, ascending, then -1; counts: of each; total: see pe_draw."""

    ids: NDArray[np.int32]
    counts: NDArray[np.int64]
    total: NDArray[np.float64]


class Labeller:
    """Labels sequences of tokens with one model."""

    def __init__(self, model: Any, options: LabelOptions):
        """model: what `pyengine.load` returns.  InputError: options that do not fit the model."""
        self.model, self.options = model, options.check(model.config.vocab_size)
        self.pool: Pool = getattr(model, "pool", None) or Pool()
        self.rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)

    def label(self, ids: Any, name: str = "", start: int = 0, following: int | None = None) -> Labels:
        """ids [T], computed from an empty state -> their labels.

        name       of the document, which keys the draws
        start      the place of ids[0] in the document
        following  the id that comes after the last one, where it is known
        Errors: InputError for ids out of range; NonFiniteError naming the document.
        """
        (labels,) = self.label_many([(ids, name, start, following)])
        return labels

    def label_many(self, sequences: Sequence[tuple[Any, str, int, int | None]]) -> Iterator[Labels]:
        """The labels of several sequences, in order: the arguments of `label`, and its bits.

        They share the passes of the model: several short ones cost little more than one.
        """
        pieces: list[Labels] = []
        at = 0
        computed = self.model.logits_in_pieces([one[0] for one in sequences], rows=self.rows)
        while (piece := self._next(computed, sequences[at:])) is not None:
            i, first, logits = piece
            if i != at:
                yield _join(pieces)
                pieces, at = [], i
            ids, name, start, following = sequences[i]
            stop = first + len(logits)
            behind = -1 if following is None else following
            next_ids = np.append(ids[first + 1 : stop + 1], [behind] if stop == len(ids) else []).astype(
                np.int64
            )
            try:
                pieces.append(self.of_logits(logits, next_ids, name, start + first))
            except NonFiniteError as error:
                raise NonFiniteError(f"{name or 'document'}: {error}") from None
        if pieces:
            yield _join(pieces)

    @staticmethod
    def _next(computed: Iterator[Any], sequences: Sequence[Any]) -> Any:
        """The next piece, or None.  NonFiniteError names the first of the sequences that are computed."""
        try:
            return next(computed, None)
        except NonFiniteError as error:
            more = " or one after it" if len(sequences) > 1 else ""
            raise NonFiniteError(f"{sequences[0][1] or 'document'}{more}: {error}") from None

    def of_logits(self, logits: Floats, following: Any, name: str = "", start: int = 0) -> Labels:
        """logits float32 [T, vocab]; following [T]: the next ids, -1 where there is none."""
        o = self.options
        y = logits if o.temperature == 1 else logits / np.float32(o.temperature)
        with self.pool.lock:
            if o.draws is None:
                ids, drawn = ops.top_k(self.pool, y, o.top_k or 0), None
                greatest = np.take_along_axis(y, ids[:, :1], axis=1)
            else:
                drawn = self._drawn(y, name, start)
                ids, greatest = drawn.ids, y.max(axis=1, keepdims=True)
            total, rest = ops.exp_sums(self.pool, y, ids)
        m, ln_total = greatest.astype(np.float64), natural_log(total)[:, None]
        logprobs = (_at(y, ids) - m) - ln_total
        true = (_at(y, np.asarray(following)[:, None]) - m) - ln_total
        weights = None
        if drawn is not None:
            ids, logprobs, weights = self._weighed(drawn, logprobs, y, m)
        return Labels(
            ids,
            np.where(ids < 0, -np.inf, logprobs).astype(np.float32),
            weights,
            np.where(following < 0, np.nan, true[:, 0]).astype(np.float32),
            (m + ln_total)[:, 0].astype(np.float32),
            (rest / total).astype(np.float32),
        )

    # ---- draws ----

    def _drawn(self, y: Floats, name: str, start: int) -> _Drawn:
        o = self.options
        power = np.float32(1 / o.proposal_temperature)
        u = uniforms(o.seed, name, start, len(y), o.draws or 0)
        drawn, total = ops.draw(self.pool, y, float(power), u)
        drawn.sort(axis=1)
        first = np.ones(drawn.shape, bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        counts = np.zeros(drawn.shape, np.int64)
        row = np.arange(len(drawn))[:, None]
        np.add.at(counts, (row, np.cumsum(first, axis=1) - 1), 1)
        ids = np.full_like(drawn, -1)
        ids[np.arange(drawn.shape[1]) < first.sum(axis=1)[:, None]] = drawn[first]
        return _Drawn(ids, counts, total)

    def _weighed(self, drawn: _Drawn, logprobs: Any, y: Floats, m: Any) -> Any:
        """-> ids, logprobs, weights in the order of layout.py, without places that no row uses."""
        o, ids = self.options, drawn.ids
        weights = drawn.counts / np.float64(o.draws or 1)
        if o.proposal_temperature != 1:
            power = np.float64(np.float32(1 / o.proposal_temperature))
            q = power * (_at(y, ids) - m) - natural_log(drawn.total)[:, None]
            ratio = np.where(ids < 0, 0.0, logprobs - q).astype(np.float32)
            with self.pool.lock:
                weights = weights * ops.exp(self.pool, np.ascontiguousarray(ratio)).astype(np.float64)
        key = np.where(ids < 0, np.inf, -logprobs)
        order = np.argsort(key, axis=1, kind="stable")  # stable: the ids ascend so far
        width = max(1, int((ids >= 0).sum(axis=1).max(initial=0)))
        ids, logprobs, weights = (
            np.take_along_axis(v, order, axis=1)[:, :width] for v in (ids, logprobs, weights)
        )
        return np.ascontiguousarray(ids), logprobs, weights.astype(np.float32)


def _at(y: Floats, ids: Any) -> NDArray[np.float64]:
    """y at ids, in float64; some value where an id is negative."""
    return np.take_along_axis(y, np.maximum(ids, 0).astype(np.int64), axis=1).astype(np.float64)


def _join(pieces: list[Labels]) -> Labels:
    """Pieces of one sequence, in order; rows of fewer labels are filled up."""
    width = max(piece.ids.shape[1] for piece in pieces)

    def filled(name: str, value: float) -> Any:
        parts = [getattr(piece, name) for piece in pieces]
        if parts[0] is None:
            return None
        return np.concatenate(
            [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=value) for part in parts]
        )

    flat = {
        name: np.concatenate([getattr(p, name) for p in pieces])
        for name in ("true_logprob", "logsumexp", "outside")
    }
    return Labels(filled("ids", -1), filled("logprobs", -np.inf), filled("weights", 0), **flat)


def uniforms(seed: int, name: str, start: int, rows: int, draws: int) -> NDArray[np.float64]:
    """[rows, draws] numbers in [0, 1): row r depends on seed, name and start + r alone.

    Philox4x64 of NumPy with the key [seed, the first 8 bytes of the SHA-256 of the name, little-endian] and
    the counter [0, start + r, 0, 0]; the upper 53 bits of each output, times 2^-53.
    """
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    key = np.array([seed, digest], np.uint64)
    raw = np.empty((rows, draws), np.uint64)
    for row in range(rows):
        counter = np.array([0, start + row, 0, 0], np.uint64)
        raw[row] = np.random.Philox(counter=counter, key=key).random_raw(draws)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


_LN2_HI = float.fromhex("0x1.62e42feep-1")  # 32 bits: times an exponent it is exact
_LN2_REST = float.fromhex("0x1.a39ef35793c76p-33")


def natural_log(x: Any) -> NDArray[np.float64]:
    """ln of positive finite float64, by operations that every machine rounds alike; within 2 ulp.

    x = f * 2^e with f from sqrt(1/2) to sqrt(2);  r = (f - 1) / (f + 1);  z = r * r;
    ln x = e * LN2_HI + (e * LN2_REST + 2 r (1 + z/3 + z^2/5 + ... + z^12/25)), Horner's scheme.
    """
    f, e = np.frexp(np.asarray(x, np.float64))
    low = f < np.sqrt(0.5)
    f, e = np.where(low, 2 * f, f), np.where(low, e - 1, e).astype(np.float64)
    r = (f - 1) / (f + 1)
    z = r * r
    series = np.full_like(z, 1 / 25)
    for odd in range(23, 0, -2):
        series = series * z + 1 / odd
    found: NDArray[np.float64] = e * _LN2_HI + (e * _LN2_REST + (2 * r) * series)
    return found
