"""The memory that a process may still take: the machine's, and cgroups of both versions."""

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
def test_cgroups(tmp_path, monkeypatch, line, files, want):
    root = tmp_path / "cgroup"
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"inactive_file {value}\n" if name.endswith("stat") else f"{value}\n")
        stat = path.with_name("memory.stat")
        if not stat.exists():
            stat.write_text("anon 5\n")
    proc = tmp_path / "proc"
    proc.write_text(f"{line}\n")
    monkeypatch.setattr(memory, "_CGROUPS", root)
    monkeypatch.setattr(memory, "_OWN_GROUPS", proc)
    monkeypatch.setattr(memory, "_machine", lambda: 10_240)
    assert memory.available_memory() == want


def test_here():
    assert 1 << 20 < memory.available_memory() < 1 << 50
