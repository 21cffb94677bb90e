"""This engine and llama.cpp on one GGUF file, in turn, in one run: tokens a second and their ratio.

    pip install llama-cpp-python
    python tools/bench_peers.py MODEL.gguf --threads 1,2 --prompt 512 --gen 64 --rounds 5 [--json]
    python tools/bench_peers.py MODEL.gguf --other CHECKPOINT     # this engine on both, INT8 say

Each engine is a process of its own that maps the file once, waits for commands, and times the work
alone; the two never work at the same time.  Rounds alternate A B A B, so that what disturbs the
machine disturbs both.  The tokens are the same, random, seed 1729; no token is sampled; one round
that is not counted comes first.  llama.cpp runs as its own benchmark runs it on a CPU: mapped file,
batches of 512, logits of the last token.

The machine has to be otherwise idle: llama.cpp's threads wait for one another by spinning, and with
anything else on the cores they lose most of their speed.  The load average at the start is printed.
So is the correlation of the two engines' logits, to show that they compute the same model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SEED = 1729
BATCH = 512
LOGITS = 1024  # that are compared, at most
ENGINES = ("pyengine", "llama.cpp")


# ---- the engines, each in its own process ------------------------------------------------------


class Pyengine:
    """One checkpoint, and a model for each number of threads that was asked for."""

    def __init__(self, path: str, context: int):
        from pyengine.checkpoint import open_checkpoint

        self.checkpoint = open_checkpoint(path)
        self.checkpoint.check_finite()  # and the whole file is in the page cache, for both
        self.vocab_size = self.checkpoint.config.vocab_size
        self.models = {}

    def version(self) -> str:
        from pyengine import __version__, ops

        return f"pyengine {__version__}, {ops.active_isa()}"

    def start(self, threads: int) -> None:
        from pyengine.decoder.model import LockedModel

        if threads not in self.models:
            self.models[threads] = LockedModel(self.checkpoint, threads, chunk=BATCH)
        self.model = self.models[threads]
        self.state = self.model.new_state()

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """-> the last token's logits [vocab]."""
        return self.model.forward(ids, self.state, last_only=True)[0]


class LlamaCpp:
    """llama.cpp's own calls, below the package's Python layer."""

    def __init__(self, path: str, context: int):
        import llama_cpp

        self.lib = llama_cpp
        self.llama = llama_cpp.Llama(path, n_gpu_layers=0, n_ctx=context, n_batch=BATCH,
                                     n_ubatch=BATCH, use_mmap=True, logits_all=False, verbose=False)
        self.context = self.llama.ctx
        self.vocab_size = self.llama.n_vocab()

    def version(self) -> str:
        return f"llama.cpp as in llama-cpp-python {self.lib.__version__}"

    def start(self, threads: int) -> None:
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """-> the last token's logits [vocab], valid until the next call."""
        for first in range(0, len(ids), BATCH):
            piece = ids[first:first + BATCH]
            tokens = (self.lib.llama_token * len(piece))(*piece.tolist())
            status = self.lib.llama_decode(self.context,
                                           self.lib.llama_batch_get_one(tokens, len(piece)))
            if status:
                raise RuntimeError(f"llama_decode: status {status}")
        logits = self.lib.llama_get_logits_ith(self.context, -1)  # waits for the computation
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,))


def work(engine: str, path: str, context: int) -> None:
    """A worker: one JSON command a line on stdin, one JSON answer a line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    runner = (Pyengine if engine == "pyengine" else LlamaCpp)(path, context)
    _answer(answers, {"version": runner.version(), "vocab_size": runner.vocab_size})
    for line in sys.stdin:
        _answer(answers, measure(runner, **json.loads(line)))


def _answer(answers, value) -> None:
    print(json.dumps(value), file=answers, flush=True)


def measure(runner, threads: int, prompt: int, gen: int) -> dict:
    """Seconds of one pass over prompt tokens, or of gen tokens one by one, from an empty state; and
    some of the last token's logits, to see that the engines compute the same thing."""
    ids = np.random.default_rng(SEED).integers(0, runner.vocab_size, prompt or gen)
    runner.start(threads)
    began = time.perf_counter()
    for step in [ids] if prompt else ids[:, None]:
        logits = runner.forward(step)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "logits": logits[:LOGITS].tolist()}


