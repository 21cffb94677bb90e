"""Hugging Face's own models, run wholly in float64: the oracle of the `float64` arithmetic.

`Qwen3_5MoeForCausalLM`, the dense `Qwen3_5ForCausalLM`, and `Qwen3NextForCausalLM`.

Three things, none of which knows `pyengine`:

    random_state_dict(config, seed)   weights of a lively random model, Hugging Face's names
    load_float64(gguf_path)           a GGUF file as a transformers model in float64
    trace(model, ids, splits)         what every module of that model put out

"Wholly in float64" is `model.double()` under `Float64Mode`, which turns the model's own casts to
float32 into casts to float64. One exception is on purpose: `rotary_emb.inv_freq` is computed in
float32 by transformers, and those 32-bit values, widened, are the model's frequencies.
"""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf_writer import LAYER_NAMES, TOP_LEVEL_NAMES, tensor_shapes
from torch.overrides import TorchFunctionMode
from transformers import (
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

# ---- random weights -----------------------------------------------------------------------------


def random_state_dict(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random weights whose activations are O(1), so that every part of the model matters.

    Drawn in the order of `gguf_writer.tensor_shapes` (the forward pass: embeddings, layers, norm,
    lm_head, then `mtp.*` where the config has `mtp_num_hidden_layers`), each tensor once, in float64,
    then rounded: bfloat16, A_log float32. Float64 draws do not depend on the processor's vector width.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(config, nextn=config.get("mtp_num_hidden_layers", 0) > 0)
    tied = "lm_head.weight" not in shapes
    return {name: random_tensor(name, shape, tied, generator) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...], tied: bool, generator: torch.Generator) -> torch.Tensor:
    """One tensor, by the role that its name gives it; `tied`: the embeddings are lm_head too."""
    if name.endswith(".A_log"):  # decay rates as the model's own initialisation draws them
        return uniform(shape, 0.01, 16.0, generator).log().float()
    if name.endswith(".dt_bias"):
        return uniform(shape, -4.0, 1.0, generator).bfloat16()
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith("linear_attn.norm.weight"):  # not zero-centred
        return (1.0 + 0.1 * noise).bfloat16()
    if len(shape) == 1:
        return (0.1 * noise).bfloat16()
    return (noise * weight_std(name, shape, tied)).bfloat16()


def weight_std(name: str, shape: tuple[int, ...], tied: bool) -> float:
    """Standard deviation of a matrix: 1/sqrt(columns), except where that would make a dull model.

    Embeddings of size 1 are for a model with an lm_head of its own: tied, they would make every
    logit of the token just read as large as sqrt(hidden_size).
    """
    if name.endswith("embed_tokens.weight") and not tied:
        return 1.0
    if name.endswith("conv1d.weight"):
        return 0.5
    gain = 2.0 if name.endswith(("mlp.gate.weight", "in_proj_a.weight")) else 1.0
    return gain * shape[-1] ** -0.5


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


# ---- GGUF -> transformers in float64 ------------------------------------------------------------


class Float64Mode(TorchFunctionMode):
    """While active, `.float()` answers float64 and every `torch.float32` argument means float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return function(*args, **kwargs)


def load_float64(gguf_path: str | Path) -> PreTrainedModel:
    """The model in a `qwen35moe`, `qwen35` or `qwen3next` GGUF file (the first of them, if split), float64,
    ready to run.

    Its next-token block, if any, is left out: it is no layer of the forward pass.
    """
    readers = [gguf.GGUFReader(path) for path in split_paths(Path(gguf_path))]
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    config = hf_config(readers[0], tensors)
    return as_float64(config, hf_state_dict(config, tensors))


CLASSES = {
    Qwen3_5TextConfig: Qwen3_5ForCausalLM,
    Qwen3_5MoeTextConfig: Qwen3_5MoeForCausalLM,
    Qwen3NextConfig: Qwen3NextForCausalLM,
}


def as_float64(config: PreTrainedConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The configuration's model with these weights."""
    model = CLASSES[type(config)](config).double().eval()
    model.load_state_dict(state, strict=True)
    check_float64(model)
    return model


def split_paths(path: Path) -> list[Path]:
    """All files of NAME-00001-of-0000N.gguf, or the one file."""
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    return [
        path.with_name(f"{match[1]}-{part:05d}-of-{match[2]}.gguf") for part in range(1, int(match[2]) + 1)
    ]


def architecture(reader: gguf.GGUFReader) -> str:
    return reader.fields["general.architecture"].contents()


def hf_config(reader: gguf.GGUFReader, tensors: dict[str, gguf.ReaderTensor]) -> PreTrainedConfig:
    """GGUF metadata as transformers' configuration, attention and experts in their eager forms."""

    def value(key: str):
        return reader.fields[f"{architecture(reader)}.{key}"].contents()

    if architecture(reader) == "qwen35":
        kind, sizes = Qwen3_5TextConfig, {"intermediate_size": value("feed_forward_length")}
    else:
        kind = Qwen3NextConfig if architecture(reader) == "qwen3next" else Qwen3_5MoeTextConfig
        sizes = {
            "num_experts": value("expert_count"),
            "num_experts_per_tok": value("expert_used_count"),
            "moe_intermediate_size": value("expert_feed_forward_length"),
            "shared_expert_intermediate_size": value("expert_shared_feed_forward_length"),
            "experts_implementation": "eager",
        }
    sections = {}
    if kind is not Qwen3NextConfig:
        sections = {"mrope_section": value("rope.dimension_sections")[:3], "mrope_interleaved": True}
    return kind(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=value("embedding_length"),
        num_hidden_layers=len(layer_types(reader)),
        layer_types=layer_types(reader),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        head_dim=value("attention.key_length"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=shortest_decimal(value("attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": value("rope.freq_base"),
            "partial_rotary_factor": value("rope.dimension_count") / value("attention.key_length"),
            **sections,
            **yarn_parameters(reader),
        },
        linear_conv_kernel_dim=value("ssm.conv_kernel"),
        linear_key_head_dim=value("ssm.state_size"),
        linear_value_head_dim=value("ssm.inner_size") // value("ssm.time_step_rank"),
        linear_num_key_heads=value("ssm.group_count"),
        linear_num_value_heads=value("ssm.time_step_rank"),
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="eager",
        **sizes,
    )


def yarn_parameters(reader: gguf.GGUFReader) -> dict:
    """YaRN under transformers' names, of a file that has it."""
    prefix = f"{architecture(reader)}.rope.scaling."
    fields = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }
    if fields.pop("type", None) != "yarn":
        return {}
    names = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    numbers = {names[key]: value for key, value in fields.items()}
    exact = {
        key: shortest_decimal(value) if isinstance(value, float) else value for key, value in numbers.items()
    }
    return {"rope_type": "yarn", **exact}


def layer_types(reader: gguf.GGUFReader) -> list[str]:
    """Kinds of the decoder layers: `attention.recurrent_layers` if written, else the interval."""
    fields, prefix = reader.fields, architecture(reader)
    nextn = fields.get(f"{prefix}.nextn_predict_layers")
    layers = fields[f"{prefix}.block_count"].contents() - (nextn.contents() if nextn else 0)
    recurrent = fields.get(f"{prefix}.attention.recurrent_layers")
    if recurrent is not None:
        linear = recurrent.contents()[:layers]
    else:
        interval = fields[f"{prefix}.full_attention_interval"].contents()
        linear = [layer % interval != 0 for layer in range(1, layers + 1)]
    return ["linear_attention" if is_linear else "full_attention" for is_linear in linear]


def shortest_decimal(value: float) -> float:
    """The float64 that a float32 field was written from: 9.99999997e-07 is config.json's 1e-06."""
    return float(str(np.float32(value)))


def hf_state_dict(config: PreTrainedConfig, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, torch.Tensor]:
    """Every parameter of the model, float64, from the GGUF's tensors."""
    state = {
        hf_name: hf_layout(config, hf_name, dequantize(tensors[gguf_name]))
        for hf_name, gguf_name in TOP_LEVEL_NAMES.items()
        if gguf_name in tensors
    }
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        block = {
            name.split(".", 2)[2]: dequantize(tensor)
            for name, tensor in tensors.items()
            if name.startswith(f"blk.{layer}.")
        }
        split_fused_qkv(config, block)
        join_qkvz(config, block)
        for suffix, array in join_gate_and_up(block).items():
            name = f"model.layers.{layer}.{suffix}"
            state[name] = hf_layout(config, name, array)
    return state


def dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor's values, rows first, float32 as gguf-py's reference gives them, widened to float64."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.astype(np.float64).reshape(shape)


def split_fused_qkv(config: PreTrainedConfig, block: dict[str, np.ndarray]) -> None:
    """`attn_qkv` of a full-attention layer (known by its `attn_q_norm`) into attn_q, attn_k, attn_v."""
    if "attn_q_norm.weight" not in block or "attn_qkv.weight" not in block:
        return
    query = 2 * config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    rows = np.split(block.pop("attn_qkv.weight"), [query, query + key])
    block.update(zip(("attn_q.weight", "attn_k.weight", "attn_v.weight"), rows))


def join_qkvz(config: PreTrainedConfig, block: dict[str, np.ndarray]) -> None:
    """Qwen3-Next's `attn_qkv` and `attn_gate` of a delta net into `ssm_in`: for each key head its query, its
    key, its value heads' values, their z."""
    if not isinstance(config, Qwen3NextConfig) or "attn_gate.weight" not in block:
        return
    n_k, key_dim = config.linear_num_key_heads, config.linear_num_key_heads * config.linear_key_head_dim
    query, key, value = np.split(block.pop("attn_qkv.weight"), [key_dim, 2 * key_dim])
    z = block.pop("attn_gate.weight")
    heads = zip(*(np.split(part, n_k) for part in (query, key, value, z)))
    block["ssm_in.weight"] = np.concatenate([part for head in heads for part in head])


def join_gate_and_up(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One block under Hugging Face's names, `gate_up_proj` [E, 2*ff, hidden] made whole where there are
    experts."""
    block, gate_up = dict(block), {}
    if "ffn_gate_up_exps.weight" in block:
        gate_up["mlp.experts.gate_up_proj"] = block.pop("ffn_gate_up_exps.weight")
    elif "ffn_gate_exps.weight" in block:
        parts = [block.pop("ffn_gate_exps.weight"), block.pop("ffn_up_exps.weight")]
        gate_up["mlp.experts.gate_up_proj"] = np.concatenate(parts, axis=1)
    hf_names = {gguf_name: hf_name for hf_name, gguf_name in LAYER_NAMES.items()}
    return gate_up | {hf_names[name]: array for name, array in block.items()}


def hf_layout(config: PreTrainedConfig, name: str, array: np.ndarray) -> torch.Tensor:
    """One tensor's values as Hugging Face has them, float64."""
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        array = array - 1.0  # in float64: exact, so that 1 + weight gives back the file's value
    elif name.endswith(".A_log"):
        array = untile(config, np.log(-array), 0)
    elif name.endswith(".conv1d.weight"):
        array = untile_values(config, array)[:, None, :]
    elif name.endswith(".in_proj_qkv.weight"):
        array = untile_values(config, array)
    elif name.endswith((".in_proj_z.weight", ".in_proj_a.weight", ".in_proj_b.weight", ".dt_bias")):
        array = untile(config, array, 0)
    elif name.endswith(".out_proj.weight"):
        array = untile(config, array, 1)
    elif name.endswith(".shared_expert_gate.weight"):
        array = array.reshape(1, -1)  # older files hold it as a vector
    return torch.from_numpy(np.ascontiguousarray(array))


def untile_values(config: PreTrainedConfig, array: np.ndarray) -> np.ndarray:
    """Untile the value rows of an array whose rows are query, key, value channels."""
    first_value = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return np.concatenate([array[:first_value], untile(config, array[first_value:], 0)])


def untile(config: PreTrainedConfig, array: np.ndarray, axis: int) -> np.ndarray:
    """Value heads along `axis` from tiled order (j*n_k + k) to grouped (k*r + j), r = n_v / n_k.
    Qwen3-Next's are grouped in the file."""
    if isinstance(config, Qwen3NextConfig):
        return array
    n_k, n_v = config.linear_num_key_heads, config.linear_num_value_heads
    ratio, width = n_v // n_k, array.shape[axis] // n_v
    grouped = [
        (j * n_k + k) * width + lane for k in range(n_k) for j in range(ratio) for lane in range(width)
    ]
    return np.take(array, grouped, axis=axis)


def check_float64(model: torch.nn.Module) -> None:
    """Refuse a model in which anything but integers is not float64, or is not finite."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            raise TypeError(f"{name}: want float64, got {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: not finite")


# ---- running it ---------------------------------------------------------------------------------

# Modules whose output says nothing more: activations (seen in their consumer), rotary tables, the
# stack as a whole (its output is `model.norm`'s).
UNTRACED = re.compile(r"(|model|.*\.act_fn|.*rotary_emb|.*dropout)")


def trace(model: PreTrainedModel, ids: np.ndarray, splits: list[int] | None = None) -> dict[str, np.ndarray]:
    """Every module's output for one sequence, in the order in which the modules finished.

    ids: [T] integers. splits: lengths that add up to T; the pieces then run one after another on one
        cache, and their traces are joined along T. Without it, one shot and no cache.
    Returns module path -> [T, features] float64. A module that returns a tuple gives `path` for its
    first element and `path.1`, `path.2` for the others: `mlp.gate` is the router's logits,
    `mlp.gate.1` the routing weights [T, k], `mlp.gate.2` the selected experts [T, k] int64.
    """
    ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    if splits is None:
        return run_piece(model, ids, None)
    if sum(splits) != len(ids):
        raise ValueError(f"splits: want a sum of {len(ids)}, got {sum(splits)}")
    cache = DynamicCache(config=model.config)
    pieces = [run_piece(model, piece, cache) for piece in torch.split(ids, splits)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def run_piece(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None) -> dict[str, np.ndarray]:
    """The trace of one forward pass; ids [T] int64."""
    outputs: dict[str, np.ndarray] = {}
    handles = [
        module.register_forward_hook(recorder(outputs, name, len(ids)))
        for name, module in model.named_modules()
        if not UNTRACED.fullmatch(name)
    ]
    try:
        with torch.no_grad(), Float64Mode():
            model(input_ids=ids[None], past_key_values=cache, use_cache=cache is not None)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def recorder(outputs: dict[str, np.ndarray], name: str, length: int):
    """A forward hook that copies a module's output into `outputs`."""

    def record(module, args, output):
        elements = output if isinstance(output, tuple) else (output,)
        if name.endswith(".self_attn"):
            elements = elements[:1]  # the rest is the attention matrix, T x T
        for index, element in enumerate(elements):
            if isinstance(element, torch.Tensor):
                key = f"{name}.{index}" if index else name
                outputs[key] = as_rows(key, element, length)

    return record


def as_rows(name: str, tensor: torch.Tensor, length: int) -> np.ndarray:
    """[1, T, ...], [T, ...] or [T*heads, width] -> [T, features], copied; float64 or int64 only."""
    if tensor.dtype not in (torch.float64, torch.int64):
        raise TypeError(f"{name}: want float64, got {tensor.dtype}")
    return tensor.detach().reshape(length, -1).numpy().copy()
