"""Traces: every module's output of one run, by Hugging Face's module path, in execution order.

A trace file is a safetensors file: one tensor a name, [T, features]; `input_ids` int64 [T]; in the
metadata `format`, `arithmetic` and `order`, a JSON list of the names as they were executed.  A
module whose output is a tuple has `NAME` for its first tensor and `NAME.1`, `NAME.2` for the others
(the router: logits, routing weights, selected experts).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import FileFormatError, quote
from .files.safetensors import SafetensorsFile, SafetensorsWriter

FORMAT = "pyengine-trace-1"
IDS = "input_ids"

_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}


@dataclass
class Trace:
    """tensors {name: array [T, features]} in the order of execution; ids int64 [T]."""

    ids: np.ndarray
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    arithmetic: str = ""

    def save(self, path) -> None:
        """Written whole or not at all."""
        tensors = {IDS: np.asarray(self.ids, np.int64), **self.tensors}
        entries = [(name, _DTYPES[str(array.dtype)], array.shape)
                   for name, array in tensors.items()]
        metadata = {"format": FORMAT, "arithmetic": self.arithmetic,
                    "order": json.dumps(list(self.tensors))}
        with SafetensorsWriter(path, entries, metadata) as writer:
            for name, array in tensors.items():
                writer.write(name, array)

    @classmethod
    def load(cls, path) -> Trace:
        """Views of the mapped file.  Errors: FileFormatError."""
        file = SafetensorsFile.open(Path(path))
        ids = file.tensors.get(IDS)
        if ids is None or ids.dtype != "I64" or len(ids.shape) != 1:
            got = "none" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise FileFormatError(path, IDS, f"want I64 [T], got {got}")
        order = _order(file, path)
        return cls(ids.data, {name: file.tensors[name].data for name in order},
                   file.metadata.get("arithmetic", ""))


def _order(file, path) -> list[str]:
    if file.metadata.get("format") != FORMAT:
        raise FileFormatError(path, "metadata format",
                              f"want {FORMAT!r}, got {quote(file.metadata.get('format'))}")
    try:
        order = json.loads(file.metadata.get("order", ""))
    except (ValueError, RecursionError):
        order = None
    names = set(file.tensors) - {IDS}
    if not isinstance(order, list) or not all(isinstance(n, str) for n in order):
        got = quote(file.metadata.get("order"))
        raise FileFormatError(path, "metadata order", f"want a JSON list of names, got {got}")
    if len(set(order)) != len(order) or set(order) != names:
        odd = sorted(set(order) ^ names) or ["a name twice"]
        raise FileFormatError(path, "metadata order", f"want every tensor once, got {quote(odd[0])}")
    unprintable = next((name for name in order if not name.isprintable()), None)
    if unprintable is not None:  # they are module paths, and reports print them
        raise FileFormatError(path, "metadata order", f"want module paths, got {quote(unprintable)}")
    return order


class Recorder:
    """What a model's `record` may be: joins the pieces of a chunked run along T."""

    def __init__(self):
        self.pieces: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, value: np.ndarray) -> None:
        self.pieces.setdefault(name, []).append(value.copy())

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.pieces.items()}


def record_trace(model, ids, state=None, chunk=None) -> Trace:
    """Run the model over ids and keep every module's output, float32 (selected experts int64)."""
    recorder = Recorder()
    model.forward(ids, state, chunk=chunk, record=recorder)
    tensors = {name: array if array.dtype == np.int64 else array.astype(np.float32)
               for name, array in recorder.tensors().items()}
    return Trace(np.asarray(ids, np.int64), tensors, model.arithmetic)
