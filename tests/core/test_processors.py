"""The processors that a process may use: affinity, cgroups of both versions, the threads of one core."""

import pytest

from pyengine.core import processors as room
from pyengine.core.threads import Pool


@pytest.fixture
def machine(tmp_path, monkeypatch, control_groups):
    """set_up(cpus, cgroup=..., files={path: text}): eight processors, two to a core, and cgroups as told."""
    monkeypatch.setattr(room, "SYSTEM", tmp_path / "cpu")

    def set_up(cpus, cgroup="", files=None):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(cpus), raising=False)
        for i in range(8):
            siblings = tmp_path / f"cpu/cpu{i}/topology/thread_siblings_list"
            siblings.parent.mkdir(parents=True, exist_ok=True)
            siblings.write_text(f"{i % 4},{i % 4 + 4}\n")
        control_groups(cgroup, files)

    return set_up


def counts():
    return room.processors(), room.physical_cores()


@pytest.mark.parametrize(
    "cpus, want", [(range(8), (8, 4)), ([0, 4], (2, 1)), ([0, 1, 5], (3, 2)), ([7], (1, 1))]
)
def test_the_affinity(machine, cpus, want):
    machine(cpus)
    assert counts() == want


@pytest.mark.parametrize(
    "text, want",
    [("max 100000", 8), ("300000 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("", 8)],
)
def test_a_quota_of_version_2(machine, text, want):
    machine(range(8), "0::/a/b\n", {"a/b/cpu.max": f"{text}\n"})
    assert counts() == (want, min(4, want))


def test_the_least_quota_upward_counts(machine):
    files = {"a/cpu.max": "200000 100000", "a/b/cpu.max": "500000 100000"}
    machine(range(8), "0::/a/b\n", files)
    assert counts() == (2, 2)


@pytest.mark.parametrize("quota, want", [("-1", 8), ("300000", 3)])
def test_a_quota_of_version_1(machine, quota, want):
    folder = "cpu/box"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    machine(range(8), "5:memory:/other\n4:cpu,cpuacct:/box\n0::/\n", files)
    assert counts() == (want, min(4, want))


def test_no_files_and_no_affinity(machine, monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert counts() == (6, 6)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert counts() == (1, 1)


def test_a_pool_has_as_many_threads_by_default(machine):
    machine(range(8), "0::/\n", {"cpu.max": "200000 100000"})
    assert Pool().threads == 2 and Pool(3).threads == 3
