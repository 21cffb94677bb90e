"""The speed of a model on this machine: llama-bench's tests and fields, and the share of the bandwidth.

    results = run("model.gguf", n_prompt=[512], n_gen=[64], threads=[1, 2])
    print(as_markdown(results))  # of bench_report

A test is a prompt (pp512: its tokens in one pass, logits of the last) or a generation (tg64: one
token at a time), perhaps behind `n_depth` tokens already seen.  One pass that is not counted comes
first; the tokens are random, from seed 1729; choosing a token from its logits is not timed.
"""

from __future__ import annotations

import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoint.config import FULL
from ..checkpoint.open import open_checkpoint
from ..checkpoint.summary import multiply_adds
from ..core.expert_cache import Counts
from ..core.threads import active_isa
from ..decoder.footprint import weight_bytes_per_token
from ..decoder.model import DEFAULT_CHUNK, LOCKED_ARITHMETICS, LockedModel
from ..decoder.residency import plan_memory, read_in
from ..decoder.state import KeyValueCache
from ..errors import InputError
from ..ids import as_chunk
from ..progress import progress
from ..seed import SEED

REPEATED = 512  # tokens that are computed, and then fill a cache again and again
FILLS = ("repeated", "computed")
GGML_NAMES = {np.float32: "f32", np.float16: "f16"}


@dataclass(frozen=True)
class Result:
    """One test on one number of threads.  What llama-bench has too has its name there.

    model_size, model_n_params  bytes and parameters of the file's weights
    n_batch                     prompt tokens computed at a time
    type_k, type_v              of the key-value cache: "f32", or "f16" in arithmetic locked-kv16
    avg_ns, stddev_ns           of one run; avg_ts, stddev_ts: tokens per second
    n_depth, fill               tokens already in the context, and how they got there: "computed", or
                                "repeated": see `state_at`
    state_size                  bytes of the sequence's state after the test: pages that were written
    gb_per_s                    weights, keys and values read, when every token reads them: for
                                generations only
    gmac_per_s                  multiply-adds with weights, 10^9 per second
    read_bandwidth_gb_per_s     of this machine and as many threads, the better of before and after
    bandwidth_share             gb_per_s over that
    memory                      bytes for the weights, if not all of them stay in memory; then also
    expert_hit_rate             share of the chosen experts that were in memory, one per pass and expert
    missed_bytes_per_token      of the experts that were not
    read_bytes_per_token        that the system read from the disk for this process, in all
    waiting_share               of the time in which nothing could be computed before they were there
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
    fill: str
    state_size: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    gb_per_s: float | None
    gmac_per_s: float
    read_bandwidth_gb_per_s: float
    bandwidth_share: float | None
    memory: int | None
    expert_hit_rate: float | None
    missed_bytes_per_token: float | None
    read_bytes_per_token: float | None
    waiting_share: float | None
    samples_ns: list[int]
    samples_ts: list[float]

    @property
    def test(self) -> str:
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


# ---- running -----------------------------------------------------------------------------------


def run(
    path,
    n_prompt=(512,),
    n_gen=(64,),
    threads=(None,),
    repetitions: int = 5,
    chunk: int | None = None,
    depths=(0,),
    arithmetic: str = "locked",
    fill: str = "repeated",
    memory: int | None = None,
) -> list[Result]:
    """Every test on every number of threads, -> one Result each.

    n_prompt, n_gen  lengths of prompts and of generations; 0 stands for none
    threads          numbers of threads; None: the physical cores
    depths           numbers of tokens already seen
    fill             how: see `state_at`
    chunk            prompt tokens computed at a time
    arithmetic       "locked" or "locked-kv16"
    memory           bytes for the weights, as `pyengine.load` takes them
    Errors: InputError, and those of opening a checkpoint.
    """
    chunk = as_chunk(DEFAULT_CHUNK if chunk is None else chunk)
    tests = _tests(n_prompt, n_gen, depths)
    if arithmetic not in LOCKED_ARITHMETICS:
        raise InputError(f"arithmetic: want {' or '.join(LOCKED_ARITHMETICS)}, got {arithmetic!r}")
    if fill not in FILLS:
        raise InputError(f"fill: want {' or '.join(FILLS)}, got {fill!r}")
    if repetitions < 1:
        raise InputError(f"repetitions: want at least 1, got {repetitions}")
    checkpoint = open_checkpoint(path)
    plan_now = partial(
        plan_memory, checkpoint, memory, context=max(map(sum, tests)), chunk=chunk, arithmetic=arithmetic
    )
    plan, again = plan_now(), plan_now if memory is None else None
    read_in(checkpoint, experts=plan is None)
    checkpoint.check_finite(experts=plan is None)
    results, model = [], None
    runs = len(threads) * len(tests) * (repetitions + 1)
    with progress(runs, "bench", "run") as bar:
        for count in threads:
            del model  # with its experts, before the next model has its own
            model = LockedModel(
                checkpoint, count, chunk=chunk, arithmetic=arithmetic, plan=plan, plan_now=again
            )
            for test in tests:
                before = read_bandwidth(model.pool.threads)
                samples, size, reading = _time(model, *test, repetitions, fill, bar.update)
                bandwidth = max(before, read_bandwidth(model.pool.threads))
                results.append(_result(model, *test, fill, size, samples, bandwidth, reading))
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


class Reading(NamedTuple):
    """What was read so far; None: all weights are in memory.

    experts  `Counts` of the model's caches; disk: bytes that the system read for this process; None: it does
    not tell
    """

    experts: Counts
    disk: int | None

    @classmethod
    def of(cls, model) -> Reading | None:
        caches = model.experts_in_memory
        return None if caches is None else cls(caches.counts(), bytes_from_disk())

    def since(self, before: Reading) -> Reading:
        disk = None if self.disk is None or before.disk is None else self.disk - before.disk
        return Reading(self.experts - before.experts, disk)


def bytes_from_disk() -> int | None:
    """Bytes that the system read from disks for this process; None: it does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
    except (OSError, StopIteration):
        return None


