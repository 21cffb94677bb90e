"""safetensors: memory-mapped reading of a file or an indexed directory.

Layout of a file: header length u64, little-endian | header, a JSON object of
name -> {dtype, shape, data_offsets} and "__metadata__" | data, which the
tensors' ranges cover exactly.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FileFormatError, quote
from .mapped import MappedFile, map_file
from .mapped_tensor import MappedTensor
from .strict_json import MAX_BYTES as MAX_HEADER_BYTES
from .strict_json import parse_object, read_object

PathLike = str | os.PathLike[str]
Optional = Callable[[str], bool]  # whether a tensor may be absent

MAX_DIMS = 32  # also keeps the product of hostile dimensions small
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# A dtype that NumPy lacks is given as its stored bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class TensorView(MappedTensor):
    """One tensor of a mapped file; `dtype` is the format's own name for it."""

    dtype: str

    @property
    def data(self) -> NDArray[Any]:
        """Read-only view of the file, DTYPES[dtype] of `shape`; BF16 as uint16."""
        view: NDArray[Any] = np.ndarray(self.shape, DTYPES[self.dtype], self._buffer, self.offset)
        return view


# --- one file ---------------------------------------------------------------


class SafetensorsFile:
    """An open file. tensors: read-only mapping, name -> TensorView, in header order;
    metadata: dict[str, str]; path; size in bytes."""

    @classmethod
    def open(cls, path: PathLike) -> SafetensorsFile:
        """Map the file and check its whole header. FileFormatError on any fault."""
        return cls(Path(path))

    def __init__(self, path: Path):
        self.path = path
        buffer = map_file(path)
        self.size = len(buffer)
        header, data_start = _read_header(path, buffer)
        self.metadata = _check_metadata(path, header.pop("__metadata__", {}))
        tensors = {name: _view(path, buffer, data_start, name, entry) for name, entry in header.items()}
        _check_tiling(path, tensors.values(), data_start, self.size)
        self.tensors: Mapping[str, TensorView] = MappingProxyType(tensors)
        self.mapped = buffer

    def check_unchanged(self) -> None:
        """FileFormatError if the file is no longer what was opened: see `MappedFile`."""
        self.mapped.check_unchanged()


def _read_header(path: Path, buffer: MappedFile) -> tuple[dict[str, Any], int]:
    """-> (dict, position of the data)."""
    if len(buffer) < 8:
        raise FileFormatError(path, "header length", f"want 8 bytes, got {len(buffer)}")
    length = int.from_bytes(buffer[:8], "little")
    limit = min(MAX_HEADER_BYTES, len(buffer) - 8)
    if not 2 <= length <= limit:
        raise FileFormatError(path, "header length", f"want 2 to {limit} bytes, got {length}")
    return parse_object(path, "header", buffer[8 : 8 + length]), 8 + length


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problem = f"want an object of strings, got {quote(metadata)}"
        raise FileFormatError(path, "__metadata__", problem)
    return metadata


