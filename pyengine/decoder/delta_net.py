"""Gated DeltaNet, Hugging Face's `Qwen3_5MoeGatedDeltaNet`."""

from __future__ import annotations

import numpy as np

from .. import ops
from ..checkpoint import Checkpoint
from .linear import Linear, LinearGroup
from .state import DeltaNetState


class DeltaNet:
    """One layer's `linear_attn`.  Value heads stay in the checkpoint's order throughout; only what
    is recorded for a trace is put into Hugging Face's."""

    def __init__(self, pool: ops.Pool, checkpoint: Checkpoint, name: str):
        config, tensors = checkpoint.config, checkpoint.tensors
        self.pool, self.name, self.eps = pool, name, config.rms_norm_eps
        self.key_heads, self.value_heads = (config.linear_num_key_heads,
                                            config.linear_num_value_heads)
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim = config.key_dim
        self.query_scale = float(np.float32(self.head_k_dim ** -0.5))
        self.key_head = checkpoint.key_heads()

        self.in_proj_z = Linear(pool, tensors[f"{name}.in_proj_z.weight"])
        self.in_proj = LinearGroup(Linear(pool, tensors[f"{name}.in_proj_qkv.weight"]),
                                   self.in_proj_z,
                                   Linear(pool, tensors[f"{name}.in_proj_b.weight"]),
                                   Linear(pool, tensors[f"{name}.in_proj_a.weight"]))
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

    def forward(self, x: ops.Activations, state: DeltaNetState, record) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; updates the state."""
        tokens, pool = x.x.shape[0], self.pool
        qkv, z, b, a = self.in_proj(x, record)

        qkv = ops.causal_conv1d(pool, qkv, self.conv1d, state.conv_state)
        query = ops.l2_norm(pool, qkv, 0, self.key_heads, self.head_k_dim, self.query_scale)
        key = ops.l2_norm(pool, qkv, self.key_dim, self.key_heads, self.head_k_dim, 1.0)
        beta, decay = ops.delta_gates(pool, a, b, self.neg_exp_a_log, self.dt_bias)
        core = ops.delta_rule(pool, query, key, qkv, 2 * self.key_dim, beta, decay, self.key_head,
                              state.recurrent_state)

        z = z.reshape(tokens, self.value_heads, self.head_v_dim)
        core = ops.rms_norm_gated(pool, core, z, self.norm, self.eps).reshape(tokens, -1)
        if record:  # in_proj_z's rows are the same heads and channels
            record(f"{self.name}.norm", self.in_proj_z.tensor.to_hf_rows(core))
        y = self.out_proj(ops.Activations(pool, core, f"{self.name}.norm"), record)
        if record:
            record(self.name, y)
        return y
