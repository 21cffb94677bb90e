"""This engine, llama.cpp and ik_llama.cpp on one GGUF file, in turn, in one run: tokens a second and ratios.

    pip install llama-cpp-python ik-llama-cpp-python
    python tools/bench/bench_peers.py MODEL.gguf --threads 1,2 --prompt 512 --gen 64 --depth 0 --rounds 5
    python tools/bench/bench_peers.py MODEL.gguf --peers llama.cpp      # of those that are installed
    python tools/bench/bench_peers.py MODEL.gguf --other CHECKPOINT     # this engine on both, INT8 say

Each engine is a process of its own that maps the file once, waits for commands, and times the work
alone; no two work at the same time.  Rounds alternate A B C A B C, so that what disturbs the
machine disturbs all.  The tokens are the same, random, seed 1729; no token is sampled; one round
that is not counted comes first.  The others run as llama.cpp's own benchmark runs on a CPU: mapped file,
batches of 512, logits of the last token.

The machine has to be otherwise idle: llama.cpp's threads wait for one another by spinning, and with
anything else on the cores they lose most of their speed.  A warning says what other processes took of the
processor, before the run and during it.  The correlation of the engines' logits with this engine's is
printed, to show that they compute the same model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from engines import BATCH, ENGINES, PEERS, SEED, installed_peers

from pyengine.errors import PyengineError
from pyengine.evaluation.bench import bytes_from_disk
from pyengine.tables import markdown_table

LOGITS = 1024  # that are compared, at most
IDLE = 0.05  # cores that others may take before it is worth a warning
SAMPLE = 0.3  # seconds in which they are watched before the run


# ---- what else runs ----------------------------------------------------------------------------


def busy_seconds() -> float | None:
    """Of all processors and all processes since the start of the machine; None: not on this system."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, words[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


class Others:
    """Processor seconds that other processes take while the block runs; None: not known on this system."""

    def __enter__(self):
        self.before = busy_seconds(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_):
        busy, own, wall = busy_seconds(), time.process_time(), time.perf_counter()
        self.wall = wall - self.before[2]
        self.seconds = None if busy is None else (busy - self.before[0]) - (own - self.before[1])


def warn(seconds: float | None, wall: float, when: str) -> None:
    if seconds is not None and seconds > IDLE * wall > 0:
        print(
            f"bench_peers: warning: the machine is not idle: others took {seconds / wall:.2f} cores {when}",
            file=sys.stderr,
        )


# ---- an engine in its own process --------------------------------------------------------------


def work(engine: str, path: str, context: int) -> int:
    """A worker: one JSON command a line on stdin, one JSON answer a line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    try:
        runner = ENGINES[engine](path, context)
        _answer(answers, {"version": runner.version(), "vocab_size": runner.vocab_size})
        for line in sys.stdin:
            _answer(answers, measure(runner, **json.loads(line)))
    except PyengineError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        return 2
    runner.close()
    return 0


def _answer(answers, value) -> None:
    print(json.dumps(value), file=answers, flush=True)


def measure(runner, threads: int, prompt: int, gen: int, depth: int = 0, keep: bool = False) -> dict:
    """Seconds of one pass over prompt tokens, or of gen tokens one by one, behind depth tokens already seen.

    keep: the tokens before are those of the engine's `at_depth`.
    And the process's own memory; some of the last token's logits, to see that the engines compute the same
    thing; the processor seconds that other processes took; and the bytes that the system read from the disk
    for this one.
    """
    ids = np.random.default_rng(SEED).integers(0, runner.vocab_size, depth + (prompt or gen))
    if keep:
        runner.at_depth(threads, depth)
    else:
        runner.start(threads)
        if depth:
            runner.forward(ids[:depth])
    ids = ids[depth:]
    read, experts = bytes_from_disk(), experts_read(runner)
    with Others() as others:
        began = time.perf_counter()
        for step in [ids] if prompt else ids[:, None]:
            logits = runner.forward(step)
        seconds = time.perf_counter() - began
    answer = {
        "seconds": seconds,
        "others_seconds": others.seconds,
        "memory": own_memory(),
        "logits": logits[:LOGITS].tolist(),
    }
    if read is not None:
        answer["read_bytes"] = bytes_from_disk() - read
    if experts is not None:
        answer["experts"] = {name: count - experts[name] for name, count in experts_read(runner).items()}
    return answer


def experts_read(runner) -> dict | None:
    return runner.experts_read() if hasattr(runner, "experts_read") else None


def own_memory() -> int | None:
    """Bytes of this process that are no file's; None: not known on this system."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Worker:
    """The other end of `work`."""

    def __init__(self, engine: str, path: str, context: int, name: str, before=None):
        """before: called in the process before the engine starts."""
        command = [sys.executable, __file__, "--worker", engine, "--context", str(context), path]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=before
        )
        self.name = name
        said = self._read()
        self.version, self.vocab_size = said["version"], said["vocab_size"]

    def measure(self, **command) -> dict:
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"bench_peers: {self.name}: want an answer, got none (see above)")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---- the comparison ----------------------------------------------------------------------------


def compare(workers: list[Worker], threads, depths, prompt: int, gen: int, rounds: int) -> list[dict]:
    """One row a test, depth and number of threads."""
    tests = [(0, gen)] * (gen > 0) + [(prompt, 0)] * (prompt > 0)
    rows = []
    for count, depth in itertools.product(threads, depths):
        for n_prompt, n_gen in tests:
            command = {"threads": count, "prompt": n_prompt, "gen": n_gen, "depth": depth}
            answers = {worker.name: [] for worker in workers}
            for _ in range(rounds + 1):
                for worker in workers:
                    answers[worker.name].append(worker.measure(**command))
            rows.append(_row(command, answers))
    return rows


