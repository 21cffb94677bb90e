"""Routed experts and the gated shared one, Hugging Face's `Qwen3_5MoeSparseMoeBlock`."""

from __future__ import annotations

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..core import ops
from ..core.matrices import Experts, as_matrix
from ..core.threads import Pool
from .linear import Linear, LinearGroup


class SparseMoe:
    """One layer's `mlp`."""

    def __init__(self, pool: Pool, checkpoint: Checkpoint, name: str):
        tensors = checkpoint.tensors
        self.pool, self.name = pool, name
        self.top_k = checkpoint.config.num_experts_per_tok
        self.gates = LinearGroup(
            Linear(pool, tensors[f"{name}.gate.weight"]),
            Linear(pool, tensors[f"{name}.shared_expert_gate.weight"]),
        )
        parts = [f"{name}.experts.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
        parts += [f"{name}.shared_expert.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
        self.experts = Experts(*(as_matrix(tensors[part]) for part in parts))

    def forward(self, x: ops.Activations, record) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]."""
        pool = self.pool
        router_logits, shared_expert_gate = self.gates(x)
        routing_weights, selected_experts = ops.router(pool, router_logits, self.top_k, f"{self.name}.gate")
        if not record:
            return ops.experts(pool, self.experts, x, selected_experts, routing_weights, shared_expert_gate)

        record(f"{self.name}.gate", router_logits)
        other = record(f"{self.name}.gate.2", selected_experts.astype(np.int64))
        if other is not None:
            selected_experts = np.ascontiguousarray(other, np.int32)
            routing_weights = ops.routing_weights(
                pool, router_logits, selected_experts, f"{self.name}.gate, experts from outside"
            )
        record(f"{self.name}.gate.1", routing_weights)
        y, inside = ops.experts(
            pool, self.experts, x, selected_experts, routing_weights, shared_expert_gate, trace=True
        )
        record(f"{self.name}.shared_expert.gate_proj", inside["shared_gate"])
        record(f"{self.name}.shared_expert.up_proj", inside["shared_up"])
        record(f"{self.name}.shared_expert.down_proj", inside["shared"])
        record(f"{self.name}.shared_expert", inside["shared"])
        record(f"{self.name}.experts", inside["routed"])
        record(f"{self.name}.shared_expert_gate", shared_expert_gate)
        record(self.name, y)
        return y

    def expert_output(self, expert: int, x: ops.Activations) -> np.ndarray:
        """One routed expert's output [T, hidden] before its weight, for x [T, hidden]; the bits are those
        that `forward` adds up."""
        gate, up, down = (matrix.of_expert(expert) for matrix in self.experts.routed)
        inner = ops.silu_mul(self.pool, ops.matmul(self.pool, gate, x), ops.matmul(self.pool, up, x))
        inner = ops.Activations(self.pool, inner, f"{self.name}.experts.{expert}.down_proj input")
        return ops.matmul(self.pool, down, inner)
