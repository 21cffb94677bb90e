"""The options of a quantization, and the source that they apply to."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import BITS, GROUP
from ..checkpoint.methods import ALL_METHODS
from ..checkpoint.open import open_checkpoint
from ..checkpoint.writer import SHARD_BYTES
from ..checks import is_integer
from ..errors import InputError


@dataclass(frozen=True)
class QuantizeOptions:
    """All that decides the bytes, beside the source.  InputError: an option out of range.

    group_size   columns that share a scale, an even number
    scale        a key of ALL_METHODS: "absmax" or "mse"; one of CALIBRATED, which need statistics
    shard_bytes  of a file, at most, where a parameter is not larger
    """

    group_size: int = GROUP
    scale: str = "absmax"
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        group = self.group_size
        if not is_integer(group) or not 2 <= group <= provenance.MAX_GROUP or group % 2:
            raise InputError(f"group size: want an even number from 2 on, got {group!r}")
        if self.scale not in ALL_METHODS:
            raise InputError(f"scale: want {' or '.join(ALL_METHODS)}, got {self.scale!r}")
        if self.scale in ("gptq", "awq") and group != GROUP:
            raise InputError(
                f"group size: want {GROUP}, which the locked arithmetic has, for {self.scale}, got {group}"
            )


def open_source(source) -> Checkpoint:
    """A GGUF or a directory to quantize.  InputError: it is quantized already in our own layout."""
    checkpoint = open_checkpoint(source)
    for tensor in checkpoint.tensors.values():
        if tensor.type in BITS:
            raise InputError(
                f"{source}: want floats or a GGUF, got a checkpoint that is quantized: {tensor.file_name}"
            )
    return checkpoint
