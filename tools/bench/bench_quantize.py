"""What quantizing costs: memory beside the mapped source, and speed against copying as many bytes.

    python tools/bench/bench_quantize.py SLICE.gguf [--rounds 3] [--scratch DIR]

Each round runs `pyengine quantize SRC --int8 --int4`, then copies the two directories that it wrote
(`cp`, then fsync), and deletes all of it; neither finds its input in the page cache.  Both write the
same bytes; the copy reads more, but quantizing reads them to hash them too.  The ratio is that of the
medians of bytes written a second.  Memory is the greatest RssAnon seen (every 20 ms), and VmHWM, in
which mapped pages count.

tools/bench/make_slice.py makes a source of real sizes.  Needs four times its size on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEMORY = ("RssAnon", "VmHWM")


def forget(*paths: Path) -> None:
    """Out of the page cache."""
    for path in files_of(*paths):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(twins: list[Path], destination: Path) -> float:
    """Seconds."""
    forget(*twins)
    destination.mkdir()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", *twins, destination], check=True)
    for path in files_of(destination):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def timed(arguments: list, scratch: Path) -> tuple[float, dict[str, int]]:
    """Runs a command of pyengine -> seconds, and the greatest of each of MEMORY, in bytes."""
    command = [sys.executable, "-m", "pyengine", *arguments]
    began = time.perf_counter()
    most = dict.fromkeys(MEMORY, 0)
    # Not in the folder it was called from: a clone's sources would stand before the package.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=scratch) as process:
        while process.poll() is None:
            most = {name: max(most[name], now) for name, now in memory_of(process.pid).items()}
            time.sleep(0.02)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - began, most


def quantize(source: Path, scratch: Path, options: list[str]) -> tuple[float, dict[str, int]]:
    """Seconds, and the greatest of each of MEMORY, in bytes."""
    forget(source)
    return timed(["quantize", source.resolve(), "--int8", "int8", "--int4", "int4", *options], scratch)


def memory_of(pid: int) -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines.get(name, "0 kB").split()[0]) * 1024 for name in MEMORY}


def files_of(*paths: Path) -> list[Path]:
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return [file for file in files if file.is_file()]


def measure(source: Path, scratch: Path, rounds: int, options: list[str]) -> dict:
    copies, runs, most = [], [], dict.fromkeys(MEMORY, 0)
    for _ in range(rounds):
        seconds, memory = quantize(source, scratch, options)
        runs.append(seconds)
        most = {name: max(most[name], memory[name]) for name in MEMORY}
        twins = [scratch / "int8", scratch / "int4"]
        written = sum(path.stat().st_size for path in files_of(*twins))
        copies.append(copy(twins, scratch / "copy"))
        for path in (*twins, scratch / "copy"):
            shutil.rmtree(path)
    return {
        "read": source.stat().st_size,
        "written": written,
        "copy_seconds": copies,
        "quantize_seconds": runs,
        "ratio": statistics.median(copies) / statistics.median(runs),
        **{f"peak_{name}": value for name, value in most.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SRC.gguf")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to write (default: beside SRC)")
    parser.add_argument("--json", action="store_true")
    options, others = parser.parse_known_args()  # the rest is for `pyengine quantize`
    where = options.scratch or options.source.absolute().parent
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        found = measure(options.source, Path(scratch), options.rounds, others)
    if options.json:
        return print(json.dumps(found, indent=2))
    for name in ("copy", "quantize"):
        seconds = ", ".join(f"{value:.1f}" for value in found[f"{name}_seconds"])
        speed = found["written"] / statistics.median(found[f"{name}_seconds"])
        print(f"{name:<10} {speed / 1e9:.2f} GB/s written ({seconds} s)")
    print(f"ratio      {found['ratio']:.0%}")
    print(
        f"memory     {found['peak_RssAnon'] / 2**20:.0f} MiB beside the mapped source (peak "
        f"RssAnon), {found['peak_VmHWM'] / 2**20:.0f} MiB with it (VmHWM)"
    )


if __name__ == "__main__":
    main()