def _view(path: Path, buffer: MappedFile, data_start: int, name: str, entry: object) -> TensorView:
    """One header entry, checked by itself -> TensorView; its range is not checked yet."""
    field = f"tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        problem = f"want dtype, shape and data_offsets, got {quote(entry)}"
        raise FileFormatError(path, field, problem)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileFormatError(path, field, f"want a known dtype, got {quote(dtype)}")
    if not _are_sizes(shape):
        raise FileFormatError(path, field, f"want a shape of sizes below 2^63, got {quote(shape)}")
    if len(shape) > MAX_DIMS:
        raise FileFormatError(path, field, f"want at most {MAX_DIMS} dimensions, got {len(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        problem = f"want data_offsets [begin, end], got {quote(offsets)}"
        raise FileFormatError(path, field, problem)
    begin, end = offsets
    nbytes = stored_nbytes(dtype, shape)
    if nbytes != end - begin:
        problem = f"want {nbytes} bytes for {dtype} {shape}, got {end - begin}"
        raise FileFormatError(path, field, problem)
    if stored_nbytes(dtype, [n for n in shape if n]) >= 1 << 63:  # NumPy refuses it, empty or not
        problem = f"want sizes whose product is below 2^63, got {shape}"
        raise FileFormatError(path, field, problem)
    return TensorView(path, name, tuple(shape), nbytes, data_start + begin, buffer, dtype)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def stored_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor's data in a file."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def _check_tiling(path: Path, tensors: Iterable[TensorView], data_start: int, size: int) -> None:
    """The ranges, in the order of their offsets, cover the data without hole or overlap."""
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            fault = "an overlap" if tensor.offset < end else "a hole"
            problem = f"want data from {end - data_start} on, "
            problem += f"got {tensor.offset - data_start}: {fault}"
            raise FileFormatError(path, f"tensor {tensor.name}", problem)
        end += tensor.nbytes
        if end > size:
            problem = f"want data within the file's {size - data_start} bytes, "
            problem += f"got its end at {end - data_start}"
            raise FileFormatError(path, f"tensor {tensor.name}", problem)
    if end != size:
        problem = f"want {end - data_start} bytes, got {size - data_start}: trailing bytes"
        raise FileFormatError(path, "data", problem)


# --- a directory ------------------------------------------------------------


def _never(name: str) -> bool:
    return False


class SafetensorsDirectory:
    """All tensors of a checkpoint's directory.

    tensors: read-only mapping, name -> TensorView, in the order of the index;
    unindexed: tuple of TensorViews that lie in a shard and that the index does not name there;
    files: tuple of SafetensorsFile; maps: the MappedFile of each; path; size: the sum of the files'
    bytes.
    """

    @classmethod
    def open(cls, path: PathLike, optional: Optional = _never) -> SafetensorsDirectory:
        """Follow model.safetensors.index.json, or else open model.safetensors.

        The index says which tensors the directory has.  optional: (name) -> whether a tensor may be
        absent although the index names it.  FileFormatError: another tensor of the index that is
        absent; a model.safetensors beside the index that holds other tensors.
        """
        return cls(Path(path), optional)

    def __init__(self, path: Path, optional: Optional = _never):
        self.path = path
        index, single = path / INDEX_NAME, path / SINGLE_NAME
        unindexed: list[TensorView] = []
        tensors: Mapping[str, TensorView]
        if os.path.lexists(index):  # a link to nothing is a fault, and not a directory without an index
            weight_map = _read_weight_map(index)
            files, tensors, unindexed = _open_index(index, weight_map, optional)
            if os.path.lexists(single) and SINGLE_NAME not in weight_map.values():
                _check_single(single, tensors, optional)
        elif os.path.lexists(single):
            file = SafetensorsFile.open(single)
            files, tensors = [file], file.tensors
        else:
            problem = f"want {INDEX_NAME} or {SINGLE_NAME}, got neither{what_else(path)}"
            raise FileFormatError(path, "directory", problem)
        self.files = tuple(files)
        self.maps = tuple(file.mapped for file in self.files)
        self.size = sum(file.size for file in files)
        self.tensors: Mapping[str, TensorView] = MappingProxyType(dict(tensors))
        self.unindexed = tuple(unindexed)

    def check_unchanged(self) -> None:
        """FileFormatError if a file is no longer what was opened: see `MappedFile`."""
        for file in self.files:
            file.check_unchanged()


def what_else(path: Path) -> str:
    """Other files of weights that the directory has, for a message."""
    endings = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
    names = sorted(p.name for p in path.iterdir() if p.name.endswith(endings) and not p.name.startswith("."))
    if not names:
        return ""
    found = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    one = next((name for name in names if name.endswith(".gguf")), None)
    return f", but {found}" + (f": give the path of {one}" if one else "")


def _open_index(
    index: Path, weight_map: dict[str, str], optional: Optional
) -> tuple[list[SafetensorsFile], dict[str, TensorView], list[TensorView]]:
    """-> (list of SafetensorsFile, dict: name -> TensorView, list of unindexed TensorViews)."""
    needed = {file_name for name, file_name in weight_map.items() if not optional(name)}
    files = {
        file_name: SafetensorsFile.open(index.with_name(file_name))
        for file_name in sorted(set(weight_map.values()))
        if file_name in needed or os.path.lexists(index.with_name(file_name))
    }
    tensors = {}
    for name, file_name in weight_map.items():
        if file_name in files and name in files[file_name].tensors:
            tensors[name] = files[file_name].tensors[name]
        elif not optional(name):
            others = [other for other, file in files.items() if name in file.tensors]
            got = f"got it in {others[0]}" if others else "got none"
            raise FileFormatError(index, f"tensor {name}", f"want it in {file_name}, {got}")
    unindexed = [
        view
        for file_name, file in files.items()
        for name, view in file.tensors.items()
        if weight_map.get(name) != file_name
    ]
    return list(files.values()), tensors, unindexed


def _check_single(path: Path, tensors: Mapping[str, TensorView], optional: Optional) -> None:
    """A model.safetensors beside an index that does not name it: some programs read this file and not the
    index.  Both must hold the same tensors, or FileFormatError."""
    advice = f"remove {SINGLE_NAME}, or {INDEX_NAME} and its files"
    try:
        single = SafetensorsFile.open(path).tensors
    except FileFormatError as error:
        got = f"{error.field}: {error.problem}"
        raise FileFormatError(path, "file", f"want {INDEX_NAME}'s tensors, got {got}; {advice}") from error
    for name in [*tensors, *single]:
        if optional(name):
            continue
        wanted, found = tensors.get(name), single.get(name)
        if wanted is None:
            fault = f"want no such tensor, as in {INDEX_NAME}, got one"
        elif found is None:
            fault = f"want it as in {wanted.path.name} by {INDEX_NAME}, got none"
        elif (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
            wants = f"{wanted.dtype} {list(wanted.shape)}"
            fault = f"want {wants} as in {wanted.path.name}, got {found.dtype} {list(found.shape)}"
        elif not wanted.has_bits_of(found):
            fault = f"want the bits of {wanted.path.name}, which {INDEX_NAME} names, got others"
        else:
            continue
        raise FileFormatError(path, f"tensor {name}", f"{fault}; {advice}")


def _read_weight_map(index: Path) -> dict[str, str]:
    """-> dict: tensor name -> plain name of a file beside the index."""
    weight_map = read_object(index, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problem = f"want an object of tensor and file names, got {quote(weight_map)}"
        raise FileFormatError(index, "weight_map", problem)
    for name, file_name in weight_map.items():
        if not _is_plain_name(file_name):
            problem = f"want the name of a file in this folder, got {quote(file_name)}"
            raise FileFormatError(index, f"weight_map {name}", problem)
    return weight_map


def _is_plain_name(name: object) -> bool:
    # Backslash and colon are separators on other systems; every system refuses the same files.
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
