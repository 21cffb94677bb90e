"""Qwen3-Next: Qwen3.5's layers, whose delta nets have two input projections in place of four.

`in_proj_qkvz` has, for each key head, the rows of its query, its key, the values of its value heads, and
their z; `in_proj_ba`, for each key head, b and then a of its value heads.  Value heads are grouped by their
key head in both kinds of file.  A GGUF has `in_proj_qkvz` as it is (`ssm_in`, of older converters), or with
its rows sorted into query, key and value (`attn_qkv`) and z (`attn_gate`).

A layer may have an MLP in place of the experts: config.json's `mlp_only_layers` and `decoder_sparse_step`.

Sources: llama.cpp's src/models/qwen3next.cpp and its converter; transformers' modeling_qwen3_next.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..keys import Lists
from .family import LINEAR, Family, Spec, Split
from .qwen35 import QKV, attention_specs, conv_rows, decay_specs, mixer_and_norms, mlp_specs
from .qwen35moe import EXPERT_SIZES, GATE_UP, experts_specs

if TYPE_CHECKING:
    from ..config import Config


def layer_specs(config: Config, layer: int) -> list[Spec]:
    if config.layer_types[layer] == LINEAR:
        mixer = _delta_net_specs(config, f"model.layers.{layer}.linear_attn", f"blk.{layer}")
    else:
        mixer = attention_specs(config, layer)
    mlp = experts_specs if config.has_experts(layer) else mlp_specs
    return [*mixer_and_norms(config, layer, mixer), *mlp(config, layer)]


def _delta_net_specs(c: Config, hf: str, g: str) -> list[Spec]:
    hidden, heads = c.hidden_size, c.linear_num_value_heads
    qkvz = c.conv_dim + c.value_dim, hidden
    return [
        Spec(f"{hf}.in_proj_qkvz.weight", f"{g}.ssm_in.weight", qkvz),
        Spec(f"{hf}.in_proj_ba.weight", f"{g}.ssm_ba.weight", (2 * heads, hidden)),
        *(spec._replace(order=None) for spec in decay_specs(c, hf, g)),
    ]


def qkvz_order(c: Config) -> np.ndarray:
    """int64 [rows of in_proj_qkvz]: where each lies when the rows are sorted into query, key, value, z."""
    keys, value_rows = c.linear_num_key_heads, c.value_dim // c.linear_num_key_heads
    query, key, value, z = (
        start + np.arange(keys * width).reshape(keys, width)
        for start, width in (
            (0, c.linear_key_head_dim),
            (c.key_dim, c.linear_key_head_dim),
            (2 * c.key_dim, value_rows),
            (c.conv_dim, value_rows),
        )
    )
    return np.concatenate([query, key, value, z], axis=1).reshape(-1)


def _z_rows(c: Config) -> int:
    return c.value_dim


QKVZ = Split("ssm_in.weight", {"attn_qkv.weight": conv_rows, "attn_gate.weight": _z_rows}, qkvz_order)


def _hf_fields(config: Config) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        "norm_topk_prob": True,
    }
    return fields | ({"intermediate_size": config.intermediate_size} if config.dense_layers else {})


QWEN3NEXT = Family(
    architecture="qwen3next",
    model_types=("qwen3_next",),
    hf_class="Qwen3NextForCausalLM",
    quantized_type="pyengine_qwen3_next",
    quantized_config="PyengineNextConfig",
    quantized_class="PyengineNextForCausalLM",
    sizes=EXPERT_SIZES,
    layer_specs=layer_specs,
    orders=lambda config: {},
    fused=(QKV, GATE_UP),
    split=(QKVZ,),
    value_heads="grouped",
    in_proj=("in_proj_qkvz", "in_proj_ba"),
    sections=False,
    hf_fields=_hf_fields,
    gguf_keys=Lists(harmless=frozenset({"feed_forward_length"}), neutral={"ssm.v_head_reordered": (False,)}),
    hf_keys=Lists(read=frozenset({"intermediate_size", "mlp_only_layers", "decoder_sparse_step"})),
)
