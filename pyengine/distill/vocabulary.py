"""Two vocabularies compared by the bytes of their tokens; a teacher's distribution over the student's ids.

`VocabularyMap` puts each id of the teacher into one kind:

    exact      the student has a token of the same bytes
    projected  the student's tokenizer makes several tokens of the bytes; the first is the id's place
    lost       a special token that the student does not have, or bytes that it has no tokens for
    padding    an id without a token

A special token is that added token of the student which has the same text, and none that merges make.
`pairs` says which others mean the same, such as the ends of text of two families.

Bytes are tokenized as they are (`Tokenizer.encode_bytes`): they may be half a character, and are not put into
NFC.

`purify_logits` gives the student's distribution.  With p = softmax(logits) over the teacher's ids, and f(v)
the place of v, computed in float64:

    q(u) = sum of p(v) over the exact and projected v with f(v) = u, / (1 - lost mass - padding's mass)

The masses are given for each row.  Where no exact or projected id has a probability there is no q.  q is the
distribution of the student's next token as far as the student's tokenizer makes f(v) of whatever begins with
the bytes of v; `alignment.py` says where that is known.  A student's id that is no f(v) gets no probability.

Ids of two vocabularies mean the same where both are padding, or the tokens are the same in bytes and in being
special.  `truncate_logits` cuts the teacher's ids off behind the student's last.  That is right for two sizes
of one vocabulary (152,064 and 151,936 ids, the rest is padding) and for nothing else: of Qwen's earlier
151,643 ids, 281 mean the same in Qwen3.5's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.families import MODEL_TYPES
from ..errors import InputError
from ..files.strict_json import read_json
from ..probabilities import softmax
from ..text.ranks import open_ranks
from ..text.tokenizer import Tokenizer

KINDS = ("exact", "projected", "lost", "padding")
EXACT, PROJECTED, LOST, PADDING = range(len(KINDS))
MIN_SHARE = 0.1  # of the smaller vocabulary's tokens, that are exact
_ROWS = 64  # computed at a time, in float64

Float = NDArray[np.float64]


def open_vocabulary(source: Any) -> Tokenizer:
    """The tokenizer of a GGUF, a Hugging Face directory, a tokenizer.json, or Qwen's ranks (.tiktoken).

    A directory may be of any family whose tokenizer is a byte-level BPE with a pattern that is known here.
    A tokenizer.json has no padding: its ids end at its last token.
    Errors: InputError, FileFormatError as of `Tokenizer.open`, `.of_directory`, `.from_file`, `open_ranks`.
    """
    path = Path(source)
    config = path / "config.json"
    if path.is_dir() and not (config.exists() and read_json(config).get("model_type") in MODEL_TYPES):
        return Tokenizer.of_directory(path)
    if path.suffix == ".json":
        return Tokenizer.from_file(path)
    if path.suffix == ".tiktoken":
        return open_ranks(path)
    return Tokenizer.open(path)


class VocabularyMap:
    """Where each of the teacher's ids is among the student's (above).

    teacher, student   the tokenizers
    teacher_size, student_size   V and W: ids are 0 to V - 1 and 0 to W - 1
    kinds     uint8 [V]: EXACT, PROJECTED, LOST or PADDING
    places    int32 [V]: the student's id, the first of a sequence; -1 of lost ids and padding
    same_ids  number of the ids below V and W that are tokens and mean the same
    differing_ids  int64: the ids below W that do not mean the same
    cut_ids   number of the teacher's tokens that are at W or behind
    """

    def __init__(
        self,
        teacher: Tokenizer,
        student: Tokenizer,
        *,
        pairs: Mapping[int, int] | None = None,
        teacher_size: int | None = None,
        student_size: int | None = None,
        larger: bool = False,
    ):
        """pairs: teacher's id -> student's id, said to mean the same (ends of text of two families).
        teacher_size, student_size: of the models, where they are padded and the tokenizers' files do not say.
        larger: take a student of more tokens than the teacher has; most of its ids then get no probability.

        Errors: InputError where less than MIN_SHARE of the smaller vocabulary is exact; for a student that
        has more tokens; for a pair out of range; for a size below that of the tokens.
        """
        self.teacher, self.student = teacher, student
        self.teacher_size = _size("teacher", teacher, teacher_size)
        self.student_size = _size("student", student, student_size)
        self.pairs = dict(pairs or {})
        self._check_pairs()
        own, their = _tokens(teacher), _tokens(student)
        self._teacher_tokens, self._student_tokens = (
            sum(token is not None for token in tokens) for tokens in (own, their)
        )
        self._compare_ids(own, their)
        self.kinds = np.full(self.teacher_size, PADDING, np.uint8)
        self.places = np.full(self.teacher_size, -1, np.int32)
        self._sequences: dict[int, tuple[int, ...]] = {}
        self._place_all(own, their)
        self._check(larger)

    # ---- one id ----

    def sequence(self, token_id: int) -> tuple[int, ...]:
        """The student's ids of one of the teacher's: one, several, or () where it is lost or padding."""
        if not 0 <= token_id < self.teacher_size:
            raise InputError(f"id: want 0 to {self.teacher_size - 1}, got {token_id}")
        if token_id in self._sequences:
            return self._sequences[int(token_id)]
        place = int(self.places[token_id])
        return () if place < 0 else (place,)

    # ---- all of them ----

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> number of the teacher's ids."""
        return {name: int((self.kinds == kind).sum()) for kind, name in enumerate(KINDS)}

    def count(self, ids: Iterable[int]) -> dict[str, int]:
        """Kind -> how many of some of the teacher's ids are of it."""
        found = np.bincount(self.kinds[np.asarray(list(ids), np.int64)], minlength=len(KINDS))
        return dict(zip(KINDS, map(int, found)))

    @property
    def unreached(self) -> int:
        """Number of the student's tokens that are the place of no id: they get no probability."""
        reached = np.unique(self.places[self.places >= 0])
        return self._student_tokens - len(reached)

    @property
    def one_vocabulary(self) -> bool:
        """Whether the two are sizes of one vocabulary, so that `truncate_logits` is right."""
        return not len(self.differing_ids) and not self.cut_ids and self.student_size <= self.teacher_size

    def masses(self, probabilities: NDArray[Any]) -> dict[str, Float]:
        """Kind -> the probability of its ids, float64 [..], of probabilities [.., V]."""
        probabilities = np.asarray(probabilities, np.float64)
        _check_width("probabilities", probabilities, self.teacher_size)
        return {name: probabilities[..., self.kinds == kind].sum(-1) for kind, name in enumerate(KINDS)}

    def gather(self, values: Float) -> Float:
        """[.., V] -> [.., W]: the sums of the values of the ids that share a place."""
        taken = np.flatnonzero(self.places >= 0)
        order = taken[np.argsort(self.places[taken], kind="stable")]
        places, starts = np.unique(self.places[order], return_index=True)
        sums = np.zeros((*values.shape[:-1], self.student_size))
        if len(order):
            sums[..., places] = np.add.reduceat(values[..., order], starts, axis=-1)
        return sums

    # ---- making it ----

    def _place_all(self, own: list[_Token | None], their: list[_Token | None]) -> None:
        text, added = _ids_of_text(their), _ids_of_added(their)
        for i, token in enumerate(own):
            if token is None:
                continue
            known = added.get(token.data) if token.added else None
            if known is None and not token.special:
                known = text.get(token.data)
            known = self.pairs.get(i, known)
            if known is None:
                self._project(i, token)
            else:
                self.kinds[i], self.places[i] = EXACT, known

    def _project(self, i: int, token: _Token) -> None:
        ids = [] if token.special else self.student.encode_bytes(token.data)
        if self.student.decode_bytes(ids) != token.data:
            self.kinds[i] = LOST
            return
        self.kinds[i], self.places[i] = PROJECTED, ids[0]
        self._sequences[i] = tuple(ids)

    def _compare_ids(self, own: list[_Token | None], their: list[_Token | None]) -> None:
        width = self.student_size
        ours, theirs = ([*tokens, *[None] * width][:width] for tokens in (own, their))
        same = np.array([_same(a, b) for a, b in zip(ours, theirs)], bool)
        self.differing_ids = np.flatnonzero(~same)
        self.same_ids = sum(a is not None and _same(a, b) for a, b in zip(own, their))
        self.cut_ids = sum(token is not None for token in own[width:])

    # ---- checks ----

    def _check_pairs(self) -> None:
        for i, j in self.pairs.items():
            for name, tokenizer, token in ("teacher", self.teacher, i), ("student", self.student, j):
                if not 0 <= token < tokenizer.vocab_size or not tokenizer.token_bytes(token):
                    raise InputError(f"pairs: want ids of tokens, got the {name}'s {token}")

    def _check(self, larger: bool) -> None:
        smaller = min(self._teacher_tokens, self._student_tokens)
        exact = self.counts["exact"]
        if exact < MIN_SHARE * smaller:
            raise InputError(
                f"vocabularies: want {MIN_SHARE:.0%} of the smaller one's {smaller:,} tokens in both, got "
                f"{exact:,}: the two are not related"
            )
        if self._student_tokens > self._teacher_tokens and not larger:
            raise InputError(
                f"student: want no more than the teacher's {self._teacher_tokens:,} tokens, got "
                f"{self._student_tokens:,}, of which {self.unreached:,} get no probability"
            )


