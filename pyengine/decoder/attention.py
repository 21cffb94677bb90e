"""Gated full attention, Hugging Face's `Qwen3_5MoeAttention`."""

from __future__ import annotations

import numpy as np

from .. import ops
from ..checkpoint import Checkpoint
from .linear import Linear, LinearGroup
from .norm import zero_centred_scale
from .state import KeyValueCache


class Attention:
    """One layer's `self_attn`."""

    def __init__(self, pool: ops.Pool, checkpoint: Checkpoint, name: str):
        config, tensors = checkpoint.config, checkpoint.tensors
        self.pool, self.name, self.eps = pool, name, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = float(np.float32(self.head_dim ** -0.5))

        self.q_proj = Linear(pool, tensors[f"{name}.q_proj.weight"])
        self.k_proj = Linear(pool, tensors[f"{name}.k_proj.weight"])
        self.v_proj = Linear(pool, tensors[f"{name}.v_proj.weight"])
        self.qkv_proj = LinearGroup(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = Linear(pool, tensors[f"{name}.o_proj.weight"])
        self.q_norm = zero_centred_scale(tensors[f"{name}.q_norm.weight"])
        self.k_norm = zero_centred_scale(tensors[f"{name}.k_norm.weight"])

    def forward(self, x: ops.Activations, cache: KeyValueCache, rope_table, record) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; appends to the cache."""
        tokens, pool, n = x.x.shape[0], self.pool, self.head_dim
        query_gate, key, value = self.qkv_proj(x)
        self.q_proj.recorded(query_gate, record)
        query_gate = query_gate.reshape(tokens, self.heads, 2 * n)
        query = ops.head_rms_norm(pool, query_gate, n, self.q_norm, self.eps)
        if record:
            record(f"{self.name}.q_norm", query.reshape(tokens, -1))
        self.k_proj.recorded(key, record)
        key = ops.head_rms_norm(pool, key.reshape(tokens, self.kv_heads, n), n, self.k_norm, self.eps)
        if record:
            record(f"{self.name}.k_norm", key.reshape(tokens, -1))
        self.v_proj.recorded(value, record)
        value = value.reshape(tokens, self.kv_heads, n)

        ops.rope(pool, query, rope_table)
        ops.rope(pool, key, rope_table)
        heads = np.empty_like(query)

        def attend():  # the cache, unlike all other arrays, is another with every token
            cache.append(key, value)
            ops.attention(pool, query, cache.keys, cache.values, self.scale, heads, self.name)

        ops.by_python(pool, attend)
        gated = ops.sigmoid_mul(pool, heads, query_gate).reshape(tokens, -1)
        y = self.o_proj(ops.Activations(pool, gated, f"{self.name} output"), record)
        if record:
            record(self.name, y)
        return y
