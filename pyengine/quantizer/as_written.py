"""A layer's parameters that stay floats, as a reader of the output has them."""

from __future__ import annotations

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import Config
from ..checkpoint.families import model_specs
from ..checkpoint.layout import float_dtype
from ..checkpoint.names import layer_of
from ..checkpoint.tensor import Tensor
from ..files.numbers import float32_to_bfloat16
from .folds import LayerFold


def as_written(checkpoint: Checkpoint, index: int, fold: LayerFold) -> dict[str, Tensor]:
    """{name: parameter} of layer `index` of the source, folded and rounded."""
    return {
        spec.name: _written(
            fold.plain(checkpoint.tensors[spec.name]), float_dtype(spec.name) if spec.linear else "F32"
        )
        for spec in _specs(checkpoint.config, index)
        if not spec.linear or float_dtype(spec.name) is not None
    }


def _specs(config: Config, index: int):
    return [spec for spec in model_specs(config) if layer_of(spec.name) == index]


def _written(tensor: Tensor, dtype: str | None) -> Tensor:
    values = np.ascontiguousarray(tensor.float64().astype(np.float32))
    if values.ndim > 2:  # the convolution's [channels, 1, taps]
        values = values.reshape(len(values), -1)
    data = float32_to_bfloat16(values) if dtype == "BF16" else values
    return Tensor(tensor.name, str(dtype), tensor.shape, data, file_name=tensor.file_name)
