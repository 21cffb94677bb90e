"""A model that is larger than memory, in this engine and in others, one after the other: what a token reads,
and how fast that is.

    python tools/bench/full.py full.gguf --layers 40 --vocab 248320       # 37 GB: made if it is not there
    python tools/bench/full.py full.gguf --rounds 3 --peers llama.cpp
    python tools/bench/full.py small.gguf --layers 4 --vocab 1024 --limit 2.5G --gen 16 --prompt 128
    python tools/bench/full.py twin-int4 --peers none                      # a checkpoint of this engine alone

In each round each engine is a process of its own.  Before it starts, the file leaves the page cache.  The
tests of a round, in this order: a prompt (cold), single tokens, the same prompt again (warm).  The tokens
are random, seed 1729; random routers choose all experts about equally often, which is the worst case: real
traffic prefers some.

read: bytes that the system read from the disk for the process.  missed: bytes of the experts that a router
chose and that were not in memory.  of the disk: the rate of the missed bytes, over the whole time of the
test, as a share of what the disk gives: the file itself, in random places, pieces of one expert's matrix,
8 at a time, past the page cache.  That is measured before each engine starts and at the end, and its median
counts: many a disk gives twice as much in its first seconds as later.

--limit gives the processes a memory cgroup (root); where there are none, a process of its own locks the
memory that is above the limit for as long as the run takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench_peers import SEED, Others, Worker, peers_of, processor, warn
from engines import BATCH
from make_slice import LAYERS, VOCABULARY, check_room, slice_config, slice_types, write_slice

from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.summary import stored_bytes
from pyengine.cli.options import memory_size
from pyengine.core.expert_cache import PAGE, READS_AT_A_TIME
from pyengine.core.memory import available_memory
from pyengine.errors import PyengineError
from pyengine.tables import markdown_table

CGROUPS = Path("/sys/fs/cgroup")
DISK_SECONDS = 3.0
BALLOON = """
import contextlib, ctypes, mmap, resource, sys
with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
memory = mmap.mmap(-1, int(sys.argv[1]))
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.memset(address, 1, len(memory))
failed = ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)))
swap = [line.split()[1] for line in open("/proc/meminfo") if line.startswith("SwapTotal:")]
print("failed" if failed and swap != ["0"] else "locked", flush=True)  # without swap it stays anyway
sys.stdin.read()
"""


# ---- the file and the disk ---------------------------------------------------------------------


def make_file(path: Path, layers: int, vocabulary: int, kind: str) -> None:
    config = slice_config(layers, vocabulary)
    check_room(path, slice_types(config, kind))
    write_slice(path, config, kind)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def files_of(path: Path) -> list[Path]:
    return open_checkpoint(path).source_files


def leave_page_cache(files: list[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def matrix_bytes(path: Path) -> int:
    """Of one expert's gate matrix."""
    checkpoint = open_checkpoint(path)
    name = next(name for name in checkpoint.tensors if name.endswith(".mlp.experts.gate_proj"))
    return stored_bytes(checkpoint.tensors[name]) // checkpoint.config.num_experts


