"""Calls of the C core, recorded and replayed."""

from __future__ import annotations

import contextlib

from .._core import ffi, lib
from .call import check_status, want
from .threads import Pool


class Tape:
    """Calls of the C core as they were made, to be made again on the same arrays: the calls for every
    token are the same, and only the contents of the arrays change.

        with tape.recording(pool):
            ...                     # operations of ops/
            by_python(pool, f)      # code that is not an operation, or needs other arrays each time
        tape.replay(pool)           # any number of times; the results are in the same arrays

    What NumPy computes in between is not recorded.  The tape holds the arrays.
    Errors: InputError at the end of the recording for an operation that csrc/replay.c does not list.
    """

    def __init__(self):
        self._parts: list = []  # in order: a function, or (calls, what each is, what they point to)
        self._calls: list = []  # since the last part: (function, what, arguments, keep)

    @contextlib.contextmanager
    def recording(self, pool: Pool):
        pool.tape = self
        try:
            yield
        finally:
            pool.tape = None
        self._end_calls()

    def add_call(self, function, what: str, arguments: tuple, keep) -> None:
        self._calls.append((function, what, arguments, keep))

    def add_function(self, function) -> None:
        self._end_calls()
        self._parts.append(function)

    def replay(self, pool: Pool) -> None:
        failed = ffi.new("int64_t *")
        for part in self._parts:
            if callable(part):
                part()
                continue
            calls, whats, _ = part
            status = lib.pe_replay(pool.pointer, calls, len(calls), failed)
            if status != lib.PE_OK:
                check_status(status, whats[failed[0]])

    def _end_calls(self) -> None:
        if not self._calls:
            return
        calls, recorded, self._calls = ffi.new("pe_call[]", len(self._calls)), self._calls, []
        for call, (function, _, arguments, _) in zip(calls, recorded):
            _fill_call(call, function, arguments)
        self._parts.append((calls, [what for _, what, *_ in recorded], recorded))


def _fill_call(call, function, arguments) -> None:
    call.operation = lib.pe_operation(function.__name__.encode())
    want(call.operation >= 0, f"{function.__name__}: cannot be replayed")
    kinds = ffi.typeof(function).args[1:]  # without the pool
    want(len(kinds) <= lib.PE_CALL_WORDS, f"{function.__name__}: too many arguments for a call")
    for word, kind, value in zip(call.words, kinds, arguments):
        if kind.kind == "pointer":
            word.p = ffi.cast("void *", value)
        elif kind.cname in ("float", "double"):
            word.d = value
        else:
            word.i = value


def by_python(pool: Pool, function) -> None:
    """Call function(), whose operations are not recorded; it is called again in every replay."""
    tape, pool.tape = pool.tape, None
    try:
        function()
    finally:
        pool.tape = tape
    if tape is not None:
        tape.add_function(function)
