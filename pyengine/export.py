"""A quantised checkpoint in the layouts of other servers: compressed-tensors' `pack-quantized`.

For a linear NAME, [out, in] columns in groups of g:

    NAME.weight_packed   int32 [out, in * bits / 32]: 32 / bits columns a word, the first in the low
                         bits, each as code + 128 (INT4: code + 8)
    NAME.weight_scale    float32 [out, in / g]
    NAME.weight_shape    int64 [2]: out, in

A weight is code * scale, the same product as in the source, to the bit.  What differs:

* Scales are float32, which holds our float16 ones exactly.  compressed-tensors multiplies in the
  dtype of the scale, and float16 would round the product of seven bits and eleven.
* The routed experts lie apart, `mlp.experts.7.gate_proj` and its like: so vLLM and transformers
  look for them; the format has no stack.
* The router is a float32 `mlp.gate.weight` with the values of code * scale.  Its class is no Linear
  in transformers, so that compressed-tensors would not unpack it.  The same happens to whatever else
  of `FLOATS` a checkpoint has quantised; ours has the rest of them as floats already.
* A group must divide the columns, and servers have none above 128.  Where the source's does not fit,
  every linear has the smaller groups that do, with the scale of the group that they lie in.

Everything else is copied.  The architecture is transformers' own: no code travels with it.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import provenance
from .checkpoint import Checkpoint, Tensor, open_checkpoint
from .codes import GROUP
from .errors import CheckpointError, InputError
from .files.safetensors import DTYPES, INDEX_NAME, SafetensorsWriter
from .progress import progress
from .quantize import SHARD_BYTES, shard_names, shards

SMALLEST_GROUP = 32  # servers' kernels have none below
BITS = {"INT8": 8, "INT4": 4}
SOURCE_PROVENANCE = "noesis_source_provenance.json"

# Without packed weights, by the end of the name; and the linears among them as config.json has them.
FLOATS = ("embed_tokens.weight", "lm_head.weight", "in_proj_a.weight", "in_proj_b.weight",
          "mlp.gate.weight", "shared_expert_gate.weight")
IGNORE = ["lm_head", r"re:.*\.in_proj_a$", r"re:.*\.in_proj_b$", r"re:.*\.mlp\.gate$",
          r"re:.*\.shared_expert_gate$"]


class Entry(NamedTuple):
    """One tensor of the output, and the function that computes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: object  # () -> array of this dtype, any shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def export_compressed_tensors(source, destination, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write an INT8 or INT4 checkpoint directory of ours in the layout `pack-quantized`.

    destination: a new directory, written whole or not at all.  One matrix is in memory at a time.
    Errors: InputError (no quantised directory, a destination that exists), FileFormatError or
    CheckpointError of the source, CheckpointError for columns that no group of 32 or more divides.
    """
    source, destination = Path(source), Path(destination)
    checkpoint, bits = _open_quantized(source)
    _check_destination(destination)
    group = _group_size(checkpoint)
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_tensors(partial, _units(checkpoint, group), shard_bytes)
        _write_json(partial / "config.json", checkpoint.config.to_hf() | {
            "quantization_config": quantization_config(bits, group)})
        _copy_the_rest(source, partial)
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def quantization_config(bits: int, group: int) -> dict:
    """What config.json says about the weights, in compressed-tensors' words."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": group, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                                      "input_activations": None, "output_activations": None}},
        "ignore": IGNORE,
        "kv_cache_scheme": None,
    }


# ---- before anything is written --------------------------------------------------------------


def _open_quantized(source: Path) -> tuple[Checkpoint, int]:
    checkpoint = open_checkpoint(source)
    kinds = {tensor.type for tensor in checkpoint.tensors.values()} & set(BITS)
    if len(kinds) != 1:
        raise InputError(f"{source}: want a checkpoint that `pyengine quantize` wrote, INT8 or INT4, "
                         f"got {' and '.join(sorted(kinds)) or 'no such tensors'}")
    return checkpoint, BITS[kinds.pop()]


def _check_destination(destination: Path) -> None:
    if destination.exists():
        raise InputError(f"{destination}: want a directory that does not exist yet, got one that does")
    if not destination.absolute().parent.is_dir():
        raise InputError(f"{destination}: want a directory to write in, got no {destination.parent}")


