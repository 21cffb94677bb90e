#!/usr/bin/env python3
"""Make `tests/quantized/`, or check it: small GGUFs of every block type, as llama.cpp quantizes them.

    python tools/golden/make_quantized.py            # writes tests/quantized/
    python tools/golden/make_quantized.py --check    # computes LOCK.json again from the files there

Two random models (seed 1729) are written in F32 by `gguf_writer.py` and quantized by llama.cpp's
`llama_model_quantize`.  LOCK.json has `ids`, and in `files` for each of them

    sha256    of the file
    types     {ggml type: tensors}
    values    sha256 of every tensor's values in file order, float32, as ggml's own `to_float` gives them
    logits    sha256 of the logits of these ids, float32: Hugging Face's code in float64 over those values

Needs the extras `golden` and `peers`.  A llama.cpp of another version may quantize to other bytes; the
values of given bytes, and the logits, are the same on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from golden_models import COMMON, SEED, rope
from rewrite import rewrite

from pyengine.files.gguf import GGUF

QUANTIZED = Path(__file__).resolve().parents[2] / "tests" / "quantized"
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 127, 0]

# Rows of 256 for the K types; o_proj and out_proj have 64 columns, for which llama.cpp takes another type.
DENSE = {
    **COMMON,
    "model_type": "qwen3_5_text",
    "vocab_size": 128,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rope_parameters": rope(0.25, [3, 3, 2]),
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "intermediate_size": 256,
}
# Experts; value heads in another order than Hugging Face's, so that out_proj's columns are, across blocks.
EXPERTS = {
    **COMMON,
    "vocab_size": 128,
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "layer_types": ["linear_attention"],
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rope_parameters": rope(0.25, [3, 3, 2]),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 64,
}

F = LlamaFileType
# Name: model, llama.cpp's file type, types that are not the file type's.
FILES: dict[str, tuple[dict, LlamaFileType, dict[str, str]]] = {
    "Q4_0": (DENSE, F.MOSTLY_Q4_0, {}),
    "Q4_1": (DENSE, F.MOSTLY_Q4_1, {}),
    "Q5_0": (DENSE, F.MOSTLY_Q5_0, {}),
    "Q5_1": (DENSE, F.MOSTLY_Q5_1, {}),
    "Q2_K": (DENSE, F.MOSTLY_Q2_K, {}),
    "Q3_K_M": (DENSE, F.MOSTLY_Q3_K_M, {}),
    "Q4_K_M": (DENSE, F.MOSTLY_Q4_K_M, {}),
    "Q5_K_M": (DENSE, F.MOSTLY_Q5_K_M, {}),
    "Q6_K": (DENSE, F.MOSTLY_Q6_K, {}),
    "IQ4_NL": (DENSE, F.MOSTLY_IQ4_NL, {}),
    "IQ4_XS": (DENSE, F.MOSTLY_IQ4_XS, {}),
    # The types of few bits, all in one file; the embedding and the head too.
    "IQ": (
        DENSE,
        F.MOSTLY_IQ2_XXS,
        {
            "token_embd": "IQ3_S",
            "output": "IQ2_S",
            "blk.0.attn_qkv": "IQ3_XXS",
            "blk.0.attn_gate": "IQ1_M",
            "blk.0.ffn_gate": "IQ2_XXS",
            "blk.0.ffn_up": "IQ2_XS",
            "blk.0.ffn_down": "IQ1_S",
            "blk.1.attn_q": "TQ1_0",
            "blk.1.attn_k": "TQ2_0",
            "blk.1.attn_v": "IQ2_S",
            "blk.1.ffn_gate": "TQ2_0",
            "blk.1.ffn_up": "IQ1_M",
            "blk.1.ffn_down": "IQ2_XS",
        },
    ),
    "NVFP4": (DENSE, F.MOSTLY_Q8_0, {"attn": "NVFP4", "ffn": "NVFP4", "ssm_out": "NVFP4"}),
    "MXFP4": (EXPERTS, F.MOSTLY_MXFP4_MOE, {}),
    # Types that differ within a layer and between gate, up and down, as "dynamic" files have them.
    "UD": (
        EXPERTS,
        F.MOSTLY_Q8_0,
        {
            "token_embd": "Q5_0",
            "output": "Q6_K",
            "ffn_gate_exps": "Q4_K",
            "ffn_up_exps": "IQ4_XS",
            "ffn_down_exps": "Q5_1",
            "ffn_gate_inp_shexp": "Q8_0",
            "ssm_out": "Q3_K",
            "attn_gate": "Q2_K",
        },
    ),
}


def make_all(folder: Path) -> None:
    from gguf_writer import write_gguf
    from hf_float64 import random_state_dict
    from quantized_models import quantize

    for name, (config, file_type, types) in FILES.items():
        with tempfile.TemporaryDirectory() as scratch:
            wide, path = Path(scratch) / "f32.gguf", folder / f"{name}.gguf"
            write_gguf(wide, config, random_state_dict(config, SEED), file_type="F32", name=name)
            quantize(wide, path, file_type, types, importance(wide) if name == "IQ" else None)
            if name == "NVFP4":
                made = path.rename(Path(scratch) / "unscaled.gguf")
                rewrite(made, path, tensors=scales(made))


def importance(path: Path) -> dict[str, np.ndarray]:
    """What llama-imatrix would measure: a positive number per column of each matrix, here random."""
    rng = np.random.default_rng(SEED)
    return {
        name: rng.uniform(0.5, 2.0, tensor.shape[-1] * math.prod(tensor.shape[:-2])).astype(np.float32)
        for name, tensor in GGUF.open(path).tensors.items()
        if len(tensor.shape) > 1
    }


def scales(path: Path) -> dict[str, tuple[np.ndarray, GGMLQuantizationType]]:
    """A scale beside each NVFP4 tensor, as llama.cpp's converter writes it of a ModelOpt checkpoint."""
    rng, found = np.random.default_rng(SEED), {}
    for name, tensor in GGUF.open(path).tensors.items():
        if tensor.type == GGMLQuantizationType.NVFP4:
            value = rng.uniform(0.5, 2.0, 1).astype(np.float32)
            found[name.removesuffix("weight") + "scale"] = value, GGMLQuantizationType.F32
            found[name.removesuffix("weight") + "input_scale"] = value / 3, GGMLQuantizationType.F32
    return found


