"""JSON that says one thing: an object, no key twice, no number beyond what a file can mean."""

import json

from pyengine.errors import FileFormatError
from pyengine.files.mapped import map_file

MAX_BYTES = 100_000_000
MAX_DIGITS = 20  # of an integer, 2^64 has them; Python's own reading of longer ones is quadratic


def read_object(path, field="file", constants=False):
    """The object in a JSON file -> dict.  Errors and `constants` as of `parse_object`."""
    text = map_file(path)
    if len(text) > MAX_BYTES:
        raise FileFormatError(path, field, f"want at most {MAX_BYTES} bytes, got {len(text)}")
    return parse_object(path, field, text[:], constants)


def parse_object(path, field, text, constants=False):
    """Bytes -> dict.  FileFormatError naming path and field: not UTF-8, no JSON, no object, a key
    twice, an integer of more than 20 digits.  constants: NaN and Infinity, which JSON does not
    have and Python's writers write, are floats; else they are faults too."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique_keys, parse_int=_integer,
                           parse_constant=float if constants else _no_constant)
    except RecursionError:
        raise FileFormatError(path, field, "want a JSON object, got one nested too deeply") from None
    except ValueError as error:  # all of JSON's and UTF-8's
        raise FileFormatError(path, field, f"want a JSON object, got {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(path, field, f"want a JSON object, got a {type(value).__name__}")
    return value


def _unique_keys(pairs):
    # json itself keeps the last of two equal keys in silence.
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f"the key {twice!r:.200} twice")


def _integer(digits):
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _no_constant(name):
    raise ValueError(f"the number {name}")
