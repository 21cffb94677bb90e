"""When the system takes mapped weights away: another program has come to need their memory.

The system drops mapped weights a large page at a time, and reads them again page by page, with what lies
around: five times the bytes of the experts that were missing (measured).  A plan (residency.py) reads the
experts alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .residency import MemoryPlan

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]

FAULTS = 8  # reads from the disk per token; a token may need the page of its row of the embedding
PASSES = 4  # one after the other
PATIENCE = 2.0  # seconds until a plan is made again, where all weights had room; it takes 0.02


class MemoryWatch:
    """Counts the reads from the disk that mapped weights cost.

    plan_now: gives the plan for the memory that is available now; None: all weights have room
    """

    def __init__(self, plan_now: Callable[[], MemoryPlan | None]):
        self.plan_now = plan_now
        self._faults, self._tokens = disk_faults(), 0
        self._passes = 0  # with many reads, one after the other
        self._plan_at = 0.0  # of the clock, at the earliest

    def plan(self, tokens: int) -> MemoryPlan | None:
        """Before a pass of so many tokens: the plan that the weights need by now.

        Passes that read much from the disk lead to it, if the weights have no room any more.  After a pause
        weights may be read again and have room.
        """
        faults = disk_faults()
        many = faults - self._faults > FAULTS * self._tokens > 0
        self._faults, self._tokens = faults, tokens
        self._passes = self._passes + 1 if many else 0
        if self._passes < PASSES or time.monotonic() < self._plan_at:
            return None
        plan = self.plan_now()
        self._plan_at = time.monotonic() + PATIENCE
        return plan


def disk_faults() -> int:
    """Pages of mapped files that this process waited for since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt if resource else 0