class _Token(NamedTuple):
    data: bytes
    special: bool
    added: bool


def _tokens(tokenizer: Tokenizer) -> list[_Token | None]:
    """Of every id; None: no token."""
    every = (
        _Token(tokenizer.token_bytes(i), tokenizer.is_special(i), tokenizer.is_added(i))
        for i in range(tokenizer.vocab_size)
    )
    return [token if token.data else None for token in every]


def _ids_of_text(tokens: list[_Token | None]) -> dict[bytes, int]:
    """Bytes -> id of a token that text can be.  Of two: the added one, which is found first, or the lower."""
    ids: dict[bytes, int] = {}
    for wanted in (True, False):
        for i, token in enumerate(tokens):
            if token is not None and not token.special and token.added == wanted:
                ids.setdefault(token.data, i)
    return ids


def _ids_of_added(tokens: list[_Token | None]) -> dict[bytes, int]:
    return {token.data: i for i, token in enumerate(tokens) if token is not None and token.added}


def _same(a: _Token | None, b: _Token | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.data, a.special) == (b.data, b.special)


def _size(name: str, tokenizer: Tokenizer, said: int | None) -> int:
    if said is not None and said < tokenizer.vocab_size:
        raise InputError(
            f"{name}_size: want at least the tokenizer's {tokenizer.vocab_size:,} ids, got {said:,}"
        )
    return tokenizer.vocab_size if said is None else said


