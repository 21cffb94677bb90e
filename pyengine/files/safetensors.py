"""safetensors: memory-mapped reading of a file or an indexed directory, streamed writing.

Layout of a file: header length u64, little-endian | header, a JSON object of
name -> {dtype, shape, data_offsets} and "__metadata__" | data, which the
tensors' ranges cover exactly.
"""

import dataclasses
import hashlib
import json
import math
import mmap
import os
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pyengine.errors import CheckpointError, FileFormatError, quote
from pyengine.files.mapped import map_file
from pyengine.files.output import OutputFile
from pyengine.files.strict_json import MAX_BYTES as MAX_HEADER_BYTES
from pyengine.files.strict_json import parse_object, read_object

MAX_DIMS = 32  # also keeps the product of hostile dimensions small
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# What NumPy has no type for comes as its stored bits.
DTYPES = {
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
class TensorView:
    """One tensor of a mapped file; `dtype` is the format's own name for it."""

    path: Path
    name: str
    dtype: str
    shape: tuple
    nbytes: int
    offset: int  # from the start of the file
    _buffer: mmap.mmap = dataclasses.field(repr=False)

    @property
    def data(self):
        """Read-only view of the file, DTYPES[dtype] of `shape`; BF16 as uint16."""
        return np.ndarray(self.shape, DTYPES[self.dtype], self._buffer, self.offset)


# --- one file ---------------------------------------------------------------


class SafetensorsFile:
    """An open file. tensors: read-only mapping, name -> TensorView, in header order;
    metadata: dict[str, str]; path; size in bytes."""

    @classmethod
    def open(cls, path):
        """Map the file and check its whole header. FileFormatError on any fault."""
        return cls(Path(path))

    def __init__(self, path):
        self.path = path
        buffer = map_file(path)
        self.size = len(buffer)
        header, data_start = _read_header(path, buffer)
        self.metadata = _check_metadata(path, header.pop("__metadata__", {}))
        tensors = {
            name: _view(path, buffer, data_start, name, entry) for name, entry in header.items()
        }
        _check_tiling(path, tensors.values(), data_start, self.size)
        self.tensors = MappingProxyType(tensors)
        self.mapped = buffer

    def check_unchanged(self):
        """FileFormatError if the file is no longer what was opened: see `MappedFile`."""
        self.mapped.check_unchanged()


def _read_header(path, buffer):
    """-> (dict, position of the data)."""
    if len(buffer) < 8:
        raise FileFormatError(path, "header length", f"want 8 bytes, got {len(buffer)}")
    length = int.from_bytes(buffer[:8], "little")
    limit = min(MAX_HEADER_BYTES, len(buffer) - 8)
    if not 2 <= length <= limit:
        raise FileFormatError(path, "header length", f"want 2 to {limit} bytes, got {length}")
    return parse_object(path, "header", buffer[8 : 8 + length]), 8 + length


def _check_metadata(path, metadata):
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problem = f"want an object of strings, got {quote(metadata)}"
        raise FileFormatError(path, "__metadata__", problem)
    return metadata


def _view(path, buffer, data_start, name, entry):
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
    nbytes = _nbytes(dtype, shape)
    if nbytes != end - begin:
        problem = f"want {nbytes} bytes for {dtype} {shape}, got {end - begin}"
        raise FileFormatError(path, field, problem)
    if _nbytes(dtype, [n for n in shape if n]) >= 1 << 63:  # NumPy refuses it, empty or not
        problem = f"want sizes whose product is below 2^63, got {shape}"
        raise FileFormatError(path, field, problem)
    return TensorView(path, name, dtype, tuple(shape), nbytes, data_start + begin, buffer)


def _are_sizes(values):
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def _nbytes(dtype, shape):
    return math.prod(shape) * DTYPES[dtype].itemsize


def _check_tiling(path, tensors, data_start, size):
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


class SafetensorsDirectory:
    """All tensors of a checkpoint's directory.

    tensors: read-only mapping, name -> TensorView, in the order of the index;
    files: tuple of SafetensorsFile; maps: the MappedFile of each; path; size: the sum of the files'
    bytes.
    """

    @classmethod
    def open(cls, path):
        """Follow model.safetensors.index.json, or else open model.safetensors."""
        return cls(Path(path))

    def __init__(self, path):
        self.path = path
        index = path / INDEX_NAME
        if index.exists():
            files, tensors = _open_index(index)
        elif (path / SINGLE_NAME).exists():
            single = SafetensorsFile.open(path / SINGLE_NAME)
            files, tensors = [single], single.tensors
        else:
            problem = f"want {INDEX_NAME} or {SINGLE_NAME}, got neither"
            raise FileFormatError(path, "directory", problem)
        self.files = tuple(files)
        self.maps = tuple(file.mapped for file in self.files)
        self.size = sum(file.size for file in files)
        self.tensors = MappingProxyType(dict(tensors))

    def check_unchanged(self):
        """FileFormatError if a file is no longer what was opened: see `MappedFile`."""
        for file in self.files:
            file.check_unchanged()


def _open_index(index):
    """-> (list of SafetensorsFile, dict: name -> TensorView)."""
    weight_map = _read_weight_map(index)
    file_names = sorted(set(weight_map.values()))
    files = {name: SafetensorsFile.open(index.with_name(name)) for name in file_names}
    for file_name, file in files.items():
        for name in file.tensors:
            if weight_map.get(name) != file_name:
                where = weight_map.get(name, "nowhere")
                problem = f"want it in {where} by {index.name}, got it here"
                raise FileFormatError(file.path, f"tensor {name}", problem)
    for name, file_name in weight_map.items():
        if name not in files[file_name].tensors:
            raise FileFormatError(index, f"tensor {name}", f"want it in {file_name}, got none")
    tensors = {name: files[file_name].tensors[name] for name, file_name in weight_map.items()}
    return list(files.values()), tensors


def _read_weight_map(index):
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


def _is_plain_name(name):
    # Backslash and colon are separators elsewhere; a refused file is refused everywhere.
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


# --- writing ----------------------------------------------------------------


class SafetensorsWriter:
    """Writes a file front to back, one tensor or part of one at a time.

    tensors: sequence of (name, dtype, shape) in the order of the file. The same
    arguments give the same bytes. The file is `path`.partial until `close`
    renames it; as a context manager, an exception removes it instead.
    sha256: name -> hex digest of each complete tensor's bytes.
    """

    def __init__(self, path, tensors, metadata=None):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.sha256 = {}
        header, self._pending = _plan(tensors, metadata or {})
        self._pending.reverse()  # the next one is the last: pop() is cheap
        self._begin_tensor()
        self._file = OutputFile(self.partial, len(header) + sum(nbytes for _, _, nbytes in self._pending))
        self._write_all(header)

    def write(self, name, array):
        """Append `array` to the tensor `name`, which must be the next incomplete one.

        Its dtype is DTYPES of the declared one, its bytes in C order continue the
        tensor's; its shape is free, so that chunks of rows can be written.
        CheckpointError when it is not what was declared.
        """
        if not self._pending or name != self._pending[-1][0]:
            want = self._pending[-1][0] if self._pending else "no more tensors"
            raise CheckpointError(f"{self.path}: want {want} next, got {name}")
        _, dtype, nbytes = self._pending[-1]
        array = np.ascontiguousarray(array)
        if array.dtype != DTYPES[dtype]:
            raise CheckpointError(f"{name}: want {DTYPES[dtype]} for {dtype}, got {array.dtype}")
        if array.nbytes > nbytes - self._written:
            left = nbytes - self._written
            raise CheckpointError(f"{name}: want at most {left} more bytes, got {array.nbytes}")
        self._append(name, array.reshape(-1).view(np.uint8), nbytes)

    def close(self):
        """Check that every tensor is complete, sync to disk, rename into place."""
        if self._file.closed:
            return
        if self._pending:
            name, _, nbytes = self._pending[-1]
            self.abort()
            raise CheckpointError(f"{name}: want {nbytes} bytes, got {self._written} at close")
        try:
            self._file.close()
            os.replace(self.partial, self.path)
        except OSError:
            self.abort()
            raise

    def abort(self):
        """Remove the partial file; nothing to do after `close`."""
        try:
            self._file.discard()
        finally:  # closing may fail as writing did
            self.partial.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, exception_type, exception, traceback):
        if exception_type is None:
            self.close()
        else:
            self.abort()

    def _append(self, name, data, nbytes):
        self._write_all(data)
        self._digest.update(data)
        self._written += data.size
        if self._written == nbytes:
            self.sha256[name] = self._digest.hexdigest()
            self._pending.pop()
            self._begin_tensor()

    def _begin_tensor(self):
        self._digest, self._written = hashlib.sha256(), 0

    def _write_all(self, data):
        try:
            self._file.write(data)
        except OSError:  # a full disk: nobody can use half a file
            self.abort()
            raise


def _plan(tensors, metadata):
    """-> (header bytes with its length, list of (name, dtype, nbytes)). CheckpointError."""
    if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise CheckpointError("__metadata__: want strings")
    header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    pending, end = [], 0
    for name, dtype, shape in tensors:
        if name in header or name == "__metadata__":
            raise CheckpointError(f"{name}: duplicate or reserved name")
        if dtype not in DTYPES:
            raise CheckpointError(f"{name}: want a known dtype, got {dtype}")
        shape = [int(n) for n in shape]
        if any(n < 1 for n in shape) or len(shape) > MAX_DIMS:
            problem = f"want at most {MAX_DIMS} dimensions of at least 1, got {shape}"
            raise CheckpointError(f"{name}: {problem}")
        nbytes = _nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        pending.append((name, dtype, nbytes))
        end += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        problem = f"want a header of at most {MAX_HEADER_BYTES} bytes, got {len(text)}"
        raise CheckpointError(problem)
    return len(text).to_bytes(8, "little") + text, pending
