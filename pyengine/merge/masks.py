"""Which elements of a tensor a random draw keeps: a function of seed, model, tensor and element alone.

The mask of a tensor for one model and one density:

    key      the first 16 bytes of the sha256 of the UTF-8 text

                 pyengine-merge-1 NEWLINE seed NEWLINE position NEWLINE name

             seed and position in decimal; position: the model's in the list of models, from 0; name: the
             tensor's (of an expert `model.layers.3.mlp.experts.7.gate_proj.weight`).  The bytes are two
             64-bit words k0, k1, little-endian.
    block b  Philox4x64-10 (Salmon et al., SC 2011) of the counter (b + 1, 0, 0, 0) under (k0, k1): four
             64-bit words w0 to w3.
    u[i]     the draw of element i, in row-major order of Hugging Face's shape, from 0: of block i div 8,
             word j = (i mod 8) div 2: its low 32 bits where i is even, its high 32 bits where i is odd.
    kept     where u[i] < T, T = ceil(density * 2^32), which float64 holds exactly.

NumPy's Philox is that generator: it adds 1 to its counter before it makes a block.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

NAME = "pyengine-merge-1"
DRAWS = 8  # per block


def mask_key(seed: int, position: int, name: str) -> tuple[int, int]:
    """(k0, k1) of a tensor of the model at this position."""
    digest = hashlib.sha256(f"{NAME}\n{seed}\n{position}\n{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def kept(key: tuple[int, int], density: float, start: int, stop: int) -> NDArray[np.bool_]:
    """bool [stop - start]: whether each of the elements [start, stop) is kept; density from 0 to 1."""
    limit = math.ceil(density * 2.0**32)
    if not 0 < limit < 1 << 32:
        return np.full(stop - start, limit > 0)
    first = start // DRAWS
    blocks = -(-stop // DRAWS) - first
    generator = np.random.Philox(counter=first, key=np.array(key, np.uint64))
    words = generator.random_raw(4 * blocks).astype("<u8", copy=False)
    draws = words.view("<u4")[start - first * DRAWS :][: stop - start]
    keep: NDArray[np.bool_] = draws < np.uint32(limit)
    return keep
