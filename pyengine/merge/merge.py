"""A configuration to a merged checkpoint: a directory of floats, or INT8 and INT4.

Each directory appears whole or not at all.  A run that was killed continues when it is repeated, to the same
bytes: see `quantizer.quantize`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import GROUP
from ..checkpoint.writer import SHARD_BYTES, CheckpointWriter, Sink, check_destinations
from ..core.processors import physical_cores
from ..core.threads import Pool
from ..errors import InputError
from ..files.strict_json import read_json
from ..files.whole import PathLike
from ..progress import progress
from ..quantizer.companions import quantized_config, write_companions
from ..quantizer.options import QuantizeOptions
from ..quantizer.plan import plan as quantized_plan
from ..quantizer.quantize_pass import Target
from ..quantizer.source_files import Described, hash_beside, identity_of
from .configuration import Configuration, parse_configuration, read_configuration
from .merge_pass import Computed, MergedTensor, Threads, write_floats, write_integers
from .plan import MergePlan
from .sources import open_models

MODEL_KEYS = ("model", "copy", "base_model", "tokenizer_source", "source")  # whose value is a model
KINDS = {"BF16": "bfloat16", "F32": "float32"}


def merge(
    configuration: PathLike,
    directory: PathLike | None = None,
    *,
    int8: PathLike | None = None,
    int4: PathLike | None = None,
    group_size: int = GROUP,
    scale: str = "absmax",
    seed: int | None = None,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Merge the models that a YAML file names.

    directory    a new directory of BF16 or F32, as the configuration says; or instead of it
    int8, int4   new directories of INT8 and INT4; group_size and scale as of `quantize`
    seed         instead of the configuration's
    Errors: InputError (an option, a destination that exists, weights that add up to zero), FileFormatError
    of the configuration or of a source, CheckpointError naming model and tensor.
    """
    said = read_configuration(Path(configuration))
    if seed is not None:
        said = with_seed(said, seed)
    destinations = _destinations(directory, int8, int4)
    options = QuantizeOptions(group_size, scale, shard_bytes)
    check_destinations(*destinations.values())
    job = MergeJob(said)
    with ExitStack() as stack:
        outputs = [Output(job, kind, options) for kind in destinations]
        writers = [
            stack.enter_context(CheckpointWriter(path, output.entries, shard_bytes, output.identity))
            for path, output in zip(destinations.values(), outputs)
        ]
        total = sum(writer.nbytes for writer in writers) + sum(c.file.size for c in job.sources)
        with progress(total, "merge") as bar, Threads(threads or physical_cores()) as pool:
            described = hash_beside(
                job.sources, bar.update, lambda: run(job, outputs, list(writers), options, pool, bar.update)
            )
        for checkpoint in job.sources:
            checkpoint.file.check_unchanged()
        for writer, output in zip(writers, outputs):
            describe = functools.partial(job.describe, described, output)
            write_companions(
                writer,
                job.plan.first,
                output.config,
                describe,
                code=output.bits is not None,
                tokenizer=job.tokenizer,
            )
        for writer in writers:
            writer.publish()


def with_seed(said: Configuration, seed: int) -> Configuration:
    """The configuration with another seed.  FileFormatError: one out of range."""
    return parse_configuration(said.document | {"seed": seed}, said.where)


def _destinations(directory: Any, int8: Any, int4: Any) -> dict[str, Path]:
    """{"floats", "int8" or "int4": path}"""
    integers = {kind: Path(path) for kind, path in (("int8", int8), ("int4", int4)) if path is not None}
    if (directory is None) == (not integers):
        raise InputError(
            "destination: want a directory, or --int8 DIR, --int4 DIR or both, got neither or all"
        )
    return integers or {"floats": Path(directory)}


