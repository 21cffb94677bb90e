"""Token ids, as people give them, checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .errors import InputError


def as_ids(ids, vocab_size: int) -> np.ndarray:
    """Any sequence of integers -> int64 [T], T >= 1.  InputError: none, or out of range."""
    try:
        array = np.asarray(ids)
    except ValueError:
        raise InputError("ids: want a flat sequence of integers") from None
    if array.ndim != 1 or not array.size:
        raise InputError(f"ids: want at least one id in a flat sequence, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise InputError(f"ids: want integers, got {array.dtype}")
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if bad.size:
        raise InputError(f"ids: want 0 to {vocab_size - 1}, got {array[bad[0]]} at index {bad[0]}")
    return array.astype(np.int64)


def as_chunk(chunk) -> int:
    if not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk: want at least 1 token, got {chunk!r}")
    return chunk


def parse_ids(text: str, where: str) -> np.ndarray:
    """Integers between blanks or commas -> int64 [T]."""
    words = text.replace(",", " ").split()
    try:
        return np.array([int(word) for word in words], np.int64)
    except (ValueError, OverflowError):
        bad = next((w for w in words if not w.lstrip("-").isdigit()), words[0])
        raise InputError(f"{where}: want integers, got {bad[:40]!r}") from None


def read_ids(path) -> np.ndarray:
    """A file of integers as text, or a .npy of them -> int64 [T]."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        return parse_ids(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: want token ids as text or .npy: {reason}") from None
