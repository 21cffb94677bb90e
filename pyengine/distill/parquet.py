"""A data set of labels on disk, or in an object store: Parquet files and `labels.json`.  Needs pyarrow.

    DIR/data/train-00000.parquet, train-00001.parquet, ...    rows in the order of the input
    DIR/labels.json                                           the description (layout.py)

A path with a scheme (s3://, gs://, file://) goes through pyarrow's filesystems.  A file is written under
another name, NAME.partial, and renamed when it is complete.  Row groups are small (ROW_GROUP_TOKENS) and
each file has a page index, so that a viewer or a sampler reads a part of a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileFormatError, InputError, quote
from ..optional import require
from . import distillkit
from .codec import Layout, decode, encode, label_columns
from .documents import Row
from .labels import Labels
from .layout import COMMON, DESCRIPTION, FORMAT, METADATA_KEY
from .plan import Description

ROW_GROUP_TOKENS = 8192
COMPRESSION, LEVEL = "zstd", 9
DATA, SUFFIX = "data", ".parquet"

Batch = Any  # pyarrow.RecordBatch
Schema = Any  # pyarrow.Schema


def _arrow() -> Any:
    return require("pyarrow", extra="distill", what="labels")


def _parquet() -> Any:
    return require("pyarrow.parquet", extra="distill", what="labels", package="pyarrow")


# ---- where it is -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A directory of a pyarrow filesystem; local: its path, if the filesystem is this machine's own."""

    filesystem: Any
    root: str
    local: Path | None = None

    @classmethod
    def open(cls, output: Any, filesystem: Any = None) -> Place:
        """output: a path, or a URI; with a pyarrow filesystem, a path of it.  InputError."""
        fs = require("pyarrow.fs", extra="distill", what="labels", package="pyarrow")
        if filesystem is not None:
            return cls(filesystem, str(output))
        if "://" in str(output):
            try:
                found, root = fs.FileSystem.from_uri(str(output))
            except (OSError, ValueError) as error:
                raise InputError(f"{output}: want a URI that pyarrow can open, got: {error}") from None
        else:
            found, root = fs.LocalFileSystem(), str(Path(output).absolute())
        local = Path(root) if isinstance(found, fs.LocalFileSystem) else None
        return cls(found, root, local)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self) -> list[str]:
        """Of the files and folders inside; none if there is no such directory."""
        return sorted(info.base_name for info in self._inside(self.root))

    def parts(self) -> dict[str, int]:
        """{name: bytes} of the Parquet files, in order."""
        found = sorted((info.base_name, info.size) for info in self._inside(self.path(DATA)))
        return {f"{DATA}/{name}": size for name, size in found if name.endswith(SUFFIX)}

    def _inside(self, path: str) -> Any:
        fs = require("pyarrow.fs", extra="distill", what="labels", package="pyarrow")
        return self.filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))

    def create(self) -> None:
        """InputError for a path that is a file."""
        fs = require("pyarrow.fs", extra="distill", what="labels", package="pyarrow")
        if self.filesystem.get_file_info(self.root).type == fs.FileType.File:
            raise InputError(f"{self.root}: want a directory, got a file")
        self.filesystem.create_dir(self.path(DATA), recursive=True)

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            data: bytes = stream.read()
        return data

    def write(self, name: str, data: bytes) -> None:
        """The file appears whole or not at all."""
        with self.writing(name) as stream:
            stream.write(data)

    def writing(self, name: str) -> _Writing:
        return _Writing(self, name)


class _Writing:
    """An output stream to a file that appears under its name when the block ends without an error."""

    def __init__(self, place: Place, name: str):
        self.place, self.name, self.partial = place, name, place.path(name + ".partial")

    def __enter__(self) -> Any:
        self.stream = self.place.filesystem.open_output_stream(self.partial)
        return self.stream

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.stream.close()
        if kind is None:
            self.place.filesystem.move(self.partial, self.place.path(self.name))
        else:
            self.place.filesystem.delete_file(self.partial)


def part_name(index: int) -> str:
    """Below the data set's directory; `datasets` takes the split's name from it."""
    return f"{DATA}/train-{index:05d}{SUFFIX}"


# ---- schema ------------------------------------------------------------------------------------


def schema_of(description: Description) -> Schema:
    pa = _arrow()
    layout = description["layout"]
    ids = pa.uint64() if layout["name"] == "distillkit" else pa.int32()
    types = {
        "document": pa.string(),
        "start": pa.int32(),
        "input_ids": pa.list_(ids),
        "assistant_masks": pa.list_(pa.int8()),
        **dict.fromkeys(("true_logprob", "logsumexp", "outside"), pa.list_(pa.float32())),
        "label_ids": pa.list_(pa.list_(pa.int32())),
        **dict.fromkeys(("label_logprobs", "label_weights"), pa.list_(pa.list_(pa.float32()))),
        **dict.fromkeys(distillkit.COLUMNS, pa.list_(pa.list_(pa.uint8()))),
    }
    fields = [(name, types.get(name, pa.binary())) for name in (*COMMON, *label_columns(layout))]
    metadata = {METADATA_KEY: json.dumps(description, sort_keys=True)}
    return pa.schema(fields, metadata=metadata)


