"""The small random checkpoints under `tests/golden/`: their configurations, and how each is written.

    python tools/golden/golden_models.py tests/golden            # all of them
    python tools/golden/golden_models.py tests/golden nextn      # one

Same bytes on every run. No file is realistic; together they hold what a reader of one checkpoint's
shape would get wrong: see the comment above each.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gguf_writer import write_gguf
from hf_float64 import random_state_dict

SEED = 1729

# What the models share unless they say otherwise. Attention's head_dim is never the delta net's.
COMMON = {
    "model_type": "qwen3_5_moe_text",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "tie_word_embeddings": False,
}


def rope(partial_rotary_factor: float, mrope_section: list[int], rope_theta: float = 1e7) -> dict:
    return {
        "rope_type": "default",
        "rope_theta": rope_theta,
        "partial_rotary_factor": partial_rotary_factor,
        "mrope_section": mrope_section,
        "mrope_interleaved": True,
    }


CONFIGS = {
    # The real model's pattern (three delta nets, one attention), two value heads to a key head.
    "pattern31": {
        **COMMON,
        "vocab_size": 288,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "rope_parameters": rope(0.25, [2, 2, 2]),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    # Three value heads to a key head; a next-token block; the layers' kinds from the interval alone.
    "nextn": {
        **COMMON,
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rope_parameters": rope(0.5, [2, 2, 2]),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 32,
    },
    # Eight of nine experts; fused tensors; alpha and beta in F32; a pattern that is no interval, so
    # that the interval beside it (the converter's default) is wrong.
    "fused": {
        **COMMON,
        "vocab_size": 128,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rope_parameters": rope(0.25, [3, 3, 2], rope_theta=1e6),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 9,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
    },
    # A hidden size of one group of 128 and a quarter; tied embeddings; as many value heads as key
    # heads; an epsilon that is not the delta rule's own; o_proj 48 wide, so F16 in a Q8_0 file.
    "tied": {
        **COMMON,
        "vocab_size": 128,
        "hidden_size": 160,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "rope_parameters": rope(0.5, [2, 2, 2]),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 160,
    },
    # Linears in BF16; routed experts 160 wide; delta-net heads wider than attention's.
    "bfloat16": {
        **COMMON,
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": rope(0.5, [3, 3, 2]),
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 160,
        "shared_expert_intermediate_size": 32,
    },
    # YaRN; a prompt of 300 tokens goes beyond the 128 that it stretches; a quarter of a head turns, and its
    # 16 frequencies are kept, between, and divided; full attention first.
    "yarn": {
        **COMMON,
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "max_position_embeddings": 512,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "rope_parameters": rope(0.25, [6, 5, 5], rope_theta=1e4)
        | {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
        },
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    # The dense family: an MLP of one group of 128 and a quarter; tied embeddings, as its small models have
    # them; three value heads to a key head; a delta net after the attention.
    "dense": {
        **COMMON,
        "model_type": "qwen3_5_text",
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "full_attention_interval": 2,
        "tie_word_embeddings": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rope_parameters": rope(0.5, [2, 2, 2]),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "intermediate_size": 160,
    },
    # Qwen3-Next: qkvz sorted into two tensors, as its converter writes it; a next-token block; plain rotary
    # positions; the older pre-tokenizer.
    "next": {
        **COMMON,
        "model_type": "qwen3_next",
        "vocab_size": 288,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 12,
        "num_experts_per_tok": 5,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    # The same with ssm_in, as older converters wrote it; three value heads to a key head; in the delta net
    # keys half as wide as values; tied embeddings; every expert chosen; fused tensors.
    "legacy": {
        **COMMON,
        "model_type": "qwen3_next",
        "vocab_size": 128,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "tie_word_embeddings": True,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
}


LATER = [
    "yarn",
    "dense",
    "next",
    "legacy",
]  # models that came after the first goldens: make_golden.write_prompts


def make(name: str, path: str | Path) -> list[Path]:
    """Write the golden model `name` to `path`; the files written, always the same bytes."""
    config = CONFIGS[name]
    return write_gguf(path, config, random_state_dict(config, SEED), name=name, **writer_options(name))


def writer_options(name: str) -> dict:
    """What `write_gguf` is told beyond its defaults."""
    return {
        "pattern31": {"tokenizer": byte_level_tokenizer(CONFIGS["pattern31"]["vocab_size"])},
        "nextn": {"nextn": True, "recurrent_layers": False},
        "fused": {"fuse_gate_up": True, "fuse_qkv": True, "alpha_beta": "F32"},
        "tied": {},
        "bfloat16": {"file_type": "BF16"},
        "yarn": {},
        "dense": {},
        "next": {
            "nextn": True,
            "tokenizer": byte_level_tokenizer(CONFIGS["next"]["vocab_size"]) | {"pre": "qwen2"},
        },
        "legacy": {"ssm_in": True, "fuse_gate_up": True, "fuse_qkv": True, "alpha_beta": "F32"},
    }[name]


# ---- a tokenizer --------------------------------------------------------------------------------

NORMAL, CONTROL, UNUSED = 1, 3, 5  # GGUF token types

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

MERGES = [
    "Ġ t",
    "h e",
    "i n",
    "Ġ a",
    "e r",
    "o n",
    "Ġt he",
    "r e",
    "a n",
    "Ġa n",
    "Ġan d",
    "in g",
    "Ġ Ġ",
    "ĠĠ ĠĠ",
]

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def byte_level_tokenizer(vocab_size: int) -> dict:
    """A byte-level BPE of 256 bytes, the merges above and three control tokens, filled up to
    `vocab_size` with unused tokens named as llama.cpp's converter names them."""
    tokens = byte_characters() + [merge.replace(" ", "") for merge in MERGES]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(CONTROL_TOKENS)
    tokens += CONTROL_TOKENS
    padding = range(len(tokens), vocab_size)
    return {
        "tokens": tokens + [f"[PAD{index}]" for index in padding],
        "types": types + [UNUSED] * len(padding),
        "merges": MERGES,
        "eos_id": tokens.index("<|im_end|>"),
        "pad_id": tokens.index("<|endoftext|>"),
        "chat_template": CHAT_TEMPLATE,
    }


def byte_characters() -> list[str]:
    """GPT-2's character for each byte, in the order of the real vocabulary: first the bytes that
    Latin-1 prints as themselves, then the others as U+0100, U+0101, ..."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return [chr(byte) for byte in printed] + [chr(256 + index) for index in range(len(others))]


def main(arguments: list[str]) -> None:
    folder, names = Path(arguments[0]), arguments[1:] or list(CONFIGS)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for path in make(name, folder / f"{name}.gguf"):
            print(f"{path} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
