"""The types of GGUF tensors whose values are read: one row for each.

A row of a tensor is a sequence of blocks of `elements` values in `nbytes` bytes; a dense type has blocks of
one value.  A new type is a new row here, and in the C core a type PE_NAME; without the latter the float64
arithmetic alone runs it.

The value of a weight is the float32 that ggml's `dequantize_row` of its type gives: a scale times a code, in
Q4_1, Q5_1, Q2_K, Q4_K and Q5_K plus a minimum.  The scale times the code, and the minimum, are exact in
float32 in whatever order their factors are multiplied; the sum of the two is rounded once.  So the value does
not depend on the machine.  gguf-py has these functions in NumPy, and this table calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from .numbers import bfloat16_to_float32

Stored = NDArray[Any]  # of a type's own dtype
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Values = NDArray[np.float32]
Word = tuple[int, np.dtype[Any], int]

NOT_FINITE = "NaN or infinity"


class BlockType(NamedTuple):
    """name        GGML's, which checkpoint.tensor.Tensor has too
    ggml        the number in a file
    elements    values per block, along a row
    nbytes      bytes per block
    dtype       of stored arrays: a dense type's own (bfloat16 as uint16), uint8 of all others
    to_float32  stored [.., stored columns] -> float32 [.., columns]; a scale that `words` refuses gives
                values that are not finite, without a warning
    words       [(byte in the block, dtype, bits)] of the scales in a block: a scale is refused where these
                bits are all ones, which of a float16 says that it is NaN or infinite
    refused     what a refused scale is, in words
    """

    name: str
    ggml: GGMLQuantizationType
    elements: int
    nbytes: int
    dtype: np.dtype[Any]
    to_float32: Callable[[Stored], Values]
    words: tuple[Word, ...]
    refused: str = NOT_FINITE

    @property
    def dense(self) -> bool:
        return self.elements == 1

    def stored_columns(self, columns: int) -> int:
        """Of a row of so many values, in units of `dtype`."""
        return columns // self.elements * (self.nbytes // self.dtype.itemsize)

    def blocks_of(self, stored: Stored) -> Bytes:
        """uint8 [.., stored columns] -> uint8 [.., blocks, nbytes]."""
        return stored.reshape(*stored.shape[:-1], stored.shape[-1] // self.nbytes, self.nbytes)

    def refuses(self, blocks: Bytes) -> NDArray[np.bool_]:
        """uint8 [.., nbytes] -> bool [..]: whether one of a block's scales is refused."""
        refused = np.zeros(blocks.shape[:-1], bool)
        for offset, dtype, bits in self.words:
            word = blocks[..., offset : offset + dtype.itemsize].view(dtype)[..., 0]
            refused |= (word & bits) == bits
        return refused


# ---- how a type is read ------------------------------------------------------------------------


def _float32(stored: Stored) -> Values:
    return stored.astype(np.float32, copy=False)


# Values that are unpacked at once: the temporaries of gguf-py stay below 64 MiB.
STEP_VALUES = 1 << 21


def _by_gguf_py(name: str) -> Callable[[Stored], Values]:
    """to_float32 of a type that gguf-py dequantizes, some rows at a time."""
    ggml = GGMLQuantizationType[name]

    def to_float32(stored: Stored) -> Values:
        row = BY_NAME[name]
        columns = stored.shape[-1] // row.nbytes * row.elements
        rows = stored.reshape(-1, stored.shape[-1])
        values: Values = np.empty((len(rows), columns), np.float32)
        step = max(1, STEP_VALUES // max(1, columns))
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, len(rows), step):
                some = rows[start : start + step]
                values[start : start + step] = quants.dequantize(some, ggml)
                if row.refused != NOT_FINITE:
                    of_block = values[start : start + step].reshape(len(some), -1, row.elements)
                    of_block[row.refuses(row.blocks_of(some))] = np.nan
        return values.reshape(*stored.shape[:-1], columns)

    return to_float32


def _q8_0_codes(blocks: Bytes) -> Codes:
    """uint8 [.., 34] -> int8 [.., 32]."""
    return blocks[..., 2:].view(np.int8)


def _q4_0_codes(blocks: Bytes) -> Codes:
    """uint8 [.., 18] -> int8 [.., 32]: low nibbles are elements 0..15, high ones 16..31."""
    packed = blocks[..., 2:]
    nibbles = np.concatenate([packed & 0x0F, packed >> 4], axis=-1)
    codes: Codes = nibbles.view(np.int8) - np.int8(8)
    return codes


