"""The columns of arcee-ai/DistillKit: `compressed_logprobs` and `bytepacked_indices`.

Per row of logits, in the order of falling log-probability:
    compressed_logprobs   k float16, little-endian: the codec's exact part alone (exact_k = k), so there is no
                          polynomial and no bin
    bytepacked_indices    k ids of `index_bits` bits, the highest bit first, one after the other; the last
                          byte is filled with zeros
DistillKit must be given the same configuration: `compression_config.yaml` has it.  Its polynomial codecs are
not written: their least squares go through LAPACK, which gives other bits on another machine.

Source: distillkit/compression/{config,compressor,bitpack,monotonic_logprobs}.py and
distillkit/sample_common.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .labels import Labels

COLUMNS = ("compressed_logprobs", "bytepacked_indices")
CONFIG_NAME = "compression_config.yaml"


def config(k: int, vocab_size: int) -> dict[str, Any]:
    """Fields of DistillKit's `DistributionQuantizationConfig`."""
    return {
        "d": vocab_size,
        "k": k,
        "exact_k": k,
        "exact_dtype": "float16",
        "polynomial_terms": None,
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
        "normalize_t": False,
    }


def index_bits(vocab_size: int) -> int:
    """As DistillKit computes it: log2 in float32, rounded up."""
    return int(np.ceil(np.log2(np.float32(vocab_size))))


def encode(labels: Labels, config: dict[str, Any]) -> dict[str, Any]:
    width = index_bits(config["d"])
    shifts = np.arange(width - 1, -1, -1)
    bits = (labels.ids[:, :, None] >> shifts & 1).astype(np.uint8)
    packed = np.packbits(bits.reshape(len(bits), -1), axis=1)
    exact = labels.logprobs.clip(-65504, 0).astype("<f2").view(np.uint8)
    return {"compressed_logprobs": list(exact), "bytepacked_indices": list(packed)}


def decode(
    columns: Mapping[str, Any], config: dict[str, Any]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """-> ids [T, k], logprobs [T, k]."""
    k, width = config["k"], index_bits(config["d"])
    exact, packed = (np.array([np.asarray(row, np.uint8) for row in columns[name]]) for name in COLUMNS)
    bits = np.unpackbits(packed, axis=1)[:, : k * width].reshape(len(packed), k, width).astype(np.int32)
    ids = (bits << np.arange(width - 1, -1, -1)).sum(axis=2, dtype=np.int32)
    return ids, np.ascontiguousarray(exact).view("<f2").astype(np.float32)
