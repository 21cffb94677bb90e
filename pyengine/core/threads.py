"""Instruction sets and threads of the C core."""

from __future__ import annotations

import os
import threading

from .._core import ffi, lib
from ..errors import InputError, PyengineError
from .processors import physical_cores


def available_isas() -> list[str]:
    """The instruction sets of this build and processor, lowest first."""
    names, i = [], 0
    while lib.pe_isa_name(i) != ffi.NULL:
        names.append(ffi.string(lib.pe_isa_name(i)).decode())
        i += 1
    return names


def active_isa() -> str:
    return ffi.string(lib.pe_isa_active()).decode()


def select_isa(name: str) -> None:
    """Use that level; not while an operation runs, in any thread: nothing locks the table of kernels.

    Errors: InputError if this build or processor lacks it.
    """
    if lib.pe_isa_select(name.encode()) != lib.PE_OK:
        raise InputError(f"PYENGINE_ISA: want one of {', '.join(available_isas())}, got {name!r}")


def _select_from_environment() -> None:
    """PYENGINE_ISA=scalar|avx2|avx512vnni|avx512amx|neon|...: a level no higher than that one."""
    name = os.environ.get("PYENGINE_ISA")
    if name:
        select_isa(name)


_select_from_environment()


class Pool:
    """Threads of the C core; freed with the object."""

    def __init__(self, threads: int | None = None, pin: bool = False):
        threads = physical_cores() if threads is None else threads
        if not 1 <= threads <= 1024:
            raise InputError(f"threads: want 1 to 1024, got {threads}")
        pointer = lib.pe_pool_new(threads, int(pin))
        if pointer == ffi.NULL:
            raise PyengineError(f"threads: {threads} threads could not be started")
        self.pointer = ffi.gc(pointer, lib.pe_pool_free)
        self.threads = threads
        self.lock = threading.Lock()  # a pool serves one caller at a time
        self.tape = None  # the `Tape` that records the calls, or None

    @property
    def scratch_bytes(self) -> int:
        return lib.pe_pool_scratch_bytes(self.pointer)
