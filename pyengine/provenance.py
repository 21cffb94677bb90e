"""What a checkpoint was made from, and what was written: `noesis_provenance.json`.

    format, engine{name, version}, seed
    source     files[{name, size, sha256}], tensor_types{type: count}
    method     how scales and codes were chosen; group_size, bits
    twin       id: of the source's bytes, the method and the group size, but not the bits: two
               checkpoints with one id come from one source in one way; kind: int8 or int4
    tensors    {name: {sha256}} of their bytes
    files      {name: {sha256}} of what travels with them: config.json, modelling file, tokenizer
    sha256     of all the rest of it, as JSON with sorted keys and no spaces

`noesis-provenance-1` had no `files` and no `sha256`: it can be read, but its own fields cannot be
checked.
"""

from __future__ import annotations

import collections
import hashlib
import json
from pathlib import Path

from .checkpoint import Checkpoint
from .config import read_json
from .errors import FileFormatError, quote

FORMAT, OLDER_FORMATS = "noesis-provenance-2", ("noesis-provenance-1",)
FILE_NAME = "noesis_provenance.json"
SEED = 1729  # of every random draw in this package; quantising draws nothing, and says so by it
HASH_PIECE = 1 << 20
MAX_GROUP = 1 << 20


def describe_file(path: Path, advance=lambda nbytes: None, mapped=None) -> dict:
    """{name, size, sha256}; advance is told the bytes read; mapped: the file, where it is mapped already."""
    digest, size = hashlib.sha256(), 0
    for piece in _pieces_of_file(path) if mapped is None else _pieces_of(memoryview(mapped)):
        digest.update(piece)
        size += len(piece)
        advance(len(piece))
    return {"name": path.name, "size": size, "sha256": digest.hexdigest()}


def _pieces_of(data):
    return (data[start:start + HASH_PIECE] for start in range(0, len(data), HASH_PIECE))


def _pieces_of_file(path):
    buffer = memoryview(bytearray(HASH_PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def digests_of_files(directory: Path) -> dict[str, str]:
    """{name: sha256} of what lies beside the tensors, whose own bytes are noted one by one."""
    return {path.name: describe_file(path)["sha256"] for path in sorted(directory.iterdir())
            if path.suffix != ".safetensors" and path.name != FILE_NAME}


def engine_version() -> str:
    from . import __version__

    return __version__


def describe(sources: list[dict], checkpoint: Checkpoint, method: str, group_size: int, bits: int,
             tensors: dict[str, str], files: dict[str, str]) -> dict:
    """The provenance of one twin; tensors, files: {name: sha256}."""
    said = {
        "format": FORMAT,
        "engine": {"name": "pyengine", "version": engine_version()},
        "seed": SEED,
        "source": {"files": sources, "tensor_types": tensor_types(checkpoint)},
        "method": method,
        "group_size": group_size,
        "bits": bits,
        "twin": {"id": twin_id(sources, method, group_size), "kind": f"int{bits}"},
        "tensors": {name: {"sha256": digest} for name, digest in tensors.items()},
        "files": {name: {"sha256": digest} for name, digest in files.items()},
    }
    return said | {"sha256": own_digest(said)}


def tensor_types(checkpoint: Checkpoint) -> dict[str, int]:
    types = collections.Counter(tensor.type for tensor in checkpoint.tensors.values())
    return dict(sorted(types.items()))


def twin_id(sources: list[dict], method: str, group_size: int) -> str:
    identity = "\n".join([*(s["sha256"] for s in sources), method, str(group_size)])
    return hashlib.sha256(identity.encode()).hexdigest()


def own_digest(said: dict) -> str:
    """What its field sha256 should be."""
    rest = {field: value for field, value in said.items() if field != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(directory) -> dict:
    """The provenance of a checkpoint directory.  FileFormatError if it has none that can be read.

    Every field that `describe` gives is there, of its type.
    """
    path = Path(directory) / FILE_NAME
    said = read_json(path)
    _check_fields(path, "", said, _FIELDS)
    if said["format"] not in (FORMAT, *OLDER_FORMATS):
        raise FileFormatError(path, "format", f"want {FORMAT!r}, got {quote(said['format'])}")
    if said["format"] == FORMAT:
        _check_fields(path, "", said, {"files": dict, "sha256": str})
    if not 2 <= said["group_size"] <= MAX_GROUP or said["group_size"] % 2:
        raise FileFormatError(path, "group_size", f"want an even number from 2 to {MAX_GROUP}, "
                              f"got {said['group_size']}")
    for i, file in enumerate(said["source"]["files"]):
        _check_fields(path, f"source.files[{i}]", file, _FILE_FIELDS)
    for part in ("tensors", "files"):
        for name, entry in said.get(part, {}).items():
            _check_fields(path, f"{part}.{name}", entry, {"sha256": str})
    return said


_FIELDS = {"format": str, "engine": {"name": str, "version": str}, "seed": int,
           "source": {"files": list, "tensor_types": dict}, "method": str, "group_size": int,
           "bits": int, "twin": {"id": str, "kind": str}, "tensors": dict}
_FILE_FIELDS = {"name": str, "size": int, "sha256": str}


def _check_fields(path, where, value, fields) -> None:
    """A dict with these fields: a type, or the fields of a dict in it."""
    if not isinstance(value, dict):
        raise FileFormatError(path, where, f"want dict, got {quote(value)}")
    for key, kind in fields.items():
        name, found = f"{where}.{key}" if where else key, value.get(key)
        if isinstance(kind, dict):
            _check_fields(path, name, found, kind)
        elif type(found) is not kind:
            raise FileFormatError(path, name, f"want {kind.__name__}, got {quote(found)}")
