"""Scales that are not finite, in any type: found at the speed of reading."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import ffi, lib
from .ggml_blocks import BlockType

PIECE_BYTES = 32 << 20
MOST_THREADS = 8  # that many read as fast as memory gives


def first_refused(row: BlockType, data: NDArray[Any], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Index of the first block with a scale that its type refuses: see `BlockType`; None: there is none.

    data: the stored bytes of an array of `shape`, in any form.  The index is (*row index, block in the row);
    of a dense type that of the value.
    """
    stored = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    shape = (*shape[:-1], shape[-1] // row.elements)
    blocks, step = math.prod(shape), max(1, PIECE_BYTES // row.nbytes)
    starts = range(0, blocks, step)

    def first_from(start: int) -> int | None:
        return _first_of(row, stored[start * row.nbytes :], min(step, blocks - start))

    run: Callable[..., Iterable[int | None]] = map if len(starts) < 2 else _in_threads
    for start, index in zip(starts, run(first_from, starts)):
        if index is not None:
            return tuple(int(i) for i in np.unravel_index(start + index, shape))
    return None


def _in_threads(function: Callable[[int], int | None], starts: range) -> Iterator[int | None]:
    with ThreadPoolExecutor(min(MOST_THREADS, len(starts), os.cpu_count() or 1)) as threads:
        try:
            yield from threads.map(function, starts)
        finally:
            threads.shutdown(cancel_futures=True)


def _first_of(row: BlockType, stored: NDArray[np.uint8], blocks: int) -> int | None:
    found = []
    for offset, dtype, bits in row.words:
        words = ffi.from_buffer(stored[offset:]) if blocks else ffi.NULL
        found.append(lib.pe_first_refused(words, blocks, row.nbytes, dtype.itemsize, bits))
    return min((index for index in found if index >= 0), default=None)
