"""The control groups that bound a process: of both versions, from its own one upward."""

import pytest

from pyengine.core.cgroups import groups, text


@pytest.mark.parametrize(
    "lines, want",
    [
        ("0::/a/b\n", ["a/b", "a", "."]),
        ("0::/\n", ["."]),
        ("4:cpu,memory:/x/y\n", ["memory/x/y", "memory/x", "memory"]),
        ("5:cpu:/x\n1:name=systemd:/y\n", []),
        ("5:memory:/x\n4:cpu,cpuacct:/y\n0::/a\n", ["memory/x", "memory", "a", "."]),
        ("0::/a:b\n", ["a:b", "."]),
        ("", []),
    ],
)
def test_the_groups_of_a_controller(control_groups, lines, want):
    root = control_groups(lines)
    assert list(groups("memory")) == [root / path for path in want]


def test_a_system_without_cgroups(control_groups):
    assert list(groups("memory")) == list(groups("cpu")) == []


def test_a_file_that_cannot_be_read_is_empty(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "blanks").write_text(" max 100000\n")
    assert [text(tmp_path / name) for name in ("bytes", "absent", ".", "blanks")] == [
        "",
        "",
        "",
        "max 100000",
    ]
