"""A checkpoint to its symmetric INT8 and INT4 twins, in one pass.

The source's rows are dequantised, put into Hugging Face's order and quantised a few at a time, for
both twins, and each twin's files are written front to back: memory does not grow with the model.
The rule is `codes.py`'s; the C core computes it.

A directory appears whole or not at all: it is written as DIR.partial and renamed.  A run that was
killed leaves DIR.partial behind, and the next one with the same source continues after its last
complete file, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np

from . import hf, ops, provenance
from .checkpoint import Checkpoint, Spec, Tensor, model_specs, open_checkpoint
from .codes import GROUP, LARGEST, SCALES, to_bfloat16
from .config import read_json
from .decoder.linear import as_matrix
from .errors import CheckpointError, FileFormatError, InputError, PyengineError
from .files.safetensors import SafetensorsFile, SafetensorsWriter
from .progress import progress
from .sampling import checkpoint_settings, to_generation_config
from .tokenizer import export_tokenizer

SHARD_BYTES = 4 << 30
PIECE_BYTES = 2 << 20  # codes computed at a time
PIECES_BEHIND = 32  # at most, of each twin, computed and not yet written


# ---- what is written -------------------------------------------------------------------------


class Entry(NamedTuple):
    """One tensor of the output: its name, safetensors dtype and shape, and where it comes from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]  # more than one: stacked along the rows of each expert

    @property
    def nbytes(self) -> int:
        size = {"I8": 1, "U8": 1, "F16": 2, "BF16": 2, "F32": 4}[self.dtype]
        return int(np.prod(self.shape)) * size


Unit = tuple[Entry, ...]  # one parameter: its codes and its scales, or one plain tensor

# Too small, or too sensitive, to be worth fewer bits.
_BF16 = ("embed_tokens.weight", "lm_head.weight", "in_proj_a.weight", "in_proj_b.weight")


def plan(checkpoint: Checkpoint, bits: int, group: int = GROUP) -> list[Unit]:
    """Every tensor of a twin, in the order of the forward pass."""
    return [_unit(spec, checkpoint.tensors, bits, group) for spec in model_specs(checkpoint.config)
            if not spec.name.endswith("mlp.experts.up_proj")]  # written with gate_proj


