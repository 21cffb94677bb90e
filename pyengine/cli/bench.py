"""bench: tokens per second."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from .options import (
    MODEL,
    add_arithmetic,
    add_chunk,
    add_memory,
    add_threads,
    check_output,
    lengths,
    new_command,
    positive,
    positives,
    warn_threads,
)


def add_commands(commands):
    parser = new_command(
        commands,
        "bench",
        _bench,
        "Measure tokens per second, as llama-bench does. The table also shows which share of this machine's "
        "read bandwidth that is; of a model that is larger than its memory, also how many of the chosen "
        "experts were in memory, and the megabytes per token that were read. -p, -n, -d and -t take lists: "
        "1,2.",
    )
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=MODEL)
    parser.add_argument(
        "-p",
        "--n-prompt",
        type=lengths,
        default=[512],
        metavar="N",
        help="prompt tokens; 0: no such test (default: 512)",
    )
    parser.add_argument(
        "-n",
        "--n-gen",
        type=lengths,
        default=[64],
        metavar="N",
        help="generated tokens; 0: no such test (default: 64)",
    )
    parser.add_argument(
        "-d",
        "--n-depth",
        "--depth",
        type=lengths,
        metavar="N",
        help="tokens already in the context (default: 0; with --plot 0,512,1024, ... up to -c)",
    )
    parser.add_argument(
        "--fill",
        choices=("repeated", "computed"),
        default="repeated",
        help="how those tokens get there. repeated: 512 are computed, and their keys and values fill the "
        "cache again and again, which takes seconds; speed and memory are those of computed ones "
        "(default: repeated)",
    )
    parser.add_argument("-pg", type=_together, help=argparse.SUPPRESS)
    add_threads(parser, positives, [None])
    parser.add_argument(
        "-r",
        "--repetitions",
        type=positive,
        default=5,
        metavar="N",
        help="runs of each test that are counted (default: 5)",
    )
    add_arithmetic(parser, ("locked", "locked-kv16"))
    add_chunk(parser)
    add_memory(parser)
    parser.add_argument(
        "-o",
        "--output",
        choices=("md", "json", "jsonl", "csv"),
        default="md",
        help="a table, or the results as JSON, one JSON object per line, or CSV (default: md)",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw tokens/s against context length, as .png or .svg (default: no)"
    )
    parser.add_argument(
        "-c",
        "--max-depth",
        type=positive,
        default=4096,
        metavar="N",
        help="longest context of the plot (default: 4096)",
    )


def _together(text):
    raise argparse.ArgumentTypeError(
        "a prompt and a generation in one test are not measured here; -p and -n measure each alone"
    )


def _bench(options):
    from ..evaluation import bench, bench_report
    from ..plots import check_plot

    depths = options.n_depth or [0]
    if options.plot:
        check_plot(check_output(options.plot))
        depths = options.n_depth or bench_report.plot_depths(options.max_depth)
    warn_threads(max((count for count in options.threads if count), default=None))
    results = bench.run(
        options.model,
        options.n_prompt,
        options.n_gen,
        options.threads,
        options.repetitions,
        options.chunk,
        depths,
        options.arithmetic,
        options.fill,
        options.memory,
    )
    write = {
        "md": bench_report.as_markdown,
        "json": bench_report.as_json,
        "jsonl": _as_json_lines,
        "csv": bench_report.as_csv,
    }
    print(write[options.output](results))
    if options.plot:
        bench_report.plot(results, options.plot)


def _as_json_lines(results) -> str:
    return "\n".join(json.dumps(asdict(result)) for result in results)