def _scaled(name: str, codes: Callable[[Bytes], Codes]) -> Callable[[Stored], Values]:
    """to_float32 of blocks that begin with a float16 scale: scale * code, float32 [.., columns]."""

    def to_float32(stored: Stored) -> Values:
        blocks = BY_NAME[name].blocks_of(stored)
        scales = blocks[..., :2].view("<f2").astype(np.float32)
        # A float16 scale has 11 significant bits and a code at most 8: float32 holds the product.
        with np.errstate(invalid="ignore"):
            values = codes(blocks).astype(np.float32)
            values *= scales
        return values.reshape(*blocks.shape[:-2], blocks.shape[-2] * values.shape[-1])

    return to_float32


# ---- the types -----------------------------------------------------------------------------------

_U8, _FLOAT16 = np.dtype(np.uint8), (np.dtype("<u2"), 0x7C00)


def _float16_at(*offsets: int) -> tuple[Word, ...]:
    return tuple((offset, *_FLOAT16) for offset in offsets)


def _row(
    name: str,
    dtype: np.dtype[Any],
    to_float32: Callable[[Stored], Values],
    words: tuple[Word, ...],
    refused: str = NOT_FINITE,
) -> BlockType:
    ggml = GGMLQuantizationType[name]
    elements, nbytes = GGML_QUANT_SIZES[ggml]
    return BlockType(name, ggml, elements, nbytes, dtype, to_float32, words, refused)


def _blocks(name: str, *words: Word, refused: str = NOT_FINITE) -> BlockType:
    return _row(name, _U8, _by_gguf_py(name), words, refused=refused)


F32 = _row("F32", np.dtype("<f4"), _float32, ((0, np.dtype("<u4"), 0x7F800000),))
F16 = _row("F16", np.dtype("<f2"), _float32, ((0, *_FLOAT16),))
BF16 = _row("BF16", np.dtype("<u2"), bfloat16_to_float32, ((0, np.dtype("<u2"), 0x7F80),))
Q8_0 = _row("Q8_0", _U8, _scaled("Q8_0", _q8_0_codes), ((0, *_FLOAT16),))
Q4_0 = _row("Q4_0", _U8, _scaled("Q4_0", _q4_0_codes), ((0, *_FLOAT16),))

# E8M0: 255 is NaN, and from 253 on the largest code's value is infinite in float32.  These three have ones in
# all bits but bit 1, or in all but bit 0.
_E8M0 = (0, _U8, 0xFD), (0, _U8, 0xFE)
# Unsigned E4M3: 127 is NaN.  ggml's code for CPUs ignores the highest bit, its code for GPUs takes it as a
# sign.
_UE4M3 = tuple((offset, _U8, bits) for offset in range(4) for bits in (0x7F, 0x80))
# IQ1_M has a float16 in the highest four bits of four words: its exponent is in the last two.
_IQ1_M = 52, np.dtype("<u4"), 0x7000C000

ROWS = (
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    _blocks("Q4_1", *_float16_at(0, 2)),
    _blocks("Q5_0", *_float16_at(0)),
    _blocks("Q5_1", *_float16_at(0, 2)),
    _blocks("Q2_K", *_float16_at(80, 82)),
    _blocks("Q3_K", *_float16_at(108)),
    _blocks("Q4_K", *_float16_at(0, 2)),
    _blocks("Q5_K", *_float16_at(0, 2)),
    _blocks("Q6_K", *_float16_at(208)),
    _blocks("IQ4_NL", *_float16_at(0)),
    _blocks("IQ4_XS", *_float16_at(0)),
    _blocks("IQ3_S", *_float16_at(0)),
    _blocks("IQ3_XXS", *_float16_at(0)),
    _blocks("IQ2_S", *_float16_at(0)),
    _blocks("IQ2_XS", *_float16_at(0)),
    _blocks("IQ2_XXS", *_float16_at(0)),
    _blocks("IQ1_M", _IQ1_M),
    _blocks("IQ1_S", *_float16_at(0)),
    _blocks("TQ2_0", *_float16_at(64)),
    _blocks("TQ1_0", *_float16_at(52)),
    _blocks("MXFP4", *_E8M0, refused="NaN or a scale whose values float32 does not hold"),
    _blocks("NVFP4", *_UE4M3, refused="NaN or a negative scale"),
)
BY_NAME = {row.name: row for row in ROWS}
BY_GGML = {row.ggml: row for row in ROWS}
DENSE_TYPES = tuple(row.name for row in ROWS if row.dense)
