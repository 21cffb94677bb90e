"""A teacher's labels placed on the student's tokens of the same bytes.

Both sequences of tokens spell the same bytes, so a position between two tokens is an offset in bytes.  A
special token is one place of its own, whatever the length of its text.  It becomes the student's token that
`VocabularyMap` has for it; without one it is left out of the student's sequence.  The teacher's BOS at the
beginning becomes the student's BOS, if the student has one; a student's BOS comes first in any case.

`align` gives each row of the student (row i: what comes after its tokens 0 to i) the teacher's row that has
read the same bytes, if

  1. the teacher has a boundary there too,
  2. the student's place f(v) of the teacher's next token v is the student's next token.

Every other row of the student has no label.  Why, is counted (`REASONS`); no label is guessed:

    inside   the teacher has no boundary there, or a special token that was left out comes next
    other    1 holds and 2 does not: the student's tokenizer cuts this text otherwise from here on, as "the"
             where the teacher read "th", so that f(v) is a token that does not occur there
    last     no token follows, so that 2 cannot be seen: a text that was cut off may end within a word

What a label means.  It is q of `vocabulary.py`: the probability that the bytes after the prefix are cut by
the teacher as v, summed over the v of one f(v).  It is the distribution of the student's next token as far as
the student's tokenizer makes f(v) of whatever begins with v's bytes.  2 says so of the text at hand; of other
continuations nothing is known, and their probability is that of the shorter token f(v) where the student
would make a longer one.  Between two boundaries that follow each other (`Alignment.chunks`) both sequences
spell the same bytes: the sum of the log-probabilities of the true tokens is the log-probability of these
bytes, as that model cuts them, whether the chunk has one token or several.  `exact` marks the rows whose next
token is one token of the same bytes in both sequences: there the true token's log-probability is the
teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..ids import as_ids
from .labels import Labels
from .vocabulary import LOST, VocabularyMap

REASONS = ("inside", "other", "last")


@dataclass(frozen=True, eq=False)
class Alignment:
    """T tokens of the teacher and S of the student, of the same bytes.

    student_ids  int32 [S]
    rows         int32 [S]: the teacher's row that has the place of the student's row i; -1: none
    shared       int32 [S]: the teacher's row that has read the same bytes (1 above alone); -1: none
    exact        bool [S]: whether the next token is one token of the same bytes in both, and the row has a
                 label
    spans        int64 [S, 2]: the teacher's tokens, first and behind the last, that have bytes of token i;
                 both 0 for a BOS that the teacher does not have
    left_out     number of the teacher's special tokens that have no token of the student
    """

    student_ids: NDArray[np.int32]
    rows: NDArray[np.int32]
    shared: NDArray[np.int32]
    exact: NDArray[np.bool_]
    spans: NDArray[np.int64]
    left_out: int

    @property
    def counts(self) -> dict[str, int]:
        """Of the student's rows: "placed", and `REASONS` of the others."""
        placed, last = self.rows >= 0, np.zeros(len(self.rows), bool)
        last[-1:] = True
        return {
            "placed": int(placed.sum()),
            "inside": int((~last & (self.shared < 0)).sum()),
            "other": int((~last & ~placed & (self.shared >= 0)).sum()),
            "last": int(last.sum()),
        }

    @property
    def chunks(self) -> NDArray[np.int64]:
        """int64 [C, 4]: i, j, k, l of each run between two shared boundaries that follow each other.

        It has the student's tokens i to j - 1 and the teacher's k to l - 1.
        """
        ends = np.flatnonzero(self.shared >= 0)
        edges = np.stack([ends + 1, self.shared[ends] + 1], axis=1).astype(np.int64)
        return np.concatenate([edges[:-1], edges[1:]], axis=1)[:, [0, 2, 1, 3]]


def align(teacher_ids: Any, vocabularies: VocabularyMap) -> Alignment:
    """The student's tokens of the teacher's, and which of its rows have labels (above).

    teacher_ids  [T], at least one.  Text between special tokens is tokenized by itself.
    Errors: InputError for an id out of range or without a token; bytes that the student cannot spell.
    """
    ids = as_ids(teacher_ids, vocabularies.teacher_size)
    reading = _Reading(vocabularies)
    reading.read([int(i) for i in ids])
    return reading.alignment(ids)


