"""The sequences that were computed, for the prompts that begin as they do."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import PyengineError
from ..ids import common_length
from .session import LanguageModel, Session
from .session_files import SUFFIX, SessionFile, file_name, save

SHOWN = 8  # ids of a difference
CACHE_MEMORY = 2 << 30  # bytes for sessions that have ended, where nobody says another number


class Reuse(NamedTuple):
    """What a prompt shares with the sequence that is most like it.

    cached   tokens that are not computed again;  shared  tokens that are equal: a delta net cannot go back to
             every one of them
    before, now   the ids that follow in that sequence and in the prompt, up to SHOWN
    """

    cached: int
    shared: int
    before: list[int]
    now: list[int]


class Prefixes:
    """Sessions that outlast their generations, within some memory.

    A prompt that continues a session's sequence gets that session.  A prompt that shares only a beginning
    with it (a system prompt, or a conversation with another last message) gets a copy of that beginning,
    as far as the session's marks go, and the session stays for whoever continues it.

    memory     bytes that idle sessions may hold together; the one that was used least recently goes first
    directory  where sessions go that leave the memory, and at `close` all others, to be found by the next
               process.  It holds at most `memory` bytes; the oldest files go first.  Files that another
               model wrote are left alone
    """

    def __init__(self, model: LanguageModel, memory: int, directory: Path | None = None):
        self.model, self.memory, self.directory = model, memory, directory
        self._idle: list[Session] = []  # least recently used first
        self._busy: list[Session] = []
        self._files: list[SessionFile] = []
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(directory.glob("*" + SUFFIX), key=lambda path: path.stat().st_mtime):
                self._add_file(path)

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def nbytes(self) -> int:
        return sum(session.nbytes for session in self._idle)

    def take(self, ids: np.ndarray) -> tuple[Session, Reuse]:
        """A session for a prompt [T], which has computed as much of it as there is; of no ids, a new one."""
        self._load_best_file(ids)
        sessions = [*self._idle, *self._busy]
        lengths = [session.reusable(ids) for session in sessions]
        most = max(lengths, default=0)
        reuse = self._reuse(ids, most, sessions)
        session = Session(self.model)
        if most:
            found = sessions[lengths.index(most)]  # an idle one before a busy one
            if found in self._idle and (most == found.position or found.is_late(most)):
                self._idle.remove(found)
                session = found
            else:
                session = found.fork(most)
                if found in self._idle:  # it was used
                    self._idle.remove(found)
                    self._idle.append(found)
        self._busy.append(session)
        return session, reuse

    def give_back(self, session: Session) -> None:
        """The generation has ended."""
        self._busy.remove(session)
        self._idle.append(session)
        while self._idle and self.nbytes > self.memory:
            self._save(self._idle.pop(0))

    def close(self) -> None:
        """Write what there is to the directory, if there is one."""
        for session in self._idle:
            self._save(session)

    # ---- files ----

    def _save(self, session: Session) -> None:
        if not self.directory or not session.ids or session.nbytes > self.memory or not session.whole:
            return
        path = self.directory / file_name(session)
        if not path.exists():
            save(session, path)
            self._add_file(path)
        sizes = [file.path.stat().st_size if file.path.exists() else 0 for file in self._files]
        while sum(sizes) > self.memory:
            del sizes[0]
            self._files.pop(0).path.unlink(missing_ok=True)

    def _add_file(self, path: Path) -> None:
        try:
            self._files.append(SessionFile(self.model, path))
        except (PyengineError, OSError):  # another model's, or another program's
            pass

    def _load_best_file(self, ids: np.ndarray) -> None:
        """Where a file has computed more of a prompt than every session has."""
        most = max((session.reusable(ids) for session in (*self._idle, *self._busy)), default=0)
        lengths = [file.reusable(ids) for file in self._files]
        if max(lengths, default=0) <= most:
            return
        file = self._files.pop(lengths.index(max(lengths)))
        try:
            self._idle.append(file.load())
            self._files.append(file)  # the one that was used last
        except (PyengineError, OSError):  # it has gone, or was changed
            pass

    def _reuse(self, ids: np.ndarray, cached: int, sessions: list[Session]) -> Reuse:
        shared = [common_length(session.ids, ids) for session in sessions]
        most = max(shared, default=0)
        before = sessions[shared.index(most)].ids[most : most + SHOWN] if most else []
        return Reuse(cached, most, [int(i) for i in before], [int(i) for i in ids[most : most + SHOWN]])
