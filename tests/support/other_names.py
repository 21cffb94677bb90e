"""A trace as other engines' modules hand it out: their names, their fused tensors, their shapes."""

import numpy as np


def _without(name, ends):
    return name.endswith(ends)


def as_vllm(trace, config):
    """vLLM's modules: fused projections, hidden states and residual apart, no output of mixers."""
    t, found = trace.tensors, {}
    for name, array in t.items():
        theirs = f"language_model.{name}" if name != "lm_head" else "language_model.logits_processor"
        if _without(
            name, ("k_proj", "v_proj", "up_proj", "in_proj_z", "in_proj_a", "self_attn", "linear_attn")
        ):
            continue
        if _without(name, ("shared_expert", "gate.1", "gate.2")):
            continue
        found |= _fused(name, theirs, array, t, config)
    return found


def _fused(name, theirs, array, t, config):
    joined = {
        "self_attn.q_proj": ("self_attn.qkv_proj", ("self_attn.k_proj", "self_attn.v_proj")),
        "mlp.gate_proj": ("mlp.gate_up_proj", ("mlp.up_proj",)),
        "shared_expert.gate_proj": ("shared_expert.gate_up_proj", ("shared_expert.up_proj",)),
        "linear_attn.in_proj_qkv": ("linear_attn.in_proj_qkvz", ("linear_attn.in_proj_z",)),
        "linear_attn.in_proj_b": ("linear_attn.in_proj_ba", ("linear_attn.in_proj_a",)),
    }
    for end, (fused, others) in joined.items():
        if name.endswith(end):
            stem = name.removesuffix(end)
            return {
                theirs.removesuffix(end) + fused: np.hstack([array, *(t[stem + other] for other in others)])
            }
    if name.endswith("mlp.experts"):  # (the gated shared expert, the routed sum)
        return {theirs: np.zeros_like(array), f"{theirs}.1": array}
    if name.count(".") == 2 and "layers" in name:  # hidden states and residual
        return {theirs: array * np.float32(0.25), f"{theirs}.1": array * np.float32(0.75)}
    if name.endswith(("q_norm", "k_norm")):  # head by head
        return {theirs: array.reshape(-1, config.head_dim)}
    if name.endswith("layernorm"):
        return {theirs: array, f"{theirs}.1": array * 2}
    return {theirs: array}


def as_sglang(trace, config):
    """The same, with the attention's modules on the layer itself, and the shared expert not gated."""
    found = {}
    for name, array in as_vllm(trace, config).items():
        if not name.endswith("mlp.experts.1"):
            found[name.replace(".self_attn.", ".")] = array
        else:
            found[name.removesuffix(".1")] = array
    shared = {f"language_model.{n}": a for n, a in trace.tensors.items() if n.endswith("shared_expert")}
    return found | shared


def as_mlx(trace, config):
    """mlx-lm's modules: a batch of one, heads apart; no outputs of the mixers' sums."""
    found = {}
    for name, array in trace.tensors.items():
        if name.endswith(("gate.1", "gate.2")):
            continue
        value = array[None]
        if name.endswith(("q_norm", "k_norm")):
            value = array.reshape(1, len(array), -1, config.head_dim)
        found[f"language_model.{name}"] = value
    return found


def as_candle(trace, config):
    """A program with candle-transformers' prefixes: query and key are [1, heads, T, n]."""
    found = {}
    for name, array in trace.tensors.items():
        value = array[None]
        if name.endswith(("q_norm", "k_norm")):
            value = np.moveaxis(array.reshape(1, len(array), -1, config.head_dim), 1, 2)
        found[name.replace("model.", "model.language_model.", 1)] = np.ascontiguousarray(value)
    return found


FORMS = {"vllm": as_vllm, "sglang": as_sglang, "mlx": as_mlx, "candle": as_candle}
