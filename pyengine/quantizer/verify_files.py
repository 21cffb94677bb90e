"""A quantized checkpoint against its provenance, its twin and its source.

Detected without the source: any change to a tensor, to a file that travels with the tensors, to the
provenance.  The provenance's own sha256 shows the last.  Where that is forged too, fields that contradict
each other or the files are found: seed, group_size, bits or mix, twin.  Recomputed from the source:
source.files' sha256 and size, tensor_types, method, every tensor.  Not verifiable: source.files' names,
engine.version.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import BITS
from ..checkpoint.methods import CALIBRATED
from ..checkpoint.open import open_checkpoint
from ..checkpoint.tensor import Tensor
from ..checkpoint.writer import DigestSink
from ..core.threads import Pool
from ..errors import FileFormatError, InputError
from ..files.safetensors import SafetensorsDirectory
from ..progress import progress
from ..seed import SEED
from .calibrated import read_statistics, run_pass
from .mix import Mix
from .options import QuantizeOptions, open_source
from .plan import PlannedParameter, plan, written_name
from .quantize_pass import Target

MOST_LINES = 10  # of faults of one kind


@dataclass
class Verification:
    """What is wrong, what was compared and found right, and what was not compared; one line each."""

    faults: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)


def verify_files(directory, twin=None, source=None, calibration=None) -> list[str]:
    """`check_files`' faults; empty if nothing is wrong."""
    return check_files(directory, twin, source, calibration).faults


def check_files(directory, twin=None, source=None, calibration=None) -> Verification:
    """Compare a directory that `quantize` wrote with its provenance, its twin and its source.

    Every tensor and every other file must have the sha256 that was noted when they were written, and
    the provenance its own.  twin: the directory of another kind, of which the same must hold, and
    which must say that it has the same source and method.  source: the file or directory that they were
    made from: these files, which must give these bytes when they are quantized again (nothing is written).
    calibration: the statistics that a calibrated checkpoint was made with, which that needs.
    Errors: FileFormatError, CheckpointError, for files that cannot be read at all; InputError, a twin
    that is the directory itself.
    """
    made = with_twin(_Directory, directory, twin)
    result = Verification()
    for one in made:
        one.check(result)
    if twin is None:
        result.not_checked.append("the twin (--twin)")
    else:
        _compare_twins(*made, result)
    if source is None:
        result.not_checked.append("the source (--source)")
    else:
        _compare_source(made, source, calibration, result)
    result.not_checked.append("names of source files and the engine's version, which nothing confirms")
    return result


def with_twin(opened, directory, twin) -> list:
    """[opened(directory)], and opened(twin) if there is one.  Errors: InputError: it is the directory."""
    made = [opened(directory)]
    if twin is not None:
        if made[0].path.resolve() == Path(twin).resolve():
            raise InputError(f"{twin}: want the other checkpoint as twin, got the directory itself")
        made.append(opened(twin))
    return made


def verify_tensors(directory) -> list[str]:
    """Which tensors are not as the provenance says, one line each; the tensors alone."""
    said = provenance.read(directory)
    opened = SafetensorsDirectory.open(Path(directory))
    return compare(directory, said["tensors"], _digests_of_tensors(opened), "the file has")


def fault_of(directory, field, wanted, got) -> str:
    return f"{directory}: {provenance.FILE_NAME}: {field}: want {wanted}, got {got}"


def compare(directory, noted: dict[str, dict], found: dict[str, str], what: str) -> list[str]:
    faults = [
        f"{directory}: {name}: want sha256 {entry['sha256']}, {what} {found.get(name, 'none')}"
        for name, entry in noted.items()
        if found.get(name) != entry["sha256"]
    ]
    return faults + [
        f"{directory}: {name}: {what} it, the provenance does not" for name in found if name not in noted
    ]


def few(directory, faults: list[str], most: int = MOST_LINES) -> list[str]:
    """The first faults, and how many more there are."""
    if len(faults) <= most:
        return faults
    return [*faults[:most], f"{directory}: and {len(faults) - most} more like the last"]


# ---- a directory by itself -------------------------------------------------------------------

