"""Token ids, as people give them, checked."""

from __future__ import annotations

import warnings
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
    return np.array([_integer(word, where) for word in text.replace(",", " ").split()], np.int64)


def _integer(word, where) -> int:
    # 18 digits fit int64, and Python reads a million of them in quadratic time.
    if len(word) <= 18:
        try:
            return int(word)
        except ValueError:
            pass
    raise InputError(f"{where}: want integers, got {word[:40]!r}")


def read_ids(path) -> np.ndarray:
    """A file of integers as text, or a .npy of them -> int64 [T]."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            return _read_npy(path)
        return parse_ids(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: want token ids as text or .npy, got: {reason}") from None


def _read_npy(path) -> np.ndarray:
    """Mapped: a header that promises more than the file holds allocates nothing."""
    try:
        # What NumPy warns of (a product that overflows, odd literals) it then refuses, or we do.
        with np.errstate(over="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # its header is Python text; what evaluating that raises comes through
        raise ValueError(error) from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"want integers [T], got {got}")
    return array.astype(np.int64) if array.dtype.kind == "i" else _signed(array)


def _signed(array):
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"want integers below 2^63, got {array.max()}")
    return array.astype(np.int64)
