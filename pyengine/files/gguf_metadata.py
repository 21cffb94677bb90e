"""The metadata of a GGUF: typed values in a mapped file, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from .._core import ffi, lib
from ..errors import FileFormatError
from .mapped import MappedFile

SCALAR_DTYPES: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}


class ValueType(NamedTuple):
    """The stored type of a metadata value; element and length are None unless it is an array."""

    kind: GGUFValueType
    element: GGUFValueType | None = None
    length: int | None = None

    def __str__(self) -> str:
        if self.kind != GGUFValueType.ARRAY or self.element is None:
            return str(self.kind.name.lower())
        return f"array of {self.length} {self.element.name.lower()}"

    def python_type(self) -> type:
        """int, float, bool, str, or list for an array."""
        return list if self.kind == GGUFValueType.ARRAY else _python_type(self.kind)


class Metadata(Mapping[str, Any]):
    """Keys -> values, decoded at each access and not kept.

    Scalars come as int, float, bool or str; numeric and bool arrays as read-only
    NumPy views of the file; string arrays as list[str]. A string that is not
    UTF-8 is a FileFormatError; `raw_strings` still gives its bytes.
    """

    def __init__(self, path: Path, buffer: MappedFile, values: dict[str, tuple[ValueType, int]]):
        self._path = path
        self._buffer = buffer
        self._values = values  # key -> (ValueType, position of the value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:  # Mapping's own would decode the value
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        value_type, position = self._values[key]
        if GGUFValueType.STRING in (value_type.kind, value_type.element):
            strings = self._decode(key, self.raw_strings(key))
            return strings if value_type.kind == GGUFValueType.ARRAY else strings[0]
        if value_type.element is not None and value_type.length is not None:
            dtype = SCALAR_DTYPES[value_type.element]
            return np.ndarray((value_type.length,), dtype, self._buffer, position)
        return np.ndarray((), SCALAR_DTYPES[value_type.kind], self._buffer, position).item()

    def type_of(self, key: str) -> ValueType:
        """-> ValueType; KeyError when absent. Decodes nothing."""
        return self._values[key][0]

    def raw_strings(self, key: str) -> list[bytes]:
        """The undecoded strings of a string array (or of one string) -> list[bytes]."""
        value_type, position = self._values[key]
        if GGUFValueType.STRING not in (value_type.kind, value_type.element):
            raise FileFormatError(self._path, key, f"want strings, got {value_type}")
        count = 1 if value_type.length is None else value_type.length
        ends = string_ends(self._buffer, position, count).tolist()
        data = self._buffer[position : position + ends[-1]] if ends else b""
        return [data[start + 8 : end] for start, end in zip([0, *ends], ends)]

    def require(self, key: str, type: type, of: type | None = None) -> Any:
        """The value of `key`, which must be an int, float, bool, str or list.

        `of` also fixes the element type of a list. No conversions: a bool is no
        int, an int is no float. FileFormatError when absent or of another type.
        """
        want = type.__name__ if of is None else f"list of {of.__name__}"
        if key not in self._values:
            raise FileFormatError(self._path, key, f"want {want}, got no such key")
        value_type = self.type_of(key)
        element_differs = of is not None and (
            value_type.element is None or _python_type(value_type.element) is not of
        )
        if value_type.python_type() is not type or element_differs:
            raise FileFormatError(self._path, key, f"want {want}, got {value_type}")
        return self[key]

    def _decode(self, key: str, strings: list[bytes]) -> list[str]:
        try:
            return [string.decode() for string in strings]
        except UnicodeDecodeError:
            index = next(i for i, string in enumerate(strings) if not is_utf8(string))
            problem = f"want UTF-8, got {strings[index][:40]!r} at index {index}"
            raise FileFormatError(self._path, key, problem) from None


def string_ends(buffer: MappedFile, position: int, count: int) -> NDArray[np.int64]:
    """Where each of `count` strings ends, in bytes from `position`; of those within the file alone."""
    ends = np.empty(count, np.int64)
    data = ffi.from_buffer(np.frombuffer(buffer, np.uint8)[position:])
    whole: NDArray[np.int64] = ends[
        : lib.pe_string_ends(data, len(data), count, ffi.from_buffer("int64_t[]", ends))
    ]
    return whole


def _python_type(kind: GGUFValueType) -> type:
    if kind == GGUFValueType.STRING:
        return str
    return {"b": bool, "f": float}.get(SCALAR_DTYPES[kind].kind, int)


def is_utf8(string: bytes) -> bool:
    try:
        string.decode()
    except UnicodeDecodeError:
        return False
    return True