class _Reading:
    """Both sequences as they grow.  A place of the byte stream is one byte, or one special token.

    ends    where the teacher's tokens end
    ids, starts, stops   the student's tokens, and where each begins and ends
    """

    def __init__(self, vocabularies: VocabularyMap):
        self.map = vocabularies
        self.place, self.left_out = 0, 0
        self.ends: list[int] = []
        self.ids: list[int] = []
        self.starts: list[int] = []
        self.stops: list[int] = []
        self.text: list[int] = []  # the teacher's ids of a run of text

    def read(self, ids: Sequence[int]) -> None:
        teacher, bos = self.map.teacher, self.map.student.bos_id
        first = ids[0] == teacher.bos_id and teacher.is_special(ids[0])
        if first:
            self.special()
        if bos is not None:
            self.push(bos, 1 if first else 0)
        for i in ids[first:]:
            if not teacher.token_bytes(i):
                raise InputError(f"ids: want tokens of the teacher, got {i}, which is padding")
            if not teacher.is_special(i) and i not in self.map.pairs:
                self.text.append(i)
                continue
            self.end_text()
            self.special()
            if self.map.kinds[i] == LOST:
                self.left_out += 1
            else:
                self.push(int(self.map.places[i]), 1)
        self.end_text()

    def special(self) -> None:
        """A special token of the teacher."""
        self.place += 1
        self.ends.append(self.place)

    def push(self, student_id: int, size: int) -> None:
        """A token of the student that ends here."""
        self.ids.append(student_id)
        self.starts.append(self.place - size)
        self.stops.append(self.place)

    def end_text(self) -> None:
        """The run of text becomes the student's tokens of the same bytes."""
        student, start = self.map.student, self.place
        data = self.map.teacher.decode_bytes(self.text)
        for i in self.text:
            self.place += len(self.map.teacher.token_bytes(i))
            self.ends.append(self.place)
        ids = student.encode_bytes(data)
        if student.decode_bytes(ids) != data:
            raise InputError("student: want a vocabulary of every byte, got one that lacks some of this text")
        self.text, self.place = [], start
        for i in ids:
            size = len(student.token_bytes(i))
            self.place += size
            self.push(i, size)

    def alignment(self, teacher_ids: Any) -> Alignment:
        ends, ids = np.array(self.ends, np.int64), np.array(self.ids, np.int32)
        starts, stops = np.array(self.starts, np.int64), np.array(self.stops, np.int64)
        at = np.searchsorted(ends, stops)
        follows_at_once = np.append(starts[1:] == stops[:-1], True)[: len(ids)]
        shared = np.where((ends[np.minimum(at, len(ends) - 1)] == stops) & follows_at_once, at, -1)
        inner = np.flatnonzero((shared[:-1] >= 0) & (shared[:-1] + 1 < len(ends)))
        placed = inner[self.map.places[teacher_ids[shared[inner] + 1]] == ids[inner + 1]]
        rows, exact = np.full(len(ids), -1), np.zeros(len(ids), bool)
        rows[placed] = shared[placed]
        exact[placed] = shared[placed + 1] == shared[placed] + 1
        spans = np.stack([np.searchsorted(ends, starts, "right"), at + 1], axis=1)
        spans[starts == stops] = 0
        return Alignment(ids, rows.astype(np.int32), shared.astype(np.int32), exact, spans, self.left_out)


# ---- labels --------------------------------------------------------------------------------------


