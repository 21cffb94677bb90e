"""Bounds of the memory that a run takes, in bytes, from the shapes alone.

The weights are in a mapped file: the system may drop them and read them again.  This module bounds the
process's own memory, without the 20 MB or so that Python and NumPy take before a model is loaded.
"""

from __future__ import annotations

import math

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import FULL, LINEAR, Config
from ..checkpoint.families import family_of, model_specs
from ..checkpoint.layout import GROUP
from ..checkpoint.summary import needed_by_a_token, stored_bytes
from ..core import ops
from .head import form_bytes
from .state import CACHE_DTYPES, KeyValueCache

FLOAT = 4  # bytes
CALLS_OF_A_LAYER = 32 << 10  # about twenty, of some 1 KB in C and Python: see decoder/model.py, OneToken


def footprint(
    checkpoint: Checkpoint, context: int, chunk: int, threads: int, arithmetic: str = "locked"
) -> dict[str, int]:
    """Bytes that one sequence of `context` tokens takes, its prompt computed `chunk` at a time.

    weights_mapped          the file
    weights_copied          vectors in the form the C core reads
    delta_net_states        of all linear layers; the same at any length
    key_value_cache         of all full-attention layers, for `context` positions, in whole pages
    activations             a chunk's arrays in Python, as if one layer's all lived at once
    one_token               the arrays of all layers that the model keeps to replay a single token
    head_screen             the smaller form of the head, where greedy decoding reads one: see head.py
    pool_scratch            what the thread pool keeps: for the experts of a chunk, or for the attention
                            scores of a token
    thread_scratch          for each thread the attention scores of some heads and tokens, some keys or
                            values of a float16 cache as float32, and a row of expert probabilities
    total                   all but weights_mapped

    The logits of one token are in activations; all of a prompt's, when asked for, are not.
    """
    config = checkpoint.config
    tokens, item = min(chunk, context), np.dtype(CACHE_DTYPES[arithmetic]).itemsize
    sizes = {
        "weights_copied": weights_copied(checkpoint),
        "delta_net_states": delta_net_states(config),
        "key_value_cache": key_value_cache(config, context, item),
        "activations": activations(config, tokens),
        "one_token": one_token(config),
        "head_screen": form_bytes(checkpoint.tensors["lm_head.weight"]),
        "pool_scratch": max(
            experts_scratch(config, tokens) if config.num_experts else 0,
            attention_shared(config, threads, context),
        ),
        "thread_scratch": threads * thread_scratch(config, context),
    }
    return {"weights_mapped": checkpoint.file.size, **sizes, "total": sum(sizes.values())}


# ---- weights -----------------------------------------------------------------------------------


