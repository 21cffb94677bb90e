"""The scale that a GGUF may have beside a weight, one per tensor or one per expert, as NVFP4 needs it.

llama.cpp's converter writes `NAME.scale` (float32) beside `NAME.weight`, and llama.cpp multiplies the product
of the weight by it, whatever the weight's type.  Here it multiplies the weight: a weight is the value of its
block times the scale, rounded to float32.  A file without the tensor has the scale 1.

Beside them `NAME.input_scale` says how a GPU rounds the activations.  llama.cpp's code for CPUs does not read
it; nor does this engine, whose activations are not rounded to four bits.

Source: llama.cpp's src/llama-model.cpp (the tensors "scale" and "input_scale").
"""

from __future__ import annotations

# The tensors that llama.cpp multiplies.  Not among them: the embedding, the router, and gate and up fused.
_SCALED = frozenset(
    "attn_q attn_k attn_v attn_output attn_qkv attn_gate ssm_in ssm_out ssm_alpha ssm_beta "
    "ffn_gate ffn_up ffn_down ffn_gate_exps ffn_up_exps ffn_down_exps "
    "ffn_gate_shexp ffn_up_shexp ffn_down_shexp output".split()
)


_ENDINGS = (".scale", ".input_scale")


def scales_of(weight: str) -> tuple[str, str] | None:
    """The names of the scale and of the input scale that a file may have beside a weight of that name."""
    stem = weight.removesuffix(".weight")
    if stem == weight or stem.split(".")[-1] not in _SCALED:
        return None
    scale, input_scale = (stem + ending for ending in _ENDINGS)
    return scale, input_scale


def weight_of(name: str) -> str | None:
    """The weight that a scale or input scale of that name stands beside; None: it is the name of neither."""
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
    if ending is None:
        return None
    weight = name.removesuffix(ending) + ".weight"
    return weight if scales_of(weight) else None
