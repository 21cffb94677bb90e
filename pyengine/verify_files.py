"""A quantised checkpoint against its provenance.

What is seen without the source: any change to a tensor, to a file that travels with the tensors, or to
the provenance.  Its own sha256 tells the latter; one who forges that too is caught where fields
contradict each other or the files: seed, group_size, bits, twin.  Of the rest, source.files' sha256 and
size, tensor_types and method are recomputed from --source; source.files' name and engine can only be
believed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from . import ops, provenance
from .checkpoint import Checkpoint, open_checkpoint
from .errors import InputError
from .files.safetensors import SafetensorsDirectory
from .progress import progress
from .quantize import METHODS, Options, Pass, Twin, open_source


def verify_files(directory, twin=None, source=None) -> list[str]:
    """What is wrong, one line each; empty if nothing is.

    Every tensor and every other file must have the sha256 that was noted when they were written, and
    the provenance its own.  twin: another checkpoint, which must say that it has the same source and
    method.  source: what the checkpoint was made from: these files, which must give these bytes when
    they are quantised again (nothing is written).
    Errors: FileFormatError, CheckpointError, InputError, for files that cannot be read at all.
    """
    directory = Path(directory)
    said = provenance.read(directory)
    if said["format"] != provenance.FORMAT:
        return [_fault(directory, "format", f"{provenance.FORMAT!r}, whose fields can be checked",
                       f"{said['format']!r}: quantize again with this engine")]
    faults = verify_tensors(directory) + _compare_files(directory, said)
    faults += _check_fields(directory, said, None if faults else open_checkpoint(directory))
    if twin is not None:
        faults += _compare_twins(directory, said, twin)
    if source is not None:
        faults += _compare_source(directory, said, source)
    return faults


def verify_tensors(directory) -> list[str]:
    """The same of the tensors alone: which of them is not as its provenance says."""
    said = provenance.read(directory)
    return _compare(directory, said["tensors"], _digests_of_tensors(Path(directory)), "the file has")


def _fault(directory, field, wanted, got) -> str:
    return f"{directory}: {provenance.FILE_NAME}: {field}: want {wanted}, got {got}"


def _compare(directory, noted: dict[str, dict], found: dict[str, str], what: str) -> list[str]:
    faults = [f"{directory}: {name}: want sha256 {entry['sha256']}, {what} {found.get(name, 'none')}"
              for name, entry in noted.items() if found.get(name) != entry["sha256"]]
    return faults + [f"{directory}: {name}: {what} it, the provenance does not"
                     for name in found if name not in noted]


# ---- the directory by itself -----------------------------------------------------------------


def _digests_of_tensors(directory) -> dict[str, str]:
    file = SafetensorsDirectory.open(directory)
    digests = {}
    with progress(file.size, "verify") as bar:
        for name, tensor in file.tensors.items():
            digests[name] = hashlib.sha256(tensor.data.reshape(-1).view(np.uint8)).hexdigest()
            bar.update(tensor.nbytes)
    return digests


def _compare_files(directory, said) -> list[str]:
    """A file that was added, a README as a rule, is no fault; code that was added is."""
    found = {name: digest for name, digest in provenance.digests_of_files(directory).items()
             if name in said["files"] or name.endswith(".py")}
    return _compare(directory, said["files"], found, "the file has")


def _check_fields(directory, said, checkpoint: Checkpoint | None) -> list[str]:
    """The provenance against itself and, where its files are intact, against the tensors."""
    twin_id = provenance.twin_id(said["source"]["files"], said["method"], said["group_size"])
    fields = [
        ("sha256", provenance.own_digest(said), said["sha256"]),
        ("engine.name", "pyengine", said["engine"]["name"]),
        ("seed", provenance.SEED, said["seed"]),
        ("twin.id", twin_id, said["twin"]["id"]),
        ("twin.kind", f"int{said['bits']}", said["twin"]["kind"]),
    ]
    if checkpoint is not None:
        quantized = [t for t in checkpoint.tensors.values() if t.scales is not None]
        fields += [("group_size", _all_of(t.group for t in quantized), str(said["group_size"])),
                   ("bits", _all_of(t.type for t in quantized), f"INT{said['bits']}")]
    faults = [_fault(directory, field, wanted, got) for field, wanted, got in fields if wanted != got]
    if said["method"] not in METHODS.values():
        faults.append(_fault(directory, "method", "one that this engine has", repr(said["method"])))
    return faults


def _all_of(values) -> str:
    return " and ".join(sorted({str(value) for value in values}))


# ---- against others --------------------------------------------------------------------------


def _compare_twins(directory, said, twin) -> list[str]:
    other = provenance.read(twin)
    if other["twin"]["id"] == said["twin"]["id"]:
        return []
    return [f"{twin}: want the source and method of {directory}, got another: "
            f"twin {other['twin']['id']}"]


def _compare_source(directory, said, source) -> list[str]:
    checkpoint = open_source(source)
    with progress(checkpoint.file.size, "hash the source") as bar:
        files = [provenance.describe_file(path, bar.update) for path in checkpoint.source_files]
    noted = said["source"]["files"]
    fields = [(f"source.files, {key}", [f[key] for f in files], [f[key] for f in noted])
              for key in ("size", "sha256")]
    fields.append(("source.tensor_types", provenance.tensor_types(checkpoint),
                   said["source"]["tensor_types"]))
    faults = [_fault(directory, field, f"{wanted} as {source}", got)
              for field, wanted, got in fields if wanted != got]
    return faults + _compare(directory, said["tensors"], _digests_of_source(checkpoint, said),
                             "the source gives")


def _digests_of_source(checkpoint, said) -> dict[str, str]:
    scales = {method: scale for scale, method in METHODS.items()}
    if said["method"] not in scales:
        raise InputError(f"{checkpoint.path}: want a method that this engine has, "
                         f"got {said['method']!r}")
    if said["bits"] not in (8, 4):
        raise InputError(f"{checkpoint.path}: want 8 or 4 bits, got {said['bits']}")
    options = Options(said["group_size"], scales[said["method"]])
    twin = _Digests(checkpoint, said["bits"], options)
    with progress(twin.nbytes, "quantize again") as bar:
        Pass(ops.Pool(), options, bar.update).run([twin])
    return {name: digest.hexdigest() for name, digest in twin.hashes.items()}


class _Digests(Twin):
    """A twin of which only the digests are kept."""

    def __init__(self, checkpoint, bits, options):
        super().__init__(checkpoint, bits, Path("unwritten"), options)
        self.hashes = {}

    def wants(self, unit):
        return True

    def begin(self, unit):
        pass

    def end(self, unit):
        pass

    def write(self, name, array):
        self.hashes.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(array))
