"""safetensors: streamed writing of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .output import OutputFile
from .safetensors import DTYPES, MAX_DIMS, PathLike, stored_nbytes
from .strict_json import MAX_BYTES as MAX_HEADER_BYTES
from .whole import WholeFile


class SafetensorsWriter:
    """Writes a file front to back, one tensor or part of one at a time.

    tensors: sequence of (name, dtype, shape) in the order of the file. The same
    arguments give the same bytes. The file is `path`.partial until `close`
    renames it; as a context manager, an exception removes it instead.
    sha256: name -> hex digest of each complete tensor's bytes.
    """

    def __init__(
        self,
        path: PathLike,
        tensors: Iterable[tuple[str, str, Sequence[int]]],
        metadata: dict[str, str] | None = None,
    ):
        self.path = Path(path)
        self._whole = WholeFile(path)
        self.sha256: dict[str, str] = {}
        header, self._pending = _plan(tensors, metadata or {})
        self._pending.reverse()  # so that pop() takes the next tensor
        self._begin_tensor()
        expected = len(header) + sum(nbytes for _, _, nbytes in self._pending)
        self._file = OutputFile(self._whole.partial, expected)
        self._write_all(header)

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Append `array` to the tensor `name`, which must be the next incomplete one.

        Its dtype is DTYPES of the declared one, its bytes in C order continue the
        tensor's; its shape is free, so that chunks of rows can be written.
        CheckpointError when it is not what was declared.
        """
        if not self._pending or name != self._pending[-1][0]:
            want = self._pending[-1][0] if self._pending else "no more tensors"
            raise CheckpointError(f"{self.path}: want {want} next, got {name}")
        _, dtype, nbytes = self._pending[-1]
        array = np.ascontiguousarray(array)
        if array.dtype != DTYPES[dtype]:
            raise CheckpointError(f"{name}: want {DTYPES[dtype]} for {dtype}, got {array.dtype}")
        if array.nbytes > nbytes - self._written:
            left = nbytes - self._written
            raise CheckpointError(f"{name}: want at most {left} more bytes, got {array.nbytes}")
        self._append(name, array.reshape(-1).view(np.uint8), nbytes)

    def close(self) -> None:
        """Check that every tensor is complete, sync to disk, rename into place."""
        if self._file.closed:
            return
        if self._pending:
            name, _, nbytes = self._pending[-1]
            self.abort()
            raise CheckpointError(f"{name}: want {nbytes} bytes, got {self._written} at close")
        try:
            self._file.close()
            self._whole.publish()
        except OSError:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove the partial file; nothing to do after `close`."""
        try:
            self._file.discard()
        finally:  # closing may fail as writing did
            self._whole.discard()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _append(self, name: str, data: NDArray[np.uint8], nbytes: int) -> None:
        self._write_all(data)
        self._digest.update(data.data)
        self._written += data.size
        if self._written == nbytes:
            self.sha256[name] = self._digest.hexdigest()
            self._pending.pop()
            self._begin_tensor()

    def _begin_tensor(self) -> None:
        self._digest, self._written = hashlib.sha256(), 0

    def _write_all(self, data: Any) -> None:
        try:
            self._file.write(data)
        except OSError:  # on a full disk, discard the partial file
            self.abort()
            raise


def _plan(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: dict[str, str]
) -> tuple[bytes, list[tuple[str, str, int]]]:
    """-> (header bytes with its length, list of (name, dtype, nbytes)). CheckpointError."""
    if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise CheckpointError("__metadata__: want strings")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    pending, end = [], 0
    for name, dtype, shape in tensors:
        if name in header or name == "__metadata__":
            raise CheckpointError(f"{name}: duplicate or reserved name")
        if dtype not in DTYPES:
            raise CheckpointError(f"{name}: want a known dtype, got {dtype}")
        shape = [int(n) for n in shape]
        if any(n < 1 for n in shape) or len(shape) > MAX_DIMS:
            problem = f"want at most {MAX_DIMS} dimensions of at least 1, got {shape}"
            raise CheckpointError(f"{name}: {problem}")
        nbytes = stored_nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        pending.append((name, dtype, nbytes))
        end += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        problem = f"want a header of at most {MAX_HEADER_BYTES} bytes, got {len(text)}"
        raise CheckpointError(problem)
    return len(text).to_bytes(8, "little") + text, pending
