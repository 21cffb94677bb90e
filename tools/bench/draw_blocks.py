"""Random blocks of GGUF's types as they lie in a file: codes even over their range, scales of a given size.

No float weights are made: a block's bytes are drawn at once, and its scale, its minimum and, where the
type has any, the upper bits of its sub-blocks' scales are set afterwards.  Source: llama.cpp's ggml-common.h.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import gguf
import numpy as np


class Layout(NamedTuple):
    """rms      of a block's values where its scale is 1
    scale    byte of the float16 scale
    minimum  byte of the float16 minimum, and the multiple of the scale that makes values zero on average
    raised   first byte, end and mask of bits that are set: the sub-blocks' scales and minimums are then in
             the upper half of their range, where quantizers put most
    signed   quantizers write scales of either sign
    """

    rms: float
    scale: int = 0
    minimum: tuple[int, float] | None = None
    raised: tuple[int, int, int] | None = None
    signed: bool = True


# Quantizers write no negative scale where a block has a minimum or, in Q8_0, a code for either sign.
LAYOUTS = {
    "Q8_0": Layout(73.9, signed=False),
    "Q4_0": Layout(4.64),
    "Q4_1": Layout(4.61, minimum=(2, -7.5), signed=False),
    "Q5_0": Layout(9.25),
    "Q5_1": Layout(9.23, minimum=(2, -15.5), signed=False),
    "Q2_K": Layout(13.99, 80, (82, 1.5), (0, 16, 0x88), signed=False),
    "Q3_K": Layout(43.3, 108),
    "Q4_K": Layout(243.6, 0, (2, 7.5), (4, 12, 0xA0), signed=False),
    "Q5_K": Layout(491.0, 0, (2, 15.5), (4, 12, 0xA0), signed=False),
    "Q6_K": Layout(1370.0, 208),
    "IQ4_NL": Layout(67.4),
    "IQ4_XS": Layout(1242.0),
    "MXFP4": Layout(5.59),  # of its doubled codes; the scale is a power of two, in one byte
}


def block_size(kind: str) -> tuple[int, int]:
    """-> columns, bytes."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def draw_blocks(rng, shape, kind: str, std: float) -> np.ndarray:
    """uint8 [.., blocks, block bytes] for values [.., columns] of about this standard deviation.

    The scales of blocks are even within a factor of 3.
    """
    columns, nbytes = block_size(kind)
    layout, blocks = LAYOUTS[kind], (*shape[:-1], shape[-1] // columns)
    data = _bytes(rng, (*blocks, nbytes))
    if kind == "Q8_0":  # no quantizer writes -128
        codes = data[..., 2:].view(np.int8)
        np.maximum(codes, -127, out=codes)
    if layout.raised:
        first, end, mask = layout.raised
        data[..., first:end] |= np.uint8(mask)
    scales = rng.random(blocks, np.float32)
    scales += 0.5
    scales *= std / layout.rms
    if kind == "MXFP4":
        data[..., 0] = np.rint(np.log2(scales)) + 128  # a scale of 1 for doubled codes is byte 128
        return data
    stored = data[..., layout.scale : layout.scale + 2].view("<u2")[..., 0]
    signs = stored & np.uint16(0x8000 if layout.signed else 0)
    stored[...] = scales.astype("<f2").view("<u2") | signs
    if layout.minimum:
        byte, multiple = layout.minimum
        scales *= multiple
        data[..., byte : byte + 2].view("<f2")[..., 0] = scales
    return data


def _bytes(rng, shape) -> np.ndarray:
    size = math.prod(shape)
    return rng.integers(0, 1 << 64, -(-size // 8), np.uint64).view(np.uint8)[:size].reshape(shape)
