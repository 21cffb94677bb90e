"""What `quality` and `quantize` share: texts to measure on, and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .options import add_arithmetic, check_output, positive, read_ids_file, read_text

CONTEXT = 512


def add_texts(group) -> None:
    group.add_argument(
        "-f",
        "--file",
        metavar="TEXT",
        action="append",
        default=[],
        help="a text in UTF-8; of each kind of text one, with an -f of its own (default: none)",
    )
    group.add_argument("--ids-file", metavar="F", help="token ids as text or .npy, instead (default: none)")
    group.add_argument(
        "-c",
        "--ctx-size",
        type=positive,
        default=CONTEXT,
        metavar="N",
        help=f"tokens of a chunk, of which the second half counts (default: {CONTEXT})",
    )
    group.add_argument(
        "--chunks", type=positive, metavar="N", help="of each text, the first N (default: all)"
    )
    add_arithmetic(group)


def add_origin(group) -> None:
    group.add_argument(
        "--base-model", metavar="NAME", help="on the card (default: what SRC says, or not stated)"
    )
    group.add_argument(
        "--license", metavar="NAME", help="on the card (default: what SRC says, or not stated)"
    )


def on_texts(options) -> bool:
    return bool(options.file or options.ids_file)


def check_options(options) -> None:
    """InputError: of what `add_texts` and `add_origin` add, what does not go together."""
    if options.file and options.ids_file:
        raise InputError("--ids-file: want it without -f, got both")
    if options.chunks and not on_texts(options):
        raise InputError("--chunks: want -f TEXT, which it measures")
    for name in ("base_model", "license"):
        if getattr(options, name) and not options.card:
            raise InputError(f"--{name.replace('_', '-')}: want --card, on which it stands")


# ---- texts -----------------------------------------------------------------------------------


def read_texts(source, options) -> list:
    """By the source's tokenizer; [] where no text is given."""
    import hashlib

    from ..census.texts import Text, encode
    from ..checkpoint.open import open_checkpoint
    from ..ids import as_ids

    if options.ids_file:
        ids = as_ids(read_ids_file(options.ids_file), open_checkpoint(source).config.vocab_size)
        digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        return [Text(options.ids_file, digest, 8 * len(ids), ids)]
    model = _Tokenized(source) if options.file else None
    return [encode(model, name, read_text(name)) for name in options.file]


class _Tokenized:
    """What `encode` reads of a model."""

    def __init__(self, source):
        from ..checkpoint.open import open_checkpoint
        from ..text.tokenizer import Tokenizer

        checkpoint = open_checkpoint(source)
        self.config, self.tokenizer = checkpoint.config, Tokenizer.open(checkpoint)


def how_to_measure(options, **more):
    """`measure`'s options; more: those that only one of the commands has."""
    from ..quantizer.cost import measure

    return measure.Options(options.ctx_size, options.chunks, options.arithmetic, options.threads, **more)


# ---- the card --------------------------------------------------------------------------------


def check_card(path, directory=None) -> None:
    """InputError, before the work begins, for a file that cannot be a card.

    directory: one that is still to be made, in which the card may lie.
    """
    from ..quantizer.cost import card

    card.check_card(path)
    if directory is None or Path(path).absolute().parent != Path(directory).absolute():
        check_output(path)


def write_cards(paths: Mapping[Any, Any], source, options, costs) -> None:
    """paths: {checkpoint: its card}; costs: card.Cost of each, in that order."""
    from ..quantizer.cost import card

    origin = card.origin_of(source, options.base_model, options.license)
    for (directory, path), cost in zip(paths.items(), costs):
        card.write_card(path, directory, origin, cost)
