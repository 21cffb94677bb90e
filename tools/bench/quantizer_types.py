"""Which block type llama.cpp's quantizer gives each matrix of a file, without an importance matrix.

Source: llama.cpp's src/llama-quant.cpp, for this engine's families.  A file type is a rule, named as
llama-quantize names it: a Q4_K_M file has Q4_K, and Q6_K where a matrix counts more.  The rule is compared
with the quantizer itself in tests/evaluation/test_make_slice.py.
"""

from __future__ import annotations

import gguf

from pyengine.checkpoint.config import Config
from pyengine.checkpoint.families import Spec

# {file type: the type of what the rule does not name}
FILE_TYPES = {
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "MXFP4_MOE": "MXFP4",
}
NARROW = {"IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def type_of(spec: Spec, file_type: str, config: Config) -> str:
    """The block type of one quantized matrix in a file of this type."""
    if config.num_experts == 8:
        raise ValueError("experts: want any number but 8, for which llama.cpp has rules of its own; got 8")
    kind, columns = _by_name(spec, file_type, config), spec.shape[-1]
    return kind if _fits(columns, kind) else NARROW[kind]


def _by_name(spec: Spec, file_type: str, config: Config) -> str:
    base, name = FILE_TYPES[file_type], spec.gguf
    if name == ("token_embd.weight" if config.tie_word_embeddings else "output.weight"):
        narrow = not _fits(config.hidden_size, base)
        return "Q8_0" if narrow or file_type in ("Q8_0", "MXFP4_MOE") else "Q6_K"
    if file_type == "MXFP4_MOE":
        return "MXFP4" if len(spec.shape) == 3 else "Q8_0"
    if not name.startswith("blk."):
        return base
    layer, layers = int(name.split(".")[1]), config.num_hidden_layers
    if name.endswith(("attn_v.weight", "attn_qkv.weight")):
        return _attention_value(file_type, layer, layers, config) or base
    if ".ffn_down" in name:
        return _ffn_down(file_type, layer, layers) or base
    if name.endswith("attn_output.weight"):
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(file_type, base)
    return base


def _attention_value(file_type: str, layer: int, layers: int, config: Config) -> str | None:
    """Of attn_v and attn_qkv: every layer has one of the two."""
    many_queries = config.num_attention_heads // config.num_key_value_heads >= 4
    return {
        "Q2_K": "Q4_K" if many_queries else "Q3_K",
        "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "Q4_K_S": "Q5_K" if layer < 4 else None,
        "Q4_K_M": "Q6_K" if _counts_more(layer, layers) else None,
        "Q5_K_M": "Q6_K" if _counts_more(layer, layers) else None,
        "IQ4_NL": "Q5_K" if many_queries else None,
        "IQ4_XS": "Q5_K" if many_queries else None,
    }.get(file_type)


def _ffn_down(file_type: str, layer: int, layers: int) -> str | None:
    """Of experts and the shared expert alike."""
    first = "Q5_K" if layer < layers // 8 else None
    return {
        "Q2_K": "Q3_K",
        "Q3_K_M": "Q5_K" if layer < layers // 16 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "Q4_K_S": first,
        "Q4_K_M": "Q6_K" if _counts_more(layer, layers) else None,
        "Q5_K_M": "Q6_K" if _counts_more(layer, layers) else None,
        "IQ4_NL": first,
        "IQ4_XS": first,
    }.get(file_type)


def _counts_more(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fits(columns: int, kind: str) -> bool:
    return columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0
