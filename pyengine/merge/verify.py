"""A merged checkpoint against its provenance, its twin and its sources.

Detected without the sources: what `quantizer.verify_files` detects, and a provenance whose fields contradict
each other.  Recomputed from the sources: their files' sha256 and size, tensor_types, every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import BITS
from ..checkpoint.methods import METHODS
from ..checkpoint.open import open_checkpoint
from ..checkpoint.writer import DigestSink
from ..core.processors import physical_cores
from ..errors import FileFormatError
from ..files.whole import PathLike
from ..progress import progress
from ..quantizer.options import QuantizeOptions
from ..quantizer.verify_files import MadeDirectory, Verification, all_of, compare, fault_of, few, with_twin
from .configuration import parse_configuration
from .merge import KINDS, MODEL_KEYS, MergeJob, Output, run
from .merge_pass import Threads


def check_merge(
    directory: PathLike, twin: PathLike | None = None, sources: Sequence[PathLike] = ()
) -> Verification:
    """Compare a directory that `merge` wrote with its provenance, its twin and its sources.

    twin: the other directory of an INT8 and INT4 pair.  sources: the models, in any order: they are found
    by their sha256, and merged again; nothing is written.
    Errors: FileFormatError, CheckpointError, for files that cannot be read at all; InputError, a twin that is
    the directory itself.
    """
    made = with_twin(_merged, directory, twin)
    result = Verification()
    for one in made:
        one.check(result)
    if twin is None:
        result.not_checked.append("the twin (--twin)")
    else:
        _compare_twins(made[0], made[1], result)
    if not sources:
        result.not_checked.append("the sources (--source, once per model)")
    else:
        _compare_sources(made, sources, result)
    result.not_checked.append("names of source files and the engine's version, which nothing confirms")
    return result


def _merged(path: PathLike) -> Any:
    made: Any = MadeDirectory(path, _check_fields)  # type: ignore[no-untyped-call]
    if not provenance.is_merge(made.said):
        wanted = f"want the provenance of a merge, as the other directory has, got {made.said['format']!r}"
        raise FileFormatError(made.path / provenance.FILE_NAME, "format", wanted)
    return made


def _check_fields(directory: Path, said: provenance.Document, checkpoint: Checkpoint | None) -> list[str]:
    """The provenance against itself and, where its files are intact, against the tensors."""
    output = said["output"]
    fields = [
        ("sha256", provenance.own_digest(said), said["sha256"]),
        ("engine.name", "pyengine", said["engine"]["name"]),
        ("configuration.seed", said["seed"], said["configuration"].get("seed")),
        ("twin.id", provenance.merge_id(said["models"], said["configuration"], output), said["twin"]["id"]),
        ("twin.kind", output["kind"], said["twin"]["kind"]),
    ]
    if checkpoint is not None:
        kinds = {tensor.type for tensor in checkpoint.tensors.values()}
        quantized = [tensor for tensor in checkpoint.tensors.values() if tensor.scales is not None]
        found = (kinds & set(BITS)) or kinds
        fields.append(
            ("output.kind", all_of(KINDS.get(kind, kind.lower()) for kind in found), output["kind"])
        )
        if quantized:
            groups = all_of(tensor.group for tensor in quantized)
            fields.append(("output.group_size", groups, str(output.get("group_size"))))
    faults = [_fault(directory, field, wanted, got) for field, wanted, got in fields if wanted != got]
    if output["kind"] in provenance.INTEGERS and output["method"] not in METHODS:
        faults.append(_fault(directory, "output.method", "one that this engine has", repr(output["method"])))
    return faults


def _fault(directory: Path, field: str, wanted: object, got: object) -> str:
    return fault_of(directory, field, wanted, got)


def _compare_twins(one: Any, other: Any, result: Verification) -> None:
    mine, others = one.said["twin"], other.said["twin"]
    if mine["id"] != others["id"]:
        got = f"got another: twin {others['id']}"
        result.faults.append(f"{other.path}: want the merge of {one.path}, {got}")
    elif mine["kind"] == others["kind"]:
        wanted = f"another kind than {mine['kind']}, as the twin of {one.path}"
        result.faults.append(_fault(other.path, "output.kind", wanted, others["kind"]))
    else:
        result.checked.append(f"{other.path}: the twin of {one.path}: the same models and configuration")


# ---- the sources ---------------------------------------------------------------------------------


def _compare_sources(made: list[Any], sources: Sequence[PathLike], result: Verification) -> None:
    """What the provenance says of the models, and, of the right ones, what they give."""
    opened = {str(source): open_checkpoint(source) for source in sources}
    with progress(sum(checkpoint.file.size for checkpoint in opened.values()), "hash the sources") as bar:
        described = {
            source: [provenance.describe_file(path, bar.update) for path in checkpoint.source_files]
            for source, checkpoint in opened.items()
        }
    for one in made:
        names = _find(one, described, result)
        if names is None:
            result.not_checked.append(f"{one.path}: its tensors against the sources, which are others")
            continue
        for i, (name, model) in enumerate(zip(names, one.said["models"])):
            types = opened[name].summary.parameter_types
            if types != model["tensor_types"]:
                wanted = f"{types} as {name}"
                result.faults.append(
                    _fault(one.path, f"models[{i}].tensor_types", wanted, model["tensor_types"])
                )
        _merge_again(one, names, result)


def _find(one: Any, described: dict[str, Any], result: Verification) -> list[str] | None:
    """The source of each model, by the sha256 of its files; None, and faults, where one has none."""
    names: list[str] = []
    left = dict(described)
    for i, model in enumerate(one.said["models"]):
        digests = [file["sha256"] for file in model["files"]]
        name = next((name for name, files in left.items() if [f["sha256"] for f in files] == digests), None)
        if name is None:
            wanted = f"a --source with the bytes of {model['name']}, its {model['role']}"
            result.faults.append(_fault(one.path, f"models[{i}].files", wanted, "none"))
            return None
        sizes = [file["size"] for file in left.pop(name)]
        noted = [file["size"] for file in model["files"]]
        if sizes != noted:
            result.faults.append(_fault(one.path, f"models[{i}].files.size", sizes, noted))
        names.append(name)
    for name in left:
        result.faults.append(f"{one.path}: want the sources that it was made from, got another one: {name}")
    return None if left else names


def _merge_again(one: Any, names: list[str], result: Verification) -> None:
    output = one.said["output"]
    if output["kind"] in provenance.INTEGERS and output["method"] not in METHODS:
        result.not_checked.append(f"{one.path}: its tensors against the sources: no such method")
        return
    document = _with_paths(one.said["configuration"], names)
    job = MergeJob(parse_configuration(document, one.path / provenance.FILE_NAME))
    integers = output["kind"] in provenance.INTEGERS
    options = QuantizeOptions(output["group_size"], output["method"]) if integers else QuantizeOptions()
    again = Output(job, output["kind"] if integers else "floats", options)
    sink = DigestSink()
    total = sum(entry.nbytes for entries in again.entries for entry in entries)
    with progress(total, "merge again") as bar, Threads(physical_cores()) as threads:
        run(job, [again], [sink], options, threads, bar.update)
    faults: list[str] = compare(one.path, one.said["tensors"], sink.digests, "the sources give")
    result.faults += few(one.path, faults, 3)
    if not faults:
        counts = f"{len(names)} models, {len(sink.digests)} tensors that they give"
        result.checked.append(f"{one.path}: as its sources give it: {counts}")


def _with_paths(value: Any, names: list[str], key: str = "") -> Any:
    """The configuration with paths in place of the models' numbers."""
    if key in MODEL_KEYS and type(value) is int:
        return names[value] if 0 <= value < len(names) else value
    if isinstance(value, dict):
        return {name: _with_paths(part, names, name) for name, part in value.items()}
    return [_with_paths(part, names) for part in value] if isinstance(value, list) else value
