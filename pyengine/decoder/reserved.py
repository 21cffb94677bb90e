"""Arrays whose memory the system gives when it is first written: an address range costs nothing."""

from __future__ import annotations

import contextlib
import math
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
HUGE = 2 << 20  # bytes of a huge page, where the system has them
HUGE_FROM = 4 << 20  # bytes of an array that come in small pages first: a short one takes no huge page

# Linux: the range is not charged to the memory that programs may ask for.  Python 3.11 names the flag.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if hasattr(mmap, "MADV_HUGEPAGE") else 0)


class Reserved:
    """arrays [count, *shape] of one mapping, zero until they are written; each counts its own pages.

    array   NumPy's view of all of them
    Errors: MemoryError: no such range of addresses.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype):
        dtype = np.dtype(dtype)
        self.part = math.prod(shape) * dtype.itemsize  # bytes of one array
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        try:
            self._mapping = mmap.mmap(-1, max(count * self.part, 1), flags=flags)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"want {count * self.part} bytes of addresses: {error}") from None
        self.array = np.frombuffer(self._mapping, dtype, count * math.prod(shape)).reshape(count, *shape)
        self._advised = False

    def will_use(self, nbytes: int) -> None:
        """The first so many bytes of each array are about to be written: the later of them in huge pages."""
        if self._advised or nbytes <= HUGE_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        self._advised, address = True, self.array.ctypes.data
        for end in range(self.part, (len(self.array) + 1) * self.part, self.part):
            first = address + end - self.part + HUGE_FROM
            start = -(-first // HUGE) * HUGE - address
            if end - start >= HUGE:
                with contextlib.suppress(OSError):  # a system without huge pages
                    self._mapping.madvise(mmap.MADV_HUGEPAGE, start, end - start)


def touched(nbytes: int) -> int:
    """Memory that the first so many bytes of an array take when they are written, at most."""
    return nbytes + HUGE if nbytes > HUGE_FROM else -(-nbytes // PAGE) * PAGE
