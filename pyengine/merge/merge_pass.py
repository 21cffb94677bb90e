"""The pass over the models: tensors are computed by several threads, and written in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.layout import GROUP
from ..checkpoint.names import is_routed_expert
from ..checkpoint.writer import Sink
from ..core.threads import Pool
from ..files.numbers import finite_to_bfloat16
from ..quantizer.options import QuantizeOptions
from ..quantizer.ordered_worker import OrderedWorker, submit
from ..quantizer.plan import PlannedParameter
from ..quantizer.quantize_pass import QuantizePass, Target
from .arithmetic import Values
from .plan import Copied, Merged
from .tensor_merge import Rows, TensorMerge

COPIED_BYTES = 1 << 24  # written at a time of a tensor that is copied
AHEAD = 2  # results per thread that wait for the writer

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], object]


class Threads:
    """Threads that compute, and results in the order of what they were given."""

    def __init__(self, count: int):
        self.count = count
        self._executor = ThreadPoolExecutor(count)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """function of each item, in the items' order; a few are computed before they are asked for.

        The items are taken in the caller's thread.
        """
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(submit(self._executor, function, item))
                if len(waiting) > AHEAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# ---- a directory of floats -----------------------------------------------------------------------


def write_floats(tensors: list[Merged | Copied], sink: Sink, threads: Threads, advance: Advance) -> None:
    """Every tensor that the sink wants; advance: called with bytes that are computed or there already."""
    writer = OrderedWorker()  # type: ignore[no-untyped-call]
    try:
        wanted = []
        for tensor in tensors:
            if sink.wants(tensor.entry.name):
                wanted.append(tensor)
            else:
                advance(tensor.entry.nbytes)
        for tensor, array in threads.map(_encoded, _blocks(wanted, threads)):
            writer(sink.write, tensor.entry.name, array)
            advance(array.nbytes)
        writer.wait()
    finally:
        writer.stop()


Block = tuple[Merged | Copied, TensorMerge | None, Rows]


def _blocks(tensors: list[Merged | Copied], threads: Threads) -> Iterator[Block]:
    """What one thread computes at a time.  The statistics of a tensor of several blocks come before them."""
    for tensor in tensors:
        if isinstance(tensor, Copied):
            size = tensor.view.nbytes
            for start in range(0, size, COPIED_BYTES):
                yield tensor, None, (start, min(start + COPIED_BYTES, size))
            continue
        for part in tensor.parts:
            blocks = part.blocks
            if len(blocks) > 1:
                part.prepare(threads.map)
            for rows in blocks:
                yield tensor, part, rows


def _encoded(block: Block) -> tuple[Merged | Copied, NDArray[Any]]:
    tensor, part, (start, stop) = block
    if isinstance(tensor, Copied):
        data = np.ascontiguousarray(tensor.view.data).reshape(-1)
        size = data.dtype.itemsize
        return tensor, data[start // size : stop // size]
    assert part is not None
    if tensor.entry.dtype == "BF16":
        return tensor, part.merged(start, stop, finite_to_bfloat16, np.uint16)
    return tensor, part.merged(start, stop)


# ---- INT8 and INT4 -------------------------------------------------------------------------------


class MergedTensor:
    """A parameter of the merge, as `quantize` reads a `Tensor`: floats in Hugging Face's order.

    A matrix, or an expert's, is computed when it is asked for; the ones behind it are computed meanwhile.
    """

    type, scales, factor, group = "F32", None, None, GROUP
    row_order = col_order = decode = None

    def __init__(
        self, name: str, shape: tuple[int, ...], parts: tuple[TensorMerge, ...], computed: Computed | None
    ):
        """computed: None for a tensor that is planned only."""
        self.name = self.file_name = name
        self.shape, self.parts, self._computed = shape, parts, computed

    @property
    def data(self) -> Any:
        """float32 [rows, columns]; of a stack something to be indexed with the number of an expert."""
        return self if is_routed_expert(self.name) else self[0]

    @property
    def computed(self) -> Computed:
        assert self._computed is not None, "want a tensor to read, got one to plan"
        return self._computed

    def __getitem__(self, expert: int) -> Values:
        return self.computed.get(self.parts[expert])

    def rows_float32(self, expert: int | None, start: int, stop: int) -> Values:
        if expert is not None:
            return self[expert][start:stop]
        return self.computed.rows(self.parts[0], start, stop)

    def runs(self, start: int, stop: int) -> list[tuple[MergedTensor, int, int]]:
        return [(self, start, stop)]

    def float64(self) -> NDArray[np.float64]:
        return self[0].reshape(self.shape).astype(np.float64)


class Computed:
    """Whole matrices in the order in which they will be asked for; each of them may be asked for again until
    the next one is.

    Matrices of one block are computed ahead, each by one thread; all threads share a larger one when it is
    asked for.
    """

    def __init__(self, threads: Threads):
        self.threads = threads
        self._results: Iterator[tuple[TensorMerge, Values]] = iter(())
        self._last: tuple[TensorMerge, Values] | None = None

    def expect(self, parts: list[TensorMerge]) -> None:
        self._results = self.threads.map(_whole, parts)

    def get(self, part: TensorMerge) -> Values:
        if self._last is None or self._last[0] is not part:
            if len(part.blocks) > 1:
                self._last = part, self.rows(part, 0, part.rows)
            else:
                self._last = next((found for found in self._results if found[0] is part), None) or _whole(
                    part
                )
        return self._last[1]

    def rows(self, part: TensorMerge, start: int, stop: int) -> Values:
        """Rows of any matrix, shared out to all threads."""
        part.prepare(self.threads.map)
        step = max(1, -(-(stop - start) // self.threads.count))
        ranges = [(first, min(first + step, stop)) for first in range(start, stop, step)]
        pieces = list(self.threads.map(lambda rows: part.merged(*rows), ranges))
        return np.concatenate(pieces)


def _whole(part: TensorMerge) -> tuple[TensorMerge, Values]:
    return part, part.merged(0, part.rows)


def write_integers(
    targets: list[Target], options: QuantizeOptions, computed: Computed, pool: Pool, advance: Advance
) -> None:
    """Every parameter that a target wants, quantized."""
    computed.expect([part for part in _quantized_parts(targets) if len(part.blocks) == 1])
    QuantizePass(pool, options, advance).run(targets)


def _quantized_parts(targets: list[Target]) -> Iterator[TensorMerge]:
    """The matrices in the order in which QuantizePass reads them, but for those that it reads row by row."""
    for parameters in zip(*(target.parameters for target in targets)):
        wanted = [p for target, p in zip(targets, parameters) if target.wants(p)]
        if wanted and not _is_read_by_rows(wanted[0]):
            sources: tuple[Any, ...] = wanted[0].sources
            for parts in zip(*(source.parts for source in sources)):
                yield from parts


def _is_read_by_rows(parameter: PlannedParameter) -> bool:
    return parameter.bits is None and parameter.entries[0].dtype != "F32"
