"""Continue a text, or token ids."""

from __future__ import annotations

from .options import add_arithmetic, add_model, load_model, new_command, positive


def add_commands(commands):
    parser = new_command(commands, "generate", _generate, "Continue a text, or token ids.")
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("--ids", metavar='"1 2 3"')
    add_arithmetic(parser)
    parser.add_argument("-n", "--predict", type=positive, default=128, metavar="N",
                        help="tokens at most (default: 128)")
    parser.add_argument("--temp", type=float, default=0.0, metavar="T",
                        help="0: the likeliest token each time (default)")
    parser.add_argument("-s", "--seed", type=int, default=1729, metavar="SEED")


def _generate(options):
    from ..generate import generate
    from ..ids import parse_ids
    from ..sampling import Sampler
    from ..tokenizer import Tokenizer

    sampler = Sampler(temperature=options.temp, seed=options.seed)
    model = load_model(options)
    tokenizer = None
    if options.prompt is not None:
        tokenizer = Tokenizer.open(options.model)
        ids = tokenizer.encode(options.prompt)
        print(options.prompt, end="", flush=True)
    else:
        ids = parse_ids(options.ids, "--ids")
    end_ids = tokenizer.end_ids if tokenizer else model.config.eos_token_ids
    for token in generate(model, ids, options.predict, sampler, end_ids, tokenizer=tokenizer):
        print(token.text if tokenizer else f"{token.id} ", end="", flush=True)
    print()