class Worker:
    """The other end of `work`."""

    def __init__(self, engine: str, path: str, context: int, name: str):
        command = [sys.executable, __file__, "--worker", engine, "--context", str(context), path]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
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


def compare(workers: list[Worker], threads: list[int], prompt: int, gen: int,
            rounds: int) -> list[dict]:
    """One row a test and number of threads."""
    tests = [(0, gen)] * (gen > 0) + [(prompt, 0)] * (prompt > 0)
    rows = []
    for count in threads:
        for n_prompt, n_gen in tests:
            answers = {worker.name: [] for worker in workers}
            for _ in range(rounds + 1):
                for worker in workers:
                    answers[worker.name].append(
                        worker.measure(threads=count, prompt=n_prompt, gen=n_gen))
            rows.append(_row(n_prompt, n_gen, count, answers))
    return rows


def _row(n_prompt: int, n_gen: int, threads: int, answers: dict[str, list]) -> dict:
    """The ratio is that of the medians; its range is that of the single rounds."""
    samples = {name: [(n_prompt + n_gen) / answer["seconds"] for answer in timed[1:]]
               for name, timed in answers.items()}
    ours, theirs = samples.values()
    ratios = [a / b for a, b in zip(ours, theirs)]
    return {
        "test": f"pp{n_prompt}" if n_prompt else f"tg{n_gen}", "n_threads": threads,
        **{name: {"median_ts": statistics.median(s), "samples_ts": s} for name, s in samples.items()},
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "ratio_range": [min(ratios), max(ratios)],
        "logits_correlation": float(np.corrcoef(
            *(timed[0]["logits"] for timed in answers.values()))[0, 1]),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines
                    if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_markdown(report: dict) -> str:
    first, second = report["names"]
    lines = [f"{report['model']}; {report['processor']}; medians of {report['rounds']} rounds; "
             f"load average before: {report['load_average']}", "; ".join(report["versions"]), "",
             f"| test | threads | {first} t/s | {second} t/s | ratio | single rounds | same logits |",
             "|------|--:|--:|--:|--:|--:|--:|"]
    for row in report["rows"]:
        ours, theirs = (row[name]["median_ts"] for name in report["names"])
        low, high = row["ratio_range"]
        lines.append(f"| {row['test']} | {row['n_threads']} | {ours:.2f} | {theirs:.2f} "
                     f"| {row['ratio']:.2f} | {low:.2f} - {high:.2f} "
                     f"| {row['logits_correlation']:.5f} |")
    return "\n".join(lines)


# ---- the command -------------------------------------------------------------------------------


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--threads", type=_counts, default=[1, 2], metavar="1,2")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="0: none")
    parser.add_argument("--gen", type=int, default=64, metavar="N", help="0: none")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--other", metavar="CHECKPOINT",
                        help="instead of llama.cpp: this engine on another checkpoint")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = _options()
    if options.worker:
        work(options.worker, options.model, options.context)
        return 0
    if not options.other and importlib.util.find_spec("llama_cpp") is None:
        print("bench_peers: want llama-cpp-python (pip install llama-cpp-python), got none",
              file=sys.stderr)
        return 2
    if not Path(options.model).is_file():
        print(f"bench_peers: {options.model}: want a GGUF file, got none", file=sys.stderr)
        return 2
    if options.rounds < 1 or max(options.prompt, options.gen) < 1 or min(options.threads) < 1:
        print("bench_peers: want at least one round, token and thread", file=sys.stderr)
        return 2
    load = round(os.getloadavg()[0], 2)
    context = max(options.prompt, options.gen) + BATCH
    sides = [("pyengine", options.model, "pyengine")]
    sides += ([("pyengine", options.other, Path(options.other).name)] if options.other else
              [("llama.cpp", options.model, "llama.cpp")])
    workers = [Worker(engine, path, context, name) for engine, path, name in sides]
    if workers[0].vocab_size != workers[1].vocab_size:
        print(f"bench_peers: {options.other}: want a checkpoint of the same model", file=sys.stderr)
        return 2
    report = {"model": Path(options.model).name, "processor": processor(), "rounds": options.rounds,
              "load_average": load, "names": [worker.name for worker in workers],
              "versions": [worker.version for worker in workers],
              "rows": compare(workers, options.threads, options.prompt, options.gen, options.rounds)}
    for worker in workers:
        worker.close()
    print(json.dumps(report, indent=2) if options.json else as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
