"""One checked wrapper per operation of the C core: check, allocate, call, check, return.

Contracts (equations, orders of summation, rounding) stand in csrc/pyengine.h.  Arrays are float32
and C-contiguous unless a docstring says otherwise; T is the number of tokens.
"""

from __future__ import annotations

from .elementwise import add, delta_gates, exp, sigmoid, sigmoid_mul, silu, silu_mul, softplus
from .mixers import attention, causal_conv1d, delta_rule, rope, rope_table
from .moe import experts, router, routing_weights
from .norms import head_rms_norm, l2_norm, rms_norm, rms_norm_gated
from .products import Activations, matmul, matmul_shared_input, quantize_activations
from .scratch import (
    attention_scratch_bytes,
    attention_shared_bytes,
    experts_scratch_bytes,
    labels_scratch_bytes,
    router_scratch_bytes,
)
from .screening import screen, screen_rows, top_k
from .soft_labels import draw, exp_sums
from .weights import pack_int4, quantize_weights

__all__ = [
    "Activations",
    "add",
    "attention",
    "attention_scratch_bytes",
    "attention_shared_bytes",
    "causal_conv1d",
    "delta_gates",
    "delta_rule",
    "draw",
    "exp",
    "exp_sums",
    "experts",
    "experts_scratch_bytes",
    "head_rms_norm",
    "l2_norm",
    "labels_scratch_bytes",
    "matmul",
    "matmul_shared_input",
    "pack_int4",
    "quantize_activations",
    "quantize_weights",
    "rms_norm",
    "rms_norm_gated",
    "rope",
    "rope_table",
    "router",
    "router_scratch_bytes",
    "routing_weights",
    "screen",
    "screen_rows",
    "sigmoid",
    "sigmoid_mul",
    "silu",
    "silu_mul",
    "softplus",
    "top_k",
]
