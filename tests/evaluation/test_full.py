"""tools/bench/full.py: what it makes of the answers, the disk's rate, the limit, and one small run."""

import dataclasses
import json
import os
import subprocess
import sys

import full
import pytest
from make_slice import write_slice
from paths import TOOLS
from small_slice import SMALL


def answer(seconds, read, **experts):
    return {"seconds": seconds, "read_bytes": read} | ({"experts": experts} if experts else {})


def test_a_row():
    answers = [
        answer(2.0, 500, hits=3, misses=1, missed_bytes=400),
        answer(4.0, 700, hits=1, misses=3, missed_bytes=600),
    ]
    row = full.row_of("tg10", 10, answers, 200.0)
    assert row == {
        "test": "tg10",
        "tokens_per_second": 3.75,
        "samples": [5.0, 2.5],
        "read_bytes_per_token": 60.0,
        "hit_rate": 0.5,
        "missed_bytes_per_token": 50.0,
        "share_of_disk": (1.0 + 0.75) / 2,
    }
    assert full.row_of("tg10", 10, [{"seconds": 1.0}], 200.0)["read_bytes_per_token"] is None


def test_a_table():
    ours = answer(1.0, 3_000_000, hits=1, misses=1, missed_bytes=2_000_000)
    engines = {"pyengine": ours, "llama.cpp": answer(4.0, 8_000_000)}
    rows = {
        name: [full.row_of(t, 2, [one], 1e9) for t in full.tests_of(8, 2)] for name, one in engines.items()
    }
    report = {"model": "a.gguf", "bytes": 1, "processor": "p", "threads": 2, "limit": 1 << 30, "rounds": 1}
    lines = full.as_markdown(
        report | {"disk_bytes_per_second": 1e9, "disk_samples": [1e9, 5e8, 2e9], "engines": rows}
    ).splitlines()
    assert "memory: 1.07 GB; disk: 1.00 GB/s in random places (0.50 - 2.00)" in lines[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert table[2] == ["pp8 cold", "pyengine", "2.00 (2.00 - 2.00)", "", "1.5", "1.0", "50.0%", "0%"]
    assert table[3] == ["pp8 cold", "llama.cpp", "0.50 (0.50 - 0.50)", "4.00", "4.0", "", "", ""]
    assert len(table) == 2 + 6


def test_tests():
    assert list(full.tests_of(512, 32)) == ["pp512 cold", "tg32", "pp512 warm"]
    assert list(full.tests_of(0, 4)) == ["tg4"] and list(full.tests_of(4, 0)) == ["pp4 cold", "pp4 warm"]


def test_the_rate_of_the_disk(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    assert full.disk_rate(path, 5000, 0.05) > 0
    with pytest.raises(ValueError, match="want a file of at least 102400 bytes"):
        full.disk_rate(path, 100_001, 0.05)


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroup(tmp_path, version):
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    group = full.new_cgroup(123, tmp_path)
    limit = group / ("memory.limit_in_bytes" if version == 1 else "memory.max")
    assert group.parent == folder and limit.read_text() == "123"
    with pytest.raises(OSError):
        full.new_cgroup(123, tmp_path)  # there is one


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="another system")
def test_a_balloon():
    with full.balloon(3 << 20):
        pass
    with pytest.raises(ValueError, match="want less than the"), full.balloon(-1):
        pass


def test_errors(tmp_path, monkeypatch, capsys):
    for arguments in (["--prompt", "0", "--gen", "0"], ["--rounds", "0"], ["--gen", "-1"]):
        monkeypatch.setattr(sys, "argv", ["full", str(tmp_path / "a.gguf"), *arguments, "--peers", "none"])
        assert full.main() == 2
        message = capsys.readouterr().err
        assert message.startswith("full: want") and message.count("\n") == 1


@pytest.mark.slow
def test_a_small_run(tmp_path):
    """The whole way, on a slice of a few megabytes that fits."""
    path = tmp_path / "small.gguf"
    write_slice(path, dataclasses.replace(SMALL, num_experts=16))
    command = [sys.executable, TOOLS / "bench" / "full.py", path, "--peers", "none", "--json"]
    command += ["--prompt", "16", "--gen", "4", "--rounds", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = report["engines"]["pyengine"]
    assert [row["test"] for row in rows] == ["pp16 cold", "tg4", "pp16 warm"]
    assert report["disk_bytes_per_second"] > 0 and len(report["disk_samples"]) == 3
    assert all(row["hit_rate"] is None for row in rows)
    assert len(rows[0]["samples"]) == 2