def disk_rate(path: Path, piece: int, seconds: float = DISK_SECONDS) -> float:
    """Bytes per second of reads in random places, READS_AT_A_TIME at a time, past the page cache."""
    piece = -(-piece // PAGE) * PAGE
    last = (path.stat().st_size - piece) // PAGE
    if last < 0:
        raise ValueError(f"{path}: want a file of at least {piece} bytes")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    ends = time.perf_counter() + seconds

    def read(seed: int) -> int:
        rng, buffer, count = np.random.default_rng([SEED, seed]), mmap.mmap(-1, piece), 0
        while time.perf_counter() < ends:
            count += os.preadv(descriptor, [buffer], int(rng.integers(0, last + 1)) * PAGE)
        return count

    try:
        began = time.perf_counter()
        with ThreadPoolExecutor(READS_AT_A_TIME) as threads:
            total = sum(threads.map(read, range(READS_AT_A_TIME)))
        return total / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


# ---- a limit of memory ---------------------------------------------------------------------------


@contextlib.contextmanager
def limited(nbytes: int | None):
    """Gives what a process must call before it starts, to have at most that much memory; None: no limit."""
    if nbytes is None:
        yield None
        return
    try:
        group = new_cgroup(nbytes)
    except OSError:
        with balloon(available_memory() - nbytes):
            yield None
        return
    try:
        yield lambda: (group / "cgroup.procs").write_text("0")
    finally:
        group.rmdir()


def new_cgroup(nbytes: int, root: Path = CGROUPS) -> Path:
    """A memory cgroup, of version 1 or 2, without swap.  OSError: this process may not make one."""
    folder, limit = root / "memory", "memory.limit_in_bytes"
    if not folder.is_dir():
        folder, limit = root, "memory.max"
    group = folder / f"pyengine-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(nbytes))
    except OSError:
        group.rmdir()
        raise
    return group


@contextlib.contextmanager
def balloon(nbytes: int):
    """Another process that locks so much memory.  ValueError: it may not, or there is not so much."""
    if nbytes <= 0:
        raise ValueError(
            f"--limit: want less than the {-nbytes + available_memory():,} bytes that are available"
        )
    command = [sys.executable, "-c", BALLOON, str(nbytes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:  # its end closes the pipes
        if process.stdout.readline() != "locked\n":
            raise ValueError(
                f"--limit: want a memory cgroup, or to lock {nbytes:,} bytes (root), got neither"
            )
        yield


# ---- the run -------------------------------------------------------------------------------------


def tests_of(prompt: int, gen: int) -> dict[str, dict]:
    tests = {f"pp{prompt} cold": {"prompt": prompt, "gen": 0}} if prompt else {}
    tests |= {f"tg{gen}": {"prompt": 0, "gen": gen}} if gen else {}
    return tests | ({f"pp{prompt} warm": {"prompt": prompt, "gen": 0}} if prompt else {})


def run(options, engines: list[str]) -> tuple[dict[tuple[str, str], list[dict]], list[float]]:
    """{(engine, test): the answers of its rounds}, and the disk's rates beside them."""
    files, tests = files_of(options.model), tests_of(options.prompt, options.gen)
    largest, piece = max(files, key=lambda path: path.stat().st_size), matrix_bytes(options.model)
    answers: dict[tuple[str, str], list[dict]] = {}
    rates = []
    with limited(options.limit) as before:
        for _ in range(options.rounds):
            for engine in engines:
                leave_page_cache(files)
                rates.append(disk_rate(largest, piece))
                worker = Worker(
                    engine, str(options.model), max(options.prompt, options.gen) + BATCH, engine, before
                )
                for test, sizes in tests.items():
                    answers.setdefault((engine, test), []).append(
                        worker.measure(threads=options.threads, **sizes)
                    )
                worker.close()
    return answers, [*rates, disk_rate(largest, piece)]


def row_of(test: str, tokens: int, answers: list[dict], disk: float) -> dict:
    """Medians of the rounds; rates per token in bytes."""

    def median(of):
        values = [of(answer) for answer in answers]
        return None if None in values else statistics.median(values)

    experts = [answer["experts"] for answer in answers if answer.get("experts")]
    row = {
        "test": test,
        "tokens_per_second": median(lambda a: tokens / a["seconds"]),
        "samples": [tokens / a["seconds"] for a in answers],
        "read_bytes_per_token": median(lambda a: a["read_bytes"] / tokens if "read_bytes" in a else None),
        "hit_rate": None,
        "missed_bytes_per_token": None,
        "share_of_disk": None,
    }
    if experts:
        row |= {
            "hit_rate": statistics.median(e["hits"] / max(1, e["hits"] + e["misses"]) for e in experts),
            "missed_bytes_per_token": statistics.median(e["missed_bytes"] / tokens for e in experts),
            "share_of_disk": median(lambda a: a["experts"]["missed_bytes"] / a["seconds"] / disk),
        }
    return row


def report_of(options, engines: list[str], answers, rates: list[float]) -> dict:
    disk = statistics.median(rates)
    tokens = {
        name: test["prompt"] + test["gen"] for name, test in tests_of(options.prompt, options.gen).items()
    }
    return {
        "model": options.model.name,
        "bytes": sum(path.stat().st_size for path in files_of(options.model)),
        "processor": processor(),
        "threads": options.threads,
        "limit": options.limit,
        "disk_bytes_per_second": disk,
        "disk_samples": rates,
        "rounds": options.rounds,
        "engines": {
            engine: [row_of(test, tokens[test], answers[engine, test], disk) for test in tokens]
            for engine in engines
        },
    }


def as_markdown(report: dict) -> str:
    ours, *others = report["engines"]
    titles = [
        "test",
        "engine",
        "t/s",
        f"{ours} to it",
        "read MB/token",
        "missed MB/token",
        "hits",
        "of the disk",
    ]
    table = [titles]
    for i, first in enumerate(report["engines"][ours]):
        for engine in (ours, *others):
            row = report["engines"][engine][i]
            low, high = min(row["samples"]), max(row["samples"])
            ratio = first["tokens_per_second"] / row["tokens_per_second"]
            table.append(
                [
                    row["test"],
                    engine,
                    f"{row['tokens_per_second']:.2f} ({low:.2f} - {high:.2f})",
                    "" if engine == ours else f"{ratio:.2f}",
                    _text(row["read_bytes_per_token"], lambda n: f"{n / 1e6:.1f}"),
                    _text(row["missed_bytes_per_token"], lambda n: f"{n / 1e6:.1f}"),
                    _text(row["hit_rate"], lambda n: f"{n:.1%}"),
                    _text(row["share_of_disk"], lambda n: f"{n:.0%}"),
                ]
            )
    limit = f"{report['limit'] / 1e9:.2f} GB" if report["limit"] else "the machine's"
    return "\n".join(
        [
            f"{report['model']}, {report['bytes'] / 1e9:.1f} GB; {report['processor']}, "
            f"{report['threads']} threads; memory: {limit}; "
            f"disk: {report['disk_bytes_per_second'] / 1e9:.2f} GB/s in random places "
            f"({min(report['disk_samples']) / 1e9:.2f} - {max(report['disk_samples']) / 1e9:.2f}); "
            f"medians of {report['rounds']} rounds",
            "",
            *markdown_table(table, "<<" + ">" * (len(titles) - 2)),
        ]
    )


def _text(value, show) -> str:
    return "" if value is None else show(value)


# ---- the command ---------------------------------------------------------------------------------


def _options():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="made, as make_slice does, if it is missing"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N", help="of the file that is made")
    parser.add_argument("--vocab", type=int, default=VOCABULARY, metavar="N")
    parser.add_argument("--type", default="Q8_0", metavar="TYPE", help="its block type")
    parser.add_argument("--limit", type=memory_size, metavar="SIZE", help="memory of each engine")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="0: none")
    parser.add_argument("--gen", type=int, default=32, metavar="N", help="0: none")
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument(
        "--peers",
        type=lambda text: [] if text == "none" else text.split(","),
        metavar="none",
        help="engines to compare with; those that are installed, unless given",
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    options = _options()
    try:
        if min(options.prompt, options.gen) < 0 or max(options.prompt, options.gen) < 1:
            raise ValueError("want a prompt or single tokens, and no negative number")
        if min(options.rounds, options.threads) < 1:
            raise ValueError("want at least one round and thread")
        engines = ["pyengine", *(peers_of(options.peers) if options.peers != [] else [])]
        if not options.model.exists():
            make_file(options.model, options.layers, options.vocab, options.type)
        with Others() as others:
            answers, rates = run(options, engines)
    except (ValueError, OSError, PyengineError) as error:
        print(f"full: {error}", file=sys.stderr)
        return 2
    report = report_of(options, engines, answers, rates)
    print(json.dumps(report, indent=2) if options.json else as_markdown(report))
    own = sum(os.times()[2:4])  # of the engines, which have ended
    warn(others.seconds - own if others.seconds is not None else None, others.wall, "during the run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
