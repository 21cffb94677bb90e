"""The hashes of the files that a checkpoint is made from, computed beside the pass that reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from .ordered_worker import submit

Described = list[dict[str, Any]]  # the files of one checkpoint


def hash_beside(
    checkpoints: Sequence[Checkpoint], advance: Callable[[int], object], work: Callable[[], object]
) -> list[Described]:
    """Calls work(), and meanwhile hashes -> the files of each checkpoint, as `provenance.describe_file` does.

    Hashing beside the pass reuses pages that are still cached.  advance: called with the bytes hashed.
    """
    stop = Event()

    def step(nbytes: int) -> None:
        if stop.is_set():
            raise InterruptedError
        advance(nbytes)

    def describe() -> list[Described]:
        return [
            [
                provenance.describe_file(path, step, mapped)
                for path, mapped in zip(checkpoint.source_files, checkpoint.file.maps)
            ]
            for checkpoint in checkpoints
        ]

    with ThreadPoolExecutor(1) as beside:
        hashing = submit(beside, describe)
        try:
            work()
            return hashing.result()
        finally:
            stop.set()


def identity_of(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Tells whether a run that is continued has the same files; a cheap check, not a content hash."""
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.source_files]
