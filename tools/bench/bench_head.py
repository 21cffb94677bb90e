"""Greedy decoding with the whole head and with the screened one, in turn: bytes, rows, tokens/s.

    python tools/bench/bench_head.py slice4.gguf --threads 2 --tokens 64 --rounds 5
    python tools/bench/bench_head.py INT4-DIR --top-k 20      # drawn from the 20 likeliest

Each round continues one prompt of random ids (seed 1729) twice: with the whole head, then with the smaller
form of it (pyengine/decoder/head.py).  Both give the same ids, which is checked.  A figure is the median
round.  The machine has to be otherwise idle: see bench_peers.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import numpy as np

import pyengine
from pyengine.checkpoint.summary import stored_bytes
from pyengine.tables import markdown_table

SEED, PROMPT = 1729, 16


def rates(model, ids, tokens: int, sampling: dict) -> tuple[list[float], list[list[int]]]:
    """Tokens/s with the whole head and with the screened one, and the ids of both."""
    found = []
    for screens in (False, True):
        model.screens = screens
        found.append(model.generate(ids, tokens, ignore_end=True, **sampling))
    return [one.tokens_per_second for one in found], [one.ids.tolist() for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--tokens", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest")
    options = parser.parse_args()
    model = pyengine.load(options.model, threads=options.threads)
    sampling = {"temperature": 1.0 if options.top_k else 0.0, "top_k": options.top_k, "seed": SEED}
    draw, vocabulary = np.random.default_rng(SEED), model.config.vocab_size
    head = model.lm_head.tensor
    model.generate([1], 3, ignore_end=True)
    screen = model.head_screen
    while screen and screen.usable and not screen.ready:  # the form is made
        model.generate([1], 32, ignore_end=True)
    if not screen or not screen.usable:
        sys.exit(f"{options.model}: a head in {head.type}, {stored_bytes(head):,} bytes, is not screened")
    tokens, rows, form_tokens = screen.tokens, screen.rows, screen.form_tokens
    speeds = []
    for _ in range(options.rounds):
        ids = draw.integers(0, vocabulary, PROMPT)
        speed, answers = rates(model, ids, options.tokens, sampling)
        if answers[0] != answers[1]:
            sys.exit("the ids differ")
        speeds.append(speed)
    tokens, rows, form_tokens = screen.tokens - tokens, screen.rows - rows, screen.form_tokens - form_tokens
    whole = stored_bytes(head)
    read = (screen.nbytes * form_tokens + whole / vocabulary * rows) / tokens
    ratios = [after / before for before, after in speeds]
    plain, screened = (statistics.median(column) for column in zip(*speeds))
    table = [
        ("what", "figure"),
        ("head", f"{head.type}, {vocabulary:,} rows of {head.shape[-1]:,}"),
        ("bytes of the head per token, whole", f"{whole:,}"),
        ("the same, screened", f"{read:,.0f} ({read / whole:.1%})"),
        ("rows computed again per token", f"{rows / tokens:,.1f}"),
        ("memory of the smaller form, bytes", f"{screen.nbytes:,}"),
        ("tokens/s, whole", f"{plain:.2f}"),
        ("tokens/s, screened", f"{screened:.2f}"),
        ("ratio, and its range", f"{screened / plain:.3f}, {min(ratios):.3f} to {max(ratios):.3f}"),
    ]
    print("\n".join(markdown_table(table, "<<")))


if __name__ == "__main__":
    main()
