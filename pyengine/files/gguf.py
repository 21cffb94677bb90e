"""GGUF v2 and v3, little-endian: memory-mapped, lazy, zero-copy. Knows no model.

Opening walks the header once, checks every bound and keeps only positions; no
array is decoded until it is asked for. Layout of a file, by the GGUF
specification of the ggml project::

    "GGUF" | version u32 | n_tensors u64 | n_kv u64
    n_kv      x  key string | value type u32 | value
    n_tensors x  name string | n_dims u32 | dims u64[n_dims] | type u32 | offset u64
    padding to general.alignment | tensor data; offsets count from here

A string is its length as u64, then its bytes. An array is its element type u32,
its length u64, then its elements.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from ..errors import FileFormatError
from .ggml_blocks import BY_GGML, BY_NAME, BlockType
from .gguf_metadata import SCALAR_DTYPES, Metadata, ValueType, is_utf8, string_ends
from .mapped import map_file
from .mapped_tensor import MappedTensor
from .refused import first_refused

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEY_BYTES = 65535  # the specification's limit
MAX_NAME_BYTES = 64  # the specification's limit
MAX_DIMS = 4
# Bounds of what is read in a loop, since a sparse file of any size costs its maker nothing.
MAX_ENTRIES = 1 << 16  # keys, and tensors
MAX_STRINGS = 1 << 22  # strings in all arrays together, bools in one array

STRINGS_AT_ONCE = 4096  # that are stepped over: bounds the memory for their positions

# The smallest size of one entry: it bounds the counts before a loop begins.
MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


# --- tensors ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFTensor(MappedTensor):
    """One tensor of a mapped file; `shape` is row-major, ggml's dimensions reversed."""

    type: GGMLQuantizationType

    @property
    def data(self) -> NDArray[Any]:
        """Read-only view of the file.

        Of a dense type [*shape], of another one uint8 [*shape[:-1], bytes per row]: see
        `ggml_blocks`.  FileFormatError on a type that has no row there.
        """
        row = self.block_type
        shape = (*self.shape[:-1], row.stored_columns(self.shape[-1]))
        view: NDArray[Any] = np.ndarray(shape, row.dtype, self._buffer, self.offset)
        return view

    @property
    def block_type(self) -> BlockType:
        """The type's row of `ggml_blocks`.  FileFormatError when it has none."""
        if self.type not in BY_GGML:
            problem = f"want type {', '.join(BY_NAME)}, got {self.type.name}"
            raise FileFormatError(self.path, f"tensor {self.name}", problem)
        return BY_GGML[self.type]


def dequantize(tensor: GGUFTensor, rows: Any = slice(None)) -> NDArray[np.float32]:
    """The exact values of `tensor`, or of `rows` along its first axis -> float32.

    rows: slice, integer or integer array. The shape is that of indexing an array
    of `tensor.shape`. An F32 tensor comes as a read-only view, all others as new
    arrays. Non-finite scales give non-finite values, without a warning.
    """
    data, row = tensor.data, tensor.block_type
    if len(tensor.shape) == 1:  # its elements share blocks: unpack, then index
        values: NDArray[np.float32] = row.to_float32(data)[rows]
        return values
    return row.to_float32(data[rows])


def first_nonfinite_scale(tensor: GGUFTensor) -> tuple[int, ...] | None:
    """Index of the first scale that the type refuses, as a rule NaN or infinity, or None: see `BlockType`.

    Of a dense type the index of the element; of another one that of the block whose scale it is, (*row
    index, block in the row).  Every page is read once.
    """
    return first_refused(tensor.block_type, tensor.stored_bytes, tensor.shape)


# --- the header -------------------------------------------------------------


# A tensor's type, row-major shape, bytes, and offset from the start of the data.
TensorInfo = tuple[GGMLQuantizationType, tuple[int, ...], int, int]


