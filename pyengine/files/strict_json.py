"""Strict JSON: an object, no duplicate keys, no oversized integers; written without NaN and infinities."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from ..errors import FileFormatError
from .mapped import map_file

Path = str | os.PathLike[str]

MAX_BYTES = 100_000_000
MAX_DIGITS = 20  # of an integer: as 2^64 has; Python takes quadratic time for longer ones


def read_object(
    path: Path, field: str = "file", constants: bool = False, long_integers: bool = False
) -> dict[str, Any]:
    """The object in a JSON file -> dict.  Errors and options as of `parse_object`."""
    text = map_file(path)
    if len(text) > MAX_BYTES:
        raise FileFormatError(path, field, f"want at most {MAX_BYTES} bytes, got {len(text)}")
    return parse_object(path, field, text[:], constants, long_integers)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that Python wrote -> dict: it may have NaN and Infinity.  FileFormatError."""
    return read_object(path, constants=True)


def parse_object(
    path: Path, field: str, text: bytes, constants: bool = False, long_integers: bool = False
) -> dict[str, Any]:
    """Bytes -> dict.  FileFormatError naming path and field: not UTF-8, not JSON, not an object, a
    duplicate key, an integer of more than 20 digits.

    constants      NaN and Infinity, which Python's writers write although JSON does not have them, are
                   floats; without it they are faults
    long_integers  an integer of more than 20 digits is the nearest float (a limit that means "none":
                   transformers writes 10^30); without it the integer is a fault
    """
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_unique_keys,
            parse_int=_any_integer if long_integers else _integer,
            parse_constant=float if constants else _no_constant,
        )
    except RecursionError:
        raise FileFormatError(path, field, "want a JSON object, got one nested too deeply") from None
    except ValueError as error:  # all of JSON's and UTF-8's
        raise FileFormatError(path, field, f"want a JSON object, got {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(path, field, f"want a JSON object, got a {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json itself keeps the last of two equal keys in silence.
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r:.200} twice")
        seen.add(key)
    raise AssertionError("pairs without a key twice")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _any_integer(digits: str) -> int | float:
    return float(digits) if len(digits) > MAX_DIGITS else int(digits)


def _no_constant(name: str) -> float:
    raise ValueError(f"the number {name}")


def finite_or_null(value: Any) -> Any:
    """A value for `json.dumps`: each NaN and each infinity in it, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
