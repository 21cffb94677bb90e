"""Qwen3.5's dense models: delta nets and gated attention, a SwiGLU MLP in every layer.

Sources: llama.cpp's src/models/qwen35.cpp and its converter; transformers' modeling_qwen3_5.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..keys import Lists
from .family import LINEAR, Family, Fused, Spec

if TYPE_CHECKING:
    from ..config import Config


def minus_one(stored: np.ndarray) -> np.ndarray:
    """A zero-centered norm: a GGUF stores 1 + weight."""
    return stored - 1.0


def log_of_negated(stored: np.ndarray) -> np.ndarray:
    """ssm_a = -exp(A_log).  Kept in float64: rounded, it would not give ssm_a back.  Of what is not below 0
    NaN or infinity, without a warning."""
    with np.errstate(invalid="ignore", divide="ignore"):
        logarithms: NDArray[np.float64] = np.log(-stored)
    return logarithms


def layer_specs(config: Config, layer: int) -> list[Spec]:
    return [*mixer_specs(config, layer), *mlp_specs(config, layer)]


def mlp_specs(config: Config, layer: int) -> list[Spec]:
    hf, gguf = f"model.layers.{layer}", f"blk.{layer}"
    hidden, ff = config.hidden_size, config.intermediate_size
    return [
        Spec(f"{hf}.mlp.gate_proj.weight", f"{gguf}.ffn_gate.weight", (ff, hidden)),
        Spec(f"{hf}.mlp.up_proj.weight", f"{gguf}.ffn_up.weight", (ff, hidden)),
        Spec(f"{hf}.mlp.down_proj.weight", f"{gguf}.ffn_down.weight", (hidden, ff)),
    ]


def mixer_specs(config: Config, layer: int) -> list[Spec]:
    """What a layer has before its MLP: the delta net or attention, and both norms."""
    if config.layer_types[layer] == LINEAR:
        mixer = _delta_net_specs(config, f"model.layers.{layer}.linear_attn", f"blk.{layer}")
    else:
        mixer = attention_specs(config, layer)
    return mixer_and_norms(config, layer, mixer)


def mixer_and_norms(config: Config, layer: int, mixer: list[Spec]) -> list[Spec]:
    hf, gguf, width = f"model.layers.{layer}", f"blk.{layer}", (config.hidden_size,)
    after = f"{hf}.post_attention_layernorm.weight", f"{gguf}.post_attention_norm.weight"
    return [
        Spec(f"{hf}.input_layernorm.weight", f"{gguf}.attn_norm.weight", width, False, decode=minus_one),
        *mixer,
        Spec(*after, width, False, decode=minus_one),
    ]


def _delta_net_specs(c: Config, hf: str, g: str) -> list[Spec]:
    hidden, heads = c.hidden_size, c.linear_num_value_heads
    return [
        Spec(f"{hf}.in_proj_qkv.weight", f"{g}.attn_qkv.weight", (c.conv_dim, hidden), order="channels"),
        Spec(f"{hf}.in_proj_z.weight", f"{g}.attn_gate.weight", (c.value_dim, hidden), order="values"),
        Spec(f"{hf}.in_proj_b.weight", f"{g}.ssm_beta.weight", (heads, hidden), order="heads"),
        Spec(f"{hf}.in_proj_a.weight", f"{g}.ssm_alpha.weight", (heads, hidden), order="heads"),
        *decay_specs(c, hf, g),
    ]


def decay_specs(c: Config, hf: str, g: str) -> list[Spec]:
    """A delta net's parameters behind its input projections."""
    heads, taps = c.linear_num_value_heads, c.linear_conv_kernel_dim
    conv = f"{hf}.conv1d.weight", f"{g}.ssm_conv1d.weight", (c.conv_dim, 1, taps)
    return [
        Spec(*conv, False, order="channels"),
        Spec(f"{hf}.A_log", f"{g}.ssm_a", (heads,), False, "heads", log_of_negated),
        # ollama's converter leaves the ending out.
        Spec(f"{hf}.dt_bias", f"{g}.ssm_dt.bias", (heads,), False, "heads", gguf_also=(f"{g}.ssm_dt",)),
        Spec(f"{hf}.norm.weight", f"{g}.ssm_norm.weight", (c.linear_value_head_dim,), False),
        Spec(
            f"{hf}.out_proj.weight",
            f"{g}.ssm_out.weight",
            (c.hidden_size, c.value_dim),
            order="value columns",
        ),
    ]


def attention_specs(c: Config, layer: int) -> list[Spec]:
    hf, g = f"model.layers.{layer}.self_attn", f"blk.{layer}"
    hidden, n, width = c.hidden_size, (c.head_dim,), c.num_attention_heads * c.head_dim
    return [
        Spec(f"{hf}.q_proj.weight", f"{g}.attn_q.weight", (_query_rows(c), hidden)),
        Spec(f"{hf}.k_proj.weight", f"{g}.attn_k.weight", (_key_rows(c), hidden)),
        Spec(f"{hf}.v_proj.weight", f"{g}.attn_v.weight", (_key_rows(c), hidden)),
        Spec(f"{hf}.q_norm.weight", f"{g}.attn_q_norm.weight", n, False, decode=minus_one),
        Spec(f"{hf}.k_norm.weight", f"{g}.attn_k_norm.weight", n, False, decode=minus_one),
        Spec(f"{hf}.o_proj.weight", f"{g}.attn_output.weight", (hidden, width)),
    ]


def conv_rows(c: Config) -> int:
    return c.conv_dim


def _query_rows(c: Config) -> int:
    return 2 * c.num_attention_heads * c.head_dim


def _key_rows(c: Config) -> int:
    return c.num_key_value_heads * c.head_dim


QKV: Fused = (
    "attn_qkv.weight",
    {"attn_q.weight": _query_rows, "attn_k.weight": _key_rows, "attn_v.weight": _key_rows},
)


def value_head_orders(config: Config) -> dict[str, np.ndarray]:
    """Where each of Hugging Face's rows lies in a GGUF, by what the rows are: heads, values, value columns,
    channels.  Hugging Face has value heads grouped by their key head, llama.cpp's converter tiles them."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    ratio = heads // keys
    grouped = np.arange(heads)
    tiled = grouped % ratio * keys + grouped // ratio
    width = config.linear_value_head_dim
    values = (tiled[:, None] * width + np.arange(width)).reshape(-1)
    channels = np.concatenate([np.arange(2 * config.key_dim), 2 * config.key_dim + values])
    return {"heads": tiled, "values": values, "value columns": values, "channels": channels}


QWEN35 = Family(
    architecture="qwen35",
    model_types=("qwen3_5_text", "qwen3_5"),
    hf_class="Qwen3_5ForCausalLM",
    quantized_type="pyengine_qwen3_5",
    quantized_config="PyengineDenseConfig",
    quantized_class="PyengineDenseForCausalLM",
    sizes={"intermediate_size": "feed_forward_length"},
    layer_specs=layer_specs,
    orders=value_head_orders,
    fused=(QKV,),
    gguf_keys=Lists(
        neutral=dict.fromkeys(
            (
                "expert_count",
                "expert_used_count",
                "expert_feed_forward_length",
                "expert_shared_feed_forward_length",
            ),
            (0,),
        )
    ),
    hf_keys=Lists(
        neutral=dict.fromkeys(
            (
                "num_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
                "shared_expert_intermediate_size",
            ),
            (0,),
        )
    ),
)
