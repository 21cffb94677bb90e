"""Memory that this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

from .cgroups import groups

_UNLIMITED = 1 << 60


def available_memory() -> int:
    """Bytes that can be had without swapping: of the machine, and of each cgroup that this process is in.

    Pages of files that the system can drop count as available.
    """
    return min(_machine(), *(_free_in(group) for group in groups("memory")), _UNLIMITED)


def _machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # macOS: it does not say what is in use
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4)


def _free_in(group: Path) -> int:
    """Its limit, less what it holds beside pages of files."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = (group / limit).read_text().strip()
            if most == "max":
                continue
            used = int((group / usage).read_text())
            return max(0, int(most) - used + _droppable(group / "memory.stat"))
        except (OSError, ValueError):
            continue
    return _UNLIMITED


def _droppable(stat: Path) -> int:
    rows = dict(line.split() for line in stat.read_text().splitlines())
    totals = [rows.get(f"total_{name}", rows.get(name, 0)) for name in ("inactive_file", "active_file")]
    return sum(map(int, totals))