# ---- distributions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Purified:
    """The student's distribution, and where the teacher's probability lay: float64.

    logprobs  [.., W]; -inf for an id that no id of the teacher has as its place
    exact, projected, lost, padding  [..]: masses of the teacher's distribution; their sum is 1
    """

    logprobs: Float
    exact: Float
    projected: Float
    lost: Float
    padding: Float


def purify_logits(logits: NDArray[Any], vocabularies: VocabularyMap, temperature: float = 1.0) -> Purified:
    """The student's distribution (above) of the teacher's logits [.., V], divided by the temperature.

    Errors: InputError for another width, for NaN or +inf, for a temperature that is not above 0, and for a
    row whose whole probability is lost.
    """
    logits = np.asarray(logits)
    _check_logits(logits, vocabularies.teacher_size)
    if not temperature > 0:
        raise InputError(f"temperature: want a number above 0, got {temperature}")
    rows = logits.reshape(-1, logits.shape[-1])
    logprobs = np.empty((len(rows), vocabularies.student_size))
    masses = {name: np.empty(len(rows)) for name in KINDS}
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        p = softmax(rows[part], temperature)
        for name, mass in vocabularies.masses(p).items():
            masses[name][part] = mass
        sums = vocabularies.gather(p)
        kept = sums.sum(-1, keepdims=True)
        if not kept.all():
            row = start + int(np.flatnonzero(kept == 0)[0])
            raise InputError(f"logits: want probability on ids that the student has, got none in row {row}")
        with np.errstate(divide="ignore"):
            logprobs[part] = np.log(sums / kept)
    shape = logits.shape[:-1]
    return Purified(
        logprobs.reshape(*shape, -1), **{name: mass.reshape(shape) for name, mass in masses.items()}
    )


def truncate_logits(logits: NDArray[Any], vocabularies: VocabularyMap, by: str = "bytes") -> NDArray[Any]:
    """The teacher's logits [.., V] -> [.., W], of its first W ids.

    by="bytes"  only where that is right: every id means the same (above), and no token is cut off
    by="id"     whatever the ids mean
    Errors: InputError with the number of ids that disagree; for another width; for a W above V.
    """
    if by not in ("bytes", "id"):
        raise InputError(f"by: want bytes or id, got {by!r}")
    logits, size = np.asarray(logits), vocabularies.student_size
    _check_width("logits", logits, vocabularies.teacher_size)
    if size > vocabularies.teacher_size:
        raise InputError(
            f"student: want at most the teacher's {vocabularies.teacher_size:,} ids, got {size:,}"
        )
    if by == "bytes" and not vocabularies.one_vocabulary:
        raise InputError(
            f"truncation by id: want {size:,} ids of one meaning, got {len(vocabularies.differing_ids):,} "
            f"that disagree, and {vocabularies.cut_ids:,} tokens cut off; purify_logits maps them, "
            'by="id" does not look'
        )
    return logits[..., :size]


def _check_width(name: str, values: NDArray[Any], width: int) -> None:
    if values.ndim < 1 or values.shape[-1] != width:
        raise InputError(f"{name}: want the teacher's {width:,} ids, got {list(values.shape)}")


def _check_logits(logits: NDArray[Any], width: int) -> None:
    _check_width("logits", logits, width)
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise InputError("logits: want numbers, got NaN or infinity")
    if logits.size and np.isneginf(logits.max(axis=-1)).any():
        raise InputError("logits: want a finite number in every row")
