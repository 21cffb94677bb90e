"""Gated full attention, Hugging Face's `Qwen3_5MoeAttention`."""

from __future__ import annotations

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..core import ops
from ..core.tape import by_python
from ..core.threads import Pool
from .linear import Linear, LinearGroup
from .norm import zero_centred_scale
from .state import KeyValueCache


class Attention:
    """One layer's `self_attn`."""

    def __init__(self, pool: Pool, checkpoint: Checkpoint, name: str):
        config, tensors = checkpoint.config, checkpoint.tensors
        self.pool, self.name, self.eps = pool, name, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = float(np.float32(self.head_dim**-0.5))

        self.q_proj = Linear(pool, tensors[f"{name}.q_proj.weight"])
        self.k_proj = Linear(pool, tensors[f"{name}.k_proj.weight"])
        self.v_proj = Linear(pool, tensors[f"{name}.v_proj.weight"])
        self.qkv_proj = LinearGroup(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = Linear(pool, tensors[f"{name}.o_proj.weight"])
        self.q_norm = zero_centred_scale(tensors[f"{name}.q_norm.weight"])
        self.k_norm = zero_centred_scale(tensors[f"{name}.k_norm.weight"])

    def forward(
        self, x: ops.Activations, sequences: list[tuple[slice, KeyValueCache]], rope_table, record
    ) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; appends each sequence's rows to its cache."""
        gated = self.inner(x, sequences, rope_table, record)
        y = self.o_proj(ops.Activations(self.pool, gated, f"{self.name} output"), record)
        if record:
            record(self.name, y)
        return y

    def inner(
        self, x: ops.Activations, sequences: list[tuple[slice, KeyValueCache]], rope_table, record=None
    ) -> np.ndarray:
        """x [T, hidden] -> what o_proj reads [T, heads * head_dim]; appends to the caches as `forward`."""
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
            for rows, cache in sequences:
                cache.append(key[rows], value[rows])
                keys, values = cache.keys, cache.values
                ops.attention(pool, query[rows], keys, values, self.scale, heads[rows], self.name)

        by_python(pool, attend)
        return ops.sigmoid_mul(pool, heads, query_gate).reshape(tokens, -1)
