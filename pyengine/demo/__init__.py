"""The embedded default: a small trained checkpoint with golden traces, made by tools/golden/make_default.py.

It has learnt the King James Bible, from Debian's bible-kjv-text (`tools/train/train_tiny.py`).
"""

from pathlib import Path

from ..checkpoint.open import EMBEDDED as CHECKPOINT

HERE = Path(__file__).parent

__all__ = ["CHECKPOINT", "GOLDEN_FLOAT64", "GOLDEN_LOCKED", "GOLDEN_LOCKED_INT8"]

# Traces that PyTorch made of it, over one prompt.
GOLDEN_FLOAT64 = HERE / "default.float64.safetensors"  # Hugging Face's own code, in float64
GOLDEN_LOCKED = HERE / "default.locked.safetensors"  # the restatement, on the GGUF
GOLDEN_LOCKED_INT8 = HERE / "default-int8.locked.safetensors"  # the restatement, on the INT8 twin
