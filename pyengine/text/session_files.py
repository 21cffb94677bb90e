"""Sessions on disk: one safetensors file each, which only the model that wrote it continues.

tensors    `State.arrays` of the session; logits, and marks.N.logits: float32 [vocab]
metadata   format; model: the checkpoint's fingerprint; arithmetic; ids: the tokens, as JSON;
           marks: the positions of the marks, as JSON
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileFormatError, InputError
from ..files.safetensors import SafetensorsFile
from ..files.safetensors_writer import SafetensorsWriter
from ..ids import common_length
from .session import Session, reusable

FORMAT = "pyengine-session-1"
SUFFIX = ".safetensors"

_DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64"}


def file_name(session: Session) -> str:
    """The same for the same tokens, so that a sequence is not kept twice."""
    return hashlib.sha256(np.array(session.ids, "<i8").tobytes()).hexdigest()[:32] + SUFFIX


def save(session: Session, path: Path) -> None:
    """Written whole or not at all."""
    marks = session.state.marks
    tensors = {"logits": session.logits, **{f"marks.{j}.logits": mark.note for j, mark in enumerate(marks)}}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    tensors |= session.state.arrays()
    entries = [(name, _DTYPES[str(array.dtype)], array.shape) for name, array in tensors.items()]
    metadata = _owner(session.model) | {
        "ids": json.dumps(session.ids),
        "marks": json.dumps([mark.position for mark in marks]),
    }
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def _owner(model: Any) -> dict[str, str]:
    return {"format": FORMAT, "model": model.checkpoint.fingerprint, "arithmetic": model.arithmetic}


class SessionFile:
    """A file that `save` wrote for this model; its ids and marks are read, its arrays are not yet.

    Errors: FileFormatError; InputError: another model's, or no session.
    """

    def __init__(self, model: Any, path: Path):
        self.model, self.path = model, path
        metadata = SafetensorsFile.open(path).metadata
        for name, want in _owner(model).items():
            if metadata.get(name) != want:
                raise InputError(f"{path}: {name}: want {want}, got {metadata.get(name)}")
        self.ids = self._integers(metadata, "ids", model.config.vocab_size - 1)
        self.marks = self._integers(metadata, "marks", len(self.ids))

    def _integers(self, metadata: dict[str, str], name: str, most: int) -> list[int]:
        try:
            values = json.loads(metadata.get(name, ""))
        except ValueError:
            values = None
        if not isinstance(values, list) or not all(type(i) is int and 0 <= i <= most for i in values):
            raise FileFormatError(self.path, name, f"want a list of integers from 0 to {most}")
        return values

    def reusable(self, ids: np.ndarray) -> int:
        """As of the session."""
        return reusable(common_length(self.ids, ids), [*self.marks, len(self.ids)])

    def load(self) -> Session:
        """Errors: FileFormatError."""
        arrays = {name: view.data for name, view in SafetensorsFile.open(self.path).tensors.items()}
        session = Session(self.model)
        marks = [(at, _copy(arrays.get(f"marks.{j}.logits"))) for j, at in enumerate(self.marks)]
        try:
            session.state.set_arrays(arrays, len(self.ids), marks)
        except KeyError as error:
            raise FileFormatError(self.path, str(error), "want this tensor, got none") from None
        except InputError as error:
            raise FileFormatError(self.path, *str(error).split(": ", 1)) from None
        session.ids, session.logits = list(self.ids), _copy(arrays.get("logits"))
        return session


def _copy(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else np.array(array)
