"""Decoding of 1, 2, 4, ... sequences in one pass, beside llama.cpp's parallel decoding, in turn.

    python tools/bench/bench_batch.py slice8.gguf --threads 2 --sequences 1,2,4,8,16 --rounds 3

Every sequence has a prompt of its own, of 16 random tokens (seed 1729), and then one random token per pass.
Each engine and round is a process of its own; rounds alternate.  A figure is the median pass of all rounds.
The machine has to be otherwise idle: see bench_peers.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np
from engines import installed_peers

from pyengine.tables import markdown_table

SEED, PROMPT, PASSES = 1729, 16, 16


def time_pyengine(path: str, threads: int, counts: list[int]) -> dict[int, list[float]]:
    """Seconds of each pass, by the number of sequences."""
    import pyengine

    model = pyengine.load(path, threads=threads)
    draw, found = np.random.default_rng(SEED), {}
    for count in counts:
        states = [model.new_state() for _ in range(count)]
        vocabulary = model.config.vocab_size
        model.forward_batch([(draw.integers(0, vocabulary, PROMPT), s) for s in states], last_only=True)
        found[count] = []
        for _ in range(PASSES):
            ids = draw.integers(0, vocabulary, (count, 1))
            begin = time.perf_counter()
            model.forward_batch(list(zip(ids, states)), last_only=True)
            found[count].append(time.perf_counter() - begin)
    return found


def time_llama_cpp(path: str, threads: int, counts: list[int]) -> dict[int, list[float]]:
    import os

    import llama_cpp as lib

    lib.llama_backend_init()
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(os.fsencode(path), parameters)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    draw, found = np.random.default_rng(SEED), {}
    for count in counts:
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = count * 256
        parameters.n_seq_max = count
        parameters.n_threads = parameters.n_threads_batch = threads
        context = lib.llama_init_from_model(model, parameters)
        for position in range(PROMPT):
            _decode(lib, context, draw.integers(0, vocabulary, count), position)
        found[count] = []
        for i in range(PASSES):
            ids = draw.integers(0, vocabulary, count)
            begin = time.perf_counter()
            _decode(lib, context, ids, PROMPT + i)
            found[count].append(time.perf_counter() - begin)
        lib.llama_free(context)
    return found


def _decode(lib, context, ids, position: int) -> None:
    """One token of each sequence, with its logits."""
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), position, 1
        batch.seq_id[i][0], batch.logits[i] = i, 1
    if lib.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    lib.llama_get_logits_ith(context, len(ids) - 1)  # waits for the computation
    lib.llama_batch_free(batch)


ENGINES = {"pyengine": time_pyengine, "llama.cpp": time_llama_cpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", default="1,2,4,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help="one round of it, as JSON")
    options = parser.parse_args()
    counts = [int(count) for count in options.sequences.split(",")]
    if options.engine:
        print(json.dumps(ENGINES[options.engine](options.model, options.threads, counts)))
        return
    engines = ["pyengine", *(name for name in installed_peers() if name in ENGINES)]
    seconds = {engine: {count: [] for count in counts} for engine in engines}
    command = [sys.executable, __file__, options.model, "--threads", str(options.threads)]
    for _ in range(options.rounds):
        for engine in engines:
            done = subprocess.run(
                [*command, "--sequences", options.sequences, "--engine", engine],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for count, passes in json.loads(done.stdout.splitlines()[-1]).items():
                seconds[engine][int(count)] += passes
    rows = []
    for count in counts:
        row = [str(count)]
        for engine in engines:
            rate = {n: n / statistics.median(seconds[engine][n]) for n in counts}
            row += [f"{rate[count]:.1f}", f"{rate[count] / rate[counts[0]]:.2f}"]
        rows.append(row)
    head = ["sequences"]
    for engine in engines:
        head += [f"{engine}, tokens/s", f"times {counts[0]}"]
    print("\n".join(markdown_table([head, *rows], ">" * len(head))))


if __name__ == "__main__":
    main()
