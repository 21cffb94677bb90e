"""Every error that pyengine raises on purpose; each reads as one line."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable


class PyengineError(Exception):
    """Base of the package's own errors."""

    def __str__(self) -> str:
        return _one_line(super().__str__(), 4096)


class FileFormatError(PyengineError):
    """A file breaks its format: ``PATH: FIELD: PROBLEM``, the problem as "want X, got Y"."""

    def __init__(self, path: str | os.PathLike[str], field: str, problem: object):
        super().__init__(path, field, problem)
        self.path, self.field, self.problem = path, field, problem

    def __str__(self) -> str:
        parts = (self.path, 4096), (self.field, 160), (self.problem, 400)
        return ": ".join(_one_line(part, limit) for part, limit in parts)


class CheckpointError(PyengineError):
    """Names, shapes or dtypes of a checkpoint contradict each other."""


class InputError(PyengineError):
    """An argument, or a token id, is out of its range."""


class NonFiniteError(PyengineError):
    """A NaN or an infinity turned up in the forward pass."""


class PyengineWarning(UserWarning):
    """Base of the package's own warnings; each reads as one line."""


class UnknownKeyWarning(PyengineWarning):
    """A file has a key that this package does not know, and does not read."""


def quote(value: object) -> str:
    """repr for a message: of a value from a file, however large or deeply nested."""
    return _QUOTE.repr(value)


def nearest(name: str, known: Iterable[str], likeness: float = 0.75) -> str | None:
    """The known name that was meant, whatever its case and its separators; None: none is near.

    likeness: 0 to 1, as of `difflib.SequenceMatcher.ratio`.
    """
    letters = {_letters(one): one for one in known}
    near = difflib.get_close_matches(_letters(name[:100]), letters, n=1, cutoff=likeness)
    return letters[near[0]] if near else None


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = 200
_QUOTE.maxlevel = 3


def _one_line(value: object, limit: int) -> str:
    # Fields and problems quote bytes of hostile files: no control characters, no megabytes.
    text = str(value)
    if len(text) > limit:
        text = text[:limit] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
