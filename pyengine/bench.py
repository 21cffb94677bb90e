"""How fast a model runs here: llama-bench's tests and fields, and how much of the machine they use.

    results = run("model.gguf", n_prompt=[512], n_gen=[64], threads=[1, 2])
    print(as_markdown(results))

A test is a prompt (pp512: its tokens in one pass, logits of the last) or a generation (tg64: one
token at a time), perhaps behind `n_depth` tokens already seen.  One pass that is not counted comes
first; the tokens are random, from seed 1729; choosing a token from its logits is not timed.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from . import ops
from .checkpoint import Checkpoint, Tensor, model_specs, open_checkpoint
from .config import ARCHITECTURE
from .decoder.model import CACHE_DTYPES, DEFAULT_CHUNK, LockedModel
from .errors import InputError
from .ids import as_chunk
from .memory import copied_bytes, stored_bytes
from .plots import check_plot, new_figure
from .progress import progress

SEED = 1729
FIRST_DEPTH = 512  # of a plot, which then doubles it
GGML_NAMES = {np.float32: "f32", np.float16: "f16"}


@dataclass(frozen=True)
class Result:
    """One test on one number of threads.  What llama-bench has too has its name there.

    model_size, model_n_params  bytes and parameters of the file's weights
    n_batch                     prompt tokens computed at a time
    type_k, type_v              of the key-value cache: "f32", or "f16" in arithmetic locked-kv16
    avg_ns, stddev_ns           of one run; avg_ts, stddev_ts: tokens a second
    gb_per_s                    weights read, when every token reads them: for generations only
    gmac_per_s                  multiply-adds with weights, 10^9 a second
    read_bandwidth_gb_per_s     of this machine and as many threads, the better of before and after
    bandwidth_share             gb_per_s over that
    """

    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    isa: str
    n_batch: int
    n_threads: int
    type_k: str
    type_v: str
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    gb_per_s: float | None
    gmac_per_s: float
    read_bandwidth_gb_per_s: float
    bandwidth_share: float | None
    samples_ns: list[int]
    samples_ts: list[float]

    @property
    def test(self) -> str:
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


# ---- running -----------------------------------------------------------------------------------


def run(path, n_prompt=(512,), n_gen=(64,), threads=(None,), repetitions: int = 5,
        chunk: int | None = None, depths=(0,), arithmetic: str = "locked") -> list[Result]:
    """Every test on every number of threads, -> one Result each.

    n_prompt, n_gen  lengths of prompts and of generations; 0 stands for none
    threads          numbers of threads; None: the physical cores
    depths           numbers of tokens already seen
    chunk            prompt tokens computed at a time
    arithmetic       "locked" or "locked-kv16"
    Errors: InputError, and those of opening a checkpoint.
    """
    chunk = as_chunk(DEFAULT_CHUNK if chunk is None else chunk)
    tests = _tests(n_prompt, n_gen, depths)
    if arithmetic not in CACHE_DTYPES:
        raise InputError(f"arithmetic: want {' or '.join(CACHE_DTYPES)}, got {arithmetic!r}")
    if repetitions < 1:
        raise InputError(f"repetitions: want at least 1, got {repetitions}")
    checkpoint = open_checkpoint(path)
    checkpoint.check_finite()  # and now the file is in the page cache, all of it
    results = []
    runs = len(threads) * len(tests) * (repetitions + 1)
    with progress(runs, "bench", "run") as bar:
        for count in threads:
            model = LockedModel(checkpoint, count, chunk=chunk, arithmetic=arithmetic)
            for test in tests:
                before = read_bandwidth(model.pool.threads)
                samples = _time(model, *test, repetitions, bar.update)
                bandwidth = max(before, read_bandwidth(model.pool.threads))
                results.append(_result(model, *test, samples, bandwidth))
    return results


def _tests(n_prompt, n_gen, depths) -> list[tuple[int, int, int]]:
    """(n_prompt, n_gen, n_depth) of every test."""
    for name, values in (("prompt", n_prompt), ("generation", n_gen), ("depth", depths)):
        if any(value < 0 for value in values):
            raise InputError(f"{name}: want lengths of at least 0, got {min(values)}")
    lengths = [(n, 0) for n in n_prompt if n] + [(0, n) for n in n_gen if n]
    tests = [(*length, depth) for depth in depths for length in lengths]
    if not tests:
        raise InputError("bench: want a prompt or a generation of at least 1 token, got neither")
    return tests


def _time(model, n_prompt, n_gen, n_depth, repetitions, advance) -> list[int]:
    """Nanoseconds of every repetition, each from a copy of one state at n_depth."""
    rng = np.random.default_rng(SEED)
    vocab_size = model.config.vocab_size
    start = model.new_state()
    if n_depth:
        model.forward(rng.integers(0, vocab_size, n_depth), start, last_only=True)
    samples = []
    for _ in range(repetitions + 1):
        ids, state = rng.integers(0, vocab_size, n_prompt or n_gen), start.copy()
        began = time.perf_counter_ns()
        for step in [ids] if n_prompt else ids[:, None]:
            model.forward(step, state, last_only=True)
        samples.append(time.perf_counter_ns() - began)
        advance(1)
    return samples[1:]


def _result(model, n_prompt, n_gen, n_depth, samples_ns, bandwidth) -> Result:
    checkpoint, tokens = model.checkpoint, n_prompt + n_gen
    samples_ts = [1e9 * tokens / ns for ns in samples_ns]
    avg_ts = statistics.fmean(samples_ts)
    cache_type = GGML_NAMES[model.cache_dtype]
    gb_per_s = weight_bytes_per_token(checkpoint) * avg_ts / 1e9 if n_gen else None
    return Result(
        model_filename=str(checkpoint.path),
        model_type=model_type(checkpoint),
        model_size=sum(stored_bytes(t) for t in _weights(checkpoint)),
        model_n_params=sum(math.prod(t.shape) for t in _weights(checkpoint)),
        isa=ops.active_isa(),
        n_batch=model.chunk,
        n_threads=model.pool.threads,
        type_k=cache_type, type_v=cache_type,
        n_prompt=n_prompt, n_gen=n_gen, n_depth=n_depth,
        test_time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        avg_ns=round(statistics.fmean(samples_ns)),
        stddev_ns=round(_deviation(samples_ns)),
        avg_ts=avg_ts,
        stddev_ts=_deviation(samples_ts),
        gb_per_s=gb_per_s,
        gmac_per_s=weight_macs(checkpoint, tokens, n_gen or 1) / tokens * avg_ts / 1e9,
        read_bandwidth_gb_per_s=bandwidth,
        bandwidth_share=gb_per_s and gb_per_s / bandwidth,
        samples_ns=samples_ns,
        samples_ts=samples_ts,
    )


def _deviation(samples) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


# ---- what a token costs ------------------------------------------------------------------------


def weight_bytes_per_token(checkpoint: Checkpoint) -> int:
    """Bytes of weights that one token reads on its way to its logits: every tensor once, of the
    routed experts those that are chosen, of the embedding one row.

    A matrix that the decoder copies counts as its copy: Q4_0 is read as Q8_0 blocks.
    """
    tensors = dict(checkpoint.tensors)
    row = stored_bytes(tensors.pop("model.embed_tokens.weight")) // checkpoint.config.vocab_size
    return row + sum(_touched(checkpoint.config, name, copied_bytes(tensor) or stored_bytes(tensor))
                     for name, tensor in tensors.items())


def weight_macs(checkpoint: Checkpoint, tokens: int, outputs: int) -> int:
    """Multiply-adds of the weight matrices, for that many tokens and that many rows of logits.

    What grows with the context (attention over the cache) and what has no weights (the delta rule)
    is not in it.
    """
    config = checkpoint.config
    layers = sum(_touched(config, spec.name, math.prod(spec.shape))
                 for spec in model_specs(config) if spec.linear and ".layers." in spec.name)
    return tokens * layers + outputs * config.vocab_size * config.hidden_size


def _touched(config, name: str, amount: int) -> int:
    """How much of a tensor's amount, which is the same for every expert, one token needs."""
    if ".mlp.experts." in name:
        return amount // config.num_experts * config.num_experts_per_tok
    return amount


