"""Every published size of every family: its own counts of heads, experts and choices, narrow layers.

Both arithmetics, from the GGUF and from its INT8 twin, against what PyTorch computes: see
`tools/golden/make_golden.py`.  The sizes are those of the model cards.
"""

import dataclasses
import warnings

import numpy as np
import pytest
from bits import same_names

import pyengine
from pyengine.quantizer.quantize import quantize

pytest.importorskip("torch")
pytest.importorskip("transformers")

from gguf_writer import write_gguf
from hf_float64 import load_float64, random_state_dict
from locked_torch import Weights
from make_golden import exceptions, rounded, run_hugging_face, run_model, run_restatement

pytestmark = pytest.mark.golden

LAYERS, NARROW = 4, 32  # three delta nets and an attention; widths are divided by NARROW
RUN = "9+1+4"
MOST_CROSSED = 2  # different values of one model: of 10^5, less than one is expected
IDS = np.random.default_rng(1729).integers(0, 64, 14)


@dataclasses.dataclass(frozen=True)
class Size:
    """hidden and inner: widths; heads: of queries, of keys and values; linear_heads: of keys, of values;
    experts: all, those of a token."""

    hidden: int
    heads: tuple[int, int]
    linear_heads: tuple[int, int]
    inner: int
    experts: tuple[int, int] | None = None
    tied: bool = False
    next: bool = False


SIZES = {
    "Qwen3.5-0.8B": Size(1024, (8, 2), (16, 16), 3584, tied=True),
    "Qwen3.5-2B": Size(2048, (8, 2), (16, 16), 6144, tied=True),
    "Qwen3.5-4B": Size(2560, (16, 4), (16, 32), 9216, tied=True),
    "Qwen3.5-9B": Size(4096, (16, 4), (16, 32), 12288),
    "Qwen3.5-27B": Size(5120, (24, 4), (16, 48), 17408),
    "Qwen3.5-35B-A3B": Size(2048, (16, 2), (16, 32), 512, (256, 8)),
    "Qwen3.5-122B-A10B": Size(3072, (32, 2), (16, 64), 1024, (256, 8)),
    "Qwen3.5-397B-A17B": Size(4096, (32, 2), (16, 64), 1024, (512, 10)),
    "Qwen3-Next-80B-A3B": Size(2048, (16, 2), (16, 32), 512, (512, 10), next=True),
}


def config_of(size: Size) -> dict:
    """config.json's fields of the narrow model."""
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    inner = size.inner // NARROW
    if size.experts:
        experts, chosen = size.experts
        mlp = {
            "model_type": "qwen3_next" if size.next else "qwen3_5_moe_text",
            "num_experts": experts,
            "num_experts_per_tok": chosen,
            "moe_intermediate_size": inner,
            "shared_expert_intermediate_size": inner,
        }
    else:
        mlp = {"model_type": "qwen3_5_text", "intermediate_size": inner}
    return mlp | {
        "vocab_size": 64,
        "hidden_size": size.hidden // NARROW,
        "num_hidden_layers": LAYERS,
        "full_attention_interval": 4,
        "mtp_num_hidden_layers": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "num_attention_heads": size.heads[0],
        "num_key_value_heads": size.heads[1],
        "head_dim": 16,
        "rope_parameters": rope | ({} if size.next else {"mrope_section": [1, 1, 0]}),
        "linear_num_key_heads": size.linear_heads[0],
        "linear_num_value_heads": size.linear_heads[1],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "tie_word_embeddings": size.tied,
    }


@pytest.mark.parametrize("name", SIZES)
def test_a_size_equals_pytorch(name, tmp_path):
    config, path = config_of(SIZES[name]), tmp_path / "model.gguf"
    write_gguf(path, config, random_state_dict(config, 1729), nextn=True)
    exact = run_hugging_face(load_float64(path), IDS, RUN)
    got = run_model(pyengine.load(path, "float64"), IDS, RUN)
    assert list(got) == list(exact)
    crossed = []  # exceptions() raises for a value that does not lie on a rounding boundary
    for tensor, value in exact.items():
        crossed += [(tensor, e) for e in exceptions(value, rounded(value), rounded(got[tensor]))]
    assert len({e["value"] for _, e in crossed}) <= MOST_CROSSED, crossed
    if crossed:
        warnings.warn(f"on a rounding boundary, and rounded the other way here: {crossed}", stacklevel=1)
    quantize(path, tmp_path / "int8")
    for model in (path, tmp_path / "int8"):
        want = run_restatement(Weights.load(model), IDS, RUN)
        got = run_model(pyengine.load(model), IDS, RUN)
        assert same_names(got, want)
        for tensor, value in want.items():
            assert got[tensor].tobytes() == value.tobytes(), tensor
