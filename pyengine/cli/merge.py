"""merge: two or more models into one, as a YAML file says."""

from __future__ import annotations

from ..checkpoint.methods import METHODS
from .options import add_threads, integer, new_command, positive, warn_threads


def add_commands(commands):
    parser = new_command(
        commands,
        "merge",
        _merge,
        "Merge models into one, as mergekit's YAML says. The methods are linear, task_arithmetic, ties, "
        "dare_linear and dare_ties, with densities, weights and transplants per layer and expert. A seed "
        "fixes every random mask. A run that was killed continues when it is repeated.",
    )
    parser.add_argument(
        "configuration", metavar="CONFIG.yaml", help="mergekit's YAML: pyengine/merge/README.md has the keys"
    )
    parser.add_argument(
        "directory", nargs="?", metavar="OUT", help="write BF16 or F32 there, a new directory (default: none)"
    )
    parser.add_argument("--int8", metavar="DIR", help="instead of OUT: write INT8 there (default: none)")
    parser.add_argument("--int4", metavar="DIR", help="instead of OUT: write INT4 there (default: none)")
    parser.add_argument(
        "--group-size", type=positive, default=128, metavar="N", help="as of quantize (default: 128)"
    )
    parser.add_argument("--scale", choices=METHODS, default="absmax", help="as of quantize (default: absmax)")
    parser.add_argument(
        "-s",
        "--seed",
        type=integer,
        metavar="SEED",
        help="of the masks (default: the configuration's, or 1729)",
    )
    add_threads(parser)


def _merge(options):
    from ..merge.merge import merge

    warn_threads(options.threads)
    merge(
        options.configuration,
        options.directory,
        int8=options.int8,
        int4=options.int4,
        group_size=options.group_size,
        scale=options.scale,
        seed=options.seed,
        threads=options.threads,
    )
    for directory in filter(None, (options.directory, options.int8, options.int4)):
        print(f"{directory}: written")
