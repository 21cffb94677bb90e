"""One pass over a source: each parameter is read once and quantized for every output.

The source's rows are dequantized, put into Hugging Face's order and quantized a few at a time, so that
memory does not grow with the model.  The rule is that of `rule.py`; the C core computes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ..checkpoint.layout import MAX_CODE
from ..checkpoint.tensor import Tensor
from ..checkpoint.writer import Sink, TensorEntry
from ..core import ops
from ..core.matrices import Matrix, as_matrix
from ..core.threads import Pool
from ..errors import CheckpointError, NonFiniteError
from ..files.ggml_blocks import DENSE_TYPES
from ..files.numbers import float32_to_bfloat16
from .options import QuantizeOptions
from .ordered_worker import OrderedWorker
from .plan import PlannedParameter

PIECE_BYTES = 2 << 20  # codes computed at a time


class Rounding(Protocol):
    def matrix(self, tensor: Tensor, expert: int | None) -> tuple[np.ndarray, np.ndarray]:
        """A matrix of the source, or one expert's -> codes int8 [rows, cols], scales float16 [rows, groups].

        Called once for each matrix of one plan, in its order, or instead of it `pass_over`.
        """

    def pass_over(self, tensor: Tensor, expert: int | None) -> None:
        """A matrix that an earlier run has written."""

    def plain(self, tensor: Tensor) -> Tensor:
        """A parameter of the source that stays floats -> what is written for it."""


@dataclass(eq=False)
class Target:
    """One output of the pass: its plan, and where the tensors go."""

    parameters: list[PlannedParameter]
    sink: Sink

    def wants(self, parameter: PlannedParameter) -> bool:
        return self.sink.wants(parameter.entries[0].name)


# The targets that still want a parameter, each with its own plan of it.
Wanted = list[tuple[Target, PlannedParameter]]


class QuantizePass:
    """Reads each parameter once and hands every target its codes.

    Meanwhile a thread per target hashes and writes.  advance: called with the bytes that are computed,
    or that a sink has already.  rounding: chooses the codes in place of the options' rule; None: nothing
    does.
    """

    def __init__(self, pool: Pool, options: QuantizeOptions, advance, rounding: Rounding | None = None):
        self.pool, self.options, self.advance, self.rounding = pool, options, advance, rounding
        self._workers: dict[Target, OrderedWorker] = {}

    def run(self, targets: list[Target]) -> None:
        self._workers = {target: OrderedWorker() for target in targets}
        try:
            for parameters in zip(*(target.parameters for target in targets)):
                self._parameters(list(zip(targets, parameters)))
            for worker in self._workers.values():
                worker.wait()
        finally:
            for worker in self._workers.values():
                worker.stop()

    def _parameters(self, all_targets: Wanted) -> None:
        wanted: Wanted = []
        for target, parameter in all_targets:
            if target.wants(parameter):
                wanted.append((target, parameter))
            else:
                self._pass_over(parameter)
                self.advance(parameter.nbytes)
        if wanted:
            self._write_parameter(wanted)

    def _write_parameter(self, wanted: Wanted) -> None:
        if wanted[0][1].bits is None:
            self._plain(wanted)
        else:
            self._quantized(wanted)

    def _write(self, target: Target, entry: TensorEntry, array: np.ndarray) -> None:
        self._workers[target](target.sink.write, entry.name, array)
        self.advance(array.nbytes)

    def _quantized(self, wanted: Wanted) -> None:
        scales: dict[Target, list[np.ndarray]] = {target: [] for target, _ in wanted}
        for expert in _experts_of(wanted[0][1]):
            for target, of_expert in self._expert(wanted, expert).items():
                scales[target].append(of_expert)
        for target, parameter in wanted:
            for of_expert in scales[target]:
                self._write(target, parameter.entries[1], of_expert)

    def _expert(self, wanted: Wanted, expert: int | None) -> dict[Target, np.ndarray]:
        """Writes the codes of one matrix; -> its scales [n_groups, rows] for each target."""
        parts: dict[Target, list[np.ndarray]] = {target: [] for target, _ in wanted}
        for tensor in wanted[0][1].sources:
            rows, cols = tensor.shape[-2:]
            step = max(1, PIECE_BYTES // cols)
            if self.rounding is not None:
                made = self.rounding.matrix(tensor, expert)
                for target, parameter in wanted:
                    parts[target].append(self._write_codes(target, parameter, *made))
                continue
            for start in range(0, rows, step):
                some = source_rows(tensor, expert, start, min(start + step, rows))
                for target, parameter in wanted:
                    made = quantize_rows(self.pool, some, MAX_CODE[parameter.bits], self.options)
                    parts[target].append(self._write_codes(target, parameter, *made))
        return {target: np.ascontiguousarray(np.concatenate(part).T) for target, part in parts.items()}

    def _write_codes(self, target: Target, parameter: PlannedParameter, codes, scales) -> np.ndarray:
        """-> scales [rows, n_groups], which are written behind the codes of all experts."""
        if parameter.bits == 4:
            with self.pool.lock:
                codes = ops.pack_int4(self.pool, codes)
        self._write(target, parameter.entries[0], codes)
        return scales

    def _pass_over(self, parameter: PlannedParameter) -> None:
        """A rounding that goes through the layers in order needs to know of what a killed run has written."""
        if self.rounding is None or parameter.bits is None:
            return
        for expert in _experts_of(parameter):
            for tensor in parameter.sources:
                self.rounding.pass_over(tensor, expert)

    def _plain(self, wanted: Wanted) -> None:
        (tensor,), (entry,) = wanted[0][1].sources, wanted[0][1].entries
        if self.rounding is not None:
            tensor = self.rounding.plain(tensor)
        for values in _plain_values(tensor, entry.dtype):
            for target, parameter in wanted:
                self._write(target, parameter.entries[0], values)


def _experts_of(parameter: PlannedParameter) -> Iterable[int | None]:
    """The experts of a stack; of a matrix None alone."""
    shape = parameter.entries[0].shape
    return range(shape[0]) if len(shape) == 3 else [None]


def _plain_values(tensor: Tensor, dtype: str):
    """The tensor's bytes, piece by piece: BF16 as uint16, or F32 as float32."""
    if dtype == "F32":
        values = tensor.float64().astype(np.float32)
        _check_finite(values, tensor)
        yield values
        return
    rows, cols = tensor.shape
    step = max(1, PIECE_BYTES // cols)
    for start in range(0, rows, step):
        values = tensor.rows_float32(None, start, min(start + step, rows))
        _check_finite(values, tensor)
        yield float32_to_bfloat16(values)


# The types that pe_quantize_weights reads where they are mapped; every other one is dequantized first.
READ_AS_MAPPED = (*DENSE_TYPES, "Q8_0")


class SourceRows(NamedTuple):
    """Rows [start, stop), in Hugging Face's order, of a matrix or of one expert's.

    values   float32 [stop - start, cols] of them; None: the C core reads the mapped tensor
    """

    tensor: Tensor
    expert: int | None
    start: int
    stop: int
    values: np.ndarray | None


def source_rows(tensor: Tensor, expert: int | None, start: int, stop: int) -> list[SourceRows]:
    """Rows to quantize, dequantized once for all targets where the C core does not read their type."""
    return [_run(part, expert, *rows) for part, *rows in tensor.runs(start, stop)]


def _run(tensor: Tensor, expert: int | None, start: int, stop: int) -> SourceRows:
    if tensor.type in READ_AS_MAPPED and tensor.factor is None:
        return SourceRows(tensor, expert, start, stop, None)
    values = np.ascontiguousarray(tensor.rows_float32(expert, start, stop))
    return SourceRows(tensor, expert, start, stop, values)


def quantize_rows(
    pool: Pool, runs: list[SourceRows], max_code: int, options: QuantizeOptions
) -> tuple[np.ndarray, np.ndarray]:
    """-> codes int8 [rows, cols], scales float16 [rows, n_groups] of the runs, one below another.

    Errors: CheckpointError naming the row and group of a value that is not finite, or too great.
    """
    codes, scales = zip(*(_quantize_run(pool, run, max_code, options) for run in runs))
    if len(runs) == 1:
        return codes[0], scales[0]
    return np.concatenate(codes), np.concatenate(scales)


def _quantize_run(
    pool: Pool, run: SourceRows, max_code: int, options: QuantizeOptions
) -> tuple[np.ndarray, np.ndarray]:
    tensor, expert, start, stop, values = run
    if values is None:
        matrix, orders = as_matrix(tensor, expert), (tensor.row_order, tensor.col_order)
        first, last = start, stop
    else:
        matrix, orders = Matrix("F32", values.shape[1], values), (None, None)
        first, last = 0, stop - start
    try:
        with pool.lock:
            return ops.quantize_weights(
                pool, matrix, *orders, first, last, max_code, options.group_size, options.scale
            )
    except NonFiniteError:
        raise name_nonfinite(tensor, expert, start, stop, options.group_size) from None


def _check_finite(values, tensor):
    if not np.isfinite(values).all():
        raise CheckpointError(f"{tensor.file_name}: want finite values, got NaN or infinity")


def name_nonfinite(tensor, expert, start, stop, group):
    x = tensor.rows_float32(expert, start, stop)
    where = "" if expert is None else f"expert {expert}, "
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        row, col = (int(i) for i in bad[0])
        return CheckpointError(
            f"{tensor.file_name}: {where}row {start + row}, group {col // group}: "
            "want finite values, got NaN or infinity"
        )
    row, col = (int(i) for i in np.unravel_index(int(np.abs(x).argmax()), x.shape))
    return CheckpointError(
        f"{tensor.file_name}: {where}row {start + row}, group {col // group}: "
        f"want a scale in float16's range, got the value {x[row, col]:g}"
    )