class MergeJob:
    """A configuration and its models, opened, compared and planned.

    sources   the checkpoints in the order of the configuration
    """

    def __init__(self, said: Configuration):
        self.said = said
        models = open_models(said.models, said.base or said.models[0])
        self.plan = MergePlan(said, models)
        self.sources = [models[name] for name in said.models]
        self.tokenizer = models[said.tokenizer]

    def document(self) -> dict[str, Any]:
        """The configuration without paths: a model is its place in the list, a census its counts."""
        places = {name: i for i, name in enumerate(self.said.models)}
        censuses = self.plan.settings.censuses

        def plain(value: Any, key: str = "") -> Any:
            if key in ("model", "copy", "base_model") or (
                key in ("tokenizer_source", "source") and value in places
            ):
                return places[value]
            if key == "census" and isinstance(value, str):
                return [list(layer) for layer in censuses[value]]
            if isinstance(value, dict):
                return {name: plain(part, name) for name, part in value.items()}
            return [plain(part) for part in value] if isinstance(value, list) else value

        document: dict[str, Any] = plain(self.said.document)
        return document | {"seed": self.said.seed}

    def describe(
        self, files: list[Described], output: Output, tensors: dict[str, str], others: dict[str, str]
    ) -> provenance.Document:
        models = [
            {
                "name": checkpoint.path.name,
                "role": "base" if name == self.said.base else "parent",
                "files": described,
                "tensor_types": checkpoint.summary.parameter_types,
            }
            for name, checkpoint, described in zip(self.said.models, self.sources, files)
        ]
        return provenance.describe_merge(
            models, self.document(), self.said.seed, output.described, tensors, others
        )


class Output:
    """One directory of the output.

    kind      "floats", "int8" or "int4"
    bits      8, 4, or None
    entries   of each parameter
    """

    def __init__(self, job: MergeJob, kind: str, options: QuantizeOptions):
        self.job = job
        self.bits = {"int8": 8, "int4": 4}.get(kind)
        self.computed: Computed | None = None
        if self.bits is None:
            self.floats = job.plan.floats()
            self.entries = [[tensor.entry] for tensor in self.floats]
            self.described: dict[str, Any] = {"kind": KINDS[job.said.dtype]}
            self.config = _config_of_floats(job)
        else:
            job.plan.check_text_only()
            self.described = {"kind": kind, "method": options.scale, "group_size": options.group_size}
            self.parameters = quantized_plan(_as_checkpoint(job, None), self.bits, options.group_size)
            self.entries = [list(parameter.entries) for parameter in self.parameters]
            self.config = quantized_config(job.plan.first.config, self.bits, options)
        facts = [
            __version__,
            [identity_of(checkpoint) for checkpoint in job.sources],
            job.document(),
            self.described,
            options.shard_bytes,
        ]
        self.identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def run(
    job: MergeJob,
    outputs: list[Output],
    sinks: list[Sink],
    options: QuantizeOptions,
    threads: Threads,
    advance: Any,
) -> None:
    """The pass: every tensor that a sink wants goes to it."""
    if outputs[0].bits is None:
        return write_floats(outputs[0].floats, sinks[0], threads, advance)
    computed = Computed(threads)
    merged = _as_checkpoint(job, computed)
    targets = [
        Target(quantized_plan(merged, output.bits, options.group_size), sink)
        for output, sink in zip(outputs, sinks)
        if output.bits is not None
    ]
    return write_integers(targets, options, computed, Pool(threads.count), advance)


def _as_checkpoint(job: MergeJob, computed: Computed | None) -> Checkpoint:
    """The merge as `quantize` reads a checkpoint; computed: None to plan alone."""
    first = job.plan.first
    tensors: dict[str, Any] = {
        name: MergedTensor(name, first.tensors[name].shape, parts, computed)
        for name, parts in job.plan.parts.items()
    }
    return replace(first, tensors=tensors)


def _config_of_floats(job: MergeJob) -> dict[str, Any]:
    """config.json: of the directory whose other tensors are copied, its own with this dtype."""
    dtype, original = KINDS[job.said.dtype], job.plan.original
    if original is None:
        return job.plan.first.config.to_hf() | {"dtype": dtype}
    config = read_json(original.path / "config.json")
    scopes = [config, *(part for part in config.values() if isinstance(part, dict))]
    for scope in scopes:
        for key in ("dtype", "torch_dtype"):
            if key in scope:
                scope[key] = dtype
    return config | {"dtype": dtype}
