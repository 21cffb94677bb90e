"""Gated DeltaNet, Hugging Face's `Qwen3_5MoeGatedDeltaNet` and `Qwen3NextGatedDeltaNet`."""

from __future__ import annotations

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..core import ops
from ..core.threads import Pool
from .linear import Linear
from .projections import input_projections
from .state import DeltaNetState


class DeltaNet:
    """One layer's `linear_attn`.  Value heads stay in the checkpoint's order throughout; only what
    is recorded for a trace is put into Hugging Face's."""

    def __init__(self, pool: Pool, checkpoint: Checkpoint, name: str):
        config, tensors = checkpoint.config, checkpoint.tensors
        self.pool, self.name, self.eps = pool, name, config.rms_norm_eps
        self.key_heads, self.value_heads = (config.linear_num_key_heads, config.linear_num_value_heads)
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim = config.key_dim
        self.query_scale = float(np.float32(self.head_k_dim**-0.5))
        self.key_head = checkpoint.key_heads()

        self.in_proj = input_projections(pool, checkpoint, name)
        self.out_proj = Linear(pool, tensors[f"{name}.out_proj.weight"])
        conv1d = tensors[f"{name}.conv1d.weight"].stored_float32()  # [conv_dim, taps]
        self.conv1d = np.ascontiguousarray(conv1d.reshape(config.conv_dim, -1).T)
        self.neg_exp_a_log = self._neg_exp_a_log(tensors[f"{name}.A_log"])
        self.dt_bias = tensors[f"{name}.dt_bias"].stored_float32()
        self.norm = tensors[f"{name}.norm.weight"].stored_float32()

    def _neg_exp_a_log(self, a_log):
        """-exp(A_log), float32 [value heads]: what a GGUF stores as ssm_a."""
        stored = a_log.stored_float32()
        return stored if a_log.decode is not None else -ops.exp(self.pool, stored)

    def forward(self, x: ops.Activations, sequences: list[tuple[slice, DeltaNetState]], record) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; updates each sequence's state by its rows."""
        core = self.inner(x, sequences, record)
        y = self.out_proj(ops.Activations(self.pool, core, f"{self.name}.norm"), record)
        if record:
            record(self.name, y)
        return y

    def inner(
        self, x: ops.Activations, sequences: list[tuple[slice, DeltaNetState]], record=None
    ) -> np.ndarray:
        """x [T, hidden] -> what out_proj reads [T, value_dim], value heads in the checkpoint's order; updates
        the states as `forward`."""
        tokens, pool = x.x.shape[0], self.pool
        qkv, z, b, a = self.in_proj(x, record)

        channels, qkv = qkv, np.empty_like(qkv)
        for rows, state in sequences:
            ops.causal_conv1d(pool, channels[rows], self.conv1d, state.conv_state, qkv[rows])
        query = ops.l2_norm(pool, qkv, 0, self.key_heads, self.head_k_dim, self.query_scale)
        key = ops.l2_norm(pool, qkv, self.key_dim, self.key_heads, self.head_k_dim, 1.0)
        beta, decay = ops.delta_gates(pool, a, b, self.neg_exp_a_log, self.dt_bias)
        core = np.empty((tokens, self.value_heads, self.head_v_dim), np.float32)
        for rows, state in sequences:
            ops.delta_rule(
                pool,
                query[rows],
                key[rows],
                qkv[rows],
                2 * self.key_dim,
                beta[rows],
                decay[rows],
                self.key_head,
                state.recurrent_state,
                core[rows],
            )

        z = z.reshape(tokens, self.value_heads, self.head_v_dim)
        core = ops.rms_norm_gated(pool, core, z, self.norm, self.eps).reshape(tokens, -1)
        if record:
            record(f"{self.name}.norm", self.in_proj.to_hf_values(core))
        return core
