"""One parameter as it is stored, and how Hugging Face has it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..files.ggml_blocks import BY_NAME
from .layout import GROUP, unpack_int4

if TYPE_CHECKING:
    from collections.abc import Callable

# ---- one tensor ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tensor:
    """One parameter as it is stored, and how Hugging Face has it.

    name     Hugging Face's parameter name
    type     a name of files.ggml_blocks, or INT8 or INT4
    shape    Hugging Face's: [rows, cols], [experts, rows, cols] or a vector's [n]
    data     as stored: floats (BF16 as uint16) [.., cols]; blocks as uint8 [.., bytes per row]; INT8
             int8 [.., cols]; INT4 uint8 [.., cols / 2], low nibble = even column, nibble = code + 8
             A stack whose experts lie apart in their file is a tuple of matrices.
    scales   INT8, INT4: float16 [.., n_groups, rows]; else None
    group    INT8, INT4: columns that share a scale
    factor   float32 [1], or [experts]: multiplies every weight, or every one of an expert; None: nothing
    row_order, col_order   Hugging Face's row i is stored row row_order[i]; None: the same
    decode   what turns stored values into Hugging Face's (float64 -> float64); None: nothing
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: NDArray[Any] | tuple[NDArray[Any], ...]
    scales: NDArray[np.float16] | None = None
    group: int = GROUP
    row_order: NDArray[np.int64] | None = None
    col_order: NDArray[np.int64] | None = None
    decode: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    file_name: str = ""
    factor: NDArray[np.float32] | None = None

    @property
    def scale_columns(self) -> int:
        """Columns that share a scale; of a dense type, `group`."""
        row = BY_NAME.get(self.type)
        return self.group if row is None or row.dense else row.elements

    def stored_float32(self, expert: int | None = None, rows: Any = slice(None)) -> NDArray[np.float32]:
        """The stored values of one expert, or all, in float32 as their type and `factor` define them; the
        file's order, undecoded."""
        data, scales = self.data, self.scales
        if expert is not None:
            data, scales = data[expert], None if scales is None else scales[expert]
        elif isinstance(data, tuple):
            data = np.stack(data)
        data = data[..., rows, :] if data.ndim > 1 else data
        scales = None if scales is None else scales[..., rows]
        values = _dequantize(self.type, data, scales, self.group)
        if self.factor is not None:
            factor = self.factor if expert is None or len(self.factor) == 1 else self.factor[expert]
            with np.errstate(over="ignore", invalid="ignore"):
                values *= factor.reshape(-1, *(1,) * (values.ndim - 1))
        return values

    def float64(self, expert: int | None = None) -> NDArray[Any]:
        """The values in Hugging Face's order and convention; of one expert of a stack, or all."""
        values = self.stored_float32(expert).astype(np.float64)
        if self.row_order is not None:
            values = values[self.row_order]
        if self.col_order is not None:
            values = values[:, self.col_order]
        if self.decode is not None:
            values = self.decode(values)
        return values if expert is not None else values.reshape(self.shape)

    def rows_float32(self, expert: int | None, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) in Hugging Face's order, float32 [rows, cols], undecoded."""
        wanted = slice(start, stop) if self.row_order is None else self.row_order[start:stop]
        values = self.stored_float32(expert, wanted)
        return values if self.col_order is None else values[:, self.col_order]

    def rows(self, start: int, stop: int, name: str) -> Tensor:
        """Rows [start, stop) of the matrix, or of every matrix of the stack, as a tensor."""
        assert not isinstance(self.data, tuple), "want a tensor that is fused, got experts apart"
        return dataclasses.replace(
            self,
            name=name,
            shape=(*self.shape[:-2], stop - start, self.shape[-1]),
            data=self.data[..., start:stop, :],
            scales=None if self.scales is None else self.scales[..., start:stop],
        )

    def to_hf_rows(self, y: NDArray[Any]) -> NDArray[Any]:
        """A product of this matrix, [.., rows], put into Hugging Face's row order."""
        return y if self.row_order is None else y[..., self.row_order]

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """What the file has: this tensor, or the tensors whose rows it is made of."""
        return (self,)

    def runs(self, start: int, stop: int) -> list[tuple[Tensor, int, int]]:
        """[(stored tensor, first row, last row + 1)]: one below another, the rows [start, stop) of the
        matrix in Hugging Face's order; rows of a stored tensor in its own `row_order`."""
        return [(self, start, stop)]


@dataclass(frozen=True, eq=False)
class JoinedTensor(Tensor):
    """A matrix whose rows a file has in several tensors.

    parts    the file's tensors [.., cols], each in its file's order; their rows one below another are the
             rows that `row_order` counts
    type     the parts' types, with + between different ones
    data     empty: the parts have it
    """

    parts: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, name: str, parts: tuple[Tensor, ...], row_order: NDArray[np.int64]) -> JoinedTensor:
        types = "+".join(dict.fromkeys(part.type for part in parts))
        shape = (len(row_order), parts[0].shape[1])
        empty = np.empty((0, shape[1]), np.float32)
        return cls(name, types, shape, empty, row_order=row_order, file_name=parts[0].file_name, parts=parts)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.parts

    @property
    def scale_columns(self) -> int:
        return min(part.scale_columns for part in self.parts)

    def stored_float32(self, expert: int | None = None, rows: Any = slice(None)) -> NDArray[np.float32]:
        wanted = np.arange(self.shape[0])[rows]
        values, start = np.empty((len(wanted), self.shape[1]), np.float32), 0
        for part in self.parts:
            mine = (wanted >= start) & (wanted < start + part.shape[0])
            values[mine] = part.stored_float32(rows=wanted[mine] - start)
            start += part.shape[0]
        return values

    def runs(self, start: int, stop: int) -> list[tuple[Tensor, int, int]]:
        assert self.row_order is not None
        firsts = np.cumsum([0, *(part.shape[0] for part in self.parts)])  # rows before each part
        wanted = self.row_order[start:stop]
        of_part = np.searchsorted(firsts, wanted, side="right") - 1
        edges = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(of_part) != 0)) + 1
        found = []
        for run in np.split(np.arange(len(wanted)), edges):
            part, first = int(of_part[run[0]]), int(wanted[run[0]])
            first -= int(firsts[part])
            found.append((self.parts[part], first, first + len(run)))
        return found


def first_differing_row(a: Tensor, b: Tensor, step: int = 4096) -> int | None:
    """Of two matrices of one shape: the first row whose values have other bits as float32, or None."""
    for start in range(0, a.shape[0], step):
        rows = slice(start, start + step)
        x, y = (np.ascontiguousarray(t.stored_float32(rows=rows)).view(np.uint32) for t in (a, b))
        differs = (x != y).any(axis=1)
        if differs.any():
            return start + int(differs.argmax())
    return None


def _dequantize(
    kind: str, data: NDArray[Any], scales: NDArray[np.float16] | None, group: int
) -> NDArray[np.float32]:
    if kind in BY_NAME:
        values = BY_NAME[kind].to_float32(data)
        return data.copy() if values is data else values
    assert scales is not None, f"{kind}: want scales"
    codes: NDArray[Any] = data if kind == "INT8" else unpack_int4(data)
    per_column = np.repeat(np.moveaxis(scales, -2, -1), group, axis=-1)[..., : codes.shape[-1]]
    values = codes * per_column.astype(np.float32)
    return values


def without_unit_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
