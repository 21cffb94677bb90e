"""Makes the embedded default, `pyengine/models/`, from seed 1729.

    python tools/make_default.py            # write it
    python tools/make_default.py --check    # make it again elsewhere and compare every byte

A small checkpoint with random weights in the shape of the 35B-A3B (three delta-net layers to one of
full attention, twice as many value heads as key heads, routed experts and a shared one), its
tokenizer, and what PyTorch computes from it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import hf_float64  # noqa: E402
import locked_torch  # noqa: E402
from golden_models import SEED, byte_level_tokenizer  # noqa: E402
from gguf_writer import write_gguf  # noqa: E402

from pyengine import models  # noqa: E402
from pyengine.quantize import quantize  # noqa: E402
from pyengine.trace import Trace  # noqa: E402

CONFIG = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 288,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                        "mrope_interleaved": True, "mrope_section": [2, 1, 1]},
}
PROMPT_LENGTH = 6


def make(directory: Path) -> list[Path]:
    """Write the checkpoint and its three golden traces into the directory; the files written."""
    checkpoint = directory / models.CHECKPOINT.name
    write_gguf(checkpoint, CONFIG, hf_float64.random_state_dict(CONFIG, SEED), name="default",
               tokenizer=byte_level_tokenizer(CONFIG["vocab_size"]))
    ids = np.random.default_rng(SEED).integers(0, CONFIG["vocab_size"], PROMPT_LENGTH)

    float64 = hf_float64.trace(hf_float64.load_float64(checkpoint), ids)
    float64 = {name: x if x.dtype == np.int64 else x.astype(np.float32)
               for name, x in float64.items()}
    Trace(ids, float64, "float64").save(directory / models.GOLDEN_FLOAT64.name)

    locked, _ = locked_torch.forward(locked_torch.Weights.from_gguf(checkpoint), ids)
    Trace(ids, locked, "locked").save(directory / models.GOLDEN_LOCKED.name)

    with tempfile.TemporaryDirectory() as scratch:
        quantize(checkpoint, int8=Path(scratch) / "int8")
        weights = locked_torch.Weights.from_int8(Path(scratch) / "int8")
        locked, _ = locked_torch.forward(weights, ids)
    Trace(ids, locked, "locked").save(directory / models.GOLDEN_LOCKED_INT8.name)
    return [checkpoint, *(directory / golden.name for golden in (
        models.GOLDEN_FLOAT64, models.GOLDEN_LOCKED, models.GOLDEN_LOCKED_INT8))]


def check() -> int:
    """-> 0 if the files in the package are what this tool makes, else 1."""
    with tempfile.TemporaryDirectory() as scratch:
        for made in make(Path(scratch)):
            if made.read_bytes() != (models.HERE / made.name).read_bytes():
                print(f"{models.HERE / made.name}: not what tools/make_default.py makes")
                return 1
    print("embedded default: equal, every byte")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    for path in make(models.HERE):
        print(f"{path} {path.stat().st_size} bytes")
