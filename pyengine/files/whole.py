"""A file written whole or not at all.

The bytes go to PATH.partial.  PATH.partial is renamed to PATH when it is complete and on the disk; it
is removed when an error or an interrupt comes first, and PATH stays as it was.  A link stays a link:
the file that it leads to is the one that is replaced.  Something that is not a regular file (/dev/null,
/dev/stdout, a pipe) cannot be replaced by a rename, so it is written directly.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PathLike = str | os.PathLike[str]


class WholeFile:
    """The two names of one file: write to `partial`, then call `publish` or `discard`."""

    def __init__(self, path: PathLike):
        self.path = Path(path)
        self.direct = self.path.exists() and not self.path.is_file()
        if not self.direct:
            self.path = Path(os.path.realpath(self.path))
        self.partial = self.path if self.direct else partial_name(self.path)

    def publish(self) -> None:
        """partial becomes path.  The caller has closed the file."""
        if not self.direct:
            os.replace(self.partial, self.path)

    def discard(self) -> None:
        """Remove partial.  After `publish`, or after another `discard`, there is nothing to do."""
        if not self.direct:
            self.partial.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """The name of a file or a directory while it is written, next to its own name."""
    return path.with_name(path.name + ".partial")


@contextmanager
def open_whole(path: PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file that appears under its name when the block ends without an error.  mode: "wb" or "w" (UTF-8).

    Errors: OSError; and the block's own, after the partial file is removed.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    whole = WholeFile(path)
    try:
        with open(whole.partial, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            sync(file.fileno())
        whole.publish()
    finally:
        whole.discard()


def write_bytes(path: PathLike, data: bytes) -> None:
    with open_whole(path) as file:
        file.write(data)


def write_text(path: PathLike, text: str) -> None:
    """UTF-8; line ends as they are in the text."""
    write_bytes(path, text.encode())


def write_json(path: PathLike, value: object, indent: int = 2) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")


def sync(descriptor: int) -> None:
    """Wait until the bytes are on the disk, where there is a disk below."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of pipes and devices
            raise
