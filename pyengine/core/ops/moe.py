"""A mixture of experts: who is chosen, and what they give."""

from __future__ import annotations

import numpy as np

from ..._core import ffi, lib
from ..call import as_input, as_output, run, want
from ..matrices import Experts
from ..threads import Pool
from .products import Activations


def router(pool: Pool, logits, top_k: int, name: str = "router logits"):
    """logits [T, experts] -> routing_weights float32, selected_experts int32, both [T, top_k]."""
    tokens, experts = logits.shape
    weights = np.empty((tokens, top_k), np.float32)
    selected = np.empty((tokens, top_k), np.int32)
    run(
        pool,
        lib.pe_router,
        name,
        as_input(logits),
        tokens,
        experts,
        top_k,
        as_output(weights),
        as_output(selected, "int32_t[]"),
    )
    return weights, selected


def routing_weights(pool: Pool, logits, selected_experts, name: str = "router logits"):
    """logits [T, experts], selected_experts int32 [T, top_k], chosen by another -> their weights float32
    [T, top_k].  InputError: a number that is no expert's."""
    tokens, experts = logits.shape
    top_k = selected_experts.shape[1]
    want(len(selected_experts) == tokens, f"{name}: want experts of {tokens} tokens")
    weights = np.empty((tokens, top_k), np.float32)
    run(
        pool,
        lib.pe_routing_weights,
        name,
        as_input(logits),
        tokens,
        experts,
        top_k,
        as_input(selected_experts, np.int32, "int32_t[]"),
        as_output(weights),
    )
    return weights


def experts(
    pool: Pool,
    weights: Experts,
    x: Activations,
    selected_experts,
    routing_weights,
    shared_expert_gate,
    trace: bool = False,
):
    """The sparse MoE block's output [T, hidden]; with trace also {name: array} of the steps inside.

    selected_experts, routing_weights [T, top_k]; shared_expert_gate [T, 1], before sigmoid.
    """
    tokens, hidden = x.x.shape
    y = np.empty((tokens, hidden), np.float32)
    inside, struct = {}, ffi.NULL
    if trace:
        inside = {
            "routed": np.empty_like(y),
            "shared": np.empty_like(y),
            "shared_gate": np.empty((tokens, weights.shared_ff), np.float32),
            "shared_up": np.empty((tokens, weights.shared_ff), np.float32),
        }
        struct = ffi.new("pe_experts_trace *", {k: as_output(v) for k, v in inside.items()})
    run(
        pool,
        lib.pe_experts,
        f"experts of {x.name}",
        weights.struct,
        x.for_matrices(*weights.inputs),
        as_input(selected_experts, np.int32, "int32_t[]"),
        as_input(routing_weights),
        selected_experts.shape[1],
        as_input(shared_expert_gate),
        as_output(y),
        struct,
        keep=(x, weights),
    )
    return (y, inside) if trace else y
