"""Bugs that shipped in engines of this model family: how each is planted in `peer.py` and named.

`further_bugs.py` has more of them.
"""

import functools
from dataclasses import dataclass

import numpy as np
from paths import GOLDEN

from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.summary import extra_layers

TOKENS = 24


@dataclass(frozen=True)
class Bug:
    """row of the list of traps; how it is planted; what is guilty; how the diagnosis names it."""

    row: int
    text: str
    fault: str
    guilty: str
    named: str | None
    model: str = "pattern31"
    splits: tuple | None = None  # at once
    budget: str = "float32"
    int8: bool = False
    also: tuple = ()  # other right names: of a tensor that tells less

    def __str__(self):
        return f"{self.row}-{self.fault}-{self.model}"


DELTA, FULL, MLP = "model.layers.0.linear_attn", "model.layers.3.self_attn", "model.layers.0.mlp"
BUGS = [
    Bug(
        1,
        "value heads paired with the wrong key heads",
        "heads",
        f"{DELTA}.norm",
        "grouped value heads are paired with key heads as if tiled (g mod n_k)",
    ),
    Bug(
        1,
        "the same, three value heads to a key head",
        "heads",
        f"{DELTA}.norm",
        "tiled value heads are paired with key heads as if grouped (t div ratio)",
        "nextn",
    ),
    Bug(
        2,
        "conv1d channels scrambled",
        "conv1d_channels",
        f"{DELTA}.norm",
        "conv1d: the value heads are un-tiled twice",
        "nextn",
    ),
    Bug(
        2,
        "ssm_a taken as A_log",
        "ssm_a_as_a_log",
        f"{DELTA}.norm",
        "ssm_a, which is -exp(A_log), is taken for A_log",
    ),
    Bug(2, "shared gate's shape", "shared_gate_shape", f"{MLP}.shared_expert_gate", None),
    Bug(
        3,
        "norm's +1 applied twice",
        "norm_plus_one_twice",
        "model.layers.0.input_layernorm",
        "the norm's +1 is there twice: scaled by 2 + weight",
    ),
    Bug(
        3,
        "norm's +1 not applied",
        "norm_plus_one_missing",
        "model.layers.0.input_layernorm",
        "the norm's +1 is missing: scaled by weight, not by 1 + weight",
    ),
    Bug(
        4,
        "1 + w rounded to bfloat16",
        "norm_in_bfloat16",
        "model.layers.0.input_layernorm",
        "1 + weight of the norm is rounded to bfloat16",
    ),
    Bug(
        5,
        "RoPE pairs (2i, 2i+1)",
        "rope_pairs",
        f"{FULL}.o_proj",
        "RoPE turns pairs (2i, 2i + 1), not halves",
    ),
    Bug(
        5,
        "partial rotary width dropped",
        "rope_full_width",
        f"{FULL}.o_proj",
        "RoPE turns the whole head: the partial rotary width is dropped",
    ),
    Bug(
        5,
        "sections misread",
        "rope_sections",
        f"{FULL}.o_proj",
        "RoPE's sections are misread: only the temporal one turns, taken as a block",
    ),
    Bug(
        6,
        "next-token block counted as a layer",
        "nextn",
        "model.norm",
        "the next-token-prediction block were a layer",
        "nextn",
    ),
    Bug(
        7,
        "several tokens with a cache: state dropped",
        "state_dropped",
        f"{DELTA}.norm",
        "the convolution's and the recurrent state are dropped at token 10",
        splits=(10, 14),
    ),
    Bug(
        8,
        "prefill and decode disagree",
        "decode_conv",
        f"{DELTA}.norm",
        "the convolution's state is a token old at token 23",
        splits=(23, 1),
    ),
    Bug(
        9,
        "chunked delta rule wrong at a length that is no multiple",
        "last_chunk",
        f"{DELTA}.norm",
        "the recurrent state is dropped at token 16",
    ),
    Bug(
        10,
        "decay far from 1 mixes up coefficients",
        "decay",
        f"{DELTA}.norm",
        "the delta rule reads the state before its decay",
    ),
    Bug(
        11,
        "left padding ignored at batch 1",
        "left_padding",
        f"{DELTA}.norm",
        "left padding is not masked: 3 tokens 0 before the first",
    ),
    Bug(
        12,
        "prefix cache without the recurrent state",
        "prefix_cache",
        f"{DELTA}.norm",
        "the recurrent state is dropped at token 12",
        splits=(12, 12),
    ),
    Bug(
        13,
        "strides ignored: halves of a head read as one piece",
        "strides",
        f"{FULL}.q_norm",
        "query and gate are split across the whole, not head by head",
    ),
    Bug(14, "A_log kept in bfloat16", "a_log_in_bfloat16", f"{DELTA}.norm", "A_log is rounded to bfloat16"),
    Bug(
        16,
        "routing weights not renormalised",
        "not_renormalised",
        f"{MLP}.gate.1",
        "the routing weights are not renormalised",
    ),
    Bug(
        18,
        "int8 dot saturates (vpmaddubsw)",
        "saturating",
        f"{DELTA}.in_proj_qkv",
        None,
        budget="int8-activations",
        int8=True,
    ),
    Bug(
        20,
        "vocabulary of another model: other ids",
        "vocabulary",
        "model.embed_tokens",
        "the embeddings are those of other ids (227 for 220): another vocabulary, or ids that were changed",
    ),
    Bug(
        0,
        "gate and up swapped",
        "gate_up_swapped",
        f"{MLP}.shared_expert.down_proj",
        "gate and up are swapped",
    ),
]


def path_of(model):
    return GOLDEN / f"{model}.gguf"


@functools.cache
def oracle(model):
    return Oracle(None, path_of(model))


@functools.cache
def ids_of(model):
    return np.random.default_rng(1729).integers(0, oracle(model).model.config.vocab_size, TOKENS)


def names(verdict):
    return [match.name for match in verdict.mistakes] + extra_layers(verdict)