def place_labels(labels: Labels, alignment: Alignment, vocabularies: VocabularyMap) -> Labels:
    """The teacher's labels of T rows -> the student's of S rows; rows without a label have ids of -1 alone.

    A row's labels whose ids have one place become one label.  With p the probabilities of the row's labels,
    and lost the part of it on ids without a place:
      top-k    p / (1 - lost), and outside / (1 - lost): what `purify_logits` gives, if k is the whole
               vocabulary. Of the mass outside, it is not known how much is lost
      sampled  weights are summed, and those of lost ids dropped: the mean of the weights over the draws is
               the mass of the ids with this place, and that of their sum 1 less the lost mass
    logsumexp is such that the logit of an exact id is still logprob + logsumexp.  true_logprob is NaN but
    where the next token is the same (`Alignment.exact`).  outside is 1, logsumexp NaN, in a row without a
    label.
    """
    if len(labels) <= int(alignment.shared.max(initial=-1)):
        raise InputError(f"labels: want a row for each of the teacher's tokens, got {len(labels)}")
    placed = np.flatnonzero(alignment.rows >= 0)
    rows = alignment.rows[placed]
    moved, lost = _moved(labels, rows, vocabularies)
    useful = (
        (lost < 1 - 1e-6) & (moved.ids[:, 0] >= 0) if labels.weights is None else np.ones(len(lost), bool)
    )
    placed, rows, lost = placed[useful], rows[useful], lost[useful]
    kept = 1 - lost if labels.weights is None else np.ones(len(lost))
    size, width = len(alignment.student_ids), max(1, moved.ids.shape[1])

    def filled(values: Any, filler: float, dtype: Any, columns: int | None = None) -> Any:
        out = np.full((size, columns) if columns else size, filler, dtype)
        out[placed] = values
        return out

    log_kept = np.log(kept)
    exact = alignment.exact[placed]
    listed = moved.ids[useful] >= 0
    logprobs = np.where(listed, moved.logprobs[useful] - log_kept[:, None], -np.inf)
    return Labels(
        filled(moved.ids[useful], -1, np.int32, width),
        filled(logprobs, -np.inf, np.float32, width),
        None if moved.weights is None else filled(moved.weights[useful], 0, np.float32, width),
        filled(np.where(exact, labels.true_logprob[rows] - log_kept, np.nan), np.nan, np.float32),
        filled(labels.logsumexp[rows] + log_kept, np.nan, np.float32),
        filled(labels.outside[rows] / kept, 1, np.float32),
    )


@dataclass(frozen=True, eq=False)
class _Moved:
    """ids, logprobs, weights [R, L], float64, by falling log-probability, the lower id first among equals."""

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    weights: NDArray[np.float64] | None


def _moved(
    labels: Labels, rows: NDArray[Any], vocabularies: VocabularyMap
) -> tuple[_Moved, NDArray[np.float64]]:
    """The labels of the rows at the student's ids, and the probability of those that have no place."""
    ids = labels.ids[rows]
    p = np.where(ids >= 0, np.exp(labels.logprobs[rows].astype(np.float64)), 0)
    places = np.where(ids >= 0, vocabularies.places[np.maximum(ids, 0)], -1).astype(np.int64)
    lost = np.where((ids >= 0) & (places < 0), p, 0).sum(axis=1)
    row, column = np.nonzero(places >= 0)
    key = row * np.int64(vocabularies.student_size) + places[row, column]
    keys, inverse = np.unique(key, return_inverse=True)
    sums = np.bincount(inverse, p[row, column], len(keys))
    at, found = np.divmod(keys, vocabularies.student_size)
    with np.errstate(divide="ignore"):
        logprobs = np.log(sums)
    order = np.lexsort((found, -logprobs, at))
    at, found, logprobs = at[order], found[order], logprobs[order]
    sizes = np.bincount(at, minlength=len(rows))
    column = np.arange(len(at)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shape = (len(rows), max(1, int(sizes.max(initial=0))))
    out = np.full(shape, -1, np.int64), np.full(shape, -np.inf), np.zeros(shape)
    out[0][at, column], out[1][at, column] = found, logprobs
    weights = None
    if labels.weights is not None:
        of_key = np.bincount(
            inverse, labels.weights[rows].astype(np.float64)[np.nonzero(places >= 0)], len(keys)
        )
        out[2][at, column] = of_key[order]
        weights = out[2]
    return _Moved(out[0], out[1], weights), lost


def place_mask(mask: Any, alignment: Alignment) -> NDArray[np.int8]:
    """assistant_masks of the teacher's tokens [T] -> of the student's [S]: 1 if all of its bytes have it."""
    total = np.concatenate([[0], np.cumsum(np.asarray(mask, np.int64))])
    first, behind = alignment.spans.T
    whole: NDArray[np.bool_] = (behind > first) & (total[behind] - total[first] == behind - first)
    return whole.astype(np.int8)
