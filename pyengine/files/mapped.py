"""A file mapped read-only, and whether it is still the file that was mapped."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import stat
from typing import NoReturn

import numpy as np

from ..errors import FileFormatError

# What a clone without Git LFS has in place of a large file.
POINTER = b"version https://git-lfs.github.com/spec/"
READ_STEP = 8 << 20  # bytes
_MADV_POPULATE_READ = 22  # of Linux; Python has no name for it
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class MappedFile(mmap.mmap):
    """mmap of a whole file; path, inode (device and number) and mtime_ns as of its opening."""

    path: str | os.PathLike[str]
    inode: tuple[int, int]
    mtime_ns: int

    def check_unchanged(self) -> None:
        """FileFormatError if the file was truncated, grew or was written to since it was mapped.

        Reading a page that truncation took away kills the process (SIGBUS), and no handler can supply the
        missing bytes; so every reader calls this first.  A change between the call and the reading is not
        detected.  A file that was removed, or replaced under its name, is not a fault: the mapping holds
        the old file.
        """
        if self.size() != len(self):
            self._fail(
                f"want the {len(self)} bytes that were opened, got {self.size()}: it has changed since"
            )
        try:
            now = os.stat(self.path)
        except OSError:
            return
        if (now.st_dev, now.st_ino) == self.inode and now.st_mtime_ns != self.mtime_ns:
            self._fail("want the bytes that were opened, got a file that was written to since")

    @functools.cached_property
    def address(self) -> int:
        """Of its first byte."""
        return int(np.frombuffer(self, np.uint8).__array_interface__["data"][0])

    def open_again(self, past_cache: bool) -> int:
        """A descriptor of the file for `os.pread`; the caller closes it.

        past_cache: for reads past the page cache; their offset, length and memory must be multiples of
        4096.  OSError where the file has no such reads.  FileFormatError: the file was replaced.
        """
        descriptor = os.open(self.path, os.O_RDONLY | (_O_DIRECT if past_cache else 0))
        try:
            found = os.fstat(descriptor)
            if (found.st_dev, found.st_ino) != self.inode:
                self._fail("want the file that was opened, got another one under its name")
            if past_cache:
                _try_past_cache(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def missing(self, start: int, stop: int, step: int = READ_STEP) -> list[tuple[int, int]]:
        """Pieces [(start, stop)] of at most `step` bytes whose first page the page cache lacks.

        Nothing is read: a read with RWF_NOWAIT would begin to read ahead, in small pages.  Empty on a system
        that does not tell.
        """
        firsts = [start, *range((start // step + 1) * step, stop, step)]
        return [
            (first, last) for first, last in zip(firsts, [*firsts[1:], stop]) if not self._is_cached(first)
        ]

    def _is_cached(self, position: int) -> bool:
        page = self.address + position // mmap.PAGESIZE * mmap.PAGESIZE
        vector = ctypes.c_ubyte(1)
        try:
            failed = _libc().mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(vector))
        except (OSError, AttributeError):
            return True
        return bool(failed) or bool(vector.value & 1)

    def read_in(self, start: int, stop: int) -> None:
        """Read bytes [start, stop) into the page cache, and into pages of this mapping."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self.madvise(_MADV_POPULATE_READ, first, stop - first)
        except (AttributeError, OSError, ValueError):  # another system, or an older kernel
            np.frombuffer(self, np.uint8, stop - start, start)[:: mmap.PAGESIZE].max()

    def drop(self) -> None:
        """Let go of the pages of this mapping; what is used again is read again."""
        try:
            self.madvise(mmap.MADV_DONTNEED)
        except (AttributeError, OSError):
            pass

    def expect_single_pages(self, start: int, stop: int) -> None:
        """Bytes [start, stop) will be read a page here and a page there: read nothing around them."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self.madvise(mmap.MADV_NOHUGEPAGE, first, stop - first)
            self.madvise(mmap.MADV_RANDOM, first, stop - first)
        except (AttributeError, OSError):
            pass

    def _fail(self, problem: str) -> NoReturn:
        raise FileFormatError(self.path, "file", problem)


def map_file(path: str | os.PathLike[str]) -> MappedFile:
    """Map a regular file -> MappedFile.  FileFormatError when missing, empty, special or unreadable."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                kind = "a named pipe" if stat.S_ISFIFO(found.st_mode) else "a device"
                raise FileFormatError(path, "file", f"want a regular file, got {kind}")
            if found.st_size == 0:
                raise FileFormatError(path, "file", "want some bytes, got an empty file")
            # Pass the length explicitly: the file may have grown since fstat.
            mapped = MappedFile(file.fileno(), found.st_size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or truncated just now
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(path, "file", f"want a file that can be read, got: {reason}") from error
    if mapped[: len(POINTER)] == POINTER:
        raise FileFormatError(
            path, "file", "want the file itself, got a pointer of Git LFS to it (git lfs pull fetches it)"
        )
    mapped.path, mapped.mtime_ns = path, found.st_mtime_ns
    mapped.inode = found.st_dev, found.st_ino
    _advise_huge_pages(mapped)
    return mapped


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _try_past_cache(descriptor: int) -> None:
    """OSError if the file cannot be read past the page cache."""
    if _O_DIRECT:
        os.preadv(descriptor, [mmap.mmap(-1, 4096)], 0)
        return
    try:
        import fcntl

        fcntl.fcntl(descriptor, getattr(fcntl, "F_NOCACHE"), 1)  # noqa: B009 - macOS alone has it
    except (ImportError, AttributeError):
        raise OSError("no reads past the page cache") from None


def _advise_huge_pages(mapped: MappedFile) -> None:
    """Ask for 2 MB pages for parts that are not cached yet.

    Each token reads the weights from end to end, and the processor's table of pages is small.
    """
    try:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # another system, or a kernel without them
        pass


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe would wait for its writer.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
