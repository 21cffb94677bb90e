"""A quantized checkpoint in the layout of other servers: compressed-tensors' `pack-quantized`.

For a linear NAME, [out, in] columns in groups of g:

    NAME.weight_packed   int32 [out, in * bits / 32]: 32 / bits columns per word, the first column in the
                         low bits, each as code + 128 (INT4: code + 8)
    NAME.weight_scale    float32 [out, in / g]
    NAME.weight_shape    int64 [2]: out, in

A weight is code * scale, the same product as in the source, to the bit.  The differences:

* Scales are float32, which holds our float16 ones exactly.  compressed-tensors multiplies in the
  dtype of the scale, and float16 would round the product of seven bits and eleven.
* The routed experts are separate tensors, such as `mlp.experts.7.gate_proj`: vLLM and transformers read
  those names, and the format has no stack.
* The router is a float32 `mlp.gate.weight` with the values of code * scale.  transformers does not
  implement the router as a Linear, so compressed-tensors would not unpack it.  The same holds for any
  other of `FLOATS` that a checkpoint has quantized; our checkpoints have the others as floats already.
* A group must divide the columns, and servers have no group above 128.  Where the source's group does
  not divide them, every linear has the largest smaller group that does, with the scale of the source's
  group around it.

config.json names the linears of each number of bits: "Linear" where there is one number; of a mixed
checkpoint a group for each, whose targets are patterns of names.  Those have the names of FUSED too, for
servers that fuse linears.  Such a server needs the parts to have the same bits.  The routed experts must have
one number of bits: transformers reads all of them by the first group that names experts.

Everything else is copied.  The architecture is transformers' own: no code travels with it.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import BITS, FLOAT_LINEARS, GROUP
from ..checkpoint.names import is_routed_expert
from ..checkpoint.open import open_checkpoint
from ..checkpoint.tensor import Tensor
from ..checkpoint.writer import SHARD_BYTES, CheckpointWriter, TensorEntry, check_destinations
from ..errors import CheckpointError, InputError
from ..files.safetensors import INDEX_NAME
from ..files.whole import write_json
from ..progress import progress

SMALLEST_GROUP = 32  # servers' kernels have no smaller one
SOURCE_PROVENANCE = "noesis_source_provenance.json"

# The linears without packed weights, by the end of the name.  The router is not an nn.Linear in
# transformers, so that compressed-tensors would not unpack it.
FLOATS = (*FLOAT_LINEARS, "mlp.gate.weight")
# The same linears as config.json names them.
IGNORE = [
    "lm_head",
    r"re:.*\.in_proj_a$",
    r"re:.*\.in_proj_b$",
    r"re:.*\.in_proj_ba$",
    r"re:.*\.mlp\.gate$",
    r"re:.*\.shared_expert_gate$",
]

# Linears that servers make of several, by the ends of their names.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "mlp.shared_expert.gate_up_proj": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


class ComputedTensor(NamedTuple):
    """One tensor of the output, and the function that computes it: an array of its dtype, any shape."""

    entry: TensorEntry
    values: Callable[[], np.ndarray]


def export_compressed_tensors(source, destination, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write an INT8, INT4 or mixed checkpoint directory of ours in the layout `pack-quantized`.

    destination: a new directory, written whole or not at all.  One matrix is in memory at a time.
    Errors: InputError (not a quantized directory, a destination that exists), FileFormatError or
    CheckpointError of the source, CheckpointError for columns that no group of 32 or more divides.
    """
    source, destination = Path(source), Path(destination)
    checkpoint = _open_quantized(source)
    check_destinations(destination)
    group = _group_size(checkpoint)
    parameters = _parameters(checkpoint, group)
    entries = [[tensor.entry for tensor in parameter] for parameter in parameters]
    with CheckpointWriter(destination, entries, shard_bytes) as writer:
        with progress(writer.nbytes, "export") as bar:
            for parameter in parameters:
                for tensor in parameter:
                    writer.write(tensor.entry.name, tensor.values())
                    bar.update(tensor.entry.nbytes)
        writer.write_index()
        write_json(
            writer.partial / "config.json",
            checkpoint.config.to_hf() | {"quantization_config": quantization_config(checkpoint, group)},
        )
        _copy_the_rest(source, writer.partial)
        writer.publish()


