"""A sequence that is kept between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np

from ..errors import InputError
from ..ids import common_length


class LanguageModel(Protocol):
    """What sessions and generations need of a model: both arithmetics have it."""

    config: Any

    def new_state(self) -> Any: ...

    def forward(self, ids: Any, state: Any, *, last_only: bool) -> np.ndarray: ...

    def forward_batch(self, sequences: Any, *, last_only: Sequence[bool]) -> list[np.ndarray]: ...


class ScreeningModel(LanguageModel, Protocol):
    """One that can compute the largest logits alone: `forward` takes `largest`, where `screens` is true."""

    screens: bool

    def complete_logits(self, state: Any) -> np.ndarray: ...


class Session:
    """One sequence, kept between calls: what a prompt shares with it is not computed again.

        session = model.new_session()
        first = model.generate(messages, session=session)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "More."}]
        model.generate(messages, session=session).cached_tokens

    The bits are those of computing the whole prompt anew.  (This holds for the locked arithmetics.  The
    last bits of float64, which is NumPy's, depend on how a prompt is cut.)

    A delta net cannot go back by itself.  Where the prompt begins with everything that was computed, the
    session continues.  Otherwise the session goes back to the last of its marks that the prompt agrees
    with; marks are the end of the first message (often a system prompt), the last of every 4,096 tokens of a
    prompt, and the ends of the last prompts and of their messages.  A mark costs the memory of the delta
    nets' states (63 MB for the 35B-A3B).  The last token drawn by a generation is not computed yet.  After
    an interrupt, even in the middle of a forward pass, the next prompt starts at a mark.

    ids       list of the ids computed, in order;  position  their number
    logits    float32 [vocab] after them, None when there are none
    state     the model's
    whole     False inside a forward pass, and after one that was interrupted
    A session serves one generation at a time.  To continue an older generation is an InputError.
    """

    def __init__(self, model: LanguageModel, state: Any = None, marks: int = 4):
        """marks: the most that are kept; 0: no prompt is compared, the state is only continued."""
        self.model, self.state = model, model.new_state() if state is None else state
        self.ids: list[int] = []
        self._logits: np.ndarray | None = None
        self._complete = True  # whether these are all logits, and not the largest alone
        self._marks = marks
        self.whole = True
        self._owner: object = None

    def __repr__(self) -> str:
        marks = len(getattr(self.state, "marks", ()))
        return f"<{type(self).__name__}: {self.position} tokens, {marks} marks>"

    @property
    def position(self) -> int:
        return len(self.ids)

    @property
    def logits(self) -> np.ndarray | None:
        if not self._complete:
            self.logits = cast(ScreeningModel, self.model).complete_logits(self.state)
        return self._logits

    @logits.setter
    def logits(self, logits: np.ndarray | None) -> None:
        self._logits, self._complete = logits, True

    def begin(self, ids: np.ndarray, owner: object = None) -> int:
        """Go back to a point from which ids [T] can be continued -> the number of them that is computed."""
        self._owner = owner
        if not self._marks:
            return 0
        shared = common_length(self.ids, ids)
        if self.whole and shared == self.position:
            return shared
        self.whole = False
        mark = self._mark_within(shared)
        if mark:
            self.state.rewind(mark)
            self.logits = mark.note
        else:
            self.state, self.logits = self.model.new_state(), None
        del self.ids[self.state.position :]
        self.whole = True
        return self.position

    def reusable(self, ids: np.ndarray) -> int:
        """How many of ids [T] `begin` would find computed."""
        shared = common_length(self.ids, ids)
        ends = [mark.position for mark in self.state.marks]
        return reusable(shared, [*ends, self.position] if self.whole else ends)

    def is_late(self, position: int) -> bool:
        """Whether a prompt that goes back to there drops no more than the last message and its answer."""
        return position in [mark.position for mark in self.state.marks[-2:]]

    def fork(self, position: int) -> Session:
        """Another session with the sequence up to a mark, or up to here; this one stays as it is."""
        fork = Session(self.model, marks=self._marks)
        if position == self.position and self.whole:
            fork.state, fork.logits = self.state.copy(), self.logits
        else:
            mark = self._mark_within(position)
            fork.state, fork.logits = self.state.copy_of_mark(mark), mark.note
        fork.ids = self.ids[: fork.state.position]
        fork.mark()
        return fork

    @property
    def nbytes(self) -> int:
        return int(self.state.nbytes)

    def _mark_within(self, length: int) -> Any:
        """The last mark that is not behind so many ids, or None."""
        return next((mark for mark in reversed(self.state.marks) if mark.position <= length), None)

    def advance(
        self,
        ids: Sequence[int] | np.ndarray,
        owner: object = None,
        every: bool = False,
        largest: int | None = None,
    ) -> np.ndarray:
        """Compute ids [T] -> float32 [vocab], the logits after them; every: [T, vocab], after each.

        largest: of one id's logits so many of the largest are needed, and the others may be -inf.
        """
        if owner is not self._owner:
            raise InputError("session: want the generation that began last, got an older one")
        self.whole = False
        some = largest is not None and len(ids) == 1 and getattr(self.model, "screens", False)
        more = {"largest": largest} if some else {}
        logits = self.model.forward(ids, self.state, last_only=not every, **more)
        logits = self._advanced(ids, logits, every)
        self._complete = not some
        return logits

    def _advanced(self, ids: Sequence[int] | np.ndarray, logits: np.ndarray, every: bool) -> np.ndarray:
        self.logits = logits[-1].copy() if every else logits[-1]
        self.ids.extend(int(i) for i in ids)
        self.whole = True
        return logits if every else logits[-1]

    def mark(self) -> None:
        """Remember this point; when there are too many marks, the second oldest is dropped."""
        if not self._marks or any(mark.position == self.position for mark in self.state.marks):
            return
        self.state.mark(self.logits)
        if len(self.state.marks) > self._marks:
            del self.state.marks[min(1, self._marks - 1)]


def reusable(shared: int, ends: Sequence[int]) -> int:
    """How far a sequence can be continued: the last of its ends that is within the ids that are shared."""
    return max((end for end in ends if end <= shared), default=0)


def advance_batch(
    model: LanguageModel, work: Sequence[tuple[Session, np.ndarray, bool, int | None]]
) -> list[np.ndarray | Exception]:
    """(session, ids [T], every, largest) of each, all in one pass -> what `Session.advance` gives, of each.

    Several sequences share the whole head: each gets all its logits.

    A sequence whose computation fails gets the error in place of its logits; the others are computed
    again, each alone.
    """
    if len(work) == 1:
        return [_alone(*work[0])]
    for session, *_ in work:
        session.whole = False
    try:
        batch = [(ids, session.state) for session, ids, *_ in work]
        computed = model.forward_batch(batch, last_only=[not every for *_, every, _ in work])
    except Exception:
        return [_alone_again(*one) for one in work]
    return [session._advanced(ids, got, every) for (session, ids, every, _), got in zip(work, computed)]


def _alone(session: Session, ids: np.ndarray, every: bool, largest: int | None) -> np.ndarray | Exception:
    try:
        return session.advance(ids, session._owner, every, largest)
    except Exception as error:
        return error


def _alone_again(
    session: Session, ids: np.ndarray, every: bool, largest: int | None
) -> np.ndarray | Exception:
    """After a pass that failed: from the session's last mark on."""
    before = np.array(session.ids, np.int64)
    done = session.begin(np.concatenate([before, ids]), session._owner)
    if done < len(before):
        try:
            session.advance(before[done:], session._owner)
        except Exception as error:
            return error
    return _alone(session, ids, every, largest)