def weights_copied(checkpoint: Checkpoint) -> int:
    vectors = sum(math.prod(spec.shape) for spec in model_specs(checkpoint.config) if not spec.linear)
    return (vectors + checkpoint.config.rotary_dim // 2) * FLOAT


def weight_bytes_per_token(checkpoint: Checkpoint) -> int:
    """Bytes of weights that one token reads on its way to its logits: every tensor once, of the routed
    experts the chosen ones, of the embedding one row."""
    tensors = dict(checkpoint.tensors)
    row = stored_bytes(tensors.pop("model.embed_tokens.weight")) // checkpoint.config.vocab_size
    return row + sum(
        needed_by_a_token(checkpoint, name, stored_bytes(part))
        for name, tensor in tensors.items()
        for part in tensor.stored
    )


# ---- the state ---------------------------------------------------------------------------------


def delta_net_states(c: Config) -> int:
    conv = (c.linear_conv_kernel_dim - 1) * c.conv_dim
    recurrent = c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    return c.layer_types.count(LINEAR) * (conv + recurrent) * FLOAT


def key_value_cache(c: Config, context: int, item: int = FLOAT) -> int:
    """item: bytes of a key's or a value's element."""
    row = (c.num_key_value_heads, c.head_dim)
    return c.layer_types.count(FULL) * KeyValueCache.bytes_of(row, item, context)


# ---- scratch -----------------------------------------------------------------------------------


def activations(c: Config, tokens: int) -> int:
    """Of the largest layer, with the embedding rows and one token's logits."""
    layer = max(_layer(c, index) for index in range(c.num_hidden_layers))
    return tokens * (_before_layers(c) + layer) + 2 * _logits(c)


def one_token(c: Config) -> int:
    """See OneToken in decoder/model.py: its arrays, its list of calls, and the Python objects of the list."""
    layers = sum(_layer(c, index) + CALLS_OF_A_LAYER for index in range(c.num_hidden_layers))
    return _before_layers(c) + layers + _logits(c) + CALLS_OF_A_LAYER


def _before_layers(c: Config) -> int:
    """Per token: the embedding's codes and values; the rope table."""
    return (3 * c.hidden_size + c.rotary_dim) * FLOAT


def _layer(c: Config, index: int) -> int:
    """Per token: the residual stream (3 copies), two normed inputs, mixer, MLP."""
    hidden = c.hidden_size
    mixer = _delta_net(c) if c.layer_types[index] == LINEAR else _attention(c)
    mlp = _experts(c) if c.has_experts(index) else _mlp(c)
    return 3 * hidden * FLOAT + 2 * (hidden * FLOAT + _quantized(hidden)) + mixer + mlp


def _logits(c: Config) -> int:
    return (c.vocab_size + c.hidden_size) * FLOAT + _quantized(c.hidden_size)


def _quantized(cols: int) -> int:
    """One token's int16 codes, their scales, and the int32 sums of 16 of them."""
    groups = -(-cols // GROUP)
    return groups * (GROUP * 2 + FLOAT + GROUP // 16 * 4)


def _delta_net(c: Config) -> int:
    """Per token: qkv before and after the convolution; z; b, a, beta, decay; query, key; the rule's
    output before and after its norm, quantized; out_proj."""
    floats = (
        2 * c.conv_dim
        + c.value_dim
        + 4 * c.linear_num_value_heads
        + 2 * c.key_dim
        + 2 * c.value_dim
        + c.hidden_size
    )
    if len(family_of(c).in_proj) == 2:  # their products are sorted into new arrays
        floats += c.conv_dim + c.value_dim + 2 * c.linear_num_value_heads
    return floats * FLOAT + _quantized(c.value_dim)


def _attention(c: Config) -> int:
    """Per token: query with gate; query; key before and after its norm, value; the output before
    and after its gate, quantized; o_proj."""
    width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    floats = 2 * width + width + 3 * kv_width + 2 * width + c.hidden_size
    return floats * FLOAT + _quantized(width)


def _mlp(c: Config) -> int:
    """Per token: gate, up and their product, quantized; the output."""
    return (3 * c.intermediate_size + c.hidden_size) * FLOAT + _quantized(c.intermediate_size)


def _experts(c: Config) -> int:
    """Per token: router logits; routing weights and selected experts; the shared gate; the output."""
    return (c.num_experts + 2 * c.num_experts_per_tok + 1 + c.hidden_size) * FLOAT


def thread_scratch(c: Config, context: int) -> int:
    return ops.attention_scratch_bytes(
        context, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    ) + ops.router_scratch_bytes(c.num_experts)


def attention_shared(c: Config, threads: int, context: int) -> int:
    if FULL not in c.layer_types:
        return 0
    return ops.attention_shared_bytes(threads, context, c.num_attention_heads, c.num_key_value_heads)


def experts_scratch(c: Config, tokens: int) -> int:
    return ops.experts_scratch_bytes(
        tokens,
        c.hidden_size,
        c.num_experts,
        c.num_experts_per_tok,
        c.moe_intermediate_size,
        c.shared_expert_intermediate_size,
    )
