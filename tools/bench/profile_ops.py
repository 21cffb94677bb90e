"""Where the time of the locked arithmetic goes: each operation of the C core, and the matmul of each type.

    python tools/bench/profile_ops.py MODEL [--threads N] [--prompt 512] [--gen 64]
    python tools/bench/profile_ops.py MODEL --only types     # one table alone: operations, types, attention

Operations are milliseconds a pass; what is left between them and the whole pass is Python.  Prompt: one
pass, logits of the last token; gen: the mean of so many passes of one token each, after the prompt, step by
step.  The line below is such passes again, in turn with those of recorded calls, as in use.  Random ids,
seed 1729.

The table of types multiplies every matrix of a type by one token, a stack of experts as one matrix, so that
each byte is read once; and some rows by a prompt.  Only the calls into C are timed.  Each round reads memory
alone as well, as `pyengine bench` does: the share is that of the medians.  A type with less data than the
caches hold is left out.

The table of attention has one layer's kernel alone, on random queries, keys and values of the model's heads:
multiply-adds of scores and mix, and of one token the bytes of keys and values that it reads.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import statistics
import time
from collections import Counter
from typing import NamedTuple

import numpy as np

import pyengine
from pyengine.checkpoint.summary import stored_bytes
from pyengine.core import ops
from pyengine.core.matrices import Matrix, as_matrix
from pyengine.evaluation.bench import read_bandwidth
from pyengine.progress import progress
from pyengine.tables import markdown_table

SEED = 1729
BEYOND_CACHES, ENOUGH = 128 << 20, 1 << 30  # bytes of a type: the least that are timed, and the most
ROUNDS = 5
PROMPT_ROWS = 4096  # of a matrix, that a prompt is multiplied by
# The files of operations; each calls the C core as its `lib`.
PARTS = [part for part in vars(ops).values() if inspect.ismodule(part) and hasattr(part, "lib")]


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


@contextlib.contextmanager
def timed():
    """Every operation with a clock, as long as this lasts."""
    before = PARTS[0].lib
    clock = Timed(before)
    for part in PARTS:
        part.lib = clock
    try:
        yield clock
    finally:
        for part in PARTS:
            part.lib = before


def profile(model, ids, passes) -> tuple[float, Counter]:
    """Seconds of all the passes, and of them in each operation; passes: lists of ids, one state."""
    model.replays = False  # a replay is one call
    state = model.new_state()
    try:
        with timed() as clock:
            model.forward(ids, state, last_only=True)
            clock.seconds.clear()
            start = time.perf_counter()
            for piece in passes:
                model.forward(piece, state, last_only=True)
            return time.perf_counter() - start, clock.seconds
    finally:
        model.replays = True


def in_turn(model, ids, passes, rounds=6) -> dict[bool, float]:
    """{whether calls are replayed: seconds of all the passes}, medians of so many rounds."""
    start, seconds = model.new_state(), {True: [], False: []}
    model.forward(ids, start, last_only=True)
    for _ in range(rounds):
        for model.replays in (True, False):
            state = start.copy()
            for piece in passes[:2]:  # the first single token is not recorded, the second is
                model.forward(piece, state, last_only=True)
            began = time.perf_counter()
            for piece in passes:
                model.forward(piece, state, last_only=True)
            seconds[model.replays].append(time.perf_counter() - began)
    model.replays = True
    return {replays: statistics.median(times) for replays, times in seconds.items()}


def report(title, seconds, parts, passes) -> None:
    print(f"{title}: {seconds / passes * 1e3:.2f} ms")
    for name, part in parts.most_common():
        print(f"  {name.removeprefix('pe_'):<24} {part / passes * 1e3:9.2f} ms {part / seconds:6.1%}")
    rest = seconds - sum(parts.values())
    print(f"  {'(Python)':<24} {rest / passes * 1e3:9.2f} ms {rest / seconds:6.1%}")


# ---- matmuls by type ---------------------------------------------------------------------------


def matrices_by_type(checkpoint, most: int = ENOUGH) -> dict[str, list[Matrix]]:
    """{type that the C core reads: its matrices}; of a type no more than so many bytes, the largest first."""
    found, sizes = {}, Counter()
    tensors = [t for t in checkpoint.tensors.values() if len(t.shape) > 1 and "conv1d" not in t.name]
    for tensor in sorted(tensors, key=stored_bytes, reverse=True):
        if sizes[tensor.type] < most:
            sizes[tensor.type] += stored_bytes(tensor)
            matrix = as_one(as_matrix(tensor))
            found.setdefault(matrix.kind, []).append(matrix)
    return found


def as_one(matrix: Matrix) -> Matrix:
    """A stack of experts as one matrix of all their rows, where the rows lie one behind the other."""
    data, scales = matrix.data, matrix.scales
    if matrix.apart:
        return Matrix(matrix.kind, matrix.cols, np.concatenate(data))
    if data.ndim == 2 or scales is not None or not data.flags.c_contiguous:
        return matrix
    return Matrix(matrix.kind, matrix.cols, data.reshape(-1, data.shape[-1]))


def nbytes(matrix: Matrix) -> int:
    return sum(array.nbytes for array in (matrix.data, matrix.scales) if array is not None)


def seconds_of(pool, matrices: list[Matrix], tokens: int) -> float:
    """In C, of each matrix times tokens; without quantizing the activations, which all matrices share."""
    rng = np.random.default_rng(SEED)
    widths = {matrix.cols for matrix in matrices}
    inputs = {cols: ops.Activations(pool, rng.standard_normal((tokens, cols), np.float32)) for cols in widths}
    with timed() as clock:
        for matrix in matrices:
            for expert in range(matrix.experts):
                ops.matmul(pool, matrix, inputs[matrix.cols], expert)
    return clock.seconds["pe_matmul"]


def some_rows(matrix: Matrix, rows: int = PROMPT_ROWS) -> Matrix:
    """The first rows; of the first expert, where experts are apart."""
    matrix = matrix.of_expert(0) if matrix.experts > 1 else matrix
    data, scales = matrix.data, matrix.scales
    return Matrix(matrix.kind, matrix.cols, data[:rows], scales if scales is None else scales[..., :rows])


class TypeSpeed(NamedTuple):
    """nbytes of a type's matrices; bytes_per_s of them with one token; macs_per_s with a prompt."""

    kind: str
    nbytes: int
    bytes_per_s: float
    macs_per_s: float