def _unit(spec: Spec, tensors: dict[str, Tensor], bits: int, group: int) -> Unit:
    tensor = tensors[spec.name]
    if not spec.linear or spec.name.endswith("shared_expert_gate.weight"):
        return (Entry(spec.name, "F32", spec.shape, (tensor,)),)
    if spec.name.endswith(_BF16):
        return (Entry(spec.name, "BF16", spec.shape, (tensor,)),)
    name, sources, mark = spec.name, (tensor,), f"i{bits}"
    *stack, rows, cols = spec.shape
    if stack:
        mark = f"q{bits}"
    if name.endswith("experts.gate_proj"):
        name = name.removesuffix("gate_proj") + "gate_up_proj"
        sources = (tensor, tensors[spec.name.removesuffix("gate_proj") + "up_proj"])
        rows *= 2
    width, dtype = (cols, "I8") if bits == 8 else (cols // 2, "U8")
    if bits == 4 and cols % 2:
        raise CheckpointError(f"{tensor.file_name}: want an even number of columns, got {cols}")
    return (Entry(f"{name}_{mark}", dtype, (*stack, rows, width), sources),
            Entry(f"{name}_scale_{mark}", "F16", (*stack, -(-cols // group), rows), sources))


def shards(units: list[Unit], limit: int) -> list[list[Unit]]:
    """The units in order, in files of at most limit bytes (or one unit)."""
    files, size = [[]], 0
    for unit in units:
        nbytes = sum(entry.nbytes for entry in unit)
        if files[-1] and size + nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(unit)
        size += nbytes
    return files


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


# ---- a twin being written --------------------------------------------------------------------


METHODS = {  # as the provenance says them
    "absmax": "symmetric, absmax / largest code as float16, nearest code, ties to even",
    "mse": "symmetric, float16 scale of least squared error, nearest code, ties to even",
}


@dataclass
class Options:
    """What decides the bytes, beside the source."""

    group_size: int = GROUP
    scale: str = "absmax"
    shard_bytes: int = SHARD_BYTES

    @property
    def method(self) -> str:
        return METHODS[self.scale]


class Twin:
    """One directory: its files are opened, filled in order and closed as the pass goes on."""

    def __init__(self, checkpoint: Checkpoint, bits: int, directory: Path, options: Options):
        self.bits, self.largest = bits, LARGEST[bits]
        self.directory = directory
        self.partial = directory.with_name(directory.name + ".partial")
        self.units = plan(checkpoint, bits, options.group_size)
        self.files = shards(self.units, options.shard_bytes)
        self.names = shard_names(len(self.files))
        self.nbytes = sum(entry.nbytes for unit in self.units for entry in unit)
        self.digests: dict[str, dict[str, str]] = {}  # file: {tensor: sha256}, complete files only
        self.identity = _identity(checkpoint, bits, options)
        self.writer: SafetensorsWriter | None = None
        self._file_of = {unit[0].name: name for name, shard in zip(self.names, self.files)
                         for unit in shard}

    # -- beginning --

    def prepare(self) -> None:
        """Make DIR.partial, or take over the complete files of a run that was killed."""
        complete = self._read_log()
        if complete is not None:
            self.digests = {name: digests for name, digests in complete.items()
                            if name in self.names and _is_intact(self.partial / name, digests)}
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()

    def _read_log(self) -> dict[str, dict[str, str]] | None:
        """What an earlier run of the same noted down, or None; a log that cannot be read is none."""
        try:
            said = read_json(self.partial / _LOG)
        except FileFormatError:
            return None
        files = said.get("files")
        if said.get("identity") != self.identity or not isinstance(files, dict):
            return None
        return {name: digests for name, digests in files.items() if isinstance(digests, dict)}

    # -- the pass --

    def wants(self, unit: Unit) -> bool:
        return self._file_of[unit[0].name] not in self.digests

    def write(self, name: str, array: np.ndarray) -> None:
        self.writer.write(name, array)

    def begin(self, unit: Unit) -> None:
        """Open the unit's file if it is the first in it."""
        if self.writer is None:
            name = self._file_of[unit[0].name]
            shard = self.files[self.names.index(name)]
            entries = [(e.name, e.dtype, e.shape) for u in shard for e in u]
            self.writer = SafetensorsWriter(self.partial / name, entries, {"format": "pt"})

    def end(self, unit: Unit) -> None:
        """Close the unit's file if it is the last in it, and note it down."""
        name = self._file_of[unit[0].name]
        if unit[0].name != self.files[self.names.index(name)][-1][0].name:
            return
        self.writer.close()
        self.digests[name] = self.writer.sha256
        self.writer = None
        _write_json(self.partial / _LOG, {"identity": self.identity, "files": self.digests})

    # -- the end --

    def abort(self, keep: bool) -> None:
        """keep: complete files stay, for a run that continues."""
        if self.writer is not None:
            self.writer.abort()
        if not keep:
            shutil.rmtree(self.partial, ignore_errors=True)

    def complete(self, checkpoint: Checkpoint, options: Options, sources: list[dict]) -> None:
        """Everything but the tensors, on the disk."""
        directory, config = self.partial, checkpoint.config
        weight_map = {tensor: name for name in self.names for tensor in self.digests[name]}
        if len(self.files) > 1:
            _write_json(directory / "model.safetensors.index.json",
                        {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map})
        _write_json(directory / "config.json", config.to_hf() | {
            **_AUTO_CLASSES, "pyengine_bits": self.bits,
            "pyengine_group_size": options.group_size, "pyengine_dequantize": "exact"})
        shutil.copyfile(_MODELING, directory / _MODELING.name)
        _write_json(directory / "generation_config.json", {
            "eos_token_id": list(config.eos_token_ids) or None,
            "pad_token_id": config.pad_token_id, **to_generation_config(checkpoint_settings(checkpoint))})
        _copy_tokenizer(checkpoint, directory)
        digests = {tensor: self.digests[name][tensor] for tensor, name in weight_map.items()}
        (directory / _LOG).unlink(missing_ok=True)
        _write_json(directory / provenance.FILE_NAME, provenance.describe(
            sources, checkpoint, options.method, options.group_size, self.bits, digests,
            provenance.digests_of_files(directory)))
        for path in directory.iterdir():  # or the renamed directory could hold empty files
            _sync(path)

    def publish(self) -> None:
        """DIR.partial becomes DIR."""
        self.partial.rename(self.directory)


_LOG = "complete_files.json"

# For transformers: its classes are in the file that is copied beside the tensors.  No
# `quantization_config`: transformers would skip an unknown method with a log line.
_MODELING = Path(hf.__file__).with_name("modeling_pyengine.py")
_AUTO_CLASSES = {
    "architectures": ["PyengineForCausalLM"],
    "model_type": "pyengine_qwen3_5_moe",
    "auto_map": {"AutoConfig": "modeling_pyengine.PyengineConfig",
                 "AutoModelForCausalLM": "modeling_pyengine.PyengineForCausalLM"},
}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
                    "merges.txt", "special_tokens_map.json", "added_tokens.json")


def _copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    if checkpoint.kind == "directory":
        for name in _TOKENIZER_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, directory / name)
    elif "tokenizer.ggml.model" in checkpoint.file.metadata:
        export_tokenizer(checkpoint.file, directory)


def _identity(checkpoint: Checkpoint, bits: int, options: Options) -> str:
    """What a run must share with the one that it continues; cheap, and no proof of equal bytes."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
             for path in checkpoint.source_files]
    said = [provenance.engine_version(), files, bits, options.group_size, options.scale,
            options.shard_bytes]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _is_intact(path: Path, digests: dict[str, str]) -> bool:
    """Whether a file that an earlier run completed still has the bytes it wrote."""
    try:
        tensors = SafetensorsFile.open(path).tensors
    except FileFormatError:
        return False
    return set(tensors) == set(digests) and all(
        hashlib.sha256(tensors[name].data.reshape(-1).view(np.uint8)).hexdigest() == digest
        for name, digest in digests.items())


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_json(path: Path, value) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".new")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


# ---- the pass --------------------------------------------------------------------------------


def _submit(executor, function, *arguments):
    try:
        return executor.submit(function, *arguments)
    except RuntimeError as error:  # no memory for its stack, or too many
        raise PyengineError(f"threads: one more could not be started: {error}") from None


class _Behind:
    """Runs calls in their order on a thread of its own, a few behind the caller.

    What a call raises is raised by the next one, or by `wait`; those between are not made.
    """

    def __init__(self):
        self._executor, self._pending, self._failed = ThreadPoolExecutor(1), deque(), False

    def __call__(self, function, *arguments) -> None:
        if len(self._pending) == PIECES_BEHIND:
            self._pending.popleft().result()
        self._pending.append(_submit(self._executor, self._run, function, arguments))

    def wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def stop(self) -> None:
        """Make no more calls, and be sure that none is being made."""
        self._failed = True
        self._executor.shutdown()

    def _run(self, function, arguments):
        if self._failed:
            return
        try:
            function(*arguments)
        except BaseException:
            self._failed = True
            raise


class Pass:
    """Reads each parameter once and hands every twin its codes.

    Meanwhile a thread of each twin's own hashes and writes its files.
    """

    def __init__(self, pool: ops.Pool, options: Options, advance):
        self.pool, self.options, self.advance = pool, options, advance

    def run(self, twins: list[Twin]) -> None:
        self.behind = {twin: _Behind() for twin in twins}
        try:
            self._run(twins)
            for behind in self.behind.values():
                behind.wait()
        finally:
            for behind in self.behind.values():
                behind.stop()

    def _run(self, twins: list[Twin]) -> None:
        for units in zip(*(twin.units for twin in twins)):
            wanted = [(twin, unit) for twin, unit in zip(twins, units) if twin.wants(unit)]
            for twin, unit in zip(twins, units):
                if not twin.wants(unit):
                    self.advance(sum(entry.nbytes for entry in unit))
            for twin, unit in wanted:
                self.behind[twin](twin.begin, unit)
            if wanted:
                self._parameter(wanted)
            for twin, unit in wanted:
                self.behind[twin](twin.end, unit)

    def _write(self, twin: Twin, name: str, array: np.ndarray) -> None:
        self.behind[twin](twin.write, name, array)
        self.advance(array.nbytes)

    def _parameter(self, wanted) -> None:
        _, unit = wanted[0]
        if len(unit) == 1:
            for values in self._plain_values(unit[0]):
                for twin, (entry,) in wanted:
                    self._write(twin, entry.name, values)
            return
        experts = range(unit[0].shape[0]) if len(unit[0].shape) == 3 else [None]
        scales = {twin: [] for twin, _ in wanted}
        for expert in experts:
            for twin, of_expert in self._expert(wanted, expert).items():
                scales[twin].append(of_expert)
        for twin, (_, entry) in wanted:
            for of_expert in scales[twin]:
                self._write(twin, entry.name, of_expert)

    def _expert(self, wanted, expert) -> dict[Twin, np.ndarray]:
        """Writes the codes of one matrix; -> its scales [n_groups, rows] for each twin."""
        parts = {twin: [] for twin, _ in wanted}
        for tensor in wanted[0][1][0].sources:
            rows, cols = tensor.shape[-2:]
            step = max(1, PIECE_BYTES // cols)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                for twin, (codes_entry, _) in wanted:
                    codes, scales = quantize_rows(self.pool, tensor, expert, start, stop,
                                                  twin.largest, self.options)
                    if twin.bits == 4:
                        with self.pool.lock:
                            codes = ops.pack_int4(self.pool, codes)
                    self._write(twin, codes_entry.name, codes)
                    parts[twin].append(scales)
        return {twin: np.ascontiguousarray(np.concatenate(part).T) for twin, part in parts.items()}

    def _plain_values(self, entry: Entry):
        """The tensor's bytes, piece by piece: bfloat16 as uint16, or float32."""
        (tensor,) = entry.sources
        if entry.dtype == "F32":
            values = tensor.float64().astype(np.float32)
            _check_finite(values, tensor)
            yield values
            return
        rows, cols = tensor.shape
        step = max(1, PIECE_BYTES // cols)
        for start in range(0, rows, step):
            values = tensor.rows_float32(None, start, min(start + step, rows))
            _check_finite(values, tensor)
            yield to_bfloat16(values)


def quantize_rows(pool: ops.Pool, tensor: Tensor, expert: int | None, start: int, stop: int,
                  largest: int, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Rows [start, stop), in Hugging Face's order, of a matrix or of one expert's -> codes int8
    [rows, cols], scales float16 [rows, n_groups].

    Errors: CheckpointError naming the row and group of a value that is not finite, or too great.
    """
    try:
        with pool.lock:
            return ops.quantize_weights(pool, as_matrix(tensor, expert), tensor.row_order,
                                        tensor.col_order, start, stop, largest, options.group_size,
                                        options.scale)
    except ops.NonFiniteError:
        raise _name_nonfinite(tensor, expert, start, stop, options.group_size) from None


def _check_finite(values, tensor):
    if not np.isfinite(values).all():
        raise CheckpointError(f"{tensor.file_name}: want finite values, got NaN or infinity")


def _name_nonfinite(tensor, expert, start, stop, group):
    x = tensor.rows_float32(expert, start, stop)
    where = "" if expert is None else f"expert {expert}, "
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        row, col = (int(i) for i in bad[0])
        return CheckpointError(f"{tensor.file_name}: {where}row {start + row}, group {col // group}: "
                               "want finite values, got NaN or infinity")
    row, col = (int(i) for i in np.unravel_index(int(np.abs(x).argmax()), x.shape))
    return CheckpointError(f"{tensor.file_name}: {where}row {start + row}, group {col // group}: "
                           f"want a scale in float16's range, got the value {x[row, col]:g}")


# ---- the whole -------------------------------------------------------------------------------


def quantize(source, int8=None, int4=None, *, group_size: int = GROUP, scale: str = "absmax",
             threads: int | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the INT8 and / or INT4 checkpoint of a GGUF or a Hugging Face directory.

    int8, int4   new directories, written whole or not at all
    group_size   columns that share a scale, an even number; the locked arithmetic runs groups of 128
                 only, float64 and transformers run any
    scale        "absmax", or "mse": the float16 scale of least squared error
    Errors: InputError (an option, a destination that exists), FileFormatError or CheckpointError of
    the source, naming tensor, row and group of a value that is not finite.
    """
    options = checked_options(group_size, scale, shard_bytes)
    wanted = [(bits, Path(directory)) for bits, directory in ((8, int8), (4, int4))
              if directory is not None]
    _check_destinations([directory for _, directory in wanted])
    checkpoint = open_source(source)
    twins = [Twin(checkpoint, bits, directory, options) for bits, directory in wanted]
    try:
        for twin in twins:
            twin.prepare()
        total = sum(twin.nbytes for twin in twins) + checkpoint.file.size
        with progress(total, "quantize") as bar, ThreadPoolExecutor(1) as beside:
            # What the pass reads is in memory for a while: so near it, the hash is no second reading.
            stop = Event()
            hashing = _submit(beside, _describe_sources, checkpoint, bar.update, stop)
            try:
                Pass(ops.Pool(threads), options, bar.update).run(twins)
                sources = hashing.result()
            finally:
                stop.set()
        checkpoint.file.check_unchanged()
        for twin in twins:
            twin.complete(checkpoint, options, sources)
        for twin in twins:
            twin.publish()
    except (KeyboardInterrupt, OSError):  # a disk that is full, a user who will come back
        for twin in twins:
            twin.abort(keep=True)
        raise
    except BaseException:
        for twin in twins:
            twin.abort(keep=False)
        raise


def _describe_sources(checkpoint: Checkpoint, advance, stop: Event) -> list[dict]:
    def step(nbytes):
        if stop.is_set():
            raise InterruptedError
        advance(nbytes)

    return [provenance.describe_file(path, step, mapped)
            for path, mapped in zip(checkpoint.source_files, checkpoint.file.maps)]


def checked_options(group_size, scale, shard_bytes=SHARD_BYTES) -> Options:
    if not isinstance(group_size, int) or not 2 <= group_size <= provenance.MAX_GROUP or group_size % 2:
        raise InputError(f"group size: want an even number from 2 on, got {group_size!r}")
    if scale not in SCALES:
        raise InputError(f"scale: want {' or '.join(SCALES)}, got {scale!r}")
    return Options(group_size, scale, shard_bytes)


def _check_destinations(directories: list[Path]) -> None:
    if not directories:
        raise InputError("destination: want --int8 DIR, --int4 DIR or both, got none")
    if len({directory.absolute() for directory in directories}) < len(directories):
        raise InputError(f"{directories[0]}: want two directories, got one twice")
    for directory in directories:
        if directory.exists():
            raise InputError(f"{directory}: want a directory that does not exist yet, "
                             "got one that does")
        if not directory.absolute().parent.is_dir():
            raise InputError(f"{directory}: want a directory to write in, got no {directory.parent}")


def open_source(source) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    for tensor in checkpoint.tensors.values():
        if tensor.type in ("INT8", "INT4"):
            raise InputError(f"{source}: want floats or a GGUF, got a checkpoint that is quantised: "
                             f"{tensor.file_name}")
    return checkpoint
