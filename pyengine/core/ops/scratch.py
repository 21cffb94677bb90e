"""Memory that operations need beside their arrays."""

from __future__ import annotations

from ..._core import lib


def experts_scratch_bytes(
    tokens: int, hidden: int, num_experts: int, top_k: int, ff: int, shared_ff: int
) -> int:
    """Memory of the pool that `experts` needs; the pool keeps it."""
    return lib.pe_experts_scratch_bytes(tokens, hidden, num_experts, top_k, ff, shared_ff)


def attention_scratch_bytes(positions: int, heads: int, kv_heads: int, n: int) -> int:
    """The most memory that each thread takes in `attention`, for that many positions of a cache."""
    return lib.pe_attention_scratch_bytes(positions, heads, kv_heads, n)


def attention_shared_bytes(threads: int, positions: int, heads: int, kv_heads: int) -> int:
    """Memory of the pool that `attention` needs for a token at that many positions; the pool keeps it."""
    return lib.pe_attention_shared_bytes(threads, positions, heads, kv_heads)


def router_scratch_bytes(experts: int) -> int:
    """Memory that each thread takes in `router`."""
    return lib.pe_router_scratch_bytes(experts)


def labels_scratch_bytes(vocab: int) -> int:
    """The most memory that each thread takes in `exp_sums` and `draw`."""
    return lib.pe_labels_scratch_bytes(vocab)
