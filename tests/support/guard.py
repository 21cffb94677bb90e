"""Arrays for kernel tests: flush against unreadable pages, poisoned, and watched.

    memory = Memory("end")                  # or "start", or "shifted"
    x = memory.input(values)                # a copy that the kernel must not change
    state = memory.in_out(values)           # a copy that it may change
    y = memory.output((tokens, n), ld=70)   # poison, also in the gaps between the rows
    ... the call ...
    memory.check()                          # inputs, gaps and surroundings are as they were

A read or write past an array's end ("end") or before its start ("start") is a segmentation fault.
"shifted" is one element off a 64-byte boundary.  Where there is no mprotect the arrays are ordinary
memory and the surroundings are still watched.
"""

import ctypes
import mmap

import numpy as np

PLACEMENTS = ("end", "start", "shifted")

PAGE = mmap.PAGESIZE
POISON = 0x7FC0DEAD  # a NaN as float32, and conspicuous as an integer
PROT_NONE = 0


def _find_mprotect():
    try:
        function = ctypes.CDLL(None, use_errno=True).mprotect
    except (OSError, TypeError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


_mprotect = _find_mprotect()
AVAILABLE = _mprotect is not None


def _guarded_pages(size):
    """At least size poisoned bytes, a whole number of pages, with an unreadable page on each side.
    The array keeps the mapping alive."""
    size = -(-max(size, 1) // PAGE) * PAGE
    if not AVAILABLE:
        return np.full(size // 4, POISON, np.uint32).view(np.uint8)
    mapping = mmap.mmap(-1, size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    everything = np.frombuffer(mapping, np.uint8)
    inside = everything[PAGE : PAGE + size]
    inside.view(np.uint32)[:] = POISON
    for start in (0, PAGE + size):
        if _mprotect(everything.ctypes.data + start, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    return inside


def _poison_bytes(start, stop):
    """What _guarded_pages wrote into bytes [start, stop)."""
    first = start // 4 * 4
    words = np.full((stop - first + 3) // 4, POISON, np.uint32)
    return words.view(np.uint8)[start - first : stop - first]


def row_major_strides(shape, ld):
    """Strides in elements.  ld: None (contiguous), the distance between two rows of a matrix, or a
    tuple of the distances along every axis but the last."""
    if ld is None:
        return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
    return (ld if isinstance(ld, tuple) else (ld,)) + (1,)


class _Block:
    """One array in pages of its own, as short as its shape and strides allow: the last row ends where
    its n elements do, not at ld."""

    def __init__(self, shape, dtype, ld, placement):
        dtype = np.dtype(dtype)
        strides = row_major_strides(shape, ld)
        empty = 0 in shape
        extent = 0 if empty else sum((d - 1) * s for d, s in zip(shape, strides)) + 1
        self.pages = _guarded_pages(extent * dtype.itemsize + 64)
        self.start = {
            "end": self.pages.size - extent * dtype.itemsize,
            "start": 0,
            "shifted": dtype.itemsize,
        }[placement]
        self.stop = self.start + extent * dtype.itemsize
        self.flat = self.pages[self.start : self.stop].view(dtype)
        self.view = self._strided(self.flat, shape, strides)
        self.shape, self.strides = shape, strides
        self.written = None  # a mask over flat: what the kernel may write; None: all of it
        self.unchanged = None  # a copy of flat: what the kernel must leave

    @staticmethod
    def _strided(flat, shape, strides):
        step = flat.itemsize
        return np.lib.stride_tricks.as_strided(flat, shape, [s * step for s in strides])

    def only_view_may_change(self):
        if self.flat.size != self.view.size:
            self.written = np.zeros(self.flat.size, bool)
            self._strided(self.written, self.shape, self.strides)[...] = True
            self.unchanged = self.flat.copy()

    def check(self):
        size = self.pages.size
        assert np.array_equal(self.pages[: self.start], _poison_bytes(0, self.start)), (
            "written before the array"
        )
        assert np.array_equal(self.pages[self.stop :], _poison_bytes(self.stop, size)), (
            "written past the array"
        )
        if self.unchanged is None:
            return
        same = self.flat.view(np.uint8) == self.unchanged.view(np.uint8)
        same = same.reshape(-1, self.flat.itemsize).all(1)
        if self.written is not None:
            same |= self.written
        where = "a gap between rows" if self.written is not None else "an input"
        assert same.all(), f"{where} was written, at element {np.argmin(same)}"


class Memory:
    """The arrays of one call."""

    def __init__(self, placement):
        self.placement = placement
        self.blocks = []

    def _block(self, shape, dtype, ld):
        shape = (shape,) if np.isscalar(shape) else tuple(shape)
        block = _Block(shape, dtype, ld, self.placement)
        self.blocks.append(block)
        return block

    def input(self, values, ld=None):
        block = self._block(values.shape, values.dtype, ld)
        block.view[...] = values
        block.unchanged = block.flat.copy()
        return block.view

    def in_out(self, values, ld=None):
        block = self._block(values.shape, values.dtype, ld)
        block.view[...] = values
        block.only_view_may_change()
        return block.view

    def output(self, shape, dtype=np.float32, ld=None):
        block = self._block(shape, dtype, ld)
        block.only_view_may_change()
        return block.view

    def check(self):
        for block in self.blocks:
            block.check()
