"""tools/bench/bench_beside.py: one small run, and what it refuses."""

import os
import subprocess
import sys

import pytest
from paths import GOLDEN, TOOLS

COMMAND = [sys.executable, str(TOOLS / "bench" / "bench_beside.py")]


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="another system")
def test_a_small_run():
    model = str(GOLDEN / "pattern31.gguf")
    run = subprocess.run(
        [*COMMAND, model, "--take", "8M", "--threads", "1", "--tokens", "4", "--gen", "2"],
        capture_output=True,
        text=True,
    )
    if "or to lock" in run.stderr:
        pytest.skip("this user may not lock memory")
    assert run.returncode == 0, run.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["nothing"] * 2 + ["0.0 GB"] * 2 + ["nothing again"] * 2
    assert all(float(row[1]) > 0 and row[3] == "mapped" for row in rows)


def test_bad_input(tmp_path):
    for options in (["--take", "much"], ["--take", "1M", "--gen", "9", "--tokens", "4"]):
        assert subprocess.run([*COMMAND, "m.gguf", *options], capture_output=True).returncode == 2
    run = subprocess.run(
        [*COMMAND, str(tmp_path / "none.gguf"), "--take", "1M"], capture_output=True, text=True
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "none.gguf" in run.stderr
