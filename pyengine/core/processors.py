"""Processors that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

from .cgroups import groups, text

SYSTEM = Path("/sys/devices/system/cpu")


def processors() -> int:
    """How many at a time: by the affinity, and by the quotas of the cgroups.

    A part of a processor counts as none: a thread more than the quota makes all threads wait.
    """
    return max(1, math.floor(min(len(_allowed()), _quota())))


def physical_cores() -> int:
    """How many threads are fastest: as `processors`, but the processors of one core count once."""
    places = [SYSTEM / f"cpu{cpu}/topology/thread_siblings_list" for cpu in _allowed()]
    cores = {text(place) or place for place in places}
    return max(1, min(len(cores), processors()))


def _allowed() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # macOS
        return set(range(os.cpu_count() or 1))


def _quota() -> float:
    """Processors' time per time: of the cgroup with the least; infinity where there is no quota."""
    least = math.inf
    for folder in groups("cpu"):
        words = text(folder / "cpu.max").split() or [  # version 2, then version 1
            text(folder / "cpu.cfs_quota_us"),
            text(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
            least = min(least, int(words[0]) / int(words[1]))
    return least
