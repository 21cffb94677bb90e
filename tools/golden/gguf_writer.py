"""Write a Hugging Face state dict as a GGUF file: `Qwen3_5MoeForCausalLM` as `qwen35moe`, the dense
`Qwen3_5ForCausalLM` as `qwen35`, `Qwen3NextForCausalLM` as `qwen3next`.

The file is what llama.cpp's `convert_hf_to_gguf.py` would write: the same names, layouts, value
types, order of keys and order of tensors. It exists so that tests and goldens can have files of any
shape and with any of the converter's options.

Every tensor passes through four steps, one function each:

    state dict --gather--> decoder names --rename_and_lay_out--> GGUF names, float32
               --storage_type--> block type --gguf.quants.quantize--> bytes

Used as a module (`from gguf_writer import write_gguf`, with `tools/` on `sys.path`).
"""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as BlockType
from gguf import GGUFValueType as ValueType
from gguf import LlamaFileType

ARCHITECTURES = {  # by config.json's model_type
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_5_text": "qwen35",
    "qwen3_next": "qwen3next",
}

FILE_TYPES = {
    "F32": (BlockType.F32, LlamaFileType.ALL_F32),
    "F16": (BlockType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (BlockType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (BlockType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}

TOP_LEVEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

# One decoder layer: Hugging Face's name after `model.layers.N.`, GGUF's after `blk.N.`.
# `mlp.experts.gate_up_proj`, a fused attention qkv and a sorted `in_proj_qkvz` are not one to one: see the
# functions below.
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_qkvz.weight": "ssm_in.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "nextn.eh_proj.weight": "nextn.eh_proj.weight",
    "nextn.enorm.weight": "nextn.enorm.weight",
    "nextn.hnorm.weight": "nextn.hnorm.weight",
    "nextn.shared_head_norm.weight": "nextn.shared_head_norm.weight",
}

# The next-token block's own tensors; its layer is `mtp.layers.0.*`.
NEXTN_NAMES = {
    "mtp.fc.weight": "nextn.eh_proj.weight",
    "mtp.pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "mtp.norm.weight": "nextn.shared_head_norm.weight",
}

# Two-dimensional, yet kept in float32 by the converter (besides every vector).
ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")
ALPHA_BETA = ("ssm_alpha.weight", "ssm_beta.weight", "ssm_ba.weight")


def write_gguf(
    path: str | Path,
    config: dict,
    state_dict: dict[str, torch.Tensor],
    *,
    file_type: str = "Q8_0",
    fuse_gate_up: bool = False,
    fuse_qkv: bool = False,
    alpha_beta: str = "quantized",
    ssm_in: bool = False,
    nextn: bool = False,
    recurrent_layers: bool = True,
    splits: int = 1,
    tokenizer: dict | None = None,
    name: str = "model",
) -> list[Path]:
    """Write `state_dict` to `path` and return the files written (`splits` of them).

    config: the keys of Hugging Face's `config.json` (the text model's own).
    state_dict: Hugging Face names; any float dtype. Routed experts stacked
        (`mlp.experts.gate_up_proj` [E, 2*ff, hidden]) or one by one (`mlp.experts.0.gate_proj.weight`).
    file_type: "Q8_0", "F16", "BF16" or "F32", of the linears; a row that Q8_0's blocks of 32 do not
        divide becomes F16, as in llama.cpp.
    fuse_gate_up: `ffn_gate_up_exps` in place of `ffn_gate_exps` and `ffn_up_exps`.
    fuse_qkv: `attn_qkv` (q, k, v rows in this order) on full-attention layers too.
    alpha_beta: "quantized" or "F32": the delta net's in_proj_a and in_proj_b, or in_proj_ba.
    ssm_in: `in_proj_qkvz` as it is, as older converters wrote it; else sorted, as `attn_qkv` and
        `attn_gate`.
    nextn: add a next-token block as block number `num_hidden_layers`, from `mtp.*`
        or, where those are absent, from random numbers (seed 1729).
    recurrent_layers: write `attention.recurrent_layers`; without it the interval alone says the pattern.
    tokenizer: dict(tokens, types, merges, eos_id, pad_id, and perhaps chat_template, pre).
    name: `general.name`.
    """
    check_options(file_type, alpha_beta, splits)
    state = gather(config, state_dict, nextn)
    tensors = list(rename_and_lay_out(config, state, fuse_gate_up, fuse_qkv, ssm_in))
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    add_tensors(writer, tensors, file_type, alpha_beta, splits)
    fields = general_fields(writer, name) + model_fields(config, file_type, nextn, recurrent_layers)
    for key, value, value_type, item_type in fields + tokenizer_fields(tokenizer):
        writer.add_key_value(key, value, value_type, item_type)
    paths = writer.format_shard_names(Path(path))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return paths


def check_options(file_type: str, alpha_beta: str, splits: int) -> None:
    if file_type not in FILE_TYPES:
        raise ValueError(f"file_type: want one of {sorted(FILE_TYPES)}, got {file_type!r}")
    if alpha_beta not in ("quantized", "F32"):
        raise ValueError(f"alpha_beta: want 'quantized' or 'F32', got {alpha_beta!r}")
    if splits < 1:
        raise ValueError(f"splits: want at least 1, got {splits}")


# ---- shapes -------------------------------------------------------------------------------------


def layer_types(config: dict) -> list[str]:
    """The kind of every decoder layer: config's own list, or every `full_attention_interval`-th full."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    interval = config.get("full_attention_interval", 4)
    layers = range(1, config["num_hidden_layers"] + 1)
    return ["linear_attention" if layer % interval else "full_attention" for layer in layers]


def delta_net_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, n_v = config["hidden_size"], config["linear_num_value_heads"]
    key_dim = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    value_dim = n_v * config["linear_value_head_dim"]
    if config["model_type"] == "qwen3_next":
        in_proj = {"qkvz": 2 * key_dim + 2 * value_dim, "ba": 2 * n_v}
    else:
        in_proj = {"qkv": 2 * key_dim + value_dim, "z": value_dim, "b": n_v, "a": n_v}
    return {
        **{f"linear_attn.in_proj_{part}.weight": (rows, hidden) for part, rows in in_proj.items()},
        "linear_attn.conv1d.weight": (2 * key_dim + value_dim, 1, config["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (n_v,),
        "linear_attn.dt_bias": (n_v,),
        "linear_attn.norm.weight": (config["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, value_dim),
    }


def full_attention_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    query_dim = config["num_attention_heads"] * head_dim
    key_dim = config["num_key_value_heads"] * head_dim
    return {
        "self_attn.q_proj.weight": (2 * query_dim, hidden),  # per head: query rows, then gate rows
        "self_attn.k_proj.weight": (key_dim, hidden),
        "self_attn.v_proj.weight": (key_dim, hidden),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "self_attn.o_proj.weight": (hidden, query_dim),
    }


def mlp_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    return {
        "mlp.gate_proj.weight": (width, hidden),
        "mlp.up_proj.weight": (width, hidden),
        "mlp.down_proj.weight": (hidden, width),
    }


def is_dense(config: dict) -> bool:
    return config["model_type"] == "qwen3_5_text"


def experts_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, experts = config["hidden_size"], config["num_experts"]
    width, shared_width = config["moe_intermediate_size"], config["shared_expert_intermediate_size"]
    return {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
        "mlp.shared_expert.gate_proj.weight": (shared_width, hidden),
        "mlp.shared_expert.up_proj.weight": (shared_width, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, shared_width),
        "mlp.shared_expert_gate.weight": (1, hidden),
    }


def layer_shapes(config: dict, layer_type: str) -> dict[str, tuple[int, ...]]:
    """Shapes of one decoder layer, names after `model.layers.N.`, in the order of the forward pass."""
    hidden = config["hidden_size"]
    mixer = delta_net_shapes if layer_type == "linear_attention" else full_attention_shapes
    return {
        "input_layernorm.weight": (hidden,),
        **mixer(config),
        "post_attention_layernorm.weight": (hidden,),
        **(mlp_shapes if is_dense(config) else experts_shapes)(config),
    }


def nextn_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of the next-token block: `mtp.*`, one full-attention layer and four tensors of its own."""
    hidden = config["hidden_size"]
    layer = layer_shapes(config, "full_attention")
    return {
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
        **{f"mtp.layers.0.{suffix}": shape for suffix, shape in layer.items()},
        "mtp.norm.weight": (hidden,),
    }


def tensor_shapes(config: dict, nextn: bool = False) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor, in the order of the forward pass (`lm_head` last,
    absent when tied), then, on request, the next-token block."""
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    for layer, layer_type in enumerate(layer_types(config)):
        for suffix, shape in layer_shapes(config, layer_type).items():
            shapes[f"model.layers.{layer}.{suffix}"] = shape
    shapes["model.norm.weight"] = (config["hidden_size"],)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    return {**shapes, **nextn_shapes(config)} if nextn else shapes


# ---- state dict -> decoder names ----------------------------------------------------------------


def gather(config: dict, state_dict: dict[str, torch.Tensor], nextn: bool) -> dict[str, np.ndarray]:
    """The tensors to write, float32, experts stacked, checked against the config's shapes.

    The next-token block comes back as the layer after the last, its own tensors as `nextn.*`.
    """
    state = stack_experts(state_dict)
    wanted = tensor_shapes(config, nextn)
    if nextn and "mtp.fc.weight" not in state:
        state |= random_nextn(config)
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"state dict: {len(missing)} tensors are missing, the first is {missing[0]}")
    gathered = {}
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{name}: want {shape}, got {tuple(state[name].shape)}")
        gathered[as_layer_name(name, config["num_hidden_layers"])] = state[name].float().numpy()
    return gathered


def stack_experts(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Routed experts saved one by one become `gate_up_proj` [E, 2*ff, hidden] and `down_proj`
    [E, hidden, ff], as transformers holds them in memory."""
    stacked, single = {}, {}
    for name, tensor in state_dict.items():
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match:
            experts = single.setdefault(match[1], {"gate": {}, "up": {}, "down": {}})
            experts[match[3]][int(match[2])] = tensor
        else:
            stacked[name] = tensor
    for prefix, experts in single.items():
        gate, up, down = (
            torch.stack([experts[part][index] for index in sorted(experts[part])])
            for part in ("gate", "up", "down")
        )
        stacked[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        stacked[f"{prefix}.down_proj"] = down
    return stacked


def as_layer_name(name: str, num_hidden_layers: int) -> str:
    """`mtp.*` under the layer number that the GGUF gives the next-token block; other names unchanged."""
    prefix = f"model.layers.{num_hidden_layers}."
    if name in NEXTN_NAMES:
        return prefix + NEXTN_NAMES[name]
    return name.replace("mtp.layers.0.", prefix)


def random_nextn(config: dict, seed: int = 1729) -> dict[str, torch.Tensor]:
    """A next-token block of random numbers, std 1/sqrt(columns), norms 0.1: present, never run."""
    generator = torch.Generator().manual_seed(seed)
    block = {}
    for name, shape in nextn_shapes(config).items():
        std = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        block[name] = (noise * std).bfloat16()
    return block


# ---- decoder names -> GGUF names and layouts ----------------------------------------------------


def rename_and_lay_out(
    config: dict, state: dict[str, np.ndarray], fuse_gate_up: bool, fuse_qkv: bool, ssm_in: bool
):
    """Yield (GGUF name, float32 array). Order: that of the sorted Hugging Face names, as they lie in
    a safetensors file and as the converter therefore meets them."""
    for name in sorted(state):
        if name in TOP_LEVEL_NAMES:
            yield TOP_LEVEL_NAMES[name], lay_out(config, name, state[name])
            continue
        _, _, layer, suffix = name.split(".", 3)
        block, prefix = f"blk.{layer}.", f"model.layers.{layer}."
        if suffix == "mlp.experts.gate_up_proj":
            yield from gate_and_up(block, state[name], fuse_gate_up)
        elif suffix == "linear_attn.in_proj_qkvz.weight" and not ssm_in:
            qkv, z = sort_qkvz(config, state[name])
            yield from ((block + "attn_qkv.weight", qkv), (block + "attn_gate.weight", z))
        elif fuse_qkv and suffix == "self_attn.q_proj.weight":
            rows = [state[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
            yield block + "attn_qkv.weight", np.concatenate(rows)
        elif fuse_qkv and suffix in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            continue
        else:
            yield block + LAYER_NAMES[suffix], lay_out(config, name, state[name])


def gate_and_up(block: str, gate_up_proj: np.ndarray, fused: bool):
    """gate_up_proj [E, 2*ff, hidden], gate rows first -> one tensor, or two of [E, ff, hidden]."""
    if fused:
        yield block + "ffn_gate_up_exps.weight", gate_up_proj
        return
    gate, up = np.split(gate_up_proj, 2, axis=1)
    yield block + "ffn_gate_exps.weight", gate
    yield block + "ffn_up_exps.weight", up


def sort_qkvz(config: dict, tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """in_proj_qkvz, each key head's query, key, values and z -> all queries, keys and values; all z."""
    n_k, dk = config["linear_num_key_heads"], config["linear_key_head_dim"]
    heads = tensor.reshape(n_k, -1, tensor.shape[1])
    values = (heads.shape[1] - 2 * dk) // 2
    parts = np.split(heads, [dk, 2 * dk, 2 * dk + values], axis=1)
    query, key, value, z = (part.reshape(-1, tensor.shape[1]) for part in parts)
    return np.concatenate([query, key, value]), z


def lay_out(config: dict, name: str, tensor: np.ndarray) -> np.ndarray:
    """One tensor's values as GGUF has them, float32, by its Hugging Face name."""
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return tensor + np.float32(1)  # zero-centred: GGUF holds the factor itself
    if ".linear_attn." not in name:
        return tensor
    if name.endswith(".conv1d.weight"):
        tensor = tensor[:, 0, :]  # [channels, 1, taps] -> [channels, taps]
    if name.endswith(".A_log"):
        # Through float64, so that the float32 result does not depend on a vector library's exp.
        tensor = -np.exp(tensor.astype(np.float64)).astype(np.float32)
    if config["model_type"] == "qwen3_next":  # value heads stay as they are
        return tensor
    return tile_value_heads(config, name.rpartition("linear_attn.")[2], tensor)


def tile_value_heads(config: dict, name: str, tensor: np.ndarray) -> np.ndarray:
    """Value heads from Hugging Face's order (grouped: head k*r + j uses key head k) to GGUF's (tiled:
    head j*n_k + k uses key head k), r = n_v / n_k."""
    if name in ("in_proj_qkv.weight", "conv1d.weight"):
        first_value = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
        values = tile(config, tensor[first_value:], axis=0)
        return np.concatenate([tensor[:first_value], values])
    if name == "norm.weight":  # one head's width, shared by all
        return tensor
    return tile(config, tensor, axis=1 if name == "out_proj.weight" else 0)


def tile(config: dict, tensor: np.ndarray, axis: int) -> np.ndarray:
    """Reorder whole heads along `axis`, whose length is n_v * (any width)."""
    n_k, n_v = config["linear_num_key_heads"], config["linear_num_value_heads"]
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    heads = tensor.reshape(*before, n_k, n_v // n_k, -1, *after)
    return np.ascontiguousarray(heads.swapaxes(axis, axis + 1)).reshape(tensor.shape)


# ---- GGUF arrays -> file ------------------------------------------------------------------------


def storage_type(name: str, tensor: np.ndarray, file_type: str, alpha_beta: str) -> BlockType:
    """The block type of one tensor in a file of `file_type`."""
    if tensor.ndim == 1 or name.endswith(ALWAYS_F32):
        return BlockType.F32
    if alpha_beta == "F32" and name.endswith(ALPHA_BETA):
        return BlockType.F32
    block_type, _ = FILE_TYPES[file_type]
    block_size, _ = gguf.GGML_QUANT_SIZES[block_type]
    return block_type if tensor.shape[-1] % block_size == 0 else BlockType.F16


def add_tensors(
    writer: gguf.GGUFWriter,
    tensors: list[tuple[str, np.ndarray]],
    file_type: str,
    alpha_beta: str,
    splits: int,
) -> None:
    """Quantise and hand over every tensor, the same number (give or take one) to each of the splits."""
    if splits > len(tensors):
        raise ValueError(f"splits: want at most {len(tensors)} (one tensor each), got {splits}")
    starts = {len(tensors) * part // splits for part in range(1, splits)}
    for index, (name, tensor) in enumerate(tensors):
        if index in starts:
            writer.tensors.append({})  # the writer makes one file of each entry
        block_type = storage_type(name, tensor, file_type, alpha_beta)
        data = np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(tensor), block_type))
        writer.add_tensor(name, data, raw_dtype=block_type)


def general_fields(writer: gguf.GGUFWriter, name: str) -> list[tuple]:
    """`general.*` that stand first; the size label counts the tensors already added."""
    size_label = gguf.size_label(*writer.get_total_parameter_count())
    return [
        ("general.type", "model", ValueType.STRING, None),
        ("general.name", name, ValueType.STRING, None),
        ("general.size_label", size_label, ValueType.STRING, None),
    ]


def model_fields(config: dict, file_type: str, nextn: bool, recurrent_layers: bool) -> list[tuple]:
    """Hyper-parameters: (key, value, value type, array's item type), in the converter's order."""
    rope = config["rope_parameters"]
    kinds = layer_types(config)
    rope_dim = int(config["head_dim"] * rope.get("partial_rotary_factor", 0.25))
    sections = (list(rope.get("mrope_section", [11, 11, 10])) + [0] * 4)[:4]
    sections = None if config["model_type"] == "qwen3_next" else sections
    interval = config.get("full_attention_interval") or interval_of(kinds, required=not recurrent_layers)
    value_dim = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    fields = [
        ("block_count", len(kinds) + nextn, ValueType.UINT32),
        ("context_length", config["max_position_embeddings"], ValueType.UINT32),
        ("embedding_length", config["hidden_size"], ValueType.UINT32),
        ("feed_forward_length", config.get("intermediate_size"), ValueType.UINT32),
        ("attention.head_count", config["num_attention_heads"], ValueType.UINT32),
        ("attention.head_count_kv", config["num_key_value_heads"], ValueType.UINT32),
        ("rope.dimension_sections", sections, ValueType.ARRAY, ValueType.INT32),
        ("rope.freq_base", rope["rope_theta"], ValueType.FLOAT32),
        ("attention.layer_norm_rms_epsilon", config["rms_norm_eps"], ValueType.FLOAT32),
        ("expert_count", config.get("num_experts"), ValueType.UINT32),
        ("expert_used_count", config.get("num_experts_per_tok"), ValueType.UINT32),
        ("attention.key_length", config["head_dim"], ValueType.UINT32),
        ("attention.value_length", config["head_dim"], ValueType.UINT32),
        ("general.file_type", int(FILE_TYPES[file_type][1]), ValueType.UINT32),
        ("expert_feed_forward_length", config.get("moe_intermediate_size"), ValueType.UINT32),
        (
            "expert_shared_feed_forward_length",
            config.get("shared_expert_intermediate_size"),
            ValueType.UINT32,
        ),
        ("ssm.conv_kernel", config["linear_conv_kernel_dim"], ValueType.UINT32),
        ("ssm.state_size", config["linear_key_head_dim"], ValueType.UINT32),
        ("ssm.group_count", config["linear_num_key_heads"], ValueType.UINT32),
        ("ssm.time_step_rank", config["linear_num_value_heads"], ValueType.UINT32),
        ("ssm.inner_size", value_dim, ValueType.UINT32),
    ]
    if recurrent_layers:
        recurrent = [kind == "linear_attention" for kind in kinds] + [False] * nextn
        fields.append(("attention.recurrent_layers", recurrent, ValueType.ARRAY, ValueType.BOOL))
    fields.append(("full_attention_interval", interval, ValueType.UINT32))
    fields.append(("rope.dimension_count", rope_dim, ValueType.UINT32))
    if nextn:
        fields.append(("nextn_predict_layers", 1, ValueType.UINT32))
    fields += yarn_fields(rope)
    fields.append(("general.quantization_version", gguf.GGML_QUANT_VERSION, ValueType.UINT32))
    # A key of the other architecture has no value here.
    architecture = ARCHITECTURES[config["model_type"]]
    return [with_prefix(architecture, *field) for field in fields if field[1] is not None]


def yarn_fields(rope: dict) -> list[tuple]:
    """What the converter writes of YaRN; it has no key for `truncate`, `mscale` and `mscale_all_dim`."""
    if rope.get("rope_type") != "yarn":
        return []
    fields = [
        ("rope.scaling.type", "yarn", ValueType.STRING),
        ("rope.scaling.factor", rope["factor"], ValueType.FLOAT32),
        ("rope.scaling.original_context_length", rope["original_max_position_embeddings"], ValueType.UINT32),
    ]
    names = {
        "attention_factor": "rope.scaling.yarn_attn_factor",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    return fields + [(names[key], rope[key], ValueType.FLOAT32) for key in names if key in rope]


def with_prefix(
    architecture: str, key: str, value, value_type: ValueType, item_type: ValueType | None = None
) -> tuple:
    return (key if key.startswith("general.") else f"{architecture}.{key}", value, value_type, item_type)


def interval_of(kinds: list[str], required: bool) -> int:
    """Every how many layers a full-attention one stands. A pattern that is no interval has 4, the
    converter's default, which `attention.recurrent_layers` then overrides."""
    for interval in range(1, len(kinds) + 1):
        pattern = [
            "linear_attention" if layer % interval else "full_attention" for layer in range(1, len(kinds) + 1)
        ]
        if pattern == kinds:
            return interval
    if required:
        raise ValueError(f"layer_types: no interval gives {kinds}, and recurrent_layers is off")
    return 4


def tokenizer_fields(tokenizer: dict | None) -> list[tuple]:
    """`tokenizer.*` of a byte-level BPE tokenizer with the Qwen3.5 pre-tokenizer, or another `pre`."""
    if tokenizer is None:
        return []
    fields = [
        ("tokenizer.ggml.model", "gpt2", ValueType.STRING, None),
        ("tokenizer.ggml.pre", tokenizer.get("pre", "qwen35"), ValueType.STRING, None),
        ("tokenizer.ggml.tokens", tokenizer["tokens"], ValueType.ARRAY, ValueType.STRING),
        ("tokenizer.ggml.token_type", tokenizer["types"], ValueType.ARRAY, ValueType.INT32),
        ("tokenizer.ggml.merges", tokenizer["merges"], ValueType.ARRAY, ValueType.STRING),
        ("tokenizer.ggml.eos_token_id", tokenizer["eos_id"], ValueType.UINT32, None),
        ("tokenizer.ggml.padding_token_id", tokenizer["pad_id"], ValueType.UINT32, None),
    ]
    if tokenizer.get("chat_template"):
        fields.append(("tokenizer.chat_template", tokenizer["chat_template"], ValueType.STRING, None))
    return fields
