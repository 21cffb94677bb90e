"""A checkpoint to its symmetric INT8 twin: groups of 128 columns, one float16 scale each.

The rule, for one group x of n <= 128 values and M = 127:

    amax = max |x|;  amax = 0: s = 0 and every code 0
    s = the float16 nearest to amax / M, or the smallest positive one where that is 0; the next
        float16 up if amax / s would round to more than M (only subnormal scales are that coarse)
    q = x / s rounded to the nearest integer, ties to even

The stored scale divides, nothing clips, and |x - q s| <= s / 2.  amax / M and x / s are computed in
float64, where no quotient of a float32 comes so near a tie that it would be rounded onto it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import provenance
from .checkpoint import GROUP, Checkpoint, Spec, Tensor, model_specs, open_checkpoint
from .errors import CheckpointError, InputError
from .files.safetensors import SafetensorsWriter
from .progress import progress
from .tokenizer import export_tokenizer

METHOD = "symmetric, absmax / largest code as float16, nearest code, ties to even"
SHARD_BYTES = 4 << 30
PIECE_VALUES = 1 << 22  # float32 values held at a time

_HALF_INFINITY = np.float16(np.inf)


# ---- the rule --------------------------------------------------------------------------------


def group_scales(x: np.ndarray, largest: int = 127) -> np.ndarray:
    """x float32 [rows, cols] -> float16 [rows, n_groups].  InputError beyond float16's range."""
    magnitude = np.abs(x)
    starts = np.arange(0, x.shape[1], GROUP)
    amax = np.maximum.reduceat(magnitude, starts, axis=1).astype(np.float64)
    with np.errstate(over="ignore"):
        scales = (amax / largest).astype(np.float16)
    scales = np.where((scales == 0) & (amax > 0), np.float16(2.0**-24), scales)
    divisor = np.where(scales == 0, np.float16(1), scales).astype(np.float64)
    clips = np.rint(amax / divisor) > largest
    scales = np.where(clips, np.nextafter(scales, _HALF_INFINITY), scales)
    if np.isinf(scales).any():
        raise InputError(f"a group's largest value {amax.max():g} wants a scale beyond float16's range")
    return scales


