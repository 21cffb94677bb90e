"""Tensors that a text-only forward pass never reads, by name: vision, audio, next-token prediction.

Every other tensor that a model does not have is refused: it may be a bias, a scale or an adapter, which
changes what the model computes.
"""

from __future__ import annotations

import re

# GGUF: llama.cpp's names of a projector file, which ollama keeps in the model's own file: v. is vision, a. is
# audio, mm. joins them to the text.  Directories: transformers' names of the same, with the prefixes that a
# multi-modal model gives them.  mtp. is next-token prediction, as Qwen publishes it.
_UNNEEDED = re.compile(
    r"(v|a|mm)\.|"
    r"(model\.|language_model\.|model\.language_model\.)?"
    r"(mtp|visual|vision_tower|vision_model|audio_tower|audio_model|multi_modal_projector|mm_projector)\."
)


def is_unneeded(name: str) -> bool:
    """Whether a file may have, or lack, a tensor of this name: it changes no logit."""
    return _UNNEEDED.match(name) is not None


def block_of(name: str) -> int:
    """The number of the block that a GGUF's tensor is of; -1: of none.  Blocks behind the last layer predict
    the token after the next one."""
    block = name.split(".")[1] if name.startswith("blk.") else ""
    return int(block) if block.isdigit() else -1