def state_at(model, depth: int, fill: str = "repeated"):
    """A state of that many tokens, random ones, seed 1729.

    fill  "computed": all of them; "repeated": the first 512, whose keys and values then fill the cache
          again and again.  A token or a prompt takes the same time after either, and the same memory:
          what a kernel does depends on the length alone.
    """
    state, rng = model.new_state(), np.random.default_rng(SEED)
    computed = depth if fill == "computed" else min(depth, REPEATED)
    if computed:
        model.forward(rng.integers(0, model.config.vocab_size, computed), state, last_only=True)
    for layer in state.layers:
        if isinstance(layer, KeyValueCache):
            keys, values = layer.keys, layer.values
            for done in range(computed, depth, REPEATED):
                count = min(REPEATED, depth - done)
                layer.append(keys[:count], values[:count])
    state.position = depth
    return state


def _time(
    model, n_prompt, n_gen, n_depth, repetitions, fill, advance
) -> tuple[list[int], int, Reading | None]:
    """Nanoseconds of every repetition, each from the same state at n_depth; the state's bytes then; what the
    repetitions read."""
    rng = np.random.default_rng(SEED)
    state = state_at(model, n_depth, fill)
    start = state.mark()
    samples, before = [], None
    for repetition in range(repetitions + 1):
        if repetition == 1:
            before = Reading.of(model)
        ids = rng.integers(0, model.config.vocab_size, n_prompt or n_gen)
        state.rewind(start)
        began = time.perf_counter_ns()
        for step in [ids] if n_prompt else ids[:, None]:
            model.forward(step, state, last_only=True)
        samples.append(time.perf_counter_ns() - began)
        advance(1)
    after = Reading.of(model)
    reading = after and before and after.since(before)
    return samples[1:], sum(layer.nbytes for layer in state.layers), reading


def read_by_a_token(model, depth: float) -> float:
    """Bytes: the weights, and the keys and values of that many tokens."""
    c, item = model.config, np.dtype(model.cache_dtype).itemsize
    row = c.layer_types.count(FULL) * 2 * c.num_key_value_heads * c.head_dim * item
    return weight_bytes_per_token(model.checkpoint) + depth * row


def _result(model, n_prompt, n_gen, n_depth, fill, state_size, samples_ns, bandwidth, reading) -> Result:
    checkpoint, tokens = model.checkpoint, n_prompt + n_gen
    summary = checkpoint.summary
    samples_ts = [1e9 * tokens / ns for ns in samples_ns]
    avg_ts = statistics.fmean(samples_ts)
    cache_type = GGML_NAMES[model.cache_dtype]
    middle = n_depth + (n_gen + 1) / 2  # what the mean token of a generation reads, itself among them
    gb_per_s = read_by_a_token(model, middle) * avg_ts / 1e9 if n_gen else None
    return Result(
        model_filename=str(checkpoint.path),
        model_type=summary.model_type,
        model_size=summary.weight_bytes,
        model_n_params=summary.parameters,
        isa=active_isa(),
        n_batch=model.chunk,
        n_threads=model.pool.threads,
        type_k=cache_type,
        type_v=cache_type,
        n_prompt=n_prompt,
        n_gen=n_gen,
        n_depth=n_depth,
        fill=fill,
        state_size=state_size,
        test_time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        avg_ns=round(statistics.fmean(samples_ns)),
        stddev_ns=round(_deviation(samples_ns)),
        avg_ts=avg_ts,
        stddev_ts=_deviation(samples_ts),
        gb_per_s=gb_per_s,
        gmac_per_s=multiply_adds(checkpoint, tokens, n_gen or 1) / tokens * avg_ts / 1e9,
        read_bandwidth_gb_per_s=bandwidth,
        bandwidth_share=gb_per_s and gb_per_s / bandwidth,
        **_reading(model, reading, tokens * len(samples_ns), sum(samples_ns)),
        samples_ns=samples_ns,
        samples_ts=samples_ts,
    )


def _reading(model, reading: Reading | None, tokens: int, ns: int) -> dict:
    if reading is None:
        names = "memory expert_hit_rate missed_bytes_per_token read_bytes_per_token waiting_share"
        return dict.fromkeys(names.split())
    return {
        "memory": model.experts_in_memory.memory,
        "expert_hit_rate": reading.experts.hit_rate,
        "missed_bytes_per_token": reading.experts.asked_bytes / tokens,
        "read_bytes_per_token": None if reading.disk is None else reading.disk / tokens,
        "waiting_share": reading.experts.wait_ns / ns,
    }


def _deviation(samples) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


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