def quantize_groups(x: np.ndarray, largest: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """x float32 [rows, cols], finite -> codes int8 [rows, cols], scales float16 [rows, n_groups]."""
    scales = group_scales(x, largest)
    per_column = np.repeat(np.where(scales == 0, np.float16(1), scales), GROUP, axis=1)
    codes = np.rint(x / per_column[:, : x.shape[1]].astype(np.float64)).astype(np.int8)
    return codes, scales


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits of the nearest bfloat16, ties to even; x finite."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


# ---- what is written -------------------------------------------------------------------------


class Entry(NamedTuple):
    """One tensor of the output: its name, safetensors dtype and shape, and where it comes from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]  # more than one: stacked along the rows of each expert

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * {"I8": 1, "F16": 2, "BF16": 2, "F32": 4}[self.dtype]


# Too small, or too sensitive, to be worth fewer bits.
_BF16 = ("embed_tokens.weight", "lm_head.weight", "in_proj_a.weight", "in_proj_b.weight")


Unit = tuple[Entry, ...]  # one parameter: its codes and scales, or one plain tensor


def plan(checkpoint: Checkpoint) -> list[Unit]:
    """Every tensor of the INT8 twin, in the order of the file."""
    return [_unit(spec, checkpoint.tensors) for spec in model_specs(checkpoint.config)
            if not spec.name.endswith("mlp.experts.up_proj")]  # written with gate_proj


def _unit(spec: Spec, tensors: dict[str, Tensor]) -> Unit:
    tensor = tensors[spec.name]
    if not spec.linear or spec.name.endswith("shared_expert_gate.weight"):
        return (Entry(spec.name, "F32", spec.shape, (tensor,)),)
    if spec.name.endswith(_BF16):
        return (Entry(spec.name, "BF16", spec.shape, (tensor,)),)
    if len(spec.shape) == 2:
        rows, cols = spec.shape
        return (Entry(f"{spec.name}_i8", "I8", spec.shape, (tensor,)),
                Entry(f"{spec.name}_scale_i8", "F16", (_groups(cols), rows), (tensor,)))
    name, sources = spec.name, (tensor,)
    if name.endswith("gate_proj"):
        name = name.removesuffix("gate_proj") + "gate_up_proj"
        sources = (tensor, tensors[spec.name.removesuffix("gate_proj") + "up_proj"])
    experts, rows, cols = spec.shape
    rows *= len(sources)
    return (Entry(f"{name}_q8", "I8", (experts, rows, cols), sources),
            Entry(f"{name}_scale_q8", "F16", (experts, _groups(cols), rows), sources))


def _groups(cols: int) -> int:
    return -(-cols // GROUP)


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


# ---- one tensor at a time --------------------------------------------------------------------


def pieces(tensor: Tensor, expert: int | None):
    """The values of one matrix, float32 [some rows, cols], in Hugging Face's order, piece by piece.

    Errors: CheckpointError naming tensor, row and group of a NaN or infinity.
    """
    rows, cols = tensor.shape[-2:]
    step = max(1, PIECE_VALUES // cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        wanted = slice(start, stop) if tensor.row_order is None else tensor.row_order[start:stop]
        x = tensor.stored_float32(expert, wanted)
        if tensor.col_order is not None:
            x = x[:, tensor.col_order]
        bad = ~np.isfinite(x)
        if bad.any():
            row, col = (int(i) for i in np.argwhere(bad)[0])
            raise CheckpointError(f"{tensor.file_name}: row {start + row}, group {col // GROUP}: "
                                  "want finite values, got NaN or infinity")
        yield x


def _write_quantized(writer, codes: Entry, scales: Entry, advance) -> None:
    experts = range(codes.shape[0]) if len(codes.shape) == 3 else [None]
    kept = []  # 1/64 of the codes' bytes: the scales wait until the codes are written
    for expert in experts:
        of_expert = []
        for tensor in codes.sources:
            for x in pieces(tensor, expert):
                q, s = quantize_groups(x)
                writer.write(codes.name, q)
                of_expert.append(s)
                advance(q.nbytes)
        kept.append(np.concatenate(of_expert).T)  # [n_groups, rows]
    for s in kept:
        writer.write(scales.name, np.ascontiguousarray(s))
        advance(s.nbytes)


def _write_plain(writer, entry: Entry, advance) -> None:
    (tensor,) = entry.sources
    if entry.dtype == "BF16":
        for x in pieces(tensor, None):
            writer.write(entry.name, to_bfloat16(x))
            advance(2 * x.size)
        return
    values = tensor.float64().astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{tensor.file_name}: want finite values, got NaN or infinity")
    writer.write(entry.name, values)
    advance(values.nbytes)


def _write_shard(path: Path, units: list[Unit], advance) -> dict[str, str]:
    """-> {tensor name: sha256 of its bytes}"""
    entries = [(e.name, e.dtype, e.shape) for unit in units for e in unit]
    with SafetensorsWriter(path, entries, {"format": "pt"}) as writer:
        for unit in units:
            if len(unit) == 2:
                _write_quantized(writer, *unit, advance)
            else:
                _write_plain(writer, *unit, advance)
    return writer.sha256


# ---- the whole -------------------------------------------------------------------------------


def quantize(source, int8, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the INT8 checkpoint of a GGUF to the new directory int8, whole or not at all.

    Errors: InputError (the destination exists), FileFormatError or CheckpointError of the source,
    naming tensor, row and group of a value that is not finite.
    """
    destination = Path(int8)
    if destination.exists():
        raise InputError(f"{destination}: want a directory that does not exist yet, got one that does")
    if not destination.absolute().parent.is_dir():
        raise InputError(f"{destination}: want a directory to write in, got no {destination.parent}")
    checkpoint = open_checkpoint(source)
    if checkpoint.kind != "gguf":
        raise InputError(f"{source}: want a GGUF file, got a directory")
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _write_directory(checkpoint, partial, shard_bytes)
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_directory(checkpoint: Checkpoint, directory: Path, shard_bytes: int) -> None:
    units = plan(checkpoint)
    files = shards(units, shard_bytes)
    total = sum(entry.nbytes for unit in units for entry in unit)
    digests, weight_map = {}, {}
    with progress(total + checkpoint.file.size, "quantize") as bar:
        for name, shard in zip(_shard_names(len(files)), files):
            written = _write_shard(directory / name, shard, bar.update)
            digests |= written
            weight_map |= dict.fromkeys(written, name)
        sources = [provenance.describe_file(path, bar.update) for path in checkpoint.file.paths]
    if len(files) > 1:
        _write_json(directory / "model.safetensors.index.json",
                    {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(directory / "config.json", checkpoint.config.to_hf() | {
        "quantization_config": {"quant_method": "pyengine", "bits": 8, "group_size": GROUP,
                                "symmetric": True}})
    _write_json(directory / "generation_config.json", {
        "eos_token_id": list(checkpoint.config.eos_token_ids) or None,
        "pad_token_id": checkpoint.config.pad_token_id, "do_sample": False})
    if "tokenizer.ggml.model" in checkpoint.file.metadata:
        export_tokenizer(checkpoint.file, directory)
    _write_json(directory / provenance.FILE_NAME, provenance.describe(
        sources, checkpoint.file, METHOD, GROUP, 8, digests))


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
