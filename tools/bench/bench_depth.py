"""Decode, prompt and memory at several depths of the context, this engine and llama.cpp in turn.

    python tools/bench/bench_depth.py MODEL.gguf --threads 2 --depth 0,4096,32768 --rounds 3 --plot depth.svg
    python tools/bench/bench_depth.py MODEL.gguf --alone --depth 0,4096,32768,131072,262144   # no peer
    python tools/bench/bench_depth.py MODEL.gguf --peer-depth 32768 ...   # the peer up to this depth alone

Prints a table, and draws a plot.  Each engine is a process of its own, as in bench_peers: rounds alternate,
one round is not counted, and the machine has to be otherwise idle.  llama.cpp computes a depth's tokens
once, and loads its saved state before each test: minutes at 32,768.  This engine computes 512 tokens and
repeats their keys and values (`pyengine bench --fill repeated`), which changes no speed and no memory.

Read: the weights and the cache that a token reads, and the share of reading alone at which it does.
Memory: of the process without mapped files, after the test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from bench_peers import SAMPLE, Others, Worker, processor, warn
from engines import BATCH, installed_peers

from pyengine.checkpoint.open import open_checkpoint
from pyengine.decoder.model import LockedModel
from pyengine.errors import InputError
from pyengine.evaluation.bench import read_bandwidth, read_by_a_token
from pyengine.plots import check_plot, new_figure, save_figure
from pyengine.tables import markdown_table

OURS, PEER = "pyengine", "llama.cpp"
TESTS = ("gen", "prompt")


def compare(workers, depths, peer_depth, threads, sizes, rounds, bandwidth) -> list[dict]:
    """One row a depth; sizes: {"gen": tokens, "prompt": tokens}; bandwidth(): GB/s of reading alone."""
    rows = []
    for depth in depths:
        here = [worker for worker in workers if worker.name == OURS or depth <= peer_depth]
        row = {"depth": depth, "engines": {worker.name: {} for worker in here}, "read": []}
        for test in TESTS:
            command = {"threads": threads, "prompt": 0, "gen": 0, "depth": depth, "keep": True}
            command[test] = sizes[test]
            answers = {worker.name: [] for worker in here}
            for _ in range(rounds + 1):
                if test == "gen":
                    row["read"].append(bandwidth())
                for worker in here:
                    answers[worker.name].append(worker.measure(**command))
            for name, timed in answers.items():
                samples = [sizes[test] / answer["seconds"] for answer in timed[1:]]
                row["engines"][name][test] = {"median_ts": statistics.median(samples), "samples_ts": samples}
                row["engines"][name]["memory"] = timed[-1]["memory"]
        row["read"] = statistics.median(row["read"])
        rows.append(row)
    return rows


def as_markdown(report: dict) -> str:
    names = report["names"]
    titles = ["depth", *(f"{name} decode t/s" for name in names)]
    titles += ["ratio"] * (len(names) - 1) + ["read/token", "of reading"]
    titles += [*(f"{name} pp{report['prompt']} t/s" for name in names)] + ["ratio"] * (len(names) - 1)
    titles += ["of depth 0", *(f"{name} memory" for name in names)]
    rows = [titles]
    for row in report["rows"]:
        engines, ours = row["engines"], row["engines"][OURS]
        cells = [f"{row['depth']:,}"]
        for test in TESTS:
            cells += [f"{engines[name][test]['median_ts']:.1f}" if name in engines else "" for name in names]
            for name in names[1:]:
                ratio = name in engines and ours[test]["median_ts"] / engines[name][test]["median_ts"]
                cells.append(f"{ratio:.2f}" if ratio else "")
            if test == "gen":
                share = row["bytes"] * ours[test]["median_ts"] / 1e9 / row["read"]
                cells += [f"{row['bytes'] / 1e6:.0f} MB", f"{share:.0%} of {row['read']:.1f} GB/s"]
        first = report["rows"][0]["engines"][OURS]["prompt"]["median_ts"]
        cells.append(f"{ours['prompt']['median_ts'] / first:.0%}")
        cells += [
            f"{(engines[name]['memory'] or 0) / 1e9:.2f} GB" if name in engines else "" for name in names
        ]
        rows.append(cells)
    return "\n".join(
        [
            f"{report['model']}; {report['processor']}; {report['threads']} threads; "
            f"medians of {report['rounds']} rounds",
            "; ".join(report["versions"]),
            "",
            *markdown_table(rows, ">" * len(titles)),
        ]
    )


def plot(report: dict, path: Path) -> None:
    """Three panels over the depth: decode, prompt, memory."""
    panels = [
        ("decode, tokens/s", lambda one: one["gen"]["median_ts"]),
        (f"prompt of {report['prompt']}, tokens/s", lambda one: one["prompt"]["median_ts"]),
        ("memory, GB", lambda one: (one["memory"] or 0) / 1e9),
    ]
    figure = new_figure((7, 9))
    figure.suptitle(f"{report['model']}, {report['threads']} threads")
    for axes, (label, value) in zip(figure.subplots(len(panels), 1, sharex=True), panels):
        for name in report["names"]:
            points = [
                (row["depth"], value(row["engines"][name]))
                for row in report["rows"]
                if name in row["engines"]
            ]
            axes.plot(*zip(*points), marker="o", label=name)
        axes.set(ylabel=label, ylim=(0, None), xscale=("symlog"))
        axes.grid(alpha=0.3)
        axes.legend()
    axes.set_xscale(
        "symlog", linthresh=max(1, min((r["depth"] for r in report["rows"] if r["depth"]), default=1))
    )
    axes.set_xlabel("tokens in the context")
    save_figure(figure, path)


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--depth", type=_counts, default=[0, 4096, 32768], metavar="0,4096")
    parser.add_argument("--prompt", type=int, default=512, metavar="N")
    parser.add_argument("--gen", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--alone", action="store_true", help="this engine only")
    parser.add_argument(
        "--peer-depth", type=int, metavar="N", help="the peer's greatest depth (default: all)"
    )
    parser.add_argument("--plot", metavar="FILE", help="as .png or .svg")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    options = _options()
    try:
        if not Path(options.model).is_file():
            raise ValueError(f"{options.model}: want a GGUF file, got none")
        if min(options.rounds, options.threads, options.prompt, options.gen) < 1 or min(options.depth) < 0:
            raise ValueError(
                "want at least one round, thread, prompt and generated token, and no negative depth"
            )
        if not options.alone and PEER not in installed_peers():
            raise ValueError("want llama-cpp-python (pip install llama-cpp-python) or --alone, got neither")
        path = check_plot(options.plot) if options.plot else None
    except (ValueError, InputError) as error:
        print(f"bench_depth: {error}", file=sys.stderr)
        return 2
    depths = sorted(set(options.depth))
    peer_depth = max(depths) if options.peer_depth is None else options.peer_depth
    sizes = {"gen": options.gen, "prompt": options.prompt}
    names = [OURS] if options.alone else [OURS, PEER]
    contexts = {OURS: max(depths), PEER: max([0, *(depth for depth in depths if depth <= peer_depth)])}
    workers = [
        Worker(name, options.model, contexts[name] + max(sizes.values()) + BATCH, name) for name in names
    ]
    with Others() as before:
        time.sleep(SAMPLE)
    warn(before.seconds, before.wall, "before the run")
    rows = compare(
        workers,
        depths,
        peer_depth,
        options.threads,
        sizes,
        options.rounds,
        lambda: read_bandwidth(options.threads, 1 << 28),
    )
    for worker in workers:
        worker.close()
    model = LockedModel(open_checkpoint(options.model), 1)
    for row in rows:
        row["bytes"] = read_by_a_token(model, row["depth"] + (options.gen + 1) / 2)
    report = {
        "model": Path(options.model).name,
        "processor": processor(),
        "threads": options.threads,
        "prompt": options.prompt,
        "gen": options.gen,
        "rounds": options.rounds,
        "names": names,
        "versions": [worker.version for worker in workers],
        "rows": rows,
    }
    print(json.dumps(report, indent=2) if options.json else as_markdown(report))
    if path:
        plot(report, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
