"""The layout of our INT8 and INT4 tensors on disk: names, shapes, nibbles, and what stays floats.

The reader (from_directory.py) and the writer (quantizer/plan.py) both use this module.  The modelling
file for transformers (hf/modeling_pyengine.py) travels with a checkpoint and cannot import it; a test
compares its copy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GROUP = 128
BITS = {"INT8": 8, "INT4": 4}
MAX_CODE = {8: 127, 4: 7}  # by bits

# Linears that stay floats, by the end of their parameter's name: they are too small, or too sensitive,
# to be worth fewer bits.
BFLOAT16_LINEARS = (
    *("embed_tokens.weight", "lm_head.weight"),
    *("in_proj_a.weight", "in_proj_b.weight", "in_proj_ba.weight"),
)
FLOAT32_LINEARS = ("shared_expert_gate.weight",)
FLOAT_LINEARS = (*BFLOAT16_LINEARS, *FLOAT32_LINEARS)


class StoredTensor(NamedTuple):
    """A tensor of the file: its name, its safetensors dtype and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class StoredForm(NamedTuple):
    """The two tensors of one quantized parameter."""

    codes: StoredTensor
    scales: StoredTensor


def stored_form(name: str, shape: tuple[int, ...], kind: str, group: int = GROUP) -> StoredForm:
    """How a parameter NAME of shape [rows, cols] or [experts, rows, cols] is stored as `kind`.

    kind     INT8 or INT4
    codes    NAME_i8 int8 [.., rows, cols], or NAME_i4 uint8 [.., rows, cols / 2]; of a stack of experts
             NAME_q8 and NAME_q4
    scales   NAME_scale_i8 and its like, float16 [.., n_groups, rows]: one per row and `group` columns
    The columns of an INT4 parameter are an even number.
    """
    *stack, rows, cols = shape
    mark = f"{'q' if stack else 'i'}{BITS[kind]}"
    width, dtype = (cols, "I8") if kind == "INT8" else (cols // 2, "U8")
    return StoredForm(
        StoredTensor(f"{name}_{mark}", dtype, (*stack, rows, width)),
        StoredTensor(f"{name}_scale_{mark}", "F16", (*stack, -(-cols // group), rows)),
    )


def float_dtype(name: str) -> str | None:
    """The safetensors dtype of a linear that stays floats; None: the linear is quantized."""
    if name.endswith(FLOAT32_LINEARS):
        return "F32"
    return "BF16" if name.endswith(BFLOAT16_LINEARS) else None


# ---- bits --------------------------------------------------------------------------------------


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """int8 codes [.., cols], cols even -> uint8 [.., cols / 2]: low nibble = even column, nibble =
    code + 8."""
    pairs = np.ascontiguousarray(codes).view("<u2")
    packed = (pairs >> 4) & 0xF0
    packed |= pairs & 0x0F
    result: NDArray[np.uint8] = packed.astype(np.uint8)
    result ^= np.uint8(0x88)  # code + 8: the low nibble with its sign bit flipped
    return result


def unpack_int4(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """uint8 [.., cols / 2] -> int8 codes [.., cols]: the inverse of `pack_int4`."""
    codes: NDArray[np.int8] = np.stack([packed & 15, packed >> 4], axis=-1).view(np.int8) - np.int8(8)
    return codes.reshape(*packed.shape[:-1], -1)
