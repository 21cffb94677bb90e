"""What `generate`, `chat` and `serve` share: how an answer is drawn, and what is shown of it."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap

from ..seed import SEED
from .options import WIDTH, integer, limit, positive


def add_generation(parser, predict):
    """How many tokens, and how they are drawn: llama.cpp's flags.  predict: default of -n."""
    shown = -1 if predict is None else predict
    parser.add_argument(
        "-n",
        "--predict",
        type=limit,
        default=predict,
        metavar="N",
        help=f"tokens at most (default: {shown}); -1: to the end of the answer, or of the context",
    )
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=positive,
        metavar="N",
        help="tokens of prompt and answer at most (default: the context that the model was made for)",
    )
    parser.add_argument(
        "-r",
        "--reverse-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends the answer; may be given again (default: none)",
    )
    drawing = parser.add_argument_group(
        "sampling",
        textwrap.fill(
            "The order is: logit bias, penalties, top-k, top-p, min-p, temperature. The checkpoint's own "
            "settings come first; the defaults below are for a checkpoint that has none.",
            WIDTH - 2,
        ),
    )
    for flag, name, kind, text in _SAMPLING:
        metavar = "X" if kind is float else "N"
        drawing.add_argument(flag, dest=name, type=kind, metavar=metavar, help=text)
    drawing.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        type=_bias,
        metavar="ID(+/-)BIAS",
        help="add to a token's logit: 271-inf, 17+1.5; may be given again (default: none)",
    )
    drawing.add_argument(
        "-s",
        "--seed",
        type=integer,
        metavar="SEED",
        help=f"start of the random draws: the same seed gives the same text (default: {SEED}, each time); "
        "-1: a fresh seed, which is printed",
    )


_SAMPLING = [
    ("--temp", "temperature", float, "temperature; 0: always the likeliest token (default: 0)"),
    ("--top-k", "top_k", integer, "keep the N likeliest tokens; 0 or -1: all (default: 0)"),
    (
        "--top-p",
        "top_p",
        float,
        "keep the likeliest that have this probability together; 1: all (default: 1)",
    ),
    ("--min-p", "min_p", float, "drop tokens below this share of the top probability; 0: none (default: 0)"),
    (
        "--repeat-penalty",
        "repetition_penalty",
        float,
        "divide the logits of tokens seen; 1: do not (default: 1)",
    ),
    ("--presence-penalty", "presence_penalty", float, "subtract from the logits of tokens seen (default: 0)"),
    ("--frequency-penalty", "frequency_penalty", float, "the same, once per time seen (default: 0)"),
    (
        "--repeat-last-n",
        "penalty_last_n",
        integer,
        "penalties look at the last N tokens; -1: at all (default: 64)",
    ),
]


def sampling_options(options) -> dict:
    """Keywords of `Sampler`, of those that are given."""
    given = {name: getattr(options, name) for name in ("seed", *(row[1] for row in _SAMPLING))}
    given["logit_bias"] = dict(options.logit_bias) or None
    return {name: value for name, value in given.items() if value is not None}


def add_reasoning(parser):
    parser.add_argument(
        "--reasoning",
        choices=("auto", "on", "off"),
        default="auto",
        help="thinking before the answer (default: auto, the template decides)",
    )
    parser.add_argument(
        "--reasoning-budget",
        type=limit,
        metavar="N",
        help="end the thinking after N tokens; -1: no limit (default: -1)",
    )


def _bias(text: str) -> tuple[int, float]:
    found = re.fullmatch(r"([0-9]{1,18})([+-].+)", text)
    try:
        return int(found[1]), float(found[2])
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"want ID+BIAS or ID-BIAS, got {text[:40]!r}") from None


def show_prompt_progress(generation):
    """Show a bar while a long prompt is computed."""
    from ..progress import progress
    from ..text.generate import Generation

    if generation.prompt_tokens <= 2 * Generation.piece:
        return
    bar = progress(generation.prompt_tokens, "prompt", " tokens")

    def advance(tokens):
        bar.update(tokens)
        if bar.n >= bar.total or bar.disable:
            bar.close()

    generation.on_prompt = advance


def print_seed(sampler):
    """Print the fresh seed of a run, so that the run can be repeated."""
    print(f"seed {sampler.seed}", file=sys.stderr, flush=True)


def print_figures(generation):
    print(
        f"prompt {generation.prompt_tokens} tokens ({generation.cached_tokens} known), "
        f"{generation.prompt_tokens_per_second:.1f}/s; answer {generation.completion_tokens} tokens, "
        f"{generation.tokens_per_second:.1f}/s; {generation.finish_reason}",
        file=sys.stderr,
    )
