"""The source of a quantized checkpoint, and the files that were written: `noesis_provenance.json`.

    format, engine{name, version}, seed
    source     files[{name, size, sha256}], tensor_types{type: parameters}
    method     how scales and codes were chosen: a key of METHODS; method_in_words, for people;
               group_size
    bits       8 or 4, of every quantized parameter; of a mixed checkpoint instead
    mix        [[pattern, bits]]: the first pattern that matches a parameter decides, see quantizer/mix.py
    calibration
               of a method that needs one: sha256 of the statistics' file; texts[{name, sha256, bytes,
               tokens}], context and all_experts where `pyengine calibrate` wrote it
    twin       id: of the source's bytes, the method, the group size and the calibration's sha256, but not
               the bits: two checkpoints with one id come from one source in one way; kind: int8, int4 or
               mixed
    tensors    {name: {sha256}} of their bytes
    files      {name: {sha256}} of the files that travel with them: config.json, modelling file, tokenizer
    sha256     of all other fields, as JSON with sorted keys and no spaces

A merge (pyengine/merge) has `noesis-merge-1`:

    format, engine, seed, tensors, files, sha256   as above
    models         [{name, role: base or parent, files, tensor_types}] in the order of the configuration
    configuration  the YAML's keys and values; a model is its place in `models`, and a census is its counts
    output         kind: bfloat16, float32, int8 or int4; of the last two method and group_size, as above
    twin           id: of the models' bytes, the configuration and how it was quantized; kind: output's

`noesis-provenance-2` has a sentence as `method`, and no method_in_words: it is read and verified.
`noesis-provenance-1` has no `files` and no `sha256` either: it is read, but its own fields cannot be
verified.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import FileFormatError, quote
from ..files.strict_json import read_object
from ..seed import SEED
from .checkpoint import Checkpoint
from .methods import ALL_METHODS, OLDER_METHODS

FORMAT = "noesis-provenance-3"
VERIFIABLE_FORMATS = (FORMAT, "noesis-provenance-2")
FORMATS = (*VERIFIABLE_FORMATS, "noesis-provenance-1")
MERGE_FORMAT = "noesis-merge-1"
FILE_NAME = "noesis_provenance.json"
HASH_PIECE = 1 << 20
MAX_GROUP = 1 << 20
FLOATS, INTEGERS = ("bfloat16", "float32"), ("int8", "int4")  # kinds of a merge's output

Document = dict[str, Any]
Mix = Sequence[tuple[str, int]]  # (pattern, bits)


def describe_file(
    path: Path, advance: Callable[[int], object] = lambda nbytes: None, mapped: mmap.mmap | None = None
) -> dict[str, Any]:
    """{name, size, sha256}; advance is called with the bytes read; mapped: the file, if it is mapped."""
    digest, size = hashlib.sha256(), 0
    for piece in _pieces_of_file(path) if mapped is None else _pieces_of(memoryview(mapped)):
        digest.update(piece)
        size += len(piece)
        advance(len(piece))
    return {"name": path.name, "size": size, "sha256": digest.hexdigest()}


def _pieces_of(data: memoryview) -> Iterator[memoryview]:
    return (data[start : start + HASH_PIECE] for start in range(0, len(data), HASH_PIECE))


def _pieces_of_file(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(HASH_PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def digests_of_files(directory: Path) -> dict[str, str]:
    """{name: sha256} of every file except those of the tensors, which have digests of their own."""
    return {
        path.name: describe_file(path)["sha256"]
        for path in sorted(directory.iterdir())
        if path.suffix != ".safetensors" and path.name != FILE_NAME
    }


def describe(
    sources: list[dict[str, Any]],
    checkpoint: Checkpoint,
    method: str,
    group_size: int,
    bits: int | Mix,
    tensors: dict[str, str],
    files: dict[str, str],
    calibration: Document | None = None,
) -> Document:
    """The provenance of one checkpoint; method: a key of ALL_METHODS; tensors, files: {name: sha256}."""
    which: Document = {"bits": bits} if isinstance(bits, int) else {"mix": [list(rule) for rule in bits]}
    document = {
        "format": FORMAT,
        "engine": {"name": "pyengine", "version": __version__},
        "seed": SEED,
        "source": {"files": sources, "tensor_types": checkpoint.summary.parameter_types},
        "method": method,
        "method_in_words": ALL_METHODS[method],
        **({} if calibration is None else {"calibration": calibration}),
        "group_size": group_size,
        **which,
        "twin": {"id": twin_id(sources, method, group_size, calibration), "kind": kind_of(which)},
        "tensors": {name: {"sha256": digest} for name, digest in tensors.items()},
        "files": {name: {"sha256": digest} for name, digest in files.items()},
    }
    return document | {"sha256": own_digest(document)}


def describe_merge(
    models: list[Document],
    configuration: Document,
    seed: int,
    output: Document,
    tensors: dict[str, str],
    files: dict[str, str],
) -> Document:
    """The provenance of a merge; models, configuration, output: as above; tensors, files: {name: sha256}."""
    document = {
        "format": MERGE_FORMAT,
        "engine": {"name": "pyengine", "version": __version__},
        "seed": seed,
        "models": models,
        "configuration": configuration,
        "output": output,
        "twin": {"id": merge_id(models, configuration, output), "kind": output["kind"]},
        "tensors": {name: {"sha256": digest} for name, digest in tensors.items()},
        "files": {name: {"sha256": digest} for name, digest in files.items()},
    }
    return document | {"sha256": own_digest(document)}


def merge_id(models: list[Document], configuration: Document, output: Document) -> str:
    digests = [[file["sha256"] for file in model["files"]] for model in models]
    how = {key: value for key, value in output.items() if key != "kind"}
    return _digest_of([digests, configuration, how])


def is_merge(document: Document) -> bool:
    return bool(document["format"] == MERGE_FORMAT)


def twin_id(
    sources: list[dict[str, Any]], method: str, group_size: int, calibration: Document | None = None
) -> str:
    statistics = [] if calibration is None else [calibration["sha256"]]
    identity = "\n".join([*(s["sha256"] for s in sources), method, str(group_size), *statistics])
    return hashlib.sha256(identity.encode()).hexdigest()


def kind_of(document: Document) -> str:
    """What `twin.kind` must be of a quantization: int8, int4 or mixed."""
    return "mixed" if "mix" in document else f"int{document['bits']}"


def method_of(document: Document) -> str | None:
    """The key of ALL_METHODS of a document of any format; None: a method that this engine does not have."""
    if document["format"] == FORMAT:
        return document["method"] if document["method"] in ALL_METHODS else None
    return OLDER_METHODS.get(document["method"])


def has_scaled_channels(path: Path) -> bool:
    """Whether a checkpoint's provenance says `awq`: its parameters, one by one, are not those of its source.
    False where there is none.  Errors: those of `read`."""
    if not (Path(path) / FILE_NAME).exists():
        return False
    document = read(path)
    return not is_merge(document) and method_of(document) == "awq"


def is_same_origin(a: Document, b: Document) -> bool:
    """Whether two documents claim one source and one method, whatever their formats."""
    if a["format"] == b["format"]:
        return bool(a["twin"]["id"] == b["twin"]["id"])
    return _origin(a) == _origin(b)


def _origin(document: Document) -> tuple[list[str], str | None, int]:
    digests = [file["sha256"] for file in document["source"]["files"]]
    return digests, method_of(document), document["group_size"]


def own_digest(document: Document) -> str:
    """What the field sha256 must be."""
    return _digest_of({field: value for field, value in document.items() if field != "sha256"})


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(directory: str | os.PathLike[str]) -> Document:
    """The provenance of a checkpoint directory.  FileFormatError if it cannot be read.

    Every field that `describe`, or `describe_merge`, gives is there and has its type.
    """
    path = Path(directory) / FILE_NAME
    document = read_object(path, constants=True)
    if document.get("format") == MERGE_FORMAT:
        _check_merge(path, document)
        return document
    _check_fields(path, "", document, _FIELDS)
    if document["format"] not in FORMATS:
        raise FileFormatError(path, "format", f"want {FORMAT!r}, got {quote(document['format'])}")
    if document["format"] in VERIFIABLE_FORMATS:
        _check_fields(path, "", document, {"files": dict, "sha256": str})
    if document["format"] == FORMAT:
        _check_fields(path, "", document, {"method_in_words": str})
    _check_bits(path, document)
    if "calibration" in document:
        _check_fields(path, "", document, {"calibration": {"sha256": str}})
    _check_group(path, "group_size", document["group_size"])
    for i, file in enumerate(document["source"]["files"]):
        _check_fields(path, f"source.files[{i}]", file, _FILE_FIELDS)
    _check_digests(path, document)
    return document


def _check_merge(path: Path, document: Document) -> None:
    _check_fields(path, "", document, _MERGE_FIELDS)
    for i, model in enumerate(document["models"]):
        _check_fields(path, f"models[{i}]", model, _MODEL_FIELDS)
        for j, file in enumerate(model["files"]):
            _check_fields(path, f"models[{i}].files[{j}]", file, _FILE_FIELDS)
    if document["output"]["kind"] in INTEGERS:
        _check_fields(path, "output", document["output"], {"method": str, "group_size": int})
        _check_group(path, "output.group_size", document["output"]["group_size"])
    elif document["output"]["kind"] not in FLOATS:
        kinds = " or ".join((*FLOATS, *INTEGERS))
        raise FileFormatError(path, "output.kind", f"want {kinds}, got {quote(document['output']['kind'])}")
    _check_digests(path, document)


def _check_bits(path: Path, document: Document) -> None:
    """bits, or instead of it mix."""
    if "mix" not in document:
        return _check_fields(path, "", document, {"bits": int})
    if "bits" in document:
        raise FileFormatError(path, "bits", f"want none beside mix, got {quote(document['bits'])}")
    mix = document["mix"]
    if not isinstance(mix, list) or not all(map(_is_rule, mix)):
        raise FileFormatError(path, "mix", f"want [[pattern, 8 or 4]], got {quote(mix)}")


def _is_rule(rule: object) -> bool:
    if not isinstance(rule, list) or len(rule) != 2:
        return False
    pattern, bits = rule
    return type(pattern) is str and type(bits) is int and bits in (8, 4)


def _check_group(path: Path, field: str, group: int) -> None:
    if not 2 <= group <= MAX_GROUP or group % 2:
        raise FileFormatError(path, field, f"want an even number from 2 to {MAX_GROUP}, got {group}")


def _check_digests(path: Path, document: Document) -> None:
    for part in ("tensors", "files"):
        for name, entry in document.get(part, {}).items():
            _check_fields(path, f"{part}.{name}", entry, {"sha256": str})


_FIELDS = {
    "format": str,
    "engine": {"name": str, "version": str},
    "seed": int,
    "source": {"files": list, "tensor_types": dict},
    "method": str,
    "group_size": int,
    "twin": {"id": str, "kind": str},
    "tensors": dict,
}
_MERGE_FIELDS = {
    "format": str,
    "engine": {"name": str, "version": str},
    "seed": int,
    "models": list,
    "configuration": dict,
    "output": {"kind": str},
    "twin": {"id": str, "kind": str},
    "tensors": dict,
    "files": dict,
    "sha256": str,
}
_MODEL_FIELDS = {"name": str, "role": str, "files": list, "tensor_types": dict}
_FILE_FIELDS = {"name": str, "size": int, "sha256": str}


def _check_fields(path: Path, where: str, value: object, fields: dict[str, Any]) -> None:
    """FileFormatError unless value is a dict with these fields: {name: its type, or the fields of a dict}."""
    if not isinstance(value, dict):
        raise FileFormatError(path, where, f"want dict, got {quote(value)}")
    for key, kind in fields.items():
        name, found = f"{where}.{key}" if where else key, value.get(key)
        if isinstance(kind, dict):
            _check_fields(path, name, found, kind)
        elif type(found) is not kind:
            raise FileFormatError(path, name, f"want {kind.__name__}, got {quote(found)}")