def _weights(checkpoint: Checkpoint) -> list[Tensor]:
    """Each once: a tied lm_head is the embedding."""
    return list({id(tensor): tensor for tensor in checkpoint.tensors.values()}.values())


def model_type(checkpoint: Checkpoint) -> str:
    """Architecture, parameters in all and active, commonest type: "qwen35moe 35B.A3B Q8_0"."""
    types = Counter()
    for tensor in _weights(checkpoint):
        types[tensor.type] += stored_bytes(tensor)
    total = sum(math.prod(tensor.shape) for tensor in _weights(checkpoint))
    active = weight_macs(checkpoint, 1, 1)
    return f"{ARCHITECTURE} {_short(total)}.A{_short(active)} {types.most_common(1)[0][0]}"


def _short(count: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            digits = 1 if count < 9.95 * unit else 0
            return f"{count / unit:.{digits}f}{letter}"
    return str(count)


# ---- what the machine can do -------------------------------------------------------------------


def read_bandwidth(threads: int, nbytes: int = 1 << 30, passes: int = 5) -> float:
    """GB/s at which that many threads read memory: the best of a few passes over nbytes.

    The buffer is far beyond the caches, and each thread reads pages that it touched first.  A sum
    is the cheapest thing to do with what was read; NumPy lets go of the interpreter lock meanwhile.
    """
    parts = np.array_split(np.empty(nbytes // 8, np.int64), threads)
    best = math.inf
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(lambda part: part.fill(1), parts))
        for _ in range(passes):
            began = time.perf_counter()
            list(executor.map(np.add.reduce, parts))
            best = min(best, time.perf_counter() - began)
    return nbytes / best / 1e9


# ---- output ------------------------------------------------------------------------------------


def as_json(results: list[Result]) -> str:
    return json.dumps([asdict(result) for result in results], indent=2)


def as_csv(results: list[Result]) -> str:
    """One line a test, no samples, as llama-bench."""
    names = [field.name for field in fields(Result) if not field.name.startswith("samples_")]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    for result in results:
        values = [getattr(result, name) for name in names]
        table.writerow(["" if value is None else value for value in values])
    return text.getvalue().rstrip("\n")


COLUMNS = {  # heading: (alignment, text)
    "model": ("<", lambda r: r.model_type),
    "size": (">", lambda r: _binary_size(r.model_size)),
    "params": (">", lambda r: f"{r.model_n_params / 1e9:.2f} B" if r.model_n_params >= 1e9
               else f"{r.model_n_params / 1e6:.2f} M"),
    "isa": ("<", lambda r: r.isa),
    "threads": (">", lambda r: str(r.n_threads)),
    "cache": ("<", lambda r: r.type_k),
    "test": (">", lambda r: r.test),
    "t/s": (">", lambda r: f"{r.avg_ts:.2f} ± {r.stddev_ts:.2f}"),
    "GMAC/s": (">", lambda r: f"{r.gmac_per_s:.2f}"),
    "GB/s": (">", lambda r: "" if r.gb_per_s is None else f"{r.gb_per_s:.2f}"),
    "of read bandwidth": (">", lambda r: "" if r.bandwidth_share is None else
                          f"{r.bandwidth_share:.0%} of {r.read_bandwidth_gb_per_s:.1f} GB/s"),
}


def _binary_size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def as_markdown(results: list[Result]) -> str:
    """A table as llama-bench prints it, with what the machine gave."""
    lines = []
    cells = [[text(result) for result in results] for _, text in COLUMNS.values()]
    widths = [max(map(len, [name, *column])) for name, column in zip(COLUMNS, cells)]
    aligned = [align for align, _ in COLUMNS.values()]
    for row in [list(COLUMNS), *zip(*cells)]:
        lines.append("| " + " | ".join(f"{cell:{align}{width}}" for cell, align, width
                                       in zip(row, aligned, widths)) + " |")
    rules = ["-" * (width + 1) + (":" if align == ">" else "-")
             for align, width in zip(aligned, widths)]
    return "\n".join([lines[0], "|" + "|".join(rules) + "|", *lines[1:]])


# ---- a plot ------------------------------------------------------------------------------------


def plot_depths(max_depth: int) -> list[int]:
    """0, 512, 1024, 2048, ... up to max_depth."""
    depths, depth = [0], FIRST_DEPTH
    while depth <= max_depth:
        depths.append(depth)
        depth *= 2
    return depths


def plot(results: list[Result], path) -> None:
    """Tokens a second against the tokens already seen: prompts above, generations below."""
    path = check_plot(path)
    kinds = [("prompt", "n_prompt"), ("generation", "n_gen")]
    kinds = [(name, field) for name, field in kinds if any(getattr(r, field) for r in results)]
    figure = new_figure(7, 0.5 + 3 * len(kinds))
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(f"{results[0].model_type}, {results[0].isa}")
    for panel, (name, field) in zip(panels, kinds):
        _draw_panel(panel, [r for r in results if getattr(r, field)], field)
        panel.set(ylabel=f"{name}, tokens/s", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    panels[-1].set_xlabel("tokens in the context")
    figure.savefig(path, dpi=150)


def _draw_panel(panel, results, field) -> None:
    """One line for each length and number of threads."""
    for length, threads in sorted({(getattr(r, field), r.n_threads) for r in results}):
        line = sorted((r for r in results if (getattr(r, field), r.n_threads) == (length, threads)),
                      key=lambda r: r.n_depth)
        label = line[0].test.partition(" ")[0] + f", {threads} thread" + "s" * (threads > 1)
        panel.errorbar([r.n_depth for r in line], [r.avg_ts for r in line],
                       [r.stddev_ts for r in line], marker="o", capsize=3, label=label)
