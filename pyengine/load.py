"""`load`: a checkpoint on disk to a model in one of the two arithmetics.

What a model needs is imported when one is loaded: `import pyengine` and the commands that load none are
quick.
"""

from __future__ import annotations

from functools import partial

from .decoder import LOCKED_ARITHMETICS
from .errors import InputError

ARITHMETICS = (*LOCKED_ARITHMETICS, "float64")


def load(
    path,
    arithmetic: str = "locked",
    threads: int | None = None,
    *,
    pin: bool = False,
    chunk: int | None = None,
    check: bool = True,
    memory: int | None = None,
    context: int | None = None,
):
    """A GGUF file (or the first of its splits) or a checkpoint directory -> a model.

    arithmetic  "locked": C, fast, the same bits everywhere; "locked-kv16": the same with keys and
                values kept as float16, half the memory; "float64": NumPy, the specification
    threads     of the locked arithmetic; None: the physical cores.  pin: one core each
    chunk       prompt tokens computed at a time by default: bounds memory, changes no bit
    check       read every weight scale once and refuse a NaN or infinity, naming the tensor; an expert's
                when the expert is read for the first time, if not all of them stay in memory
    memory      bytes for the weights, of the locked arithmetic; None: what is available, less the state of
                `context` tokens; where not all fit, a tenth is left to other programs, and the bound follows
                what they take and give back.  Routed experts that do not fit are read when they are chosen:
                decoder/residency.py.  It changes no bit.

    The model has `forward(ids, state=None) -> logits [T, vocab] float32`, `new_state()`, `config`, and
    `generate(prompt or messages)` (generate.py).
    Errors: FileFormatError, CheckpointError, InputError.
    """
    if arithmetic not in ARITHMETICS:
        raise InputError(f"arithmetic: want {' or '.join(ARITHMETICS)}, got {arithmetic!r}")
    if memory is not None and arithmetic == "float64":
        raise InputError("memory: want a locked arithmetic, got float64, which has no bound")
    from .checkpoint.open import open_checkpoint
    from .decoder.model import DEFAULT_CHUNK
    from .decoder.residency import plan_memory, read_in
    from .text.models import LockedTextModel, ReferenceTextModel

    checkpoint, chunk = open_checkpoint(path), DEFAULT_CHUNK if chunk is None else chunk
    if arithmetic == "float64":
        if check:
            checkpoint.check_finite()
        return ReferenceTextModel(checkpoint)
    plan_now = partial(plan_memory, checkpoint, memory, context=context, chunk=chunk, arithmetic=arithmetic)
    plan = plan_now()
    read_in(checkpoint, experts=plan is None)
    if check:
        checkpoint.check_finite(experts=plan is None)
    if memory is not None:
        plan_now = None
    return LockedTextModel(checkpoint, threads, pin, chunk, arithmetic, plan, check, plan_now)
