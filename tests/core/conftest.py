import pytest

from pyengine.core import cgroups


@pytest.fixture
def control_groups(tmp_path, monkeypatch):
    """set_up(lines, {path: text}) of /proc/self/cgroup and of files below /sys/fs/cgroup -> that folder."""
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    monkeypatch.setattr(cgroups, "CGROUPS", root)
    monkeypatch.setattr(cgroups, "PROC", proc)

    def set_up(lines, files=None):
        every = {proc / "self/cgroup": lines} | {root / path: text for path, text in (files or {}).items()}
        for path, text in every.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    return set_up
