"""What a checkpoint was made from, and what was written: `noesis_provenance.json`."""

from __future__ import annotations

import collections
import hashlib
from pathlib import Path

from .checkpoint import Checkpoint
from .config import read_json
from .errors import FileFormatError

FORMAT = "noesis-provenance-1"
FILE_NAME = "noesis_provenance.json"
SEED = 1729  # of every random draw in this package; quantising draws nothing, and says so by it
HASH_PIECE = 16 << 20


def describe_file(path: Path, advance=lambda nbytes: None) -> dict:
    """{name, size, sha256}; advance is told the bytes read."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(HASH_PIECE):
            digest.update(piece)
            size += len(piece)
            advance(len(piece))
    return {"name": path.name, "size": size, "sha256": digest.hexdigest()}


def engine_version() -> str:
    from . import __version__

    return __version__


def describe(sources: list[dict], checkpoint: Checkpoint, method: str, group_size: int, bits: int,
             digests: dict[str, str]) -> dict:
    """The provenance of one twin.

    `twin.id` depends on the source's bytes, the method and the group size, but not on the bits: two
    checkpoints with one id come from one source in one way.
    """
    types = collections.Counter(tensor.type for tensor in checkpoint.tensors.values())
    identity = "\n".join([*(s["sha256"] for s in sources), method, str(group_size)])
    return {
        "format": FORMAT,
        "engine": {"name": "pyengine", "version": engine_version()},
        "seed": SEED,
        "source": {"files": sources, "tensor_types": dict(sorted(types.items()))},
        "method": method,
        "group_size": group_size,
        "bits": bits,
        "twin": {"id": hashlib.sha256(identity.encode()).hexdigest(), "kind": f"int{bits}"},
        "tensors": {name: {"sha256": digest} for name, digest in digests.items()},
    }


def read(directory) -> dict:
    """The provenance of a checkpoint directory.  FileFormatError if it has none that can be read."""
    path = Path(directory) / FILE_NAME
    said = read_json(path)
    for field, kind in (("format", str), ("source", dict), ("twin", dict), ("tensors", dict),
                        ("method", str), ("group_size", int), ("bits", int)):
        if not isinstance(said.get(field), kind):
            raise FileFormatError(path, field, f"want {kind.__name__}, got {said.get(field)!r}")
    if said["format"] != FORMAT:
        raise FileFormatError(path, "format", f"want {FORMAT!r}, got {said['format']!r}")
    return said
