"""`load`: a checkpoint on disk to a model in one of the two arithmetics."""

from __future__ import annotations

from .checkpoint import open_checkpoint
from .decoder.model import DEFAULT_CHUNK, LockedModel
from .errors import InputError
from .generate import TextModel
from .reference import ReferenceModel

ARITHMETICS = ("locked", "locked-kv16", "float64")


def load(path, arithmetic: str = "locked", threads: int | None = None, *, pin: bool = False,
         chunk: int | None = None, check: bool = True):
    """A GGUF file (or the first of its splits) or a checkpoint directory -> a model.

    arithmetic  "locked": C, fast, the same bits everywhere; "locked-kv16": the same with keys and
                values kept as float16, half the memory; "float64": NumPy, the specification
    threads     of the locked arithmetic; None: the physical cores.  pin: one core each
    chunk       prompt tokens computed at a time by default: bounds memory, changes no bit
    check       read every weight scale once and refuse a NaN or infinity, naming the tensor

    The model has `forward(ids, state=None) -> logits [T, vocab] float32`, `new_state()`, `config`, and
    `generate(prompt or messages)` (generate.py).
    Errors: FileFormatError, CheckpointError, InputError.
    """
    if arithmetic not in ARITHMETICS:
        raise InputError(f"arithmetic: want {' or '.join(ARITHMETICS)}, got {arithmetic!r}")
    checkpoint = open_checkpoint(path)
    if check:
        checkpoint.check_finite()
    if arithmetic == "float64":
        return ReferenceTextModel(checkpoint)
    return LockedTextModel(checkpoint, threads, pin, chunk or DEFAULT_CHUNK, arithmetic)


class LockedTextModel(TextModel, LockedModel):
    """The engine, with text in and text out."""


class ReferenceTextModel(TextModel, ReferenceModel):
    """The specification, with text in and text out."""
