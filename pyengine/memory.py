"""How much memory a run takes, from the shapes alone: bounds, in bytes.

The weights lie in a mapped file: the system may drop them and read them again.  Everything else is
the process's own, and what this module bounds.  What Python and NumPy take before a model is loaded
is not in it (some 20 MB).
"""

from __future__ import annotations

import math

import numpy as np

from . import ops
from .checkpoint import Checkpoint, Tensor, model_specs
from .config import FULL, LINEAR, Config
from .decoder.model import CACHE_DTYPES

FLOAT = 4  # bytes
ALIGNMENT = 64  # of every piece of the experts' scratch
FIRST_CAPACITY = 256  # positions of a key-value cache that has just begun: see decoder/state.py
CALLS_OF_A_LAYER = 32 << 10  # about twenty, of some 1 KB in C and Python: see decoder/model.py, OneToken
PIECE, MAX_HEADS = 32, 16  # a thread's positions and query heads at a time: see csrc/attention.c


def footprint(checkpoint: Checkpoint, context: int, chunk: int, threads: int,
              arithmetic: str = "locked") -> dict[str, int]:
    """Bytes that one sequence of `context` tokens takes, its prompt computed `chunk` at a time.

    weights_mapped          the file
    weights_copied          vectors in the form the C core reads, Q4_0 matrices as Q8_0, and
                            experts that lie apart in their file
    delta_net_states        of all linear layers; the same at any length
    key_value_cache         of all full-attention layers, for `context` positions
    key_value_cache_growth  what doubling may add, the old arrays while they are copied included;
                            nothing of it when room was reserved
    activations             a chunk's arrays in Python, as if one layer's all lived at once
    one_token               the arrays of all layers that a state keeps to replay a single token
    experts_scratch         what the thread pool keeps for the experts of a chunk
    thread_scratch          for each thread some heads' attention scores, some keys or values of a
                            float16 cache as float32, and a row of expert probabilities
    total                   all but weights_mapped

    The logits of one token are in activations; all of a prompt's, when asked for, are not.
    """
    config = checkpoint.config
    tokens, item = min(chunk, context), np.dtype(CACHE_DTYPES[arithmetic]).itemsize
    sizes = {
        "weights_copied": weights_copied(checkpoint),
        "delta_net_states": delta_net_states(config),
        "key_value_cache": key_value_cache(config, context, item),
        "key_value_cache_growth": key_value_cache_growth(config, context, item),
        "activations": activations(config, tokens),
        "one_token": one_token(config),
        "experts_scratch": experts_scratch(config, tokens),
        "thread_scratch": threads * thread_scratch(config, context),
    }
    return {"weights_mapped": checkpoint.file.size, **sizes, "total": sum(sizes.values())}


# ---- weights -----------------------------------------------------------------------------------


