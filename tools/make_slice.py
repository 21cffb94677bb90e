"""Writes a slice of Qwen3.5-35B-A3B: its own layer sizes, fewer layers, random weights, seed 1729.

    python tools/make_slice.py OUT.gguf                      # 8 layers, vocabulary 49,664: 7 GB
    python tools/make_slice.py OUT.gguf --layers 4 --vocab 1024
    python tools/make_slice.py OUT.gguf --layers 40 --vocab 248320    # the whole size: 37 GB

For speed only: a token costs in it what it costs in the model, a layer for a layer, and experts are
chosen as evenly as random routers choose them.  llama.cpp loads it like any other Qwen3.5-MoE file.

Quantised blocks are drawn as they lie in the file, scale and codes, so no float weights are ever
made, and memory holds one tensor at a time.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np

from pyengine.checkpoint import Spec, model_specs
from pyengine.config import ARCHITECTURE, FULL, LINEAR, Config
from pyengine.progress import progress
from pyengine.tokenizer import BYTE_OF_CHARACTER

SEED = 1729
LAYERS, VOCABULARY = 8, 49_664
FULL_ATTENTION_INTERVAL = 4

BLOCK = 32  # columns that share a scale; a block is the float16 scale, then the codes
CODE_BYTES = {"Q8_0": 32, "Q4_0": 16}
CODE_RMS = {"Q8_0": 73.9, "Q4_0": 4.64}  # of codes drawn evenly from all there are
FILE_TYPES = {"Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}
F32 = gguf.GGMLQuantizationType.F32

# Matrices that the converter leaves in float32, besides every vector and the convolution.
ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def slice_config(layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Config:
    """Qwen3.5-35B-A3B's hyper-parameters, but for the number of layers and of tokens."""
    return Config(
        vocab_size=vocabulary, hidden_size=2048, rms_norm_eps=1e-6,
        layer_types=tuple(LINEAR if (i + 1) % FULL_ATTENTION_INTERVAL else FULL
                          for i in range(layers)),
        num_attention_heads=16, num_key_value_heads=2, head_dim=256, rotary_dim=64, rope_theta=1e7,
        linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_conv_kernel_dim=4,
        num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512,
        shared_expert_intermediate_size=512, mrope_section=(11, 11, 10))


# ---- the file ----------------------------------------------------------------------------------


def write_slice(path, config: Config, kind: str = "Q8_0") -> None:
    """A model of this config with random weights, its quantised matrices of this block type."""
    specs = model_specs(config)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    add_metadata(writer, config, kind)
    add_tokenizer(writer, config.vocab_size)
    for spec in specs:
        add_tensor_info(writer, spec, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(SEED)
    with progress(sum(file_bytes(spec, kind) for spec in specs), str(path)) as bar:
        for spec in specs:
            tensor = draw(rng, spec, kind)
            writer.write_tensor_data(tensor)
            bar.update(tensor.nbytes)
    writer.close()


def add_tensor_info(writer, spec: Spec, kind: str) -> None:
    block_type = gguf.GGMLQuantizationType[kind] if is_quantised(spec) else F32
    writer.add_tensor_info(spec.gguf, stored_shape(spec), np.dtype(np.float32),
                           file_bytes(spec, kind), raw_dtype=block_type)


def add_metadata(writer, c: Config, kind: str) -> None:
    """Hyper-parameters, as llama.cpp's converter writes them."""
    writer.add_type("model")
    writer.add_name(f"Qwen3.5-35B-A3B slice, {c.num_hidden_layers} layers, random weights")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    integers = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim, "rope.dimension_count": c.rotary_dim,
        "expert_count": c.num_experts, "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_feed_forward_length": c.shared_expert_intermediate_size,
        "ssm.conv_kernel": c.linear_conv_kernel_dim, "ssm.state_size": c.linear_key_head_dim,
        "ssm.group_count": c.linear_num_key_heads, "ssm.time_step_rank": c.linear_num_value_heads,
        "ssm.inner_size": c.value_dim, "full_attention_interval": FULL_ATTENTION_INTERVAL,
    }
    for key, value in integers.items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", value)
    writer.add_float32(f"{ARCHITECTURE}.rope.freq_base", c.rope_theta)
    writer.add_float32(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_array(f"{ARCHITECTURE}.rope.dimension_sections", [*c.mrope_section, 0])


def add_tokenizer(writer, vocab_size: int) -> None:
    """The 256 bytes, one merge (llama.cpp asks for some) and two control tokens, filled up."""
    tokens = [*BYTE_OF_CHARACTER, "Ġt", "<|endoftext|>", "<|im_end|>"]
    kinds = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2
    if vocab_size < len(tokens):
        raise ValueError(f"vocabulary: want at least {len(tokens)} tokens, got {vocab_size}")
    padding = range(len(tokens), vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens + [f"[PAD{index}]" for index in padding])
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(padding))
    writer.add_token_merges(["Ġ t"])
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(257)


