"""A checkpoint directory written whole or not at all.

    with CheckpointWriter(directory, parameters) as writer:
        ...                       # writer.write(name, array), front to back
        writer.write_index()
        ...                       # config.json and the like, to writer.partial
        writer.publish()

The directory is DIR.partial until `publish` renames it.  An error removes DIR.partial.  A writer with an
identity can continue: an interrupt or a full disk leaves DIR.partial behind, and the next writer with
the same identity keeps the files in it that are complete.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import FileFormatError, InputError
from ..files.safetensors import DTYPES, INDEX_NAME, SINGLE_NAME, SafetensorsFile
from ..files.safetensors_writer import SafetensorsWriter
from ..files.strict_json import read_object
from ..files.whole import partial_name, write_json

SHARD_BYTES = 4 << 30

_LOG = "complete_files.json"


class TensorEntry(NamedTuple):
    """One tensor of the output: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


ParameterEntries = Sequence[TensorEntry]  # the tensors of one parameter, which lie in one file


class Sink(Protocol):
    """Receives the tensors of a checkpoint, in the order of its plan, each front to back."""

    def wants(self, name: str) -> bool:
        """False: the sink has the tensor already, and it need not be computed."""

    def read(self, name: str) -> NDArray[Any] | None:
        """A tensor that the sink has already; None: it does not have it, or not whole."""

    def write(self, name: str, array: NDArray[Any]) -> None:
        """The next bytes of a tensor."""


class DigestSink:
    """A sink that keeps only the sha256 of each tensor."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def wants(self, name: str) -> bool:
        return True

    def read(self, name: str) -> NDArray[Any] | None:
        return None

    def write(self, name: str, array: NDArray[Any]) -> None:
        self._hashes.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(array))

    @property
    def digests(self) -> dict[str, str]:
        """{tensor: sha256}"""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


# ---- files ---------------------------------------------------------------------------------------


def split_into_shards(
    parameters: Sequence[ParameterEntries], limit: int
) -> list[tuple[str, list[TensorEntry]]]:
    """(file name, tensors) of each file: the parameters in order, at most `limit` bytes or one parameter
    per file."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for parameter in parameters:
        nbytes = sum(entry.nbytes for entry in parameter)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1] += parameter
        size += nbytes
    return list(zip(shard_names(len(shards)), shards))


def shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def check_destinations(*directories: Path) -> None:
    """InputError: one directory twice, a directory that exists, or a parent that does not exist."""
    if len({directory.absolute() for directory in directories}) < len(directories):
        raise InputError(f"{directories[0]}: want two directories, got one twice")
    for directory in directories:
        if directory.exists():
            raise InputError(f"{directory}: want a directory that does not exist yet, got one that does")
        if not directory.absolute().parent.is_dir():
            raise InputError(f"{directory}: want a directory to write in, got no {directory.parent}")


# ---- the directory -------------------------------------------------------------------------------


class CheckpointWriter:
    """One directory; a `Sink`, whose files are opened, filled in order and closed.

    partial   where files that are not tensors are to be written, between `write_index` and `publish`
    nbytes    of all tensors
    digests   {tensor: sha256} of the files that are complete, in the order of the plan
    """

    def __init__(
        self,
        directory: Path,
        parameters: Sequence[ParameterEntries],
        shard_bytes: int = SHARD_BYTES,
        identity: str | None = None,
    ):
        """identity: of a run that can be continued; two runs of one identity write the same bytes."""
        self.directory, self.partial, self.identity = directory, partial_name(directory), identity
        self.shards = dict(split_into_shards(parameters, shard_bytes))
        self.nbytes = sum(entry.nbytes for parameter in parameters for entry in parameter)
        self._shard_of = {entry.name: shard for shard, entries in self.shards.items() for entry in entries}
        self._complete: dict[str, dict[str, str]] = {}  # file: {tensor: sha256}
        self._opened: dict[str, SafetensorsFile] = {}  # of those, the files that were read
        self._file: SafetensorsWriter | None = None
        self._left = 0  # bytes of the open file's tensors

    def __enter__(self) -> CheckpointWriter:
        """Make DIR.partial, or take over the complete files of an earlier run."""
        earlier = self._read_log()
        if earlier is None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
            return self
        self._complete = {
            name: digests
            for name, digests in earlier.items()
            if name in self.shards
            and set(digests) == {entry.name for entry in self.shards[name]}
            and is_intact(self.partial / name, digests)
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is None:
            return
        if self._file is not None:
            self._file.abort()
        # After a full disk or an interrupt, the user can come back.
        if self.identity is None or not issubclass(kind, (KeyboardInterrupt, OSError)):
            shutil.rmtree(self.partial, ignore_errors=True)

    # -- tensors --

    def wants(self, name: str) -> bool:
        return self._shard_of[name] not in self._complete

    def read(self, name: str) -> NDArray[Any] | None:
        """Mapped from the file, whose digests were compared when the run began."""
        shard = self._shard_of[name]
        if shard not in self._complete:
            return None
        if shard not in self._opened:
            self._opened[shard] = SafetensorsFile.open(self.partial / shard)
        return self._opened[shard].tensors[name].data

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Opens the tensor's file with its first bytes, and closes the file with its last."""
        if self._file is None:
            entries = self.shards[self._shard_of[name]]
            path = self.partial / self._shard_of[name]
            self._file = SafetensorsWriter(path, entries, {"format": "pt"})
            self._left = sum(entry.nbytes for entry in entries)
        self._file.write(name, array)
        self._left -= array.nbytes
        if self._left == 0:
            self._file.close()
            self._complete[self._shard_of[name]] = self._file.sha256
            self._file = None
            self._write_log()

    @property
    def digests(self) -> dict[str, str]:
        return {
            entry.name: self._complete[shard][entry.name]
            for shard, entries in self.shards.items()
            if shard in self._complete
            for entry in entries
        }

    # -- the rest --

    def write_index(self) -> None:
        """The index of several files; one file has none."""
        if len(self.shards) > 1:
            write_json(
                self.partial / INDEX_NAME,
                {"metadata": {"total_size": self.nbytes}, "weight_map": self._shard_of},
            )

    def remove_log(self) -> None:
        """From here on DIR.partial holds only files to publish, and a run cannot be continued."""
        (self.partial / _LOG).unlink(missing_ok=True)

    def publish(self) -> None:
        """DIR.partial becomes DIR, with every file on the disk."""
        self.remove_log()
        for path in self.partial.iterdir():  # or the renamed directory could hold empty files
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        self.partial.rename(self.directory)

    # -- continuing --

    def _write_log(self) -> None:
        if self.identity is not None:
            write_json(self.partial / _LOG, {"identity": self.identity, "files": self._complete})

    def _read_log(self) -> dict[str, dict[str, str]] | None:
        """The files that an earlier run of this identity completed; None without a log that can be read."""
        if self.identity is None:
            return None
        try:
            log = read_object(self.partial / _LOG)
        except FileFormatError:
            return None
        files = log.get("files")
        if log.get("identity") != self.identity or not isinstance(files, dict):
            return None
        return {name: digests for name, digests in files.items() if isinstance(digests, dict)}


def is_intact(path: Path, digests: dict[str, str]) -> bool:
    """Whether a file that an earlier run completed still has the bytes that the run wrote."""
    try:
        tensors = SafetensorsFile.open(path).tensors
    except FileFormatError:
        return False
    return set(tensors) == set(digests) and all(
        tensors[name].sha256() == digest for name, digest in digests.items()
    )
