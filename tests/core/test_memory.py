"""The memory that a process may still take: the machine's, and cgroups of both versions."""

from pathlib import Path

import pytest

from pyengine.core import memory


@pytest.mark.parametrize(
    "line, files, want",
    [
        ("0::/a/b", {"a/memory.max": 900, "a/memory.current": 300, "a/memory.stat": 100}, 700),
        ("0::/a/b", {"a/b/memory.max": "max", "a/b/memory.current": 300}, 10_240),
        ("4:memory:/x", {"memory/x/memory.limit_in_bytes": 1000, "memory/x/memory.usage_in_bytes": 400}, 600),
        ("3:cpu:/x", {"memory/x/memory.limit_in_bytes": 1, "memory/x/memory.usage_in_bytes": 0}, 10_240),
    ],
)
def test_cgroups(control_groups, monkeypatch, line, files, want):
    texts = {str(Path(path).with_name("memory.stat")): "anon 5\n" for path in files}
    texts |= {
        path: f"inactive_file {value}\n" if path.endswith("stat") else f"{value}\n"
        for path, value in files.items()
    }
    control_groups(f"{line}\n", texts)
    monkeypatch.setattr(memory, "_machine", lambda: 10_240)
    assert memory.available_memory() == want


def test_here():
    assert 1 << 20 < memory.available_memory() < 1 << 50