# ---- tensors -----------------------------------------------------------------------------------


def is_quantised(spec: Spec) -> bool:
    return spec.linear and not spec.gguf.endswith(ALWAYS_F32)


def stored_shape(spec: Spec) -> tuple[int, ...]:
    """The convolution's unit axis is Hugging Face's alone."""
    return (spec.shape[0], spec.shape[2]) if spec.name.endswith("conv1d.weight") else spec.shape


def file_bytes(spec: Spec, kind: str) -> int:
    size = math.prod(spec.shape)
    return size // BLOCK * (2 + CODE_BYTES[kind]) if is_quantised(spec) else 4 * size


def draw(rng, spec: Spec, kind: str) -> np.ndarray:
    """One tensor as it lies in the file."""
    if is_quantised(spec):
        return draw_blocks(rng, spec.shape, kind, weight_std(spec))
    return draw_floats(rng, spec).astype(np.float32)


def weight_std(spec: Spec) -> float:
    """1/sqrt(columns) keeps activations of size 1; routers and gates are livelier with twice it."""
    if spec.gguf == "token_embd.weight":
        return 1.0
    gain = 2.0 if spec.gguf.endswith(("ffn_gate_inp.weight", "ssm_alpha.weight")) else 1.0
    return gain * spec.shape[-1] ** -0.5


def draw_blocks(rng, shape, kind: str, std: float) -> np.ndarray:
    """uint8 [.., blocks, block bytes]: codes even over their range, scales within a factor of 3."""
    blocks = (*shape[:-1], shape[-1] // BLOCK)
    block_bytes = 2 + CODE_BYTES[kind]
    size = math.prod(blocks) * block_bytes
    data = rng.integers(0, 1 << 64, -(-size // 8), np.uint64).view(np.uint8)[:size]
    data = data.reshape(*blocks, block_bytes)
    if kind == "Q8_0":  # no quantiser writes -128
        codes = data[..., 2:].view(np.int8)
        np.maximum(codes, -127, out=codes)
    scales = rng.random(blocks, np.float32)
    scales += 0.5
    scales *= std / CODE_RMS[kind]
    data[..., :2].view("<f2")[..., 0] = scales
    return data


def draw_floats(rng, spec: Spec) -> np.ndarray:
    """Vectors, the convolution and the router, in the GGUF's convention: norms hold the factor."""
    shape = stored_shape(spec)
    if spec.gguf.endswith("ssm_a"):  # -exp(A_log), as the model's own initialisation draws it
        return -rng.uniform(0.01, 16.0, shape)
    if spec.gguf.endswith("ssm_dt.bias"):
        return rng.uniform(-4.0, 1.0, shape)
    if spec.gguf.endswith("norm.weight"):
        return 1.0 + 0.1 * rng.standard_normal(shape)
    std = 0.5 if spec.gguf.endswith("ssm_conv1d.weight") else weight_std(spec)
    return std * rng.standard_normal(shape)


# ---- the command -------------------------------------------------------------------------------


def check_room(path: Path, config: Config, kind: str) -> None:
    """A file of this size fits on the disk, before a minute is spent writing it."""
    if not path.absolute().parent.is_dir():
        sys.exit(f"{path}: want a file in a directory that exists")
    need = sum(file_bytes(spec, kind) for spec in model_specs(config))
    free = shutil.disk_usage(path.absolute().parent).free
    if need > free:
        sys.exit(f"{path}: want {need / 1e9:.1f} GB of free space, got {free / 1e9:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUT.gguf")
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N")
    parser.add_argument("--vocab", type=int, default=VOCABULARY, metavar="N")
    parser.add_argument("--type", choices=CODE_BYTES, default="Q8_0")
    options = parser.parse_args()
    config = slice_config(options.layers, options.vocab)
    check_room(options.output, config, options.type)
    write_slice(options.output, config, options.type)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