def _group_size(checkpoint: Checkpoint) -> int:
    """The largest group, 128 or less, that divides the source's and every packed linear's columns."""
    packed = [tensor for tensor in checkpoint.tensors.values() if _is_packed(tensor)]
    for tensor in packed:
        if tensor.group % SMALLEST_GROUP:
            raise CheckpointError(f"{tensor.file_name}: want groups of a multiple of "
                                  f"{SMALLEST_GROUP} columns, got {tensor.group}")
        if tensor.shape[-1] % SMALLEST_GROUP:
            raise CheckpointError(f"{tensor.file_name}: want a multiple of {SMALLEST_GROUP} columns, "
                                  f"the smallest group of the layout, got {tensor.shape[-1]}")
    return math.gcd(GROUP, *(n for tensor in packed for n in (tensor.group, tensor.shape[-1])))


def _is_packed(tensor: Tensor) -> bool:
    return tensor.type in BITS and not tensor.name.endswith(FLOATS)


# ---- what is written -------------------------------------------------------------------------


def _units(checkpoint: Checkpoint, group: int) -> list[tuple[Entry, ...]]:
    """Every tensor of the output, those of one linear together, in the order of the forward pass."""
    units = []
    for name, tensor in checkpoint.tensors.items():
        if name == "lm_head.weight" and checkpoint.config.tie_word_embeddings:
            continue
        units += _units_of(name, tensor, group)
    return units


def _units_of(name: str, tensor: Tensor, group: int) -> list[tuple[Entry, ...]]:
    if tensor.type not in BITS:
        return [(Entry(name, tensor.type, tensor.shape, lambda: tensor.data),)]
    if not _is_packed(tensor):
        return [(Entry(name, "F32", tensor.shape, tensor.stored_float32),)]
    if len(tensor.shape) == 2:
        return [_packed(name.removesuffix(".weight"), tensor, None, group)]
    stem, part = name.rsplit(".", 1)
    return [_packed(f"{stem}.{expert}.{part}", tensor, expert, group)
            for expert in range(tensor.shape[0])]


def _packed(name: str, tensor: Tensor, expert: int | None, group: int) -> tuple[Entry, ...]:
    rows, cols = tensor.shape[-2:]
    index = ... if expert is None else expert
    return (
        Entry(f"{name}.weight_packed", "I32", (rows, cols * BITS[tensor.type] // 32),
              lambda: pack_words(tensor.data[index])),
        Entry(f"{name}.weight_scale", "F32", (rows, cols // group),
              lambda: scales_of_groups(tensor.scales[index], cols, tensor.group, group)),
        Entry(f"{name}.weight_shape", "I64", (2,), lambda: np.array([rows, cols], np.int64)),
    )


def pack_words(codes: np.ndarray) -> np.ndarray:
    """int8 [rows, cols], or our INT4's uint8 [rows, cols / 2] -> int32 [rows, cols * bits / 32].

    Our INT4 bytes are the layout's own, four to a word.  INT8's code + 128 is the code with its
    sign bit turned over.
    """
    stored = np.ascontiguousarray(codes)
    if stored.dtype == np.int8:
        stored = stored.view(np.uint8) ^ np.uint8(0x80)
    return stored.view("<i4")


def scales_of_groups(scales: np.ndarray, cols: int, stored: int, group: int) -> np.ndarray:
    """float16 [groups of `stored`, rows] -> float32 [rows, cols / group]; group divides both."""
    repeated = np.repeat(scales.T.astype(np.float32), stored // group, axis=1)
    return repeated[:, : cols // group]


def _write_tensors(directory: Path, units, shard_bytes: int) -> None:
    files = shards(units, shard_bytes)
    names = shard_names(len(files))
    total = sum(entry.nbytes for unit in units for entry in unit)
    with progress(total, "export") as bar:
        for name, shard in zip(names, files):
            entries = [entry for unit in shard for entry in unit]
            with SafetensorsWriter(directory / name, [entry[:3] for entry in entries],
                                   {"format": "pt"}) as writer:
                for entry in entries:
                    writer.write(entry.name, entry.values())
                    bar.update(entry.nbytes)
    if len(files) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, files)
                      for unit in shard for entry in unit}
        _write_json(directory / INDEX_NAME,
                    {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_the_rest(source: Path, directory: Path) -> None:
    """Tokenizer, chat template, generation_config.json, whatever else a user put there; no code.

    The provenance speaks of the source's tensors, and goes by a name that says so.
    """
    for path in sorted(source.iterdir()):
        if (not path.is_file() or path.suffix in (".safetensors", ".py", ".gguf")
                or path.name in ("config.json", INDEX_NAME)):
            continue
        name = SOURCE_PROVENANCE if path.name == provenance.FILE_NAME else path.name
        shutil.copyfile(path, directory / name)


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