def weights_copied(checkpoint: Checkpoint) -> int:
    vectors = sum(math.prod(spec.shape) for spec in model_specs(checkpoint.config) if not spec.linear)
    matrices = sum(copied_bytes(tensor) for name, tensor in checkpoint.tensors.items()
                   if name != "model.embed_tokens.weight")  # of which rows are read as they lie
    return (vectors + checkpoint.config.rotary_dim // 2) * FLOAT + matrices


def stored_bytes(tensor: Tensor) -> int:
    """In the file."""
    pieces = tensor.data if isinstance(tensor.data, tuple) else (tensor.data,)
    return sum(piece.nbytes for piece in pieces) + (
        0 if tensor.scales is None else tensor.scales.nbytes)


def copied_bytes(tensor: Tensor) -> int:
    """Of the copy that decoder/linear.py makes of a matrix; 0: it is read where it is mapped."""
    if tensor.type == "Q4_0":
        return stored_bytes(tensor) // 18 * 34
    return stored_bytes(tensor) if isinstance(tensor.data, tuple) else 0


# ---- the state ---------------------------------------------------------------------------------


def delta_net_states(c: Config) -> int:
    conv = (c.linear_conv_kernel_dim - 1) * c.conv_dim
    recurrent = c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    return c.layer_types.count(LINEAR) * (conv + recurrent) * FLOAT


def key_value_cache(c: Config, context: int, item: int = FLOAT) -> int:
    """item: bytes of a key's or a value's element."""
    return c.layer_types.count(FULL) * 2 * _cache_array(c, max(context, FIRST_CAPACITY), item)


def key_value_cache_growth(c: Config, context: int, item: int = FLOAT) -> int:
    """An array that is full doubles: it ends below twice the context, and its old half, itself at
    most the context, lives until it is copied."""
    if context <= FIRST_CAPACITY or FULL not in c.layer_types:
        return 0
    return key_value_cache(c, context, item) + _cache_array(c, context, item)


def _cache_array(c: Config, positions: int, item: int) -> int:
    """Keys, or values, of one layer."""
    return positions * c.num_key_value_heads * c.head_dim * item


# ---- scratch -----------------------------------------------------------------------------------


def activations(c: Config, tokens: int) -> int:
    """Of the larger kind of layer, with the embedding rows and one token's logits."""
    layer = max(_layer(c, kind) for kind in set(c.layer_types))
    return tokens * (_before_layers(c) + layer) + 2 * _logits(c)


def one_token(c: Config) -> int:
    """See OneToken in decoder/model.py: its arrays, and its list of calls with what Python holds of it."""
    layers = sum(_layer(c, kind) + CALLS_OF_A_LAYER for kind in c.layer_types)
    return _before_layers(c) + layers + _logits(c) + CALLS_OF_A_LAYER


def _before_layers(c: Config) -> int:
    """Per token: the embedding's codes and values; the rope table."""
    return (3 * c.hidden_size + c.rotary_dim) * FLOAT


def _layer(c: Config, kind: str) -> int:
    """Per token: what lies before the layer, between its halves and after it; normed twice; its halves."""
    hidden = c.hidden_size
    mixer = _delta_net(c) if kind == LINEAR else _attention(c)
    return 3 * hidden * FLOAT + 2 * (hidden * FLOAT + _quantised(hidden)) + mixer + _mlp(c)


def _logits(c: Config) -> int:
    return (c.vocab_size + c.hidden_size) * FLOAT + _quantised(c.hidden_size)


def _quantised(cols: int) -> int:
    """One token's int16 codes and their scales."""
    groups = -(-cols // ops.GROUP)
    return groups * (ops.GROUP * 2 + FLOAT)


def _delta_net(c: Config) -> int:
    """Per token: qkv before and after the convolution; z; b, a, beta, decay; query, key; the rule's
    output before and after its norm, quantised; out_proj."""
    floats = (2 * c.conv_dim + c.value_dim + 4 * c.linear_num_value_heads + 2 * c.key_dim
              + 2 * c.value_dim + c.hidden_size)
    return floats * FLOAT + _quantised(c.value_dim)


def _attention(c: Config) -> int:
    """Per token: query with gate; query; key before and after its norm, value; the output before
    and after its gate, quantised; o_proj."""
    width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    floats = 2 * width + width + 3 * kv_width + 2 * width + c.hidden_size
    return floats * FLOAT + _quantised(width)


def _mlp(c: Config) -> int:
    """Per token: router logits; routing weights and selected experts; the shared gate; the output."""
    return (c.num_experts + 2 * c.num_experts_per_tok + 1 + c.hidden_size) * FLOAT


def thread_scratch(c: Config, context: int) -> int:
    heads = min(c.num_attention_heads // c.num_key_value_heads, MAX_HEADS)
    return (heads * context + PIECE * c.head_dim + c.num_experts) * FLOAT


def experts_scratch(c: Config, tokens: int) -> int:
    """The block that pe_experts takes from the pool: lay_out in csrc/experts.c, piece by piece."""
    slots = tokens * c.num_experts_per_tok
    job = ops.ffi.sizeof("pe_matrix") + ops.ffi.sizeof("pe_activations") + 16
    groups = -(-c.hidden_size // ops.GROUP)
    pieces = [
        (c.num_experts + 1) * 8, slots * 8, slots * FLOAT, slots * 8, tokens * 8,  # the slot table
        2 * (c.num_experts + 1) * job,
        slots * c.hidden_size * FLOAT, slots * groups * ops.GROUP * 2, slots * groups * FLOAT,
        tokens * FLOAT,
        *_branch(slots, c.moe_intermediate_size, c.hidden_size),
        *_branch(tokens, c.shared_expert_intermediate_size, c.hidden_size),
    ]
    return sum(-(-piece // ALIGNMENT) * ALIGNMENT for piece in pieces)


def _branch(rows: int, ff: int, hidden: int) -> list[int]:
    """gate, up and h; h quantised; down."""
    groups = -(-ff // ops.GROUP)
    return [rows * ff * FLOAT] * 3 + [rows * groups * ops.GROUP * 2, rows * groups * FLOAT,
                                      rows * hidden * FLOAT]
