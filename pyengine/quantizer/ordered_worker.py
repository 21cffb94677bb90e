"""Calls made in their order by a thread of their own."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from ..errors import PyengineError

MAX_PENDING = 32  # calls not made yet: of a quantization, pieces computed and not yet written


def submit(executor: Executor, function, *arguments) -> Future:
    """executor.submit; PyengineError where the system starts no more threads."""
    try:
        return executor.submit(function, *arguments)
    except RuntimeError as error:  # no memory for its stack, or too many
        raise PyengineError(f"threads: one more could not be started: {error}") from None


class OrderedWorker:
    """Lags the caller by a few calls.

    An error of a call is raised by the next call, or by `wait`.  Calls queued after a failure are skipped.
    """

    def __init__(self):
        self._executor, self._pending, self._failed = ThreadPoolExecutor(1), deque(), False

    def __call__(self, function, *arguments) -> None:
        if len(self._pending) == MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(submit(self._executor, self._run, function, arguments))

    def wait(self) -> None:
        """Until every call is made."""
        while self._pending:
            self._pending.popleft().result()

    def stop(self) -> None:
        """Skip the calls that are left, and wait for the one that is being made."""
        self._failed = True
        self._executor.shutdown()

    def _run(self, function, arguments):
        if self._failed:
            return
        try:
            function(*arguments)
        except BaseException:
            self._failed = True
            raise
