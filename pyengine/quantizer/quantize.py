"""A checkpoint to its symmetric INT8, INT4 and mixed forms, in one pass.

Each form is a directory that appears whole or not at all: it is written as DIR.partial and renamed.
A run that was killed leaves DIR.partial behind, and the next run with the same source and options
continues after its last complete file, to the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from .._version import __version__
from ..calibration.statistics import Statistics
from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import GROUP
from ..checkpoint.writer import SHARD_BYTES, CheckpointWriter, check_destinations
from ..core.threads import Pool
from ..errors import FileFormatError, InputError
from ..progress import progress
from .calibrated import read_statistics, run_pass
from .companions import quantized_config, write_companions
from .mix import ACTIVE, KINDS, Mix
from .options import QuantizeOptions, open_source
from .plan import PlannedParameter, plan
from .quantize_pass import Target
from .source_files import Described, hash_beside, identity_of

Plans = dict[str, list[PlannedParameter]]  # by kind: int8, int4, mixed


def quantize(
    source,
    int8=None,
    int4=None,
    mixed=None,
    *,
    mix: Mix | str = ACTIVE,
    group_size: int = GROUP,
    scale: str = "absmax",
    calibration=None,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_plans: Callable[[Plans], object] = lambda plans: None,
) -> None:
    """Write the INT8, INT4 and mixed checkpoints, one or more of them, of a GGUF or a Hugging Face directory.

    int8, int4, mixed   new directories, written whole or not at all
    mix          which parameters of `mixed` are INT8 and which INT4: see mix.py
    group_size   columns that share a scale, an even number; the locked arithmetic runs groups of 128
                 only, float64 and transformers run any
    on_plans     called with {kind: its plan} before anything is written
    scale        "absmax", or "mse": the float16 scale of least squared error; "weighted", "gptq" or "awq",
                 which need a calibration: see calibrated.py
    calibration  statistics that `pyengine calibrate` or llama.cpp wrote; None: there are none
    Errors: InputError (an option, a destination that exists), FileFormatError or CheckpointError of
    the source, naming tensor, row and group of a value that is not finite.
    """
    options = QuantizeOptions(group_size, scale, shard_bytes)
    directories = _given(int8, int4, mixed)
    check_destinations(*directories.values())
    bits = _bits_of_kinds(directories, mix)
    checkpoint = open_source(source)
    statistics = read_statistics(calibration, checkpoint, options)
    plans = {kind: plan(checkpoint, bits[kind], group_size) for kind in directories}
    on_plans(plans)
    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(
                CheckpointWriter(
                    directory,
                    [parameter.entries for parameter in plans[kind]],
                    shard_bytes,
                    _identity(checkpoint, bits[kind], options, statistics),
                )
            )
            for kind, directory in directories.items()
        }
        targets = [Target(plans[kind], writer) for kind, writer in writers.items()]
        total = sum(writer.nbytes for writer in writers.values()) + checkpoint.file.size
        with progress(total, "quantize") as bar:
            work = functools.partial(
                run_pass, Pool(threads), checkpoint, statistics, options, targets, bar.update
            )
            (sources,) = hash_beside([checkpoint], bar.update, work)
        checkpoint.file.check_unchanged()
        for kind, writer in writers.items():
            own = bits[kind]
            describe = _describer(sources, checkpoint, own, options, statistics)
            config = quantized_config(checkpoint.config, own, options)
            write_companions(writer, checkpoint, config, describe, code=True)
        for writer in writers.values():
            writer.publish()


def plans_of(
    source,
    int8=None,
    int4=None,
    mixed=None,
    *,
    mix: Mix | str = ACTIVE,
    group_size: int = GROUP,
    scale: str = "absmax",
) -> Plans:
    """What `quantize` would write.  Errors: its own, but for destinations, which are not looked at."""
    QuantizeOptions(group_size, scale)
    bits = _bits_of_kinds(_given(int8, int4, mixed), mix)
    checkpoint = open_source(source)
    return {kind: plan(checkpoint, own, group_size) for kind, own in bits.items()}


def written_before(
    source,
    int8=None,
    int4=None,
    mixed=None,
    *,
    mix: Mix | str = ACTIVE,
    group_size: int = GROUP,
    scale: str = "absmax",
    calibration=None,
) -> set[str]:
    """The kinds of which the directory exists, and is what `quantize` would write.

    Its provenance decides; the source is hashed for it, and the directory's tensors are not read.
    Errors: InputError, a directory that exists and is another; those of `quantize`.
    """
    options = QuantizeOptions(group_size, scale)
    directories = {kind: path for kind, path in _given(int8, int4, mixed).items() if path.exists()}
    if not directories:
        return set()
    bits = _bits_of_kinds(directories, mix)
    checkpoint = open_source(source)
    statistics = read_statistics(calibration, checkpoint, options)

    def check(sources: Described, *fields: str) -> None:
        for kind, directory in directories.items():
            wanted = _describer(sources, checkpoint, bits[kind], options, statistics)({}, {})
            said = _said(directory)
            if any(said.get(field) != wanted.get(field) for field in fields):
                check_destinations(directory)

    check([], "format", "method", "group_size", "bits", "mix", "calibration")  # quick
    with progress(checkpoint.file.size, "source") as bar:
        (sources,) = hash_beside([checkpoint], bar.update, lambda: None)
    check(sources, "twin")
    return set(directories)


def _said(directory: Path) -> provenance.Document:
    """A directory's provenance; {}: it has none."""
    try:
        return provenance.read(directory)
    except FileFormatError:
        return {}


def _describer(
    sources: Described,
    checkpoint: Checkpoint,
    bits: int | Mix,
    options: QuantizeOptions,
    statistics: Statistics | None,
) -> Callable[[dict[str, str], dict[str, str]], provenance.Document]:
    """(tensors, files), both {name: sha256} -> the provenance"""
    return functools.partial(
        provenance.describe,
        sources,
        checkpoint,
        options.scale,
        options.group_size,
        bits.rules if isinstance(bits, Mix) else bits,
        calibration=None if statistics is None else statistics.describe(),
    )


def _given(int8, int4, mixed) -> dict[str, Path]:
    """{kind: destination}"""
    given = {"int8": int8, "int4": int4, "mixed": mixed}
    directories = {kind: Path(path) for kind, path in given.items() if path is not None}
    if not directories:
        raise InputError("destination: want --int8 DIR, --int4 DIR, --mixed DIR or several, got none")
    return directories


def _bits_of_kinds(kinds: Iterable[str], mix: Mix | str) -> dict[str, int | Mix]:
    """{kind: 8, 4, or which parameters have how many}.  InputError: a mix that cannot be read."""
    mixed = Mix.parse(mix) if isinstance(mix, str) and "mixed" in kinds else mix
    return {kind: KINDS.get(kind, mixed) for kind in kinds}


def _identity(
    checkpoint: Checkpoint, bits: int | Mix, options: QuantizeOptions, statistics: Statistics | None
) -> str:
    """Identifies a run that can be continued; a cheap check, not a content hash."""
    facts = [
        __version__,
        identity_of(checkpoint),
        str(bits),
        options.group_size,
        options.scale,
        options.shard_bytes,
        None if statistics is None else statistics.sha256,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
