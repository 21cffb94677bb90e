"""The dense SwiGLU MLP, Hugging Face's `Qwen3_5MLP`."""

from __future__ import annotations

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..core import ops
from ..core.threads import Pool
from .linear import Linear, LinearGroup


class Mlp:
    """One layer's `mlp`: down(silu(gate x) * up x)."""

    def __init__(self, pool: Pool, checkpoint: Checkpoint, name: str):
        tensors = checkpoint.tensors
        self.pool, self.name = pool, name
        self.gate_up = LinearGroup(
            Linear(pool, tensors[f"{name}.gate_proj.weight"]), Linear(pool, tensors[f"{name}.up_proj.weight"])
        )
        self.down_proj = Linear(pool, tensors[f"{name}.down_proj.weight"])

    def forward(self, x: ops.Activations, record) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]."""
        gate, up = self.gate_up(x, record)
        inner = ops.silu_mul(self.pool, gate, up)
        y = self.down_proj(ops.Activations(self.pool, inner, f"{self.name}.down_proj input"), record)
        if record:
            record(self.name, y)
        return y
