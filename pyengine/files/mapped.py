"""A file mapped read-only, and whether it is still the file that was mapped."""

import mmap
import os
import stat

from pyengine.errors import FileFormatError


class MappedFile(mmap.mmap):
    """mmap of a whole file; path, inode (device and number) and mtime_ns as of its opening."""

    def check_unchanged(self):
        """FileFormatError if the file was truncated, grew or was written to since it was mapped.

        Reading a page that truncation took away kills the process (SIGBUS), and no handler could
        answer with the bytes that are gone; so whoever is about to read asks here first.  What
        happens between the question and the reading stays with the system.  A file that was
        removed, or replaced under its name, is no fault: the mapping holds on to the old one.
        """
        if self.size() != len(self):
            self._fail(f"want the {len(self)} bytes that were opened, got {self.size()}: it has "
                       "changed since")
        try:
            now = os.stat(self.path)
        except OSError:
            return
        if (now.st_dev, now.st_ino) == self.inode and now.st_mtime_ns != self.mtime_ns:
            self._fail("want the bytes that were opened, got a file that was written to since")

    def _fail(self, problem):
        raise FileFormatError(self.path, "file", problem)


def map_file(path):
    """Map a regular file -> MappedFile.  FileFormatError when missing, empty, special or unreadable."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                kind = "a named pipe" if stat.S_ISFIFO(found.st_mode) else "a device"
                raise FileFormatError(path, "file", f"want a regular file, got {kind}")
            if found.st_size == 0:
                raise FileFormatError(path, "file", "want some bytes, got an empty file")
            # The length is said, or a file that grows in between would be mapped beyond found.
            mapped = MappedFile(file.fileno(), found.st_size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or truncated just now
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(path, "file", f"want a file that can be read, got: {reason}") from error
    mapped.path, mapped.mtime_ns = path, found.st_mtime_ns
    mapped.inode = found.st_dev, found.st_ino
    _wish_for_large_pages(mapped)
    return mapped


def _wish_for_large_pages(mapped):
    """So that what is not in the page cache yet is read into pages of 2 MB, where the file system has
    them: weights are read through from end to end with each token, and the processor's table of pages
    is small (INT8, one thread: 15 -> 19 GB/s)."""
    try:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # another system, or a kernel without
        pass


def _open_without_waiting(path, flags):
    # A named pipe would wait for its writer.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
