"""generate: continue a text, or token ids."""

from __future__ import annotations

import json
import sys

from .generation import add_generation, print_figures, print_seed, sampling_options, show_prompt_progress
from .options import add_arithmetic, add_json, add_model, add_prompt, load_model, new_command, read_prompt


def add_commands(commands):
    parser = new_command(commands, "generate", _generate, "Continue a text, or token ids.")
    add_model(parser)
    add_prompt(parser)
    add_arithmetic(parser)
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on after the model's end ids (default: stop there)"
    )
    add_json(parser, "the answer, its ids and figures")
    parser.add_argument("--verbose", action="store_true", help="counts and tokens/s, on stderr")
    add_generation(parser, predict=128)


def _generate(options):
    prompt = read_prompt(options)
    generation = load_model(options).generate(
        prompt,
        options.predict,
        stream=True,
        special=options.parse_special,
        stop=options.reverse_prompt,
        ignore_end=options.ignore_eos,
        context=options.ctx_size,
        logprobs=0 if options.json else None,
        **sampling_options(options),
    )
    if options.seed == -1 and not options.json:
        print_seed(generation.sampler)
    show_prompt_progress(generation)
    if options.json:
        print(json.dumps(_as_json(prompt, generation.run()), indent=2))
    else:
        _show(prompt, generation)
    if options.verbose:
        print_figures(generation)


def _show(prompt, generation) -> None:
    """Print the prompt, where it is text, and the answer as it comes; for ids, the ids of the answer."""
    text = isinstance(prompt, str)
    if text:
        print(prompt, end="", flush=True)
    try:
        for token in generation:
            print(token.text if text else f"{token.id} ", end="", flush=True)
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            print(flush=True)  # for the shell's prompt
        raise
    print()


def _as_json(prompt, generation) -> dict:
    return {
        "prompt": prompt if isinstance(prompt, str) else prompt.tolist(),
        "text": generation.text,
        "ids": generation.ids.tolist(),
        "logprobs": generation.logprobs.tolist(),
        "finish_reason": generation.finish_reason,
        "seed": generation.sampler.seed,
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "prompt_tokens_per_second": generation.prompt_tokens_per_second,
        "tokens_per_second": generation.tokens_per_second,
    }