def quantization_config(checkpoint: Checkpoint, group: int) -> dict:
    """What config.json says about the weights, in compressed-tensors' words; group: of every linear."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _config_group(BITS[kind], targets, group)
            for i, (kind, targets) in enumerate(sorted(_targets(checkpoint).items(), reverse=True))
        },
        "ignore": IGNORE,
        "kv_cache_scheme": None,
    }


def _config_group(bits: int, targets: list[str], group: int) -> dict:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _targets(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """{INT8 or INT4: the linears of this type, as compressed-tensors names them}"""
    kinds: dict[str, dict[int, str]] = {}  # {end of the module's name: {layer: type}}
    for name, tensor in checkpoint.tensors.items():
        if _is_packed(tensor):
            _, _, layer, end = name.removesuffix(".weight").split(".", 3)
            kinds.setdefault(end, {})[int(layer)] = tensor.type
    together = {kind for of_layers in kinds.values() for kind in of_layers.values()}
    if len(together) == 1:
        return {kind: ["Linear"] for kind in together}
    for end, parts in FUSED.items():
        shared = [set(kinds.get(part, {}).items()) for part in parts]
        if alike := set.intersection(*shared):
            kinds[end] = dict(alike)
    return {
        kind: [target for end, of_layers in kinds.items() for target in _target(end, of_layers, kind)]
        for kind in together
    }


def _target(end: str, of_layers: dict[int, str], kind: str) -> list[str]:
    """The pattern of a linear in the layers in which it is of this type; none, or one."""
    layers = sorted(layer for layer, own in of_layers.items() if own == kind)
    if not layers:
        return []
    where = r"\d+" if len(layers) == len(of_layers) else f"({'|'.join(map(str, layers))})"
    escaped = re.escape(end).replace(r"mlp\.experts\.", r"mlp\.experts\.\d+\.")
    return [rf"re:.*\.layers\.{where}\.{escaped}$"]


# ---- before anything is written --------------------------------------------------------------


def _open_quantized(source: Path) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    if not any(_is_packed(tensor) for tensor in checkpoint.tensors.values()):
        raise InputError(
            f"{source}: want a checkpoint that `pyengine quantize` wrote, INT8, INT4 or mixed, "
            "got no such tensors"
        )
    experts = {tensor.type: tensor for tensor in checkpoint.tensors.values() if is_routed_expert(tensor.name)}
    if len(experts) > 1:
        got = " and ".join(f"{kind} ({experts[kind].file_name})" for kind in sorted(experts))
        raise CheckpointError(
            f"{source}: want routed experts of one number of bits, for transformers reads all of them alike, "
            f"got {got}"
        )
    return checkpoint


def _group_size(checkpoint: Checkpoint) -> int:
    """The largest group, 128 or less, that divides the source's and every packed linear's columns."""
    packed = [tensor for tensor in checkpoint.tensors.values() if _is_packed(tensor)]
    for tensor in packed:
        if tensor.group % SMALLEST_GROUP:
            raise CheckpointError(
                f"{tensor.file_name}: want groups of a multiple of "
                f"{SMALLEST_GROUP} columns, got {tensor.group}"
            )
        if tensor.shape[-1] % SMALLEST_GROUP:
            raise CheckpointError(
                f"{tensor.file_name}: want a multiple of {SMALLEST_GROUP} columns, "
                f"the smallest group of the layout, got {tensor.shape[-1]}"
            )
    return math.gcd(GROUP, *(n for tensor in packed for n in (tensor.group, tensor.shape[-1])))


def _is_packed(tensor: Tensor) -> bool:
    return tensor.type in BITS and not tensor.name.endswith(FLOATS)


# ---- what is written -------------------------------------------------------------------------


def _parameters(checkpoint: Checkpoint, group: int) -> list[list[ComputedTensor]]:
    """Every tensor of the output, those of one linear together, in the order of the forward pass."""
    parameters = []
    for name, tensor in checkpoint.tensors.items():
        if name == "lm_head.weight" and checkpoint.config.tie_word_embeddings:
            continue
        parameters += _of_tensor(name, tensor, group)
    return parameters


def _of_tensor(name: str, tensor: Tensor, group: int) -> list[list[ComputedTensor]]:
    if tensor.type not in BITS:
        return [[ComputedTensor(TensorEntry(name, tensor.type, tensor.shape), lambda: tensor.data)]]
    if not _is_packed(tensor):
        return [[ComputedTensor(TensorEntry(name, "F32", tensor.shape), tensor.stored_float32)]]
    if len(tensor.shape) == 2:
        return [_packed(name.removesuffix(".weight"), tensor, None, group)]
    stem, part = name.rsplit(".", 1)
    return [_packed(f"{stem}.{expert}.{part}", tensor, expert, group) for expert in range(tensor.shape[0])]


def _packed(name: str, tensor: Tensor, expert: int | None, group: int) -> list[ComputedTensor]:
    rows, cols = tensor.shape[-2:]
    index = ... if expert is None else expert
    return [
        ComputedTensor(
            TensorEntry(f"{name}.weight_packed", "I32", (rows, cols * BITS[tensor.type] // 32)),
            lambda: pack_words(tensor.data[index]),
        ),
        ComputedTensor(
            TensorEntry(f"{name}.weight_scale", "F32", (rows, cols // group)),
            lambda: scales_of_groups(tensor.scales[index], cols, tensor.group, group),
        ),
        ComputedTensor(
            TensorEntry(f"{name}.weight_shape", "I64", (2,)), lambda: np.array([rows, cols], np.int64)
        ),
    ]


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


def _copy_the_rest(source: Path, directory: Path) -> None:
    """Tokenizer, chat template, generation_config.json, other files that a user put there; no code.

    The provenance describes the source's tensors, so it gets a name that says so.
    """
    for path in sorted(source.iterdir()):
        if (
            not path.is_file()
            or path.suffix in (".safetensors", ".py", ".gguf")
            or path.name in ("config.json", INDEX_NAME)
        ):
            continue
        name = SOURCE_PROVENANCE if path.name == provenance.FILE_NAME else path.name
        shutil.copyfile(path, directory / name)
