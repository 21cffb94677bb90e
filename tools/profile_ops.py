"""Where the time of the locked arithmetic goes: milliseconds a pass in each operation of the C core.

    python tools/profile_ops.py MODEL [--threads N] [--prompt 512] [--gen 64]

What is left between the operations and the whole pass is Python.  Prompt: one pass, logits of the last
token; gen: the mean of so many passes of one token each, after the prompt, step by step, and then as they
are computed in use, the recorded calls replayed.  Random ids, seed 1729.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import numpy as np

import pyengine
from pyengine import ops

SEED = 1729


class Timed:
    """The C core, with a clock around each call."""

    def __init__(self, lib):
        self._lib, self.seconds = lib, Counter()

    def __getattr__(self, name):
        value = getattr(self._lib, name)
        if not name.startswith("pe_"):
            return value

        def call(*arguments):
            start = time.perf_counter()
            try:
                return value(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return call


def profile(model, ids, passes) -> tuple[float, Counter]:
    """Seconds of all the passes, and of them in each operation; passes: lists of ids, one state."""
    timed = ops.lib = Timed(ops.lib)
    model.replays = False  # a replay is one call
    state = model.new_state()
    try:
        model.forward(ids, state, last_only=True)
        timed.seconds.clear()
        start = time.perf_counter()
        for piece in passes:
            model.forward(piece, state, last_only=True)
        return time.perf_counter() - start, timed.seconds
    finally:
        ops.lib, model.replays = timed._lib, True


def replayed(model, ids, passes) -> float:
    """Seconds of all the passes but the two that come before a replay."""
    state = model.new_state()
    model.forward(ids, state, last_only=True)
    for piece in passes[:2]:
        model.forward(piece, state, last_only=True)
    start = time.perf_counter()
    for piece in passes[2:]:
        model.forward(piece, state, last_only=True)
    return time.perf_counter() - start


def report(title, seconds, parts, passes) -> None:
    print(f"{title}: {seconds / passes * 1e3:.2f} ms")
    for name, part in parts.most_common():
        print(f"  {name.removeprefix('pe_'):<24} {part / passes * 1e3:9.2f} ms {part / seconds:6.1%}")
    rest = seconds - sum(parts.values())
    print(f"  {'(Python)':<24} {rest / passes * 1e3:9.2f} ms {rest / seconds:6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=64)
    options = parser.parse_args()
    model = pyengine.load(options.model, threads=options.threads)
    ids = np.random.default_rng(SEED).integers(0, model.config.vocab_size,
                                               options.prompt + options.gen)
    prompt, gen = ids[:options.prompt], ids[options.prompt:, None]
    report(f"prompt of {len(prompt)}", *profile(model, prompt[:1], [prompt]), 1)
    report("one token", *profile(model, prompt, gen), len(gen))
    if len(gen) > 2:
        print(f"one token, replayed: {replayed(model, prompt, gen) / (len(gen) - 2) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
