"""A model with a few channels that are much greater than the others, as large models have them.

    python tools/golden/outliers.py SRC.gguf OUT.gguf

The same function, to the bit in float64: behind each norm of a layer one channel of sixteen is 32 times as
great, and what reads it is 1/32 of what it was.  SRC has F32 and BF16 alone in these tensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from rewrite import rewrite

from pyengine.files.gguf import GGUF
from pyengine.files.numbers import bfloat16_to_float32, float32_to_bfloat16

EVERY, FIRST, POWER = 16, 3, 5

NORMS = ("attn_norm", "post_attention_norm")
READERS = (
    *("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "attn_q", "attn_k", "attn_v"),
    *("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_inp_shexp"),
)


def with_outliers(source: Path, destination: Path) -> Path:
    changed = {}
    for name, tensor in GGUF.open(source).tensors.items():
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if part in NORMS + READERS:
            factor = np.float32(2.0 ** (POWER if part in NORMS else -POWER))
            changed[name] = _scaled(np.array(tensor.data), tensor.type, factor), tensor.type
    return Path(rewrite(source, destination, tensors=changed))


def _scaled(values: np.ndarray, kind: int, factor: np.float32) -> np.ndarray:
    some = np.ascontiguousarray(values[..., FIRST::EVERY])
    if kind == GGMLQuantizationType.BF16:
        values[..., FIRST::EVERY] = float32_to_bfloat16(bfloat16_to_float32(some) * factor)
    elif kind == GGMLQuantizationType.F32:
        values[..., FIRST::EVERY] = some * factor
    else:
        raise SystemExit(f"outliers: want F32 and BF16, got {GGMLQuantizationType(kind).name}")
    return values


if __name__ == "__main__":
    with_outliers(*map(Path, sys.argv[1:]))