def _row(command: dict, answers: dict[str, list]) -> dict:
    """A ratio is that of the medians; its range is that of the single rounds."""
    prompt, gen, depth = command["prompt"], command["gen"], command["depth"]
    samples = {
        name: [(prompt + gen) / answer["seconds"] for answer in timed[1:]] for name, timed in answers.items()
    }
    ours, *names = samples
    counted = [answer for timed in answers.values() for answer in timed[1:]]
    others = [answer["others_seconds"] for answer in counted]
    return {
        "test": (f"pp{prompt}" if prompt else f"tg{gen}") + (f" @ d{depth}" if depth else ""),
        "n_threads": command["threads"],
        "engines": {
            name: {"median_ts": statistics.median(s), "samples_ts": s} for name, s in samples.items()
        },
        "against": {
            name: _against(samples[ours], samples[name], answers[ours][0], answers[name][0]) for name in names
        },
        "seconds": sum(answer["seconds"] for answer in counted),
        "others_seconds": None if None in others else sum(others),
    }


def _against(ours: list[float], theirs: list[float], our_answer: dict, their_answer: dict) -> dict:
    ratios = [a / b for a, b in zip(ours, theirs)]
    return {
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "ratio_range": [min(ratios), max(ratios)],
        "logits_correlation": float(np.corrcoef(our_answer["logits"], their_answer["logits"])[0, 1]),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_markdown(report: dict) -> str:
    first, *others = report["names"]
    titles = ["test", "threads", *(f"{name} t/s" for name in report["names"])]
    titles += [f"{first} to {name}" for name in others] + [f"logits as {name}" for name in others]
    rows = [titles]
    for row in report["rows"]:
        engines = [row["engines"][name] for name in report["names"]]
        against = [row["against"][name] for name in others]
        cells = [row["test"], str(row["n_threads"])]
        cells += [_ranged(one["median_ts"], one["samples_ts"], 1) for one in engines]
        cells += [_ranged(one["ratio"], one["ratio_range"], 2) for one in against]
        rows.append(cells + [f"{one['logits_correlation']:.5f}" for one in against])
    return "\n".join(
        [
            f"{report['model']}; {report['processor']}; medians of {report['rounds']} rounds (single rounds)",
            "; ".join(report["versions"]),
            "",
            *markdown_table(rows, "<" + ">" * (len(titles) - 1)),
        ]
    )


def _ranged(median: float, samples: list[float], digits: int) -> str:
    return f"{median:.{digits}f} ({min(samples):.{digits}f} - {max(samples):.{digits}f})"


# ---- the command -------------------------------------------------------------------------------


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--threads", type=_counts, default=[1, 2], metavar="1,2")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="0: none")
    parser.add_argument("--gen", type=int, default=64, metavar="N", help="0: none")
    parser.add_argument(
        "--depth", type=_counts, default=[0], metavar="0,4096", help="tokens seen before the test"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        metavar=",".join(PEERS),
        help="engines to compare with; those that are installed, unless given",
    )
    parser.add_argument(
        "--other", metavar="CHECKPOINT", help="instead of the peers: this engine on another checkpoint"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def peers_of(wanted: list[str] | None) -> list[str]:
    """The engines to compare with.  Errors: ValueError, one that is not known or not installed."""
    here = installed_peers()
    for name in wanted or []:
        if name not in PEERS:
            raise ValueError(f"--peers: want {' or '.join(PEERS)}, got {name!r}")
        if name not in here:
            raise ValueError(f"want {PEERS[name][2]} (pip install {PEERS[name][2]}), got none")
    if not here:
        packages = [package for _, _, package in PEERS.values()]
        raise ValueError(f"want {' or '.join(packages)} (pip install {' '.join(packages)}), got none")
    return wanted or here


def sides_of(options) -> list[tuple[str, str, str]]:
    """[(engine, its file, its name in the report)]"""
    ours = ("pyengine", options.model, "pyengine")
    if options.other:
        return [ours, ("pyengine", options.other, Path(options.other).name)]
    return [ours, *((name, options.model, name) for name in peers_of(options.peers))]


def main() -> int:
    options = _options()
    if options.worker:
        return work(options.worker, options.model, options.context)
    try:
        if not Path(options.model).is_file():
            raise ValueError(f"{options.model}: want a GGUF file, got none")
        least = min(options.rounds, *options.threads, max(options.prompt, options.gen))
        if least < 1 or min(options.prompt, options.gen, *options.depth) < 0:
            raise ValueError("want at least one round, token and thread, and no negative number")
        sides = sides_of(options)
    except ValueError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        return 2
    context = max(options.depth) + max(options.prompt, options.gen) + BATCH
    workers = [Worker(engine, path, context, name) for engine, path, name in sides]
    if len({worker.vocab_size for worker in workers}) > 1:
        print(f"bench_peers: {sides[1][1]}: want a checkpoint of the same model", file=sys.stderr)
        return 2
    with Others() as before:
        time.sleep(SAMPLE)
    warn(before.seconds, before.wall, "before the run")
    rows = compare(workers, options.threads, options.depth, options.prompt, options.gen, options.rounds)
    for worker in workers:
        worker.close()
    report = {
        "model": Path(options.model).name,
        "processor": processor(),
        "rounds": options.rounds,
        "names": [worker.name for worker in workers],
        "versions": [worker.version for worker in workers],
        "rows": rows,
    }
    print(json.dumps(report, indent=2) if options.json else as_markdown(report))
    others = sum(row["others_seconds"] or 0.0 for row in rows)
    warn(others, sum(row["seconds"] for row in rows), "during the run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