def batch_of(row: Row, labels: Labels, schema: Schema, layout: Layout) -> Batch:
    """One row as a record batch."""
    pa = _arrow()
    values = {
        "document": row.document,
        "start": row.start,
        "input_ids": row.ids,
        "assistant_masks": row.mask,
        "true_logprob": labels.true_logprob,
        "logsumexp": labels.logsumexp,
        "outside": labels.outside,
        **encode(labels, layout),
    }
    arrays = [_array(pa, values[field.name], field.type) for field in schema]
    return pa.record_batch(arrays, schema=schema)


def _array(pa: Any, value: Any, kind: Any) -> Any:
    """An array of one value."""
    if not pa.types.is_list(kind):
        return pa.array([value], kind)
    inner = kind.value_type
    if pa.types.is_list(inner):
        lengths = [len(part) for part in value]
        flat = np.concatenate([np.asarray(part) for part in value]) if value else np.empty(0)
        places = pa.array(np.cumsum([0, *lengths]), pa.int32())
        items = pa.ListArray.from_arrays(places, pa.array(flat, inner.value_type), type=inner)
    else:
        items = pa.array(np.asarray(value), inner)
    return pa.ListArray.from_arrays(pa.array([0, len(items)], pa.int32()), items, type=kind)


# ---- writing -----------------------------------------------------------------------------------


def write_part(place: Place, index: int, batches: Iterable[Batch], schema: Schema) -> None:
    """One file; the bytes depend on the rows alone, and on the version of pyarrow."""
    pa, pq = _arrow(), _parquet()
    plain = [f"{name}.list.element" for name in ("true_logprob", "logsumexp", "outside")]
    with (
        place.writing(part_name(index)) as stream,
        pq.ParquetWriter(
            stream,
            schema,
            compression=COMPRESSION,
            compression_level=LEVEL,
            use_dictionary=["document", "input_ids.list.element"],
            use_byte_stream_split=plain,
            write_statistics=[name for name in COMMON if name in ("document", "start")],
            write_page_index=True,
            data_page_size=1 << 20,
        ) as writer,
    ):
        for group in _groups(batches):
            writer.write_table(pa.Table.from_batches(group, schema), row_group_size=len(group))


def _groups(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Batches of one row, gathered into row groups."""
    group: list[Batch] = []
    tokens = 0
    for batch in batches:
        group.append(batch)
        tokens += len(batch.column("input_ids").values)
        if tokens >= ROW_GROUP_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


# ---- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelledRow:
    """One row, read back; fields as in layout.py."""

    document: str
    start: int
    input_ids: np.ndarray[Any, Any]
    assistant_masks: np.ndarray[Any, Any]
    labels: Labels


def read_description(place: Place) -> Description | None:
    """What labels.json says; None: there is no such file.  FileFormatError: it is another file."""
    if DESCRIPTION not in place.names():
        return None
    where = place.path(DESCRIPTION)
    try:
        found = json.loads(place.read(DESCRIPTION))
    except ValueError as error:
        raise FileFormatError(where, "file", f"want JSON, got: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else found
        raise FileFormatError(where, "format", f"want {FORMAT!r}, got {quote(got)}")
    return found


def read_rows(directory: Any, filesystem: Any = None) -> Iterator[LabelledRow]:
    """Every row of a data set, in order; a row group at a time is in memory.

    Errors: InputError for a directory without a data set, FileFormatError.
    """
    place = Place.open(directory, filesystem)
    description = read_description(place)
    if description is None:
        raise InputError(f"{directory}: want a data set of labels, got no {DESCRIPTION}")
    for name in place.parts():
        yield from read_part(place, name, description["layout"])


def read_part(place: Place, name: str, layout: Layout) -> Iterator[LabelledRow]:
    """The rows of one file, as of `read_rows`."""
    try:
        with _parquet().ParquetFile(place.path(name), filesystem=place.filesystem) as file:
            for group in range(file.num_row_groups):
                yield from _rows(file.read_row_group(group), layout)
    except (OSError, ValueError, KeyError) as error:
        raise FileFormatError(
            place.path(name), "rows", f"want those of {DESCRIPTION}, got: {error}"
        ) from None


def _rows(table: Any, layout: Layout) -> Iterator[LabelledRow]:
    for i in range(table.num_rows):
        columns = {name: _value(table.column(name)[i]) for name in table.column_names}
        yield LabelledRow(
            columns["document"],
            columns["start"],
            np.asarray(columns["input_ids"], np.int32),
            np.asarray(columns["assistant_masks"], np.int8),
            decode(columns, layout),
        )


def _value(scalar: Any) -> Any:
    """A list as an array, without a Python object per element."""
    if not hasattr(scalar, "values"):
        return scalar.as_py()
    if hasattr(scalar.values, "offsets"):
        flat, places = (
            scalar.values.flatten().to_numpy(zero_copy_only=False),
            scalar.values.offsets.to_numpy(),
        )
        return np.split(flat, (places - places[0])[1:-1])
    return scalar.values.to_numpy(zero_copy_only=False)
