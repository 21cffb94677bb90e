"""What a checkpoint was made from, and what was written: `noesis_provenance.json`."""

from __future__ import annotations

import collections
import hashlib
from pathlib import Path

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


def describe(sources: list[dict], gguf, method: str, group_size: int, bits: int,
             digests: dict[str, str]) -> dict:
    """The provenance of one twin.

    `twin.id` depends on the source's bytes, the method and the group size, but not on the bits: two
    checkpoints with one id come from one source in one way.
    """
    from . import __version__

    types = collections.Counter(tensor.type.name for tensor in gguf.tensors.values())
    identity = "\n".join([*(s["sha256"] for s in sources), method, str(group_size)])
    return {
        "format": "noesis-provenance-1",
        "engine": {"name": "pyengine", "version": __version__},
        "seed": SEED,
        "source": {"files": sources, "tensor_types": dict(sorted(types.items()))},
        "method": method,
        "group_size": group_size,
        "bits": bits,
        "twin": {"id": hashlib.sha256(identity.encode()).hexdigest(), "kind": f"int{bits}"},
        "tensors": {name: {"sha256": digests[name]} for name in digests},
    }
