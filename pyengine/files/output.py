"""A large file written front to back, past the page cache where the system allows it."""

import errno
import mmap
import os

BLOCK = 4096  # what a direct write's place, length and memory must be multiples of
BUFFER_BYTES = 4 << 20
DIRECT_BYTES = 64 << 20  # a file of this size on does not go through the page cache


class OutputFile:
    """`write` and `close` (on the disk when it returns), and no more; expected: the bytes it will hold.

    A large checkpoint is larger than what anybody will read of it soon: in the page cache it would only
    displace the source and the user's files, at the cost of one more copy.  Where O_DIRECT is not to
    be had, or the file system does not take it, the writes are ordinary ones.
    """

    def __init__(self, path, expected: int):
        size = min(BUFFER_BYTES, -(-max(expected, 1) // BLOCK) * BLOCK)
        # Memory of its own that begins with a page.
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer, self._filled = memoryview(pages), 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._direct = expected >= DIRECT_BYTES and hasattr(os, "O_DIRECT")
        try:
            self._descriptor = os.open(path, flags | (os.O_DIRECT if self._direct else 0), 0o666)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            self._direct = False
            self._descriptor = os.open(path, flags, 0o666)

    @property
    def closed(self) -> bool:
        return self._descriptor is None

    def write(self, data) -> None:
        """Append bytes, or a buffer of them."""
        data = memoryview(data)
        while len(data):
            part = data[:len(self._buffer) - self._filled]
            self._buffer[self._filled:self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part):]
            if self._filled == len(self._buffer):
                self._write_all(self._buffer)
                self._filled = 0

    def close(self) -> None:
        """Write what is left and wait for the disk."""
        if self.closed:
            return
        try:
            whole = self._filled // BLOCK * BLOCK
            self._write_all(self._buffer[:whole])
            if whole < self._filled:
                self._be_ordinary()
                self._write_all(self._buffer[whole:self._filled])
            os.fsync(self._descriptor)
        finally:
            self.discard()

    def discard(self) -> None:
        """Close; what was not written yet is not."""
        if not self.closed:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _write_all(self, left) -> None:
        while len(left):
            try:
                count = os.write(self._descriptor, left)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._be_ordinary()
                continue
            left = left[count:]
            if count % BLOCK:  # what the disk took before it was full: the next place is no block's
                self._be_ordinary()

    def _be_ordinary(self) -> None:
        if self._direct:
            import fcntl

            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False
