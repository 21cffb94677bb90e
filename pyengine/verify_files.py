"""A quantised checkpoint against its provenance."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from . import ops, provenance
from .errors import InputError
from .files.safetensors import SafetensorsDirectory
from .progress import progress
from .quantize import Options, Pass, Twin, open_source


def verify_files(directory, twin=None, source=None) -> list[str]:
    """What is wrong, one line each; empty if nothing is.

    Every tensor's bytes must have the sha256 that was noted when they were written.  twin: another
    checkpoint, which must say that it has the same source and method.  source: what the checkpoint
    was made from, which must give these bytes when it is quantised again (nothing is written).
    Errors: FileFormatError, CheckpointError, InputError, for files that cannot be read at all.
    """
    said = provenance.read(directory)
    faults = _compare(directory, said, _digests_of_files(directory), "the file has")
    if twin is not None:
        faults += _compare_twins(directory, said, twin)
    if source is not None:
        faults += _compare(directory, said, _digests_of_source(source, said), "the source gives")
    return faults


def _compare(directory, said, found: dict[str, str], what: str) -> list[str]:
    noted = {name: entry.get("sha256") for name, entry in said["tensors"].items()}
    faults = [f"{directory}: {name}: want sha256 {digest}, {what} {found.get(name, 'no such tensor')}"
              for name, digest in noted.items() if found.get(name) != digest]
    return faults + [f"{directory}: {name}: {what} it, the provenance does not"
                     for name in found if name not in noted]


def _digests_of_files(directory) -> dict[str, str]:
    file = SafetensorsDirectory.open(Path(directory))
    digests = {}
    with progress(file.size, "verify") as bar:
        for name, tensor in file.tensors.items():
            digests[name] = hashlib.sha256(tensor.data.reshape(-1).view(np.uint8)).hexdigest()
            bar.update(tensor.nbytes)
    return digests


def _compare_twins(directory, said, twin) -> list[str]:
    other = provenance.read(twin)
    if other["twin"].get("id") == said["twin"].get("id"):
        return []
    return [f"{twin}: want the source and method of {directory}, got another: "
            f"twin {other['twin'].get('id')}"]


def _digests_of_source(source, said) -> dict[str, str]:
    method = {Options(scale=scale).method: scale for scale in ("absmax", "mse")}
    if said["method"] not in method:
        raise InputError(f"{source}: want a method that this engine has, got {said['method']!r}")
    if said["bits"] not in (8, 4):
        raise InputError(f"{source}: want 8 or 4 bits, got {said['bits']}")
    options = Options(said["group_size"], method[said["method"]])
    checkpoint = open_source(source)
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
