"""Every error that pyengine raises on purpose; each reads as one line."""

import reprlib


class PyengineError(Exception):
    """Base of the package's own errors."""

    def __str__(self):
        return _one_line(super().__str__(), 4096)


class FileFormatError(PyengineError):
    """A file breaks its format: ``PATH: FIELD: PROBLEM``, the problem as "want X, got Y"."""

    def __init__(self, path, field, problem):
        super().__init__(path, field, problem)
        self.path, self.field, self.problem = path, field, problem

    def __str__(self):
        parts = (self.path, 4096), (self.field, 160), (self.problem, 400)
        return ": ".join(_one_line(part, limit) for part, limit in parts)


class CheckpointError(PyengineError):
    """Names, shapes or dtypes of a checkpoint contradict each other."""


class InputError(PyengineError):
    """An argument, or a token id, is out of its range."""


def quote(value):
    """repr for a message: of a value from a file, however large or deeply nested."""
    return _QUOTE.repr(value)


_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = 200
_QUOTE.maxlevel = 3


def _one_line(value, limit):
    # Fields and problems quote bytes of hostile files: no control characters, no megabytes.
    text = str(value)
    if len(text) > limit:
        text = text[:limit] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
