"""Arguments into the C core, and its status out."""

from __future__ import annotations

import numpy as np

from .._core import ffi, lib
from ..errors import InputError, NonFiniteError, PyengineError
from .threads import Pool


def as_input(array, dtype=np.float32, kind="float[]"):
    if array.dtype != dtype:
        raise TypeError(f"want {np.dtype(dtype)}, got {array.dtype}")
    return ffi.from_buffer(kind, array, require_writable=False)


def as_output(array, kind="float[]"):
    return ffi.from_buffer(kind, array, require_writable=True)


REASONS = {
    lib.PE_ERROR_NONFINITE: (NonFiniteError, "want finite values, got NaN or infinity"),
    lib.PE_ERROR_ARGUMENT: (InputError, "a size or type that the operation excludes"),
    lib.PE_ERROR_MEMORY: (MemoryError, "no memory for scratch"),
    lib.PE_ERROR_READ: (PyengineError, "want weights, got a file that the system could not read"),
}


def check_status(status, what):
    if status != lib.PE_OK:
        kind, reason = REASONS[status]
        raise kind(f"{what}: {reason}")


def run(pool: Pool, function, what: str, *arguments, keep=()) -> None:
    """An operation of the C core on the pool; also recorded while the pool has a tape.

    The arguments hold the arrays that `as_input` and `as_output` were given; keep holds
    what structs point to.
    """
    check_status(function(pool.pointer, *arguments), what)
    if pool.tape is not None:
        pool.tape.add_call(function, what, arguments, keep)


def want(condition, what):
    if not condition:
        raise InputError(what)


def want_out(out, shape) -> None:
    want(
        out.shape == shape and out.dtype == np.float32,
        f"out: want float32 {shape}, got {out.dtype} {out.shape}",
    )
