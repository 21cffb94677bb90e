"""Tokens/s of a model that fits into memory, before, while and after another program takes some of it.

    python tools/bench/bench_beside.py q4.gguf --take 8G --threads 2 --tokens 64 --gen 16

The other program takes the memory once the model is loaded, and keeps it until its rows are measured.  It
takes no processor time.  Each row computes so many random tokens one by one, seed 1729; read: bytes that the
system read from the disk for this process.  The machine has to be otherwise idle: see bench_peers.py.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from full import balloon

import pyengine
from pyengine.cli.options import memory_size
from pyengine.errors import PyengineError
from pyengine.evaluation.bench import bytes_from_disk
from pyengine.tables import markdown_table

SEED = 1729


class Sequence:
    """Random tokens of one sequence, computed one by one."""

    def __init__(self, model):
        self.model, self.state = model, model.new_state()
        self.draw = np.random.default_rng(SEED)

    def row(self, what: str, tokens: int) -> list[str]:
        before, began = bytes_from_disk(), time.perf_counter()
        for token in self.draw.integers(0, self.model.config.vocab_size, tokens):
            self.model.forward([token], self.state)
        seconds, after = time.perf_counter() - began, bytes_from_disk()
        read = "" if before is None or after is None else f"{(after - before) / tokens / 1e6:.0f}"
        mapped = self.model.experts_in_memory is None
        return [what, f"{tokens / seconds:.2f}", read, "mapped" if mapped else "read when chosen"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--take", type=memory_size, required=True, metavar="SIZE", help="of the other program"
    )
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of all rows of one part")
    parser.add_argument("--gen", type=int, default=16, metavar="N", help="of one row")
    options = parser.parse_args()
    if not 0 < options.gen <= options.tokens:
        parser.error("--gen: want at least 1 and at most --tokens")
    try:
        sequence = Sequence(pyengine.load(options.model, threads=options.threads))
        sequence.row("", options.gen)  # its experts are used for the first time
        rows = [["others take", "t/s", "read MB/token", "experts"]]
        parts = range(options.tokens // options.gen)
        rows += [sequence.row("nothing", options.gen) for _ in parts]
        with balloon(options.take):
            rows += [sequence.row(f"{options.take / 1e9:.1f} GB", options.gen) for _ in parts]
        rows += [sequence.row("nothing again", options.gen) for _ in parts]
    except (ValueError, OSError, PyengineError) as error:
        print(f"bench_beside: {error}", file=sys.stderr)
        return 2
    print("\n".join(markdown_table(rows, "<>><")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
