"""Qwen3.5's models with experts: the dense models' mixers, and routed experts with a gated shared one.

Sources: llama.cpp's src/models/qwen35moe.cpp and its converter; transformers' modeling_qwen3_5_moe.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..keys import Lists
from .family import Family, Fused, Spec
from .qwen35 import QKV, mixer_specs, value_head_orders

if TYPE_CHECKING:
    from ..config import Config


def layer_specs(config: Config, layer: int) -> list[Spec]:
    return [*mixer_specs(config, layer), *experts_specs(config, layer)]


def experts_specs(config: Config, layer: int) -> list[Spec]:
    mlp, gguf = f"model.layers.{layer}.mlp", f"blk.{layer}"
    hidden, experts = config.hidden_size, config.num_experts
    ff, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
    return [
        Spec(f"{mlp}.gate.weight", f"{gguf}.ffn_gate_inp.weight", (experts, hidden)),
        Spec(f"{mlp}.experts.gate_proj", f"{gguf}.ffn_gate_exps.weight", (experts, ff, hidden)),
        Spec(f"{mlp}.experts.up_proj", f"{gguf}.ffn_up_exps.weight", (experts, ff, hidden)),
        Spec(f"{mlp}.experts.down_proj", f"{gguf}.ffn_down_exps.weight", (experts, hidden, ff)),
        Spec(f"{mlp}.shared_expert.gate_proj.weight", f"{gguf}.ffn_gate_shexp.weight", (shared, hidden)),
        Spec(f"{mlp}.shared_expert.up_proj.weight", f"{gguf}.ffn_up_shexp.weight", (shared, hidden)),
        Spec(f"{mlp}.shared_expert.down_proj.weight", f"{gguf}.ffn_down_shexp.weight", (hidden, shared)),
        Spec(f"{mlp}.shared_expert_gate.weight", f"{gguf}.ffn_gate_inp_shexp.weight", (1, hidden)),
    ]


def _expert_rows(c: Config) -> int:
    return c.moe_intermediate_size


GATE_UP: Fused = (
    "ffn_gate_up_exps.weight",
    {"ffn_gate_exps.weight": _expert_rows, "ffn_up_exps.weight": _expert_rows},
)

EXPERT_SIZES = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}

QWEN35MOE = Family(
    architecture="qwen35moe",
    model_types=("qwen3_5_moe_text", "qwen3_5_moe"),
    hf_class="Qwen3_5MoeForCausalLM",
    quantized_type="pyengine_qwen3_5_moe",
    quantized_config="PyengineConfig",
    quantized_class="PyengineForCausalLM",
    sizes=EXPERT_SIZES,
    layer_specs=layer_specs,
    orders=value_head_orders,
    fused=(QKV, GATE_UP),
    gguf_keys=Lists(harmless=frozenset({"feed_forward_length"})),
    hf_keys=Lists(harmless=frozenset({"intermediate_size"})),
)