def speeds(
    model, prompt: int, least: int = BEYOND_CACHES, rounds: int = ROUNDS, alone=read_bandwidth
) -> tuple[list[TypeSpeed], float, list[str]]:
    """-> each type's speed; GB/s of reading alone; the types left out."""
    pool, by_type = model.pool, matrices_by_type(model.checkpoint)
    sizes = {kind: sum(map(nbytes, matrices)) for kind, matrices in by_type.items()}
    kinds = [kind for kind, size in sizes.items() if size >= least]
    pieces = {kind: some_rows(by_type[kind][0]) for kind in kinds}
    reading, one, many = [], {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    with progress(rounds, "matmuls by type", unit="round") as bar:
        for _ in range(rounds):
            reading.append(alone(pool.threads))
            for kind in kinds:
                one[kind].append(seconds_of(pool, by_type[kind], 1))
                many[kind].append(seconds_of(pool, [pieces[kind]], prompt))
            bar.update(1)
    found = []
    for kind, piece in pieces.items():
        macs = prompt * piece.rows * piece.cols / statistics.median(many[kind])
        found.append(TypeSpeed(kind, sizes[kind], sizes[kind] / statistics.median(one[kind]), macs))
    return found, statistics.median(reading), [kind for kind in by_type if kind not in kinds]


def report_types(model, prompt: int, found: list[TypeSpeed], reading: float, left_out: list[str]) -> None:
    print(f"matmuls by type, {model.pool.threads} threads; reading alone: {reading:.1f} GB/s")
    rows = [
        (
            row.kind,
            f"{row.nbytes / 1e6:.0f}",
            f"{row.bytes_per_s / 1e9:.1f}",
            f"{row.bytes_per_s / 1e9 / reading:.0%}",
            f"{row.macs_per_s / 1e9:.0f}",
        )
        for row in found
    ]
    title = ("type", "MB", "one token: GB/s", "of reading alone", f"prompt of {prompt}: 10^9 multiply-adds/s")
    print("\n".join(markdown_table([title, *rows], "<>>>>")))
    if left_out:
        print(f"left out, because caches may hold all of it: {', '.join(left_out)}")


# ---- attention ----------------------------------------------------------------------------------

ATTENTION = ((64, 2048), (64, 8192), (1, 2048), (1, 8192), (1, 32_768))  # (tokens, positions before them)


class AttentionSpeed(NamedTuple):
    tokens: int
    depth: int
    half: bool
    macs_per_s: float
    bytes_per_s: float


def attention_speeds(model, cases=ATTENTION, rounds: int = ROUNDS) -> list[AttentionSpeed]:
    """Medians of so many calls; each case over a cache of float32, and one of float16."""
    c, rng, found = model.config, np.random.default_rng(SEED), []
    for tokens, depth in cases:
        query = rng.standard_normal((tokens, c.num_attention_heads, c.head_dim), np.float32)
        shape = (c.num_key_value_heads, depth + tokens, c.head_dim)
        whole = [rng.standard_normal(shape, np.float32) for _ in range(2)]
        macs = 2 * c.num_attention_heads * c.head_dim * sum(depth + i + 1 for i in range(tokens))
        for half in (False, True):
            caches = [cache.astype(np.float16) if half else cache for cache in whole]
            seconds = []
            for _ in range(rounds + 1):
                began = time.perf_counter()
                ops.attention(model.pool, query, *(cache.swapaxes(0, 1) for cache in caches), 0.0625)
                seconds.append(time.perf_counter() - began)
            median = statistics.median(seconds[1:])
            found.append(
                AttentionSpeed(tokens, depth, half, macs / median, 2 * caches[0].nbytes * tokens / median)
            )
    return found


def report_attention(model, found: list[AttentionSpeed]) -> None:
    c = model.config
    print(
        f"attention of one layer, {c.num_attention_heads} heads on {c.num_key_value_heads} of {c.head_dim}, "
        f"{model.pool.threads} threads"
    )
    rows = [("tokens", "positions before", "cache", "10^9 multiply-adds/s", "cache read, GB/s")]
    for one in found:
        read = f"{one.bytes_per_s / 1e9:.1f}" if one.tokens == 1 else ""
        cache = "float16" if one.half else "float32"
        rows.append((str(one.tokens), f"{one.depth:,}", cache, f"{one.macs_per_s / 1e9:.1f}", read))
    print("\n".join(markdown_table(rows, ">><>>")))


# ---- the command -------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--only", choices=("operations", "types", "attention"))
    options = parser.parse_args()
    model = pyengine.load(options.model, threads=options.threads)
    if options.only in (None, "operations"):
        report_operations(model, options.prompt, options.gen)
    if options.only in (None, "types"):
        report_types(model, options.prompt, *speeds(model, options.prompt))
    if options.only in (None, "attention"):
        report_attention(model, attention_speeds(model))


def report_operations(model, n_prompt: int, n_gen: int) -> None:
    ids = np.random.default_rng(SEED).integers(0, model.config.vocab_size, n_prompt + n_gen)
    prompt, gen = ids[:n_prompt], ids[n_prompt:, None]
    report(f"prompt of {len(prompt)}", *profile(model, prompt[:1], [prompt]), 1)
    report("one token", *profile(model, prompt, gen), len(gen))
    seconds = in_turn(model, prompt, gen)
    print(
        f"one token, in turn: {seconds[False] / len(gen) * 1e3:.2f} ms step by step, "
        f"{seconds[True] / len(gen) * 1e3:.2f} ms replayed"
    )


if __name__ == "__main__":
    main()
