"""The delta net's input projections: Qwen3.5's four matrices, or Qwen3-Next's two."""

from __future__ import annotations

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.families import family_of
from ..core import ops
from ..core.tape import by_python
from ..core.threads import Pool
from .linear import Linear, LinearGroup


def input_projections(pool: Pool, checkpoint: Checkpoint, name: str) -> FourProjections | TwoProjections:
    four = len(family_of(checkpoint.config).in_proj) == 4
    return (FourProjections if four else TwoProjections)(pool, checkpoint, name)


class FourProjections:
    """in_proj_qkv, in_proj_z, in_proj_b, in_proj_a."""

    def __init__(self, pool: Pool, checkpoint: Checkpoint, name: str):
        parts = family_of(checkpoint.config).in_proj
        layers = [Linear(pool, checkpoint.tensors[f"{name}.{part}.weight"]) for part in parts]
        self.group, self.z = LinearGroup(*layers), layers[1]

    def __call__(self, x: ops.Activations, record=None) -> list[np.ndarray]:
        """x [T, hidden] -> qkv [T, conv_dim], z [T, value_dim], b, a [T, value heads]."""
        return self.group(x, record)

    def to_hf_values(self, y: np.ndarray) -> np.ndarray:
        """[T, value_dim] in Hugging Face's order: in_proj_z's rows are the same heads and channels."""
        return self.z.tensor.to_hf_rows(y)


class TwoProjections:
    """in_proj_qkvz and in_proj_ba, whose products are sorted: see `split_qkvz`, `split_ba` in reference.py.

    A GGUF may have the rows of in_proj_qkvz sorted already, in two tensors.
    """

    def __init__(self, pool: Pool, checkpoint: Checkpoint, name: str):
        config = checkpoint.config
        self.pool, self.name, self.key_heads = pool, name, config.linear_num_key_heads
        self.key_dim, self.conv_dim = config.key_dim, config.conv_dim
        self.value_dim, self.value_heads = config.value_dim, config.linear_num_value_heads
        self.qkvz, ba = (
            checkpoint.tensors[f"{name}.{part}.weight"] for part in ("in_proj_qkvz", "in_proj_ba")
        )
        self.group = LinearGroup(*(Linear(pool, tensor) for tensor in (*self.qkvz.stored, ba)))

    def __call__(self, x: ops.Activations, record=None) -> list[np.ndarray]:
        """As FourProjections."""
        *qkvz, ba = self.group(x)
        if record:
            record(f"{self.name}.in_proj_qkvz", self.qkvz.to_hf_rows(np.concatenate(qkvz, axis=1)))
            record(f"{self.name}.in_proj_ba", ba)
        b, a = (np.empty((len(ba), self.value_heads), np.float32) for _ in range(2))
        if len(qkvz) == 2:
            by_python(self.pool, lambda: self._sort(ba, b, a))
            return [*qkvz, b, a]
        (joined,) = qkvz
        qkv, z = (np.empty((len(ba), n), np.float32) for n in (self.conv_dim, self.value_dim))
        query_key_value = np.split(qkv, [self.key_dim, 2 * self.key_dim], axis=1)

        def sort():
            self._sort(joined, *query_key_value, z)
            self._sort(ba, b, a)

        by_python(self.pool, sort)
        return [qkv, z, b, a]

    def to_hf_values(self, y: np.ndarray) -> np.ndarray:
        return y

    def _sort(self, joined: np.ndarray, *parts: np.ndarray) -> None:
        """joined [T, n], for each key head its share of every part -> the parts [T, n of the part]."""
        of_head, start = joined.reshape(len(joined), self.key_heads, -1), 0
        for part in parts:
            share = part.shape[1] // self.key_heads
            part.reshape(len(part), self.key_heads, share)[:] = of_head[:, :, start : start + share]
            start += share