class _Header:
    """Reads one file's header front to back; every read is checked against the file's end."""

    def __init__(self, path: Path):
        self.path = path
        self.buffer = map_file(path)
        self.size = len(self.buffer)
        self.position, self.strings_left = 0, MAX_STRINGS
        self.version, n_tensors, n_values = self._read_preamble()
        values = self._read_values(n_values)
        self.metadata = Metadata(path, self.buffer, values)
        self.alignment = self._read_alignment()
        self.tensors = self._read_tensors(n_tensors)

    def fail(self, field: str, problem: str) -> NoReturn:
        raise FileFormatError(self.path, field, problem)

    def _take(self, nbytes: int, field: str) -> int:
        """Step over `nbytes` -> their position."""
        position, left = self.position, self.size - self.position
        if nbytes > left:
            self.fail(field, f"want {nbytes} bytes, got {left} to the end of the file")
        self.position += nbytes
        return position

    def _u32(self, field: str) -> int:
        value: int = _U32.unpack_from(self.buffer, self._take(4, field))[0]
        return value

    def _u64(self, field: str) -> int:
        value: int = _U64.unpack_from(self.buffer, self._take(8, field))[0]
        return value

    def _name(self, field: str, limit: int) -> str:
        """A key or a tensor's name -> str."""
        length = self._u64(field)
        if not 1 <= length <= limit:
            self.fail(field, f"want a length of 1 to {limit} bytes, got {length}")
        start = self._take(length, field)
        name = self.buffer[start : start + length]
        if not is_utf8(name):
            self.fail(field, f"want UTF-8, got {name!r}")
        return name.decode()

    def _read_preamble(self) -> tuple[int, int, int]:
        start = self._take(4, "magic")
        magic = self.buffer[start : start + 4]
        if magic != b"GGUF":
            self.fail("magic", f"want b'GGUF', got {magic!r}")
        version = self._u32("version")
        if version and version & 0xFFFF == 0:
            self.fail("version", f"want a little-endian file, got {version:#010x}: big-endian")
        if version not in (2, 3):
            self.fail("version", f"want 2 or 3, got {version}")
        return version, self._u64("tensor count"), self._u64("key count")

    def _check_count(self, field: str, count: int, min_bytes: int) -> None:
        limit = (self.size - self.position) // min_bytes
        if count > limit:
            self.fail(field, f"want at most {limit} in what is left of the file, got {count}")
        if count > MAX_ENTRIES:
            self.fail(field, f"want at most {MAX_ENTRIES}, got {count}")

    def _read_values(self, count: int) -> dict[str, tuple[ValueType, int]]:
        """-> dict: key -> (ValueType, position of the value, after an array's own header)."""
        self._check_count("key count", count, MIN_KEY_VALUE_BYTES)
        values: dict[str, tuple[ValueType, int]] = {}
        for index in range(count):
            key = self._name(f"key {index}", MAX_KEY_BYTES)
            if key in values:
                self.fail(key, f"want every key once, got it again as key {index}")
            values[key] = self._read_value(key)
        return values

    def _value_type(self, key: str) -> GGUFValueType:
        code = self._u32(key)
        try:
            return GGUFValueType(code)
        except ValueError:
            self.fail(key, f"want a value type of 0 to 12, got {code}")

    def _read_value(self, key: str) -> tuple[ValueType, int]:
        kind = self._value_type(key)
        if kind == GGUFValueType.STRING:
            position = self.position
            self._take(self._u64(key), key)
            return ValueType(kind), position
        if kind != GGUFValueType.ARRAY:
            return ValueType(kind), self._skip_numbers(key, kind, 1)
        element = self._value_type(key)
        length = self._u64(key)
        if element == GGUFValueType.ARRAY:
            self.fail(key, "want an array of scalars or strings, got nested arrays")
        skip = self._skip_strings if element == GGUFValueType.STRING else self._skip_numbers
        return ValueType(kind, element, length), skip(key, element, length)

    def _skip_numbers(self, key: str, kind: GGUFValueType, count: int) -> int:
        """Step over `count` scalars -> the position of the first."""
        position = self._take(count * SCALAR_DTYPES[kind].itemsize, key)
        if kind == GGUFValueType.BOOL:
            if count > MAX_STRINGS:
                self.fail(key, f"want at most {MAX_STRINGS} bools, got {count}")
            stored: NDArray[np.uint8] = np.ndarray((count,), np.uint8, self.buffer, position)
            if (stored > 1).any():
                self.fail(key, f"want bools of 0 or 1, got {stored[stored > 1][0]}")
        return position

    def _skip_strings(self, key: str, kind: GGUFValueType, count: int) -> int:
        """Step over `count` strings -> the position of the first.

        A length leads to the next one, so this walk is the only way to the next
        key, and its loop is the cost of opening: nothing but the step is in it.
        """
        limit = min(self.strings_left, (self.size - self.position) // 8)
        if count > limit:
            self.fail(key, f"want at most {limit} strings, got {count}")
        self.strings_left -= count
        start = self.position
        for first in range(0, count, STRINGS_AT_ONCE):
            some = min(STRINGS_AT_ONCE, count - first)
            ends = string_ends(self.buffer, self.position, some)
            if len(ends) < some:
                self.fail(key, "want its strings within the file, got one that runs past the end")
            self.position += int(ends[-1])
        return start

    def _read_alignment(self) -> int:
        key = "general.alignment"
        if key not in self.metadata:
            return DEFAULT_ALIGNMENT
        value_type = self.metadata.type_of(key)
        if value_type.kind != GGUFValueType.UINT32:
            self.fail(key, f"want uint32, got {value_type}")
        alignment: int = self.metadata[key]
        # The specification's multiple of 8; it also keeps every F32 view aligned.
        if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(key, f"want a power of two from 8 to {MAX_ALIGNMENT}, got {alignment}")
        return alignment

    def _read_tensors(self, count: int) -> dict[str, GGUFTensor]:
        """-> dict: name -> GGUFTensor, in file order."""
        self._check_count("tensor count", count, MIN_TENSOR_INFO_BYTES)
        infos: dict[str, TensorInfo] = {}
        for index in range(count):
            name = self._name(f"tensor {index}", MAX_NAME_BYTES)
            if name in infos:
                self.fail(f"tensor {name}", f"want every name once, got it again as tensor {index}")
            infos[name] = self._read_tensor_info(f"tensor {name}")
        data_start = -(-self.position // self.alignment) * self.alignment
        self._check_ranges(infos, data_start)
        return {
            name: GGUFTensor(self.path, name, shape, nbytes, data_start + offset, self.buffer, ggml_type)
            for name, (ggml_type, shape, nbytes, offset) in infos.items()
        }

    def _read_tensor_info(self, field: str) -> TensorInfo:
        """-> (ggml type, row-major shape, nbytes, offset from the start of the data)."""
        n_dims = self._u32(field)
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(field, f"want 1 to {MAX_DIMS} dimensions, got {n_dims}")
        dims = tuple(self._u64(field) for _ in range(n_dims))
        if 0 in dims:
            self.fail(field, f"want dimensions of at least 1, got {dims}")
        ggml_type = self._tensor_type(field)
        nbytes = self._tensor_nbytes(field, dims, ggml_type)
        return ggml_type, dims[::-1], nbytes, self._u64(field)

    def _tensor_type(self, field: str) -> GGMLQuantizationType:
        code = self._u32(field)
        try:
            ggml_type = GGMLQuantizationType(code)
            GGML_QUANT_SIZES[ggml_type]
        except (ValueError, KeyError):
            self.fail(field, f"want type {', '.join(BY_NAME)}, got ggml's number {code}")
        return ggml_type

    def _tensor_nbytes(self, field: str, dims: tuple[int, ...], ggml_type: GGMLQuantizationType) -> int:
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if dims[0] % block:
            want = f"rows of a multiple of {block} for {ggml_type.name}"
            self.fail(field, f"want {want}, got {dims[0]}")
        nbytes: int = math.prod(dims) // block * block_bytes
        if max(nbytes, math.prod(dims)) >= 1 << 63:
            self.fail(field, f"want fewer than 2^63 elements and bytes, got dimensions {dims}")
        return nbytes

    def _check_ranges(self, infos: dict[str, TensorInfo], data_start: int) -> None:
        """Every range aligned, inside the file, and apart from the others."""
        data_size = max(0, self.size - data_start)
        end, before = 0, ""
        for name, (_, _, nbytes, offset) in sorted(infos.items(), key=lambda item: item[1][3]):
            field = f"tensor {name}"
            if offset % self.alignment:
                self.fail(field, f"want an offset of a multiple of {self.alignment}, got {offset}")
            if offset + nbytes > data_size:
                got = f"bytes {offset} to {offset + nbytes}"
                self.fail(field, f"want data within the file's {data_size} bytes, got {got}")
            if offset < end:
                self.fail(field, f"want an offset from {end} on, got {offset}: overlaps {before}")
            end, before = offset + nbytes, name


# --- the file, or its splits ------------------------------------------------

SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUF:
    """An open GGUF model: one file, or all splits of one.

    path: Path as opened; paths: tuple of every split's Path; maps: the MappedFile
    of each; size: the sum of their bytes. metadata, version and alignment are those of the first split.
    tensors: read-only mapping, name -> GGUFTensor, in file order. The mappings
    close when the last view of them is gone.
    """

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUF:
        """Open a file, or the first split and with it all others. FileFormatError on any fault."""
        first = _Header(Path(path))
        return cls([first, *_open_other_splits(first)])

    def __init__(self, headers: Sequence[_Header]):
        first = headers[0]
        self.path, self.version, self.alignment = first.path, first.version, first.alignment
        self.metadata = first.metadata
        self.paths = tuple(header.path for header in headers)
        self.size = sum(header.size for header in headers)
        self.tensors: Mapping[str, GGUFTensor] = MappingProxyType(_merge_tensors(headers))
        self.maps = tuple(header.buffer for header in headers)

    def check_unchanged(self) -> None:
        """FileFormatError if a file is no longer what was opened: see `MappedFile`."""
        for mapped in self.maps:
            mapped.check_unchanged()


def _open_other_splits(first: _Header) -> list[_Header]:
    """The first split's header -> those of splits 1 .. split.count - 1."""
    if "split.count" not in first.metadata:
        return []
    count: int = first.metadata.require("split.count", int)
    if count <= 1:
        return []
    name = SPLIT_NAME.fullmatch(first.path.name)
    _check_split_number(
        first, 0, f": give the path of {name['stem']}-00001-of-{count:05d}.gguf" if name else ""
    )
    if not name or int(name["number"]) != 1 or int(name["count"]) != count:
        want = f"NAME-00001-of-{count:05d}.gguf"
        raise FileFormatError(first.path, "file name", f"want {want}, got {first.path.name}")
    return [_open_split(first, name["stem"], number, count) for number in range(1, count)]


def _open_split(first: _Header, stem: str, number: int, count: int) -> _Header:
    path = first.path.with_name(f"{stem}-{number + 1:05d}-of-{count:05d}.gguf")
    split = _Header(path)
    got = split.metadata.require("split.count", int)
    if got != count:
        raise FileFormatError(path, "split.count", f"want {count} as in {first.path}, got {got}")
    _check_split_number(split, number)
    return split


def _check_split_number(split: _Header, number: int, advice: str = "") -> None:
    got = split.metadata.require("split.no", int)
    if got != number:
        raise FileFormatError(split.path, "split.no", f"want {number}, got {got}{advice}")


def _merge_tensors(headers: Sequence[_Header]) -> dict[str, GGUFTensor]:
    first = headers[0]
    tensors: dict[str, GGUFTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                problem = f"want it in one split, got it in {tensors[name].path} too"
                raise FileFormatError(header.path, f"tensor {name}", problem)
            tensors[name] = tensor
    if len(headers) > 1 and "split.tensors.count" in first.metadata:
        want = first.metadata.require("split.tensors.count", int)
        if want != len(tensors):
            problem = f"want {want} tensors in all splits, got {len(tensors)}"
            raise FileFormatError(first.path, "split.tensors.count", problem)
    return tensors
