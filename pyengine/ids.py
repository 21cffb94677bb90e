"""Token ids from arguments, texts and files, checked."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import is_integer
from .errors import InputError, quote

Ids = NDArray[np.int64]  # [T]

NO_TOKEN = (-1, 2**32 - 1)  # what a file may have for a token that its model lacks; a GGUF has uint32


def as_ids(ids: object, vocab_size: int, name: str = "ids") -> Ids:
    """Any sequence of integers -> int64 [T], T >= 1.  InputError, "NAME: ...": none, or out of range."""
    try:
        array = np.asarray(ids)
    except ValueError:
        raise InputError(f"{name}: want a flat sequence of integers") from None
    if array.ndim != 1 or not array.size:
        raise InputError(f"{name}: want at least one id in a flat sequence, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise InputError(f"{name}: want integers, got {array.dtype}")
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if bad.size:
        raise InputError(f"{name}: want 0 to {vocab_size - 1}, got {array[bad[0]]} at index {bad[0]}")
    return array.astype(np.int64)


def as_chunk(chunk: object) -> int:
    """A number of tokens to compute at a time."""
    if not is_integer(chunk) or chunk < 1:  # type: ignore[operator]
        raise InputError(f"chunk: want at least 1 token, got {quote(chunk)}")
    return int(chunk)  # type: ignore[call-overload, no-any-return]


def parse_ids(text: str, where: str) -> Ids:
    """Integers between blanks or commas, perhaps within one pair of brackets -> int64 [T]."""
    bracketed = re.fullmatch(r"\s*\[(.*)\]\s*", text, re.DOTALL)
    words = (bracketed[1] if bracketed else text).replace(",", " ").split()
    return np.array([_integer(word, where) for word in words], np.int64)


def _integer(word: str, where: str) -> int:
    # 18 digits fit int64.  `int` alone would take "1_0" too, and a million digits in quadratic time.
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", word):
        raise InputError(f"{where}: want integers, got {word[:40]!r}")
    return int(word)


def read_ids(path: str | os.PathLike[str]) -> Ids:
    """A file of integers as text, or a .npy of them -> int64 [T]."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            return _read_npy(path)
        return parse_ids(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: want token ids as text or .npy, got: {reason}") from None


def _read_npy(path: Path) -> Ids:
    """Mapped: a header that promises more than the file holds allocates nothing."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            raise ValueError("want integers [T], got an archive")
    try:
        # What NumPy warns of (a product that overflows, odd literals) it then refuses, or we do.
        with np.errstate(over="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # its header is Python text; what evaluating that raises comes through
        raise ValueError(error) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"want integers [T], got {array.dtype} {array.shape}")
    return array.astype(np.int64) if array.dtype.kind == "i" else _signed(array)


def _signed(array: NDArray[np.unsignedinteger[Any]]) -> Ids:
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"want integers below 2^63, got {array.max()}")
    return array.astype(np.int64)


def common_length(a: Sequence[int] | Ids, b: Sequence[int] | Ids) -> int:
    """Length of the common beginning of two sequences of ids."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n], np.int64) != np.asarray(b[:n], np.int64))
    return int(differ[0]) if differ.size else n