# ---- what they hold ------------------------------------------------------------------------------


def locked_facts(path: Path) -> dict:
    """What LOCK.json says of a file, from llama.cpp's values and Hugging Face's code."""
    from hf_float64 import load_float64, trace
    from quantized_models import dequantize, widen

    file, values = GGUF.open(path), hashlib.sha256()
    for tensor in file.tensors.values():
        dense = tensor.block_type.dense
        values.update(tensor.data if dense else dequantize(tensor.data, tensor.type))
    with tempfile.TemporaryDirectory() as scratch:
        model = load_float64(widen(path, Path(scratch) / "f32.gguf"))
    logits = trace(model, np.array(IDS))["lm_head"].astype("<f4")
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "types": dict(sorted(Counter(tensor.type.name for tensor in file.tensors.values()).items())),
        "values": values.hexdigest(),
        "logits": hashlib.sha256(np.ascontiguousarray(logits)).hexdigest(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="compute LOCK.json again; exit 1 at a difference"
    )
    options = parser.parse_args()
    if not options.check:
        QUANTIZED.mkdir(exist_ok=True)
        make_all(QUANTIZED)
    files = {name: locked_facts(QUANTIZED / f"{name}.gguf") for name in FILES}
    lock = {"ids": IDS, "files": files}
    path = QUANTIZED / "LOCK.json"
    if not options.check:
        path.write_text(json.dumps(lock, indent=1) + "\n")
        return 0
    noted = json.loads(path.read_text())
    if noted["ids"] != IDS:
        raise ValueError(f"{path}: ids: want {IDS}, got {noted['ids']}")
    noted = noted["files"]
    different = [name for name in noted | files if noted.get(name) != files.get(name)]
    print(
        f"different: {', '.join(different)}" if different else f"equal: {len(files)} files", file=sys.stderr
    )
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
