"""What several commands share: the model, its arithmetic, the ids, the output file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..errors import InputError


def new_command(commands, name, run, text):
    """run(options) -> exit code or None."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse names the type in its message


def add_model(parser):
    parser.add_argument("-m", "--model", required=True, metavar="MODEL")
    parser.add_argument("-t", "--threads", type=positive, metavar="N",
                        help="of the locked arithmetic (default: physical cores)")
    parser.add_argument("--pin", action="store_true", help="one processor a thread")


def add_arithmetic(parser):
    from ..model import ARITHMETICS

    parser.add_argument("--arithmetic", choices=ARITHMETICS, default="locked")


def limit(text):
    value = int(text)
    if value < -1:
        raise ValueError
    return None if value == -1 else value


limit.__name__ = "number of tokens, or -1"


def add_generation(parser, predict):
    """How many tokens, and how they are drawn: llama.cpp's flags.  predict: default of -n."""
    shown = -1 if predict is None else predict
    parser.add_argument("-n", "--predict", type=limit, default=predict, metavar="N",
                        help=f"tokens at most (default: {shown}); -1: until the context is full")
    parser.add_argument("-c", "--ctx-size", type=positive, metavar="N",
                        help="tokens of prompt and answer at most (default: as the model was made for)")
    parser.add_argument("-r", "--reverse-prompt", action="append", default=[], metavar="TEXT",
                        help="text that ends the answer; may be given again")
    drawing = parser.add_argument_group(
        "sampling", "Applied in this order: logit bias, penalties, top-k, top-p, min-p, temperature. "
        "Defaults are the checkpoint's generation settings; without them, the likeliest token.")
    for flag, name, kind, text in _SAMPLING:
        metavar = "X" if kind is float else "N"
        drawing.add_argument(flag, dest=name, type=kind, metavar=metavar, help=text)
    drawing.add_argument("--logit-bias", action="append", default=[], type=_bias, metavar="ID(+/-)BIAS",
                         help="add to a token's logit: 271-inf, 17+1.5; may be given again")
    drawing.add_argument("-s", "--seed", type=int, metavar="SEED", help="default: 1729")


_SAMPLING = [
    ("--temp", "temperature", float, "0: the likeliest token each time"),
    ("--top-k", "top_k", int, "of the k likeliest tokens; 0: all"),
    ("--top-p", "top_p", float, "of the likeliest that have this probability together; 1: all"),
    ("--min-p", "min_p", float, "of those at least so likely as this times the likeliest; 0: all"),
    ("--repeat-penalty", "repetition_penalty", float, "divides logits of tokens seen; 1: none"),
    ("--presence-penalty", "presence_penalty", float, "taken from logits of tokens seen"),
    ("--frequency-penalty", "frequency_penalty", float, "the same, as often as they were seen"),
    ("--repeat-last-n", "penalty_last_n", int, "tokens that penalties look at (default: 64); -1: all"),
]


def _bias(text):
    found = re.fullmatch(r"(\d+)([+-].+)", text)
    if not found:
        raise ValueError
    return int(found[1]), float(found[2])


_bias.__name__ = "ID(+/-)BIAS"


def sampling_options(options) -> dict:
    """Keywords of `Sampler`, of those that are given."""
    given = {name: getattr(options, name) for name in ("seed", *(row[1] for row in _SAMPLING))}
    given["logit_bias"] = dict(options.logit_bias) or None
    return {name: value for name, value in given.items() if value is not None}


def add_reasoning(parser):
    parser.add_argument("--reasoning", choices=("auto", "on", "off"), default="auto",
                        help="thinking before the answer (default: auto, as the template has it)")
    parser.add_argument("--reasoning-budget", type=limit, metavar="N",
                        help="tokens of thinking, after which it is ended; -1: any number (default)")


def add_ids_run(parser):
    add_model(parser)
    ids = parser.add_mutually_exclusive_group(required=True)
    ids.add_argument("--ids", metavar='"1 2 3"', help="token ids")
    ids.add_argument("--ids-file", metavar="F", help="token ids as text or .npy")
    add_arithmetic(parser)
    parser.add_argument("--chunk", type=positive, metavar="N",
                        help="prompt tokens computed at a time; changes no bit")
    parser.add_argument("-o", "--output", required=True, metavar="OUT")


def load_model(options):
    from .. import load

    return load(options.model, getattr(options, "arithmetic", "locked"), options.threads,
                pin=options.pin)


def read_ids_option(options):
    from ..ids import parse_ids, read_ids

    return parse_ids(options.ids, "--ids") if options.ids is not None else read_ids(options.ids_file)


def show_prompt_progress(generation):
    """A bar while a long prompt is computed."""
    from ..generate import PIECE
    from ..progress import progress

    if generation.prompt_tokens <= 2 * PIECE:
        return
    bar = progress(generation.prompt_tokens, "prompt", " tokens")

    def advance(tokens):
        bar.update(tokens)
        if bar.n >= bar.total or bar.disable:
            bar.close()

    generation.on_prompt = advance


def print_figures(generation):
    print(f"prompt {generation.prompt_tokens} tokens ({generation.cached_tokens} known), "
          f"{generation.prompt_tokens_per_second:.1f}/s; answer {generation.completion_tokens} tokens, "
          f"{generation.tokens_per_second:.1f}/s; {generation.finish_reason}", file=sys.stderr)


def check_output(path) -> Path:
    """Known to be writable before the work begins."""
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{path}: want a file in a directory that exists")
    return path


def write_text(path, text: str) -> None:
    """Written whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
