"""Continue a text, or token ids."""

from __future__ import annotations

from .options import (
    add_arithmetic,
    add_generation,
    add_model,
    load_model,
    new_command,
    print_figures,
    sampling_options,
    show_prompt_progress,
)


def add_commands(commands):
    parser = new_command(commands, "generate", _generate, "Continue a text, or token ids.")
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("--ids", metavar='"1 2 3"')
    add_arithmetic(parser)
    parser.add_argument("--parse-special", action="store_true",
                        help="text of the prompt that spells a special token is that token")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's end ids")
    parser.add_argument("--verbose", action="store_true", help="counts and tokens/s, on stderr")
    add_generation(parser, predict=128)


def _generate(options):
    from ..ids import parse_ids

    text = options.prompt is not None
    prompt = options.prompt if text else parse_ids(options.ids, "--ids")
    generation = load_model(options).generate(
        prompt, options.predict, stream=True, special=options.parse_special,
        stop=options.reverse_prompt, ignore_end=options.ignore_eos, context=options.ctx_size, **sampling_options(options))
    show_prompt_progress(generation)
    if text:
        print(prompt, end="", flush=True)
    for token in generation:
        print(token.text if text else f"{token.id} ", end="", flush=True)
    print()
    if options.verbose:
        print_figures(generation)
