"""A large file written front to back, past the page cache where the system allows it."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

from .whole import sync

BLOCK = 4096  # a direct write's offset, length and address are multiples of this
BUFFER_BYTES = 4 << 20
DIRECT_BYTES = 64 << 20  # files of this size and larger do not go through the page cache


class OutputFile:
    """`write`, and `close`, which returns when the bytes are on the disk.

    A large checkpoint would displace the source and the user's files from the page cache, at the cost of
    one more copy, and nobody reads all of it soon.  Where the system or the file system does not have
    O_DIRECT, the writes are ordinary ones.
    """

    def __init__(self, path: str | os.PathLike[str], expected: int):
        """expected: the bytes that the file will hold."""
        size = min(BUFFER_BYTES, -(-max(expected, 1) // BLOCK) * BLOCK)
        # Memory of its own that begins with a page.
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer, self._filled = memoryview(pages), 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._direct = expected >= DIRECT_BYTES and hasattr(os, "O_DIRECT")
        try:
            direct = os.O_DIRECT if self._direct else 0
            self._descriptor: int | None = os.open(path, flags | direct, 0o666)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            self._direct = False
            self._descriptor = os.open(path, flags, 0o666)

    @property
    def closed(self) -> bool:
        return self._descriptor is None

    @property
    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ValueError("the file is closed")
        return self._descriptor

    def write(self, buffer: Any) -> None:
        """Append bytes, or a buffer of bytes."""
        data = memoryview(buffer)
        while len(data):
            part = data[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == len(self._buffer):
                self._write_all(self._buffer)
                self._filled = 0

    def close(self) -> None:
        """Write the rest and wait for the disk."""
        if self._descriptor is None:
            return
        try:
            whole = self._filled // BLOCK * BLOCK
            self._write_all(self._buffer[:whole])
            if whole < self._filled:
                self._be_ordinary()
                self._write_all(self._buffer[whole : self._filled])
            sync(self._descriptor)
        finally:
            self.discard()

    def discard(self) -> None:
        """Close without writing the rest."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _write_all(self, left: memoryview) -> None:
        while len(left):
            try:
                count = os.write(self._open_descriptor, left)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._be_ordinary()
                continue
            left = left[count:]
            if count % BLOCK:  # a short write leaves the offset unaligned
                self._be_ordinary()

    def _be_ordinary(self) -> None:
        if self._direct:
            import fcntl

            flags = fcntl.fcntl(self._open_descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._open_descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False
