"""Writes a slice of Qwen3.5-35B-A3B: its own layer sizes, fewer layers, random weights, seed 1729.

    python tools/bench/make_slice.py OUT.gguf                      # 8 layers, vocabulary 49,664: 7 GB
    python tools/bench/make_slice.py OUT.gguf --layers 4 --vocab 1024
    python tools/bench/make_slice.py OUT.gguf --layers 40 --vocab 248320    # the whole size: 37 GB
    python tools/bench/make_slice.py OUT.gguf --type Q5_1      # every matrix in blocks of this type
    python tools/bench/make_slice.py OUT.gguf --type Q4_K_M    # types by tensor, as llama.cpp's quantizer
    python tools/bench/make_slice.py OUT.gguf --type Q4_0 --mix    # the same; Q4_0 is a block type, too

For speed only: a token costs in it what it costs in the model, a layer for a layer, and experts are
chosen as evenly as random routers choose them.  llama.cpp loads it like any other Qwen3.5-MoE file.

Quantised blocks are drawn as they lie in the file, scale and codes, so no float weights are ever
made, and memory holds one tensor at a time.  The last lines say how much of each type was drawn.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
from draw_blocks import LAYOUTS, block_size, draw_blocks
from quantizer_types import FILE_TYPES, type_of

from pyengine.checkpoint.config import FULL, LINEAR, Config
from pyengine.checkpoint.families import Spec, family_of, model_specs
from pyengine.progress import progress
from pyengine.text.gguf_vocabulary import BYTE_OF_CHARACTER

SEED = 1729
LAYERS, VOCABULARY = 8, 49_664
FULL_ATTENTION_INTERVAL = 4

BLOCK_TYPES, MIXES = tuple(LAYOUTS), tuple(name for name in FILE_TYPES if name not in LAYOUTS)

# Matrices that the converter leaves in float32, besides every vector and the convolution.
ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def slice_config(layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Config:
    """Qwen3.5-35B-A3B's hyper-parameters, but for the number of layers and of tokens."""
    return Config(
        vocab_size=vocabulary,
        hidden_size=2048,
        rms_norm_eps=1e-6,
        layer_types=tuple(LINEAR if (i + 1) % FULL_ATTENTION_INTERVAL else FULL for i in range(layers)),
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        rotary_dim=64,
        rope_theta=1e7,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        mrope_section=(11, 11, 10),
    )


# ---- the file ----------------------------------------------------------------------------------