# What loaders of models read, or run, without being told to.
_LOADED_ENDINGS = (".py", ".safetensors", ".bin", ".pt", ".pth", ".jinja")
_LOADED_NAMES = (
    "adapter_config.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


class MadeDirectory:
    """A directory with a provenance, and what its provenance says.

    check_fields   (directory, provenance, its checkpoint or None where a file is not intact) -> faults
    """

    def __init__(self, path, check_fields):
        self.path, self.check_fields = Path(path), check_fields
        self.said = provenance.read(self.path)

    def check(self, result: Verification) -> None:
        """The provenance, the tensors and the files against each other."""
        opened = SafetensorsDirectory.open(self.path)
        files, others = self._files(opened)
        digests = _digests_of_tensors(opened)
        faults = few(self.path, compare(self.path, self.said["tensors"], digests, "the file has"))
        faults += compare(self.path, self.said["files"], files, "the file has")
        faults += [
            f"{view.path}: {view.name}: want only tensors that the index names, got this one"
            for view in opened.unindexed
        ]
        faults += self.check_fields(self.path, self.said, None if faults else open_checkpoint(self.path))
        result.faults += faults
        if not faults:
            counts = f"{len(digests)} tensors, {len(files)} other files, the provenance's own fields"
            result.checked.append(f"{self.path}: as its provenance says: {counts}")
        result.not_checked += [f"{self.path / name}" for name in others]

    def _files(self, opened) -> tuple[dict[str, str], list[str]]:
        """{name: sha256} of the files that are noted, or that loaders would read; names of all others."""
        shards = {file.path.name for file in opened.files}
        digests, others = {}, []
        for path in sorted(self.path.iterdir()):
            name = path.name
            if name in shards or name == provenance.FILE_NAME:
                continue
            loaded = name.endswith(_LOADED_ENDINGS) or name in _LOADED_NAMES
            if path.is_file() and (name in self.said["files"] or loaded):
                digests[name] = provenance.describe_file(path)["sha256"]
            else:
                others.append(name)
        return digests, others


class _Directory(MadeDirectory):
    """A directory that `quantize` wrote."""

    def __init__(self, path):
        super().__init__(path, _check_fields)
        if provenance.is_merge(self.said):
            wanted = "the provenance of a quantization, as the other directory has"
            raise FileFormatError(self.path / provenance.FILE_NAME, "format", f"want {wanted}, got a merge's")
        self.current = self.said["format"] in provenance.VERIFIABLE_FORMATS

    def check(self, result: Verification) -> None:
        if self.current:
            return super().check(result)
        wanted = f"{provenance.FORMAT!r}, whose fields can be checked"
        got = f"{self.said['format']!r}: quantize again with this engine"
        result.faults.append(fault_of(self.path, "format", wanted, got))


def _digests_of_tensors(opened: SafetensorsDirectory) -> dict[str, str]:
    digests = {}
    with progress(opened.size, "verify") as bar:
        for name, tensor in opened.tensors.items():
            digests[name] = tensor.sha256()
            bar.update(tensor.nbytes)
    return digests


def _check_fields(directory, said, checkpoint: Checkpoint | None) -> list[str]:
    """The provenance against itself and, where its files are intact, against the tensors."""
    twin_id = provenance.twin_id(
        said["source"]["files"], said["method"], said["group_size"], said.get("calibration")
    )
    fields = [
        ("sha256", provenance.own_digest(said), said["sha256"]),
        ("engine.name", "pyengine", said["engine"]["name"]),
        ("seed", SEED, said["seed"]),
        ("twin.id", twin_id, said["twin"]["id"]),
        ("twin.kind", provenance.kind_of(said), said["twin"]["kind"]),
    ]
    if checkpoint is not None:
        quantized = [t for t in checkpoint.tensors.values() if t.scales is not None]
        fields += [("group_size", all_of(t.group for t in quantized), str(said["group_size"]))]
        if "bits" in said:
            fields.append(("bits", all_of(t.type for t in quantized), f"INT{said['bits']}"))
        else:
            fields += _other_bits(quantized, mix_of(said))
    faults = [fault_of(directory, field, wanted, got) for field, wanted, got in fields if wanted != got]
    if provenance.method_of(said) is None:
        faults.append(fault_of(directory, "method", "one that this engine has", repr(said["method"])))
    return faults


def _other_bits(quantized: list[Tensor], mix: Mix) -> list[tuple[str, str, str]]:
    """[(field, wanted, got)] of the first tensor whose bits are not those that the mix gives it."""
    found = ((t.file_name, BITS[t.type], mix.bits_of(written_name(t.name))) for t in quantized)
    wrong = next((one for one in found if one[1] != one[2]), None)
    return [("mix", f"{wrong[1]} bits of {wrong[0]}", str(wrong[2]))] if wrong else []


def mix_of(said: provenance.Document) -> Mix:
    """Of a provenance that has one."""
    return Mix(tuple((pattern, bits) for pattern, bits in said["mix"]))


def all_of(values) -> str:
    return " and ".join(sorted({str(value) for value in values}))


# ---- against others --------------------------------------------------------------------------


def _compare_twins(one: _Directory, other: _Directory, result: Verification) -> None:
    """The same source and method, and the other number of bits."""
    mine, others = one.said, other.said
    if not provenance.is_same_origin(mine, others):
        wanted, got = f"the source and method of {one.path}", f"another: twin {others['twin']['id']}"
        result.faults.append(f"{other.path}: want {wanted}, got {got}")
    elif _bits(others) == _bits(mine):
        field = "mix" if "mix" in mine else "bits"
        wanted = f"the other number of bits than {mine[field]}, as the twin of {one.path}"
        result.faults.append(fault_of(other.path, field, wanted, others[field]))
    elif one.current and other.current:
        result.checked.append(f"{other.path}: the twin of {one.path}: the same source and method")


def _bits(said: provenance.Document) -> int | Mix:
    return mix_of(said) if "mix" in said else int(said["bits"])


def _compare_source(made: list[_Directory], source, calibration, result: Verification) -> None:
    """What the provenance says of the source, and, of the right source, what it gives."""
    checkpoint = open_source(source)
    with progress(checkpoint.file.size, "hash the source") as bar:
        files = [provenance.describe_file(path, bar.update) for path in checkpoint.source_files]
    again = []
    for one in made:
        fault = _another_source(one, source, files)
        if fault:
            result.faults.append(fault)
            result.not_checked.append(f"{one.path}: its tensors against the source, which is another")
            continue
        types, noted = checkpoint.summary.parameter_types, one.said["source"]["tensor_types"]
        if types != noted:
            result.faults.append(fault_of(one.path, "source.tensor_types", f"{types} as {source}", noted))
        parameters = _plan_again(checkpoint, one.said)
        if parameters is None:
            result.not_checked.append(f"{one.path}: its tensors against the source: no such method")
        elif provenance.method_of(one.said) not in CALIBRATED:
            again.append((one, parameters))
        elif calibration is None:
            wanted = "that needs the statistics (--calibration)"
            result.not_checked.append(f"{one.path}: its tensors against the source: {wanted}")
        elif _other_statistics(one, calibration, result) is None:
            again.append((one, parameters))
    for (one, _), digests in zip(again, _digests_of_source(checkpoint, again, calibration) if again else []):
        faults = compare(one.path, one.said["tensors"], digests, "the source gives")
        result.faults += few(one.path, faults, 3)
        if not faults:
            counts = f"{len(files)} source file{'s'[: len(files) > 1]}, {len(digests)} tensors that it gives"
            result.checked.append(f"{one.path}: as {source} gives it: {counts}")


def _other_statistics(one: _Directory, calibration, result: Verification) -> str | None:
    """The digest of statistics that are not those that were noted, which is a fault; None: they are."""
    found = provenance.describe_file(Path(calibration))["sha256"]
    noted = one.said.get("calibration", {}).get("sha256")
    if found == noted:
        return None
    result.faults.append(fault_of(one.path, "calibration.sha256", f"{found} as {calibration}", noted))
    return str(found)


def _another_source(one: _Directory, source, files: list[dict]) -> str | None:
    """The first thing in which the files of the source differ from those that were noted."""
    noted = one.said["source"]["files"]
    if len(noted) != len(files):
        return fault_of(one.path, "source.files", f"{len(files)} files as {source}", len(noted))
    for key in ("sha256", "size"):
        for i, (was, now) in enumerate(zip(noted, files)):
            if was[key] != now[key]:
                wanted = f"{now[key]} as {source}"
                got = f"{was[key]} of {was['name']}: another source"
                return fault_of(one.path, f"source.files[{i}].{key}", wanted, got)
    return None


def _plan_again(checkpoint: Checkpoint, said: provenance.Document) -> list[PlannedParameter] | None:
    """None: by a method, bits or a mix that this engine, or this source, does not have."""
    if provenance.method_of(said) is None or ("bits" in said and said["bits"] not in BITS.values()):
        return None
    try:
        return plan(checkpoint, _bits(said), said["group_size"])
    except InputError:
        return None


def _digests_of_source(
    checkpoint: Checkpoint, made: list[tuple[_Directory, list[PlannedParameter]]], calibration
) -> list[dict[str, str]]:
    """{tensor: sha256} for each directory, quantized again: directories of one method in one pass."""
    ways: dict[QuantizeOptions, list[Target]] = {}
    sinks = [DigestSink() for _ in made]
    for (one, parameters), sink in zip(made, sinks):
        options = QuantizeOptions(one.said["group_size"], provenance.method_of(one.said))
        ways.setdefault(options, []).append(Target(parameters, sink))
    total = sum(p.nbytes for targets in ways.values() for target in targets for p in target.parameters)
    with progress(total, "quantize again") as bar:
        for options, targets in ways.items():
            path = calibration if options.scale in CALIBRATED else None
            statistics = read_statistics(path, checkpoint, options)
            run_pass(Pool(), checkpoint, statistics, options, targets, bar.update)
    return [sink.digests for sink in sinks]
