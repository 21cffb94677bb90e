"""Control groups of Linux that this process is in, of version 2, or 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def groups(controller: str) -> Iterator[Path]:
    """Folders of the cgroups that bound what a controller ("cpu", "memory") gives this process.

    From the process's own one upward; none where the system has no cgroups.
    """
    for line in text(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        own = root / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def text(path: Path) -> str:
    """Of a small file, without the blanks around it; of one that cannot be read: ""."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
