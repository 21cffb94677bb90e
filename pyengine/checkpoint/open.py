"""`open_checkpoint`: a path to a checked checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from .checkpoint import Checkpoint
from .from_directory import open_directory
from .from_gguf import open_gguf

EMBEDDED = Path(__file__).parent.parent / "demo" / "default.gguf"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A GGUF (or the first of its splits) or a checkpoint directory, mapped and checked.

    The name "default" is the checkpoint that this package holds, unless there is a file of that name.
    Errors: FileFormatError, CheckpointError (a name, shape or dtype), InputError (no such path).
    """
    path = Path(path)
    if path == Path("default") and not path.exists():
        path = EMBEDDED
    if path.is_dir():
        return open_directory(path)
    if not path.exists():
        raise InputError(f"{path}: want a GGUF file or a checkpoint directory, got no such path")
    return open_gguf(path)
