"""One tensor of a mapped file, whatever the file's format."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .mapped import MappedFile

COMPARED = 1 << 24  # bytes compared at a time


@dataclasses.dataclass(frozen=True, eq=False)
class MappedTensor:
    """Where a tensor's bytes are.  A subclass knows its type, and gives `data`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int  # from the start of the file
    _buffer: MappedFile = dataclasses.field(repr=False)

    @property
    def stored_bytes(self) -> NDArray[np.uint8]:
        """Read-only view of the file, uint8 [nbytes]."""
        view: NDArray[np.uint8] = np.ndarray((self.nbytes,), np.uint8, self._buffer, self.offset)
        return view

    def sha256(self) -> str:
        """Hex digest of the tensor's bytes."""
        return hashlib.sha256(self.stored_bytes.data).hexdigest()

    def has_bits_of(self, other: MappedTensor) -> bool:
        """Whether both tensors have the same bytes; the same place of one file is not read."""
        if self.nbytes != other.nbytes:
            return False
        if (self._buffer.inode, self.offset) == (other._buffer.inode, other.offset):
            return True
        mine, theirs = self.stored_bytes, other.stored_bytes
        return all(
            np.array_equal(mine[start : start + COMPARED], theirs[start : start + COMPARED])
            for start in range(0, self.nbytes, COMPARED)
        )
