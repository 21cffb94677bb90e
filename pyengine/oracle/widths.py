"""How many features each tensor of a trace has."""

from __future__ import annotations

from ..checkpoint.config import LINEAR, Config
from ..checkpoint.families import family_of
from .dataflow import EMBEDDING, HEAD, LAST_NORM, module_inputs


def widths(config: Config) -> dict[str, int]:
    """{name: features} in the order of execution, of every tensor of a complete trace, and of the memories
    that it may have."""
    ends = {EMBEDDING: config.hidden_size, LAST_NORM: config.hidden_size, HEAD: config.vocab_size}
    found, states = {}, state_widths(config)
    for name in module_inputs(config):
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        found[name] = ends[name] if name in ends else _of_part(part, int(layer), config)
        if part in ("linear_attn", "self_attn"):
            found |= {state: size for state, size in states.items() if state.startswith(f"{name}.")}
    return found


def _of_part(part: str, layer: int, c: Config) -> int:
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    module, _, inner = part.partition(".")
    if module == "linear_attn":
        fused = 2 * (c.key_dim + c.value_dim)
        sizes = {"in_proj_qkv": c.conv_dim, "in_proj_z": c.value_dim, "norm": c.value_dim}
        sizes |= {"in_proj_b": c.linear_num_value_heads, "in_proj_a": c.linear_num_value_heads}
        sizes |= {"in_proj_qkvz": fused, "in_proj_ba": 2 * c.linear_num_value_heads}
        return sizes.get(inner, c.hidden_size)
    if module == "self_attn":
        sizes = {"q_proj": 2 * heads, "q_norm": heads, "k_proj": kv, "k_norm": kv, "v_proj": kv}
        return sizes.get(inner, c.hidden_size)
    if module == "mlp":
        sizes = {"gate": c.num_experts, "gate.1": c.num_experts_per_tok, "gate.2": c.num_experts_per_tok}
        sizes |= {"shared_expert_gate": 1, "gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
        shared = ("shared_expert.gate_proj", "shared_expert.up_proj")
        sizes |= dict.fromkeys(shared, c.shared_expert_intermediate_size)
        return sizes.get(inner, c.hidden_size)
    return c.hidden_size


def state_widths(config: Config) -> dict[str, int]:
    """{name: features} of the memories of each layer, which a trace may hold."""
    found = {}
    for index, kind in enumerate(config.layer_types):
        layer, kv = f"model.layers.{index}", config.num_key_value_heads * config.head_dim
        if kind == LINEAR:
            state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
            found[f"{layer}.linear_attn.conv_state"] = (config.linear_conv_kernel_dim - 1) * config.conv_dim
            found[f"{layer}.linear_attn.recurrent_state"] = state
        else:
            found |= {f"{layer}.self_attn.{part}": kv for part in ("key_cache", "value_cache")}
    return found


def state_inputs(config: Config) -> dict[str, tuple[str, ...]]:
    """{state: the tensors that it is computed from}, as `dataflow.module_inputs` of the modules."""
    found: dict[str, tuple[str, ...]] = {}
    for name in state_widths(config):
        mixer, _, part = name.rpartition(".")
        inputs = {"key_cache": ("k_norm",), "value_cache": ("v_proj",)}.get(part)
        if inputs is None:
            inputs = family_of(config).in_proj
            if part == "conv_state" and len(inputs) == 4:
                inputs = inputs[:1]  # of query, key and value alone
        found[name] = tuple(f"{mixer}.{name}" for name in inputs)
    return found
