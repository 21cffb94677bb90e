"""Tokens a second."""

from __future__ import annotations

from .options import check_output, new_command, positive


def _lengths(text):
    values = [int(word) for word in text.split(",")]
    if min(values) < 0:
        raise ValueError
    return values


def _positives(text):
    return [positive(word) for word in text.split(",")]


_lengths.__name__, _positives.__name__ = "list of lengths", "list of positive integers"


def add_commands(commands):
    parser = new_command(commands, "bench", _bench, "Tokens a second, as llama-bench measures them, "
                      "and how much of this machine that is. -p, -n and -t take lists: 1,2.")
    parser.add_argument("-m", "--model", required=True, metavar="MODEL")
    parser.add_argument("-p", "--n-prompt", type=_lengths, default=[512], metavar="N",
                        help="prompt tokens (default: 512; 0: none)")
    parser.add_argument("-n", "--n-gen", type=_lengths, default=[64], metavar="N",
                        help="generated tokens (default: 64; 0: none)")
    parser.add_argument("-t", "--threads", type=_positives, default=[None], metavar="N",
                        help="default: physical cores")
    parser.add_argument("-r", "--repetitions", type=positive, default=5, metavar="N")
    parser.add_argument("--arithmetic", choices=("locked", "locked-kv16"), default="locked")
    parser.add_argument("--chunk", type=positive, metavar="N", help="prompt tokens at a time")
    parser.add_argument("-o", "--output", choices=("md", "json", "csv"), default="md")
    parser.add_argument("--plot", metavar="FILE", help="draw tokens/s against context length, as "
                        ".png or .svg")
    parser.add_argument("-c", "--max-depth", type=positive, default=4096, metavar="N",
                        help="longest context of the plot (default: 4096)")


def _bench(options):
    from .. import bench

    depths = [0]
    if options.plot:
        bench.check_plot(check_output(options.plot))
        depths = bench.plot_depths(options.max_depth)
    results = bench.run(options.model, options.n_prompt, options.n_gen, options.threads,
                        options.repetitions, options.chunk, depths, options.arithmetic)
    write = {"md": bench.as_markdown, "json": bench.as_json, "csv": bench.as_csv}
    print(write[options.output](results))
    if options.plot:
        bench.plot(results, options.plot)
