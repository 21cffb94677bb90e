"""A trace's file: what its header says, checked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from ..errors import FileFormatError, quote
from ..files.numbers import bfloat16_to_float32
from ..files.safetensors import SafetensorsFile

FORMAT = "pyengine-trace-1"
IDS = "input_ids"
ROWS, COLUMNS = "@rows", "@columns"  # what follows a tensor's name in the name of its indices

_READABLE = ("F32", "F64", "F16", "I64", "I32", "U32", "BF16")


def open_trace_file(path) -> SafetensorsFile:
    """FileFormatError: of the file's header, or that the file is another kind of file."""
    try:
        return SafetensorsFile.open(Path(path))
    except FileFormatError as error:
        kind = _other_kind(path) if str(error.field).startswith("header") else None
        if kind is None:
            raise
        raise FileFormatError(path, "trace", f"want a safetensors file, got {kind}") from None


def _other_kind(path) -> str | None:
    """What a file is that does not begin as a safetensors file does."""
    with open(path, "rb") as file:
        start, size = file.read(9), file.seek(0, 2)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return None
    return next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), "another file")


_KINDS = {
    b"GGUF": "a GGUF",
    b"\x93NUMPY": "a NumPy array",
    b"PK": "a zip archive (.npz or PyTorch's)",
    b"{": "JSON",
    b"[": "JSON",
    b"\x7fELF": "a program",
}


def values_of(path, view) -> np.ndarray:
    if view.dtype not in _READABLE:
        raise FileFormatError(path, f"tensor {view.name}", f"want {', '.join(_READABLE)}, got {view.dtype}")
    if view.dtype == "BF16":
        return bfloat16_to_float32(view.data)
    return view.data


def indices_of(file, path, order, suffix) -> dict[str, np.ndarray]:
    found = {}
    for name in [*order, ""]:
        view = file.tensors.get(f"{name}{suffix}")
        if view is None:
            continue
        if view.dtype not in ("I64", "I32") or len(view.shape) != 1:
            raise FileFormatError(
                path, view.name, f"want I64 or I32 [n], got {view.dtype} {list(view.shape)}"
            )
        found[name] = view.data
    every = found.pop("", None)
    if every is None or suffix != ROWS:
        return found
    count = {name: file.tensors[name].shape[:1] for name in order}
    return {name: every for name in order if count[name] == every.shape} | found


def names_of(file, path, known) -> str:
    """Whose names the tensors have, one of `known`."""
    names = file.metadata.get("names", "")
    if names not in known:
        wanted = ", ".join(repr(name) for name in known if name)
        raise FileFormatError(path, "metadata names", f"want {wanted} or none, got {quote(names)}")
    return names


def steps_of(file, path, tokens) -> tuple[int, ...]:
    text = file.metadata.get("steps")
    if text is None:
        return ()
    try:
        steps = json.loads(text)
    except (ValueError, RecursionError):
        steps = None
    if (
        not isinstance(steps, list)
        or not all(type(n) is int and n > 0 for n in steps)
        or sum(steps) != tokens
    ):
        raise FileFormatError(
            path, "metadata steps", f"want a JSON list of lengths with the sum {tokens}, got {quote(text)}"
        )
    return tuple(steps)


def resolution_of(file, path) -> float:
    text = file.metadata.get("resolution", "0")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise FileFormatError(path, "metadata resolution", f"want a number from 0 on, got {quote(text)}")
    return value


def order_of(file, path) -> list[str]:
    if file.metadata.get("format") != FORMAT:
        raise FileFormatError(
            path, "metadata format", f"want {FORMAT!r}, got {quote(file.metadata.get('format'))}"
        )
    try:
        order = json.loads(file.metadata.get("order", ""))
    except (ValueError, RecursionError):
        order = None
    names = {n for n in file.tensors if n != IDS and not n.endswith((ROWS, COLUMNS))}
    if not isinstance(order, list) or not all(isinstance(n, str) for n in order):
        got = quote(file.metadata.get("order"))
        raise FileFormatError(path, "metadata order", f"want a JSON list of names, got {got}")
    if len(set(order)) != len(order) or set(order) != names:
        odd = sorted(set(order) ^ names) or ["a name twice"]
        raise FileFormatError(path, "metadata order", f"want every tensor once, got {quote(odd[0])}")
    unplaced = next(
        (n for n in file.tensors if n.endswith((ROWS, COLUMNS)) and not _of_a_tensor(n, names)), None
    )
    if unplaced is not None:
        raise FileFormatError(path, unplaced, "want the indices of a tensor of the trace, got another's")
    unprintable = next((name for name in order if not name.isprintable()), None)
    if unprintable is not None:  # they are module paths, and reports print them
        raise FileFormatError(path, "metadata order", f"want module paths, got {quote(unprintable)}")
    return order


def _of_a_tensor(name, tensors) -> bool:
    stem, _, _ = name.rpartition("@")
    return stem in tensors or name == ROWS
