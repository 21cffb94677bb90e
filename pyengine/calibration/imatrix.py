"""Activation statistics as a file: llama.cpp's imatrix in its GGUF form, read and written.

    general.type "imatrix"; imatrix.datasets, .chunk_count, .chunk_size
    NAME.in_sum2   float32 [n], of experts [experts, n]: sums of squares of what the weight NAME reads
    NAME.counts    float32 [1], of experts [experts, 1]: the tokens that were added up

NAME is the weight's name in a GGUF, and columns have a GGUF's order.  Sums are rounded to float32 as they are
written.  A file of ours has also the text's ids, by which a quantizer makes further statistics again:

    pyengine.calibration.version 1; .model, .ids, .texts (JSON), .context, .all_experts: see `Run`

Other programs ignore keys that they do not know.  A file of theirs may be partial: a weight that it lacks
has none.  Source: llama.cpp, tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import Config
from ..checkpoint.families import Spec, family_of, model_specs, value_head_orders
from ..checkpoint.names import is_routed_expert, layer_of
from ..checkpoint.provenance import describe_file
from ..errors import FileFormatError, quote
from ..files.gguf import GGUF
from ..files.whole import PathLike, WholeFile
from ..ids import as_ids
from .statistics import Array, Run, Statistics

OURS = "pyengine.calibration."
VERSION = 1
SUMS, COUNTS = ".in_sum2", ".counts"


def calibrated_specs(config: Config) -> list[Spec]:
    """The linears of the layers, in the order of the forward pass."""
    return [spec for spec in model_specs(config) if spec.linear and layer_of(spec.name) is not None]


# ---- writing -----------------------------------------------------------------------------------


def write(
    path: PathLike, checkpoint: Checkpoint, sums: dict[str, Array], counts: dict[str, Array], run: Run
) -> None:
    """A file of ours, whole or not at all.  sums, counts: as `Statistics` has them."""
    orders = value_head_orders(checkpoint.config)
    whole = WholeFile(path)
    writer = gguf.GGUFWriter(whole.partial, checkpoint.config.architecture)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text["name"] for text in run.texts])
    writer.add_uint32("imatrix.chunk_count", len(run.windows()))
    writer.add_uint32("imatrix.chunk_size", run.context)
    writer.add_uint32(f"{OURS}version", VERSION)
    writer.add_string(f"{OURS}model", run.model)
    writer.add_key_value(
        f"{OURS}ids", run.ids.tolist(), gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.INT32
    )
    writer.add_string(f"{OURS}texts", json.dumps(run.texts))
    writer.add_uint32(f"{OURS}context", run.context)
    writer.add_bool(f"{OURS}all_experts", run.all_experts)
    for spec in calibrated_specs(checkpoint.config):
        columns = np.atleast_2d(sums[spec.name])
        if spec.order == "value columns":
            stored = np.empty_like(columns)
            stored[:, orders[spec.order]] = columns
            columns = stored
        writer.add_tensor(spec.gguf + SUMS, columns.astype(np.float32))
        writer.add_tensor(spec.gguf + COUNTS, counts[spec.name].reshape(-1, 1).astype(np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        whole.publish()
    finally:
        whole.discard()


# ---- reading -----------------------------------------------------------------------------------


def read(path: PathLike, checkpoint: Checkpoint) -> Statistics:
    """The statistics of this checkpoint's linears, from a file of ours or of llama.cpp.

    Errors: FileFormatError: no imatrix; NaN, infinity or a negative sum; a shape that the model does not
    have; no token; no weight of this model, or of its experts; a file of ours of another model.
    """
    path = Path(path)
    file = GGUF.open(path)
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise FileFormatError(path, "general.type", f"want 'imatrix', got {quote(kind)}")
    reader = _Reader(path, file, checkpoint.config)
    sums, counts = {}, {}
    for spec in calibrated_specs(checkpoint.config):
        found = reader.of(spec)
        if found is not None:
            sums[spec.name], counts[spec.name] = found
    _check_some(path, checkpoint, sums, counts)
    run = _read_run(path, file.metadata, checkpoint)
    datasets = file.metadata.get("imatrix.datasets") or []
    return Statistics(
        path,
        str(describe_file(path)["sha256"]),
        sums,
        counts,
        int(file.metadata.get("imatrix.chunk_count") or 0),
        int(file.metadata.get("imatrix.chunk_size") or 0),
        [str(name) for name in datasets] if isinstance(datasets, list) else [],
        run,
    )


class _Reader:
    def __init__(self, path: Path, file: GGUF, config: Config):
        self.path, self.file, self.config = path, file, config
        self.orders = value_head_orders(config)

    def of(self, spec: Spec) -> tuple[Array, Array] | None:
        for name in self._names(spec):
            if name + SUMS in self.file.tensors or name + COUNTS in self.file.tensors:
                return self._read(spec, name)
        return None

    def _names(self, spec: Spec) -> list[str]:
        """What a GGUF may call the weight, or the one that holds it, or one that holds part of it: all of
        these read the same input."""
        names = [spec.gguf, *spec.gguf_also]
        family = family_of(self.config)
        for ending, parts in family.fused:
            names += [spec.gguf.removesuffix(p) + ending for p in parts if spec.gguf.endswith(f".{p}")]
        for split in family.split:
            if spec.gguf.endswith(f".{split.ending}"):
                names += [spec.gguf.removesuffix(split.ending) + part for part in split.parts]
        return names

    def _read(self, spec: Spec, name: str) -> tuple[Array, Array]:
        experts = spec.shape[0] if len(spec.shape) == 3 else 1
        sums = self._tensor(name + SUMS, (experts, spec.shape[-1]))
        counts = self._tensor(name + COUNTS, (experts,))
        if spec.order == "value columns":
            sums = sums[:, self.orders[spec.order]]
        return (sums if experts > 1 or len(spec.shape) == 3 else sums[0]), counts

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise FileFormatError(self.path, name, "want this tensor beside its other half, got none")
        wanted = tuple(n for n in shape if n != 1)
        if tensor.type.name != "F32" or tuple(n for n in tensor.shape if n != 1) != wanted:
            got = f"{tensor.type.name} {list(tensor.shape)}"
            raise FileFormatError(
                self.path, name, f"want F32 {list(shape)} as this model's weight has it, got {got}"
            )
        values: Array = np.array(tensor.data, np.float64).reshape(shape)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise FileFormatError(self.path, name, f"want finite values of at least 0, got {_bad(values)}")
        return values


def _bad(values: Array) -> str:
    bad = values[~(np.isfinite(values) & (values >= 0))]
    return f"{bad.flat[0]:g}"


def _check_some(path: Path, checkpoint: Checkpoint, sums: dict[str, Array], counts: dict[str, Array]) -> None:
    specs = calibrated_specs(checkpoint.config)
    if not sums:
        raise FileFormatError(path, specs[0].gguf + SUMS, f"want weights of {checkpoint.path}, got none")
    stacks = [spec for spec in specs if is_routed_expert(spec.name)]
    if stacks and not any(spec.name in sums for spec in stacks):
        wanted = f"the routed experts of {checkpoint.path}"
        raise FileFormatError(path, stacks[0].gguf + SUMS, f"want {wanted}, got none")
    if not any(count.sum() > 0 for count in counts.values()):
        raise FileFormatError(path, specs[0].gguf + COUNTS, "want statistics of at least one token, got 0")


def _read_run(path: Path, metadata: Any, checkpoint: Checkpoint) -> Run | None:
    if f"{OURS}version" not in metadata:
        return None
    if metadata.require(f"{OURS}version", int) != VERSION:
        raise FileFormatError(path, f"{OURS}version", f"want {VERSION}, got {metadata[f'{OURS}version']}")
    model = metadata.require(f"{OURS}model", str)
    if model != checkpoint.fingerprint:
        wanted = f"statistics of {checkpoint.path}, {checkpoint.fingerprint[:12]}"
        raise FileFormatError(
            path, f"{OURS}model", f"want {wanted}, got those of another model, {model[:12]}"
        )
    where = f"{path}: {OURS}ids"
    ids = as_ids(metadata.require(f"{OURS}ids", list, int), checkpoint.config.vocab_size, where)
    texts = _texts(path, metadata.require(f"{OURS}texts", str), ids)
    context = metadata.require(f"{OURS}context", int)
    if context < 1:
        raise FileFormatError(path, f"{OURS}context", f"want at least 1, got {context}")
    return Run(model, ids, texts, context, metadata.require(f"{OURS}all_experts", bool))


def _texts(path: Path, text: str, ids: NDArray[Any]) -> list[dict[str, Any]]:
    try:
        texts = json.loads(text)
        right = sum(int(one["tokens"]) for one in texts) == len(ids) and all(
            type(one["tokens"]) is int and one["tokens"] > 0 and type(one["sha256"]) is str for one in texts
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        right = False
    if not right:
        raise FileFormatError(
            path, f"{OURS}texts", f"want the texts of {len(ids)} tokens, got {quote(text[:40])}"
        )
    return list(texts)