def write_slice(path, config: Config, kind: str = "Q8_0", mix: bool = False, seed: int = SEED) -> Counter:
    """A model of this config with random weights; -> bytes of each type.

    kind   a block type: of every quantised matrix; or a file type of llama.cpp's quantizer
    mix    kind is a file type, also where it has the name of a block type
    """
    types = slice_types(config, kind, mix)
    writer = gguf.GGUFWriter(path, config.architecture)
    add_metadata(writer, config, kind)
    add_tokenizer(writer, config.vocab_size)
    for spec, type_ in types.items():
        add_tensor_info(writer, spec, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng, drawn = np.random.default_rng(seed), Counter()
    with progress(sum(file_bytes(spec, type_) for spec, type_ in types.items()), str(path)) as bar:
        for spec, type_ in types.items():
            tensor = draw(rng, spec, type_)
            writer.write_tensor_data(tensor)
            bar.update(tensor.nbytes)
            drawn[type_] += tensor.nbytes
    writer.close()
    return drawn


def slice_types(config: Config, kind: str, mix: bool = False) -> dict[Spec, str]:
    """{parameter: its type in the file}, in the file's order."""
    mix = mix or kind in MIXES
    types = {}
    for spec in model_specs(config):
        types[spec] = "F32" if not is_quantised(spec) else type_of(spec, kind, config) if mix else kind
        columns = spec.shape[-1]
        if types[spec] != "F32" and columns % block_size(types[spec])[0]:
            raise ValueError(
                f"{spec.gguf}: want a multiple of {block_size(types[spec])[0]} columns, got {columns}"
            )
    return types


def add_tensor_info(writer, spec: Spec, kind: str) -> None:
    block_type = gguf.GGMLQuantizationType[kind]
    writer.add_tensor_info(
        spec.gguf, stored_shape(spec), np.dtype(np.float32), file_bytes(spec, kind), raw_dtype=block_type
    )


def file_type(kind: str) -> gguf.LlamaFileType:
    """general.file_type.  A file of one block type has the number of the mix that has most of it."""
    name = {"MXFP4": "MXFP4_MOE"}.get(kind, kind)
    known = gguf.LlamaFileType.__members__
    return known.get(f"MOSTLY_{name}") or known[f"MOSTLY_{name}_M"]


def add_metadata(writer, c: Config, kind: str) -> None:
    """Hyper-parameters, as llama.cpp's converter writes them."""
    writer.add_type("model")
    writer.add_name(f"Qwen3.5-35B-A3B slice, {c.num_hidden_layers} layers, random weights")
    writer.add_file_type(file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    integers = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.rotary_dim,
        **{key: getattr(c, field) for field, key in family_of(c).sizes.items()},
        "ssm.conv_kernel": c.linear_conv_kernel_dim,
        "ssm.state_size": c.linear_key_head_dim,
        "ssm.group_count": c.linear_num_key_heads,
        "ssm.time_step_rank": c.linear_num_value_heads,
        "ssm.inner_size": c.value_dim,
        "full_attention_interval": FULL_ATTENTION_INTERVAL,
    }
    for key, value in integers.items():
        writer.add_uint32(f"{c.architecture}.{key}", value)
    writer.add_float32(f"{c.architecture}.rope.freq_base", c.rope_theta)
    writer.add_float32(f"{c.architecture}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_array(f"{c.architecture}.rope.dimension_sections", [*c.mrope_section, 0])


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
    if kind == "F32":
        return 4 * size
    columns, nbytes = block_size(kind)
    return size // columns * nbytes


def draw(rng, spec: Spec, kind: str) -> np.ndarray:
    """One tensor as it lies in the file."""
    if kind == "F32":
        return draw_floats(rng, spec).astype(np.float32)
    return draw_blocks(rng, spec.shape, kind, weight_std(spec))


def weight_std(spec: Spec) -> float:
    """1/sqrt(columns) keeps activations of size 1; routers and gates are livelier with twice it."""
    if spec.gguf == "token_embd.weight":
        return 1.0
    gain = 2.0 if spec.gguf.endswith(("ffn_gate_inp.weight", "ssm_alpha.weight")) else 1.0
    return gain * spec.shape[-1] ** -0.5


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


def check_room(path: Path, types: dict[Spec, str]) -> None:
    """A file of this size fits on the disk, before a minute is spent writing it."""
    if not path.absolute().parent.is_dir():
        sys.exit(f"{path}: want a file in a directory that exists")
    need = sum(file_bytes(spec, kind) for spec, kind in types.items())
    free = shutil.disk_usage(path.absolute().parent).free
    if need > free:
        sys.exit(f"{path}: want {need / 1e9:.1f} GB of free space, got {free / 1e9:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUT.gguf")
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N")
    parser.add_argument("--vocab", type=int, default=VOCABULARY, metavar="N")
    parser.add_argument(
        "--type",
        choices=BLOCK_TYPES + MIXES,
        default="Q8_0",
        metavar="TYPE",
        help=f"{' '.join(BLOCK_TYPES)}: of every matrix; {' '.join(MIXES)}: as llama.cpp's quantizer mixes",
    )
    parser.add_argument(
        "--mix", action="store_true", help="TYPE is llama.cpp's file type: its Q4_0, say, has a head in Q6_K"
    )
    parser.add_argument("--seed", type=int, default=SEED, metavar="N")
    options = parser.parse_args()
    if options.mix and options.type not in FILE_TYPES:
        parser.error(f"--mix: want one of {' '.join(FILE_TYPES)}, got {options.type}")
    config = slice_config(options.layers, options.vocab)
    check_room(options.output, slice_types(config, options.type, options.mix))
    drawn = write_slice(options.output, config, options.type, options.mix, options.seed)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")
    for kind, nbytes in drawn.most_common():
        print(f"  {kind:<7} {nbytes:14,} bytes {nbytes / drawn.total():6.1%}")


if __name__ == "__main__":
    main()
