"""A checkpoint from a GGUF."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CheckpointError
from ..files import gguf as gguf_file
from ..files.ggml_blocks import BY_NAME, DENSE_TYPES
from .checkpoint import Checkpoint
from .config import Config
from .did_you_mean import TWICE, hint
from .families import Spec, family_of, model_specs, value_head_orders
from .tensor import JoinedTensor, Tensor, without_unit_axes
from .unneeded import block_of, is_unneeded
from .weight_scales import scales_of, weight_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


def open_gguf(path: Path) -> Checkpoint:
    file = gguf_file.GGUF.open(path)
    config = Config.from_gguf(file)
    reader = _GGUFTensors(file, config)
    tensors = {spec.name: reader.read(spec) for spec in model_specs(config)}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    reader.check_all_used()
    return Checkpoint(path, "gguf", config, tensors, family_of(config).value_heads, file)


class _GGUFTensors:
    """Reads parameters by Spec and remembers which tensors of the file were used."""

    def __init__(self, file: gguf_file.GGUF, config: Config):
        self.file, self.config = file, config
        self.used: set[str] = set()

    @functools.cached_property
    def orders(self) -> dict[str, NDArray[np.int64]]:
        return value_head_orders(self.config)  # computed after a tensor has confirmed the sizes

    def read(self, spec: Spec) -> Tensor:
        tensor = self._fused(spec) or self._joined(spec) or self._whole(spec)
        if spec.order is None:
            return tensor
        order = self.orders[spec.order]
        if spec.order == "value columns":
            return dataclasses.replace(tensor, col_order=order)
        return dataclasses.replace(tensor, row_order=order)

    def check_all_used(self) -> None:
        first_nextn = self.config.num_hidden_layers
        for name in self.file.tensors:
            if name in self.used or is_unneeded(name):
                continue
            if first_nextn <= block_of(name) < first_nextn + self.config.num_nextn_predict_layers:
                continue  # a next-token-prediction block is not a layer of the forward pass
            known = self._known()
            if weight_of(name) in known:
                raise CheckpointError(f"{self.file.path}: {name}: want {weight_of(name)} beside it, got none")
            if name in known:
                raise CheckpointError(f"{self.file.path}: {name}: {TWICE}")
            nearest = hint(name, known, "nearest known name")
            raise CheckpointError(
                f"{self.file.path}: {name}: want only tensors that the architecture "
                f"{self.config.architecture} has, got this one{nearest}"
            )

    def _known(self) -> set[str]:
        """Every name that this model's tensors can have."""
        names = {name for spec in model_specs(self.config) for name in (spec.gguf, *spec.gguf_also)}
        for fused, parts in family_of(self.config).fused:
            for part in parts:
                names |= {name.removesuffix(part) + fused for name in names if name.endswith(f".{part}")}
        for ending, parts, _ in family_of(self.config).split:
            stems = [name.removesuffix(ending) for name in names if name.endswith(f".{ending}")]
            names |= {stem + part for stem in stems for part in parts}
        return names

    def _fused(self, spec: Spec) -> Tensor | None:
        """The parameter as rows of a tensor that holds several parameters (`--fuse-qkv`, fused gate_up), or
        None."""
        if spec.gguf in self.file.tensors:
            return None
        for ending, parts in family_of(self.config).fused:
            part = next((part for part in parts if spec.gguf.endswith(f".{part}")), None)
            if part is None or spec.gguf.removesuffix(part) + ending not in self.file.tensors:
                continue
            sizes = [rows(self.config) for rows in parts.values()]
            start = sum(sizes[: list(parts).index(part)])
            stop = start + parts[part](self.config)
            shape = (*spec.shape[:-2], sum(sizes), spec.shape[-1])
            whole = self._whole(spec._replace(gguf=spec.gguf.removesuffix(part) + ending, shape=shape))
            return whole.rows(start, stop, spec.name)
        return None

    def _joined(self, spec: Spec) -> Tensor | None:
        """The parameter from the tensors that hold its rows, or None."""
        if spec.gguf in self.file.tensors:
            return None
        for ending, parts, order in family_of(self.config).split:
            stem = spec.gguf.removesuffix(ending)
            if stem == spec.gguf or all(stem + part not in self.file.tensors for part in parts):
                continue
            cols = spec.shape[-1:]
            tensors = (
                self._whole(spec._replace(gguf=stem + part, shape=(rows(self.config), *cols)))
                for part, rows in parts.items()
            )
            return JoinedTensor.of(spec.name, tuple(tensors), order(self.config))
        return None

    def _whole(self, spec: Spec) -> Tensor:
        name = next((n for n in (spec.gguf, *spec.gguf_also) if n in self.file.tensors), None)
        if name is None:
            unknown = {n for n in set(self.file.tensors) - self._known() if not is_unneeded(n)}
            raise CheckpointError(
                f"{self.file.path}: {spec.gguf}: want this tensor, got none"
                f"{hint(spec.gguf, unknown, 'nearest unknown name in the file')}"
            )
        stored = self.file.tensors[name]
        self.used.add(name)
        kinds = tuple(BY_NAME) if spec.linear else DENSE_TYPES
        if stored.type.name not in kinds:
            want = ", ".join(kinds)
            raise CheckpointError(f"{self.file.path}: {name}: want type {want}, got {stored.type.name}")
        if without_unit_axes(stored.shape) != without_unit_axes(spec.shape):
            raise CheckpointError(
                f"{self.file.path}: {name}: want shape {without_unit_axes(spec.shape)}, got {stored.shape}"
            )
        data = stored.data
        if spec.linear and data.ndim == 1:
            data = data.reshape(1, -1)
        return Tensor(
            spec.name,
            stored.type.name,
            spec.shape,
            data,
            decode=spec.decode,
            file_name=name,
            factor=self._factor(name, spec),
        )

    def _factor(self, weight: str, spec: Spec) -> NDArray[np.float32] | None:
        """The scale beside a weight: float32 [1], of experts [experts].  See `weight_scales`."""
        names = scales_of(weight)
        if names is None:
            return None
        self.used.update(names)
        name, _ = names
        if name not in self.file.tensors:
            return None
        stored, shape = self.file.tensors[name], spec.shape[:-2] or (1,)
        if stored.type.name != "F32" or stored.shape != shape:
            raise CheckpointError(
                f"{self.file.path}: {name}: want {shape} F32, got {stored.shape} {stored.type.name}"
            )
        if not np.isfinite(stored.data).all():
            raise CheckpointError(f"{self.file.path}: {name}: want finite values, got NaN or infinity")
        factor: NDArray[np.float32] = stored.data
        return factor
