"""quantize: a checkpoint to INT8, to INT4, to a mix of both."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.layout import GROUP
from ..checkpoint.methods import ALL_METHODS
from ..errors import InputError
from . import cards
from .options import add_threads, new_command, positive, warn_threads

KINDS = ("int8", "int4", "mixed")
IN_EACH = object()  # --card without FILE


def add_commands(commands):
    parser = new_command(
        commands,
        "quantize",
        _quantize,
        "Quantize a model to INT8, INT4 or a mix of them. SRC becomes a symmetric INT8 checkpoint, its INT4 "
        "twin, one with bits where they count, or several of them in one pass.",
    )
    parser.add_argument("source", metavar="SRC", help="a GGUF file, or a Hugging Face directory")
    parser.add_argument("--int8", metavar="DIR", help="write INT8 there, a new directory (default: none)")
    parser.add_argument("--int4", metavar="DIR", help="write INT4 there, a new directory (default: none)")
    parser.add_argument(
        "--mixed",
        metavar="DIR",
        help="write both kinds there, as --mix says, a new directory (default: none)",
    )
    parser.add_argument(
        "--mix",
        metavar="LIST",
        help="of --mixed: PATTERN=int8,PATTERN=int4,... of parameter names; the first that matches decides; "
        "what none matches is INT4 (default: INT4 for routed experts, INT8 for the rest)",
    )
    parser.add_argument(
        "--group-size",
        type=positive,
        default=GROUP,
        metavar="N",
        help="columns that share a scale, an even number (default: 128; the locked "
        "arithmetic runs 128 only, float64 and transformers run any)",
    )
    parser.add_argument(
        "--scale",
        choices=ALL_METHODS,
        help="absmax: from the largest weight of a group; mse: the scale of least squared error; with "
        "--calibration: weighted: mse, columns weighed by the statistics; gptq: layer after layer, errors "
        "compensated; awq: channels scaled, then gptq (default: absmax; with --calibration: gptq)",
    )
    parser.add_argument(
        "--calibration",
        metavar="STATS",
        help="statistics that `calibrate`, or for weighted llama.cpp, wrote (default: none)",
    )
    add_threads(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the sizes and write nothing (default: no)"
    )
    parser.add_argument(
        "--export",
        choices=("compressed-tensors",),
        help="write --int8, --int4 or --mixed, a new directory, from SRC, a directory that "
        "this command wrote, in the layout of another library (default: no)",
    )
    a_card = parser.add_argument_group("a model card, and texts to measure on")
    a_card.add_argument(
        "--card",
        metavar="FILE",
        nargs="?",
        const=IN_EACH,
        help="write one as README.md into each directory; with FILE, a .md or one .html page, there, of one "
        "directory; without a text it has the weights' figures (default: no)",
    )
    cards.add_texts(a_card)
    cards.add_origin(a_card)


def _quantize(options):
    from ..quantizer.mix import ACTIVE
    from ..quantizer.quantize import plans_of, quantize, written_before

    warn_threads(options.threads)
    if options.mix is not None and options.mixed is None:
        raise InputError("--mix: want --mixed DIR, to which it belongs")
    if options.export:
        return _export(options)
    directories = {kind: getattr(options, kind) for kind in KINDS}
    how = {
        "mix": ACTIVE if options.mix is None else options.mix,
        "group_size": options.group_size,
        "scale": options.scale or ("absmax" if options.calibration is None else "gptq"),
    }
    _check_card_options(options, how)
    paths = _cards(options, directories) if options.card else {}
    if options.dry_run:
        return _print_sizes(plans_of(options.source, **directories, **how))
    texts = cards.read_texts(options.source, options)
    how["calibration"] = options.calibration
    done = written_before(options.source, **directories, **how) if paths else set()
    if texts:
        _check_texts(options, texts)
    left = {kind: None if kind in done else directory for kind, directory in directories.items()}
    if any(left.values()) or not done:
        quantize(
            options.source,
            **left,
            **how,
            threads=options.threads,
            on_plans=_print_sizes if options.mixed else lambda plans: None,
        )
    for kind, directory in directories.items():
        if directory is not None:
            print(f"{directory}: written{' before' * (kind in done)}", flush=True)
    if paths:
        _write_cards(options, paths, texts)


def _print_sizes(plans):
    from ..quantizer.sizes import as_table, sizes

    for kind, plan in plans.items():
        print("\n".join(as_table(kind, sizes(plan))), end="\n\n", flush=True)


# ---- the card --------------------------------------------------------------------------------


def _check_card_options(options, how):
    cards.check_options(options)
    if cards.on_texts(options):
        if not options.card:
            raise InputError(f"{'-f' if options.file else '--ids-file'}: want --card, which has its figures")
        if how["group_size"] != GROUP and options.arithmetic != "float64":
            raise InputError(
                f"--group-size: want {GROUP}, which the locked arithmetic has, or --arithmetic float64 for a "
                f"text, got {how['group_size']}"
            )
    elif options.card and how["scale"] == "awq":
        raise InputError(
            "--card: want -f TEXT with --scale awq, whose channels are scaled: its weights are not SRC's"
        )


def _cards(options, directories) -> dict[str, Path]:
    """{directory: the file of its card}.  InputError: a file that cannot be one."""
    from ..quantizer.cost.card import NAME

    given = [directory for directory in directories.values() if directory is not None]
    if options.card is IN_EACH:
        paths = {directory: Path(directory) / NAME for directory in given}
    elif len(given) > 1:
        raise InputError(
            f"--card: {options.card}: want one directory, of which it is the card, got {len(given)} (without "
            f"FILE, --card writes {NAME} into each)"
        )
    else:
        paths = {directory: Path(options.card) for directory in given}
    for directory, path in paths.items():
        cards.check_card(path, directory)
        # Of an earlier run, which is complete then; or its reader has changed it.
        if path.exists() and path.absolute().parent == Path(directory).absolute():
            raise InputError(f"{path}: want a card that does not exist yet, got one that does")
    return paths


def _check_texts(options, texts):
    from ..quantizer.cost import measure

    measure.check(options.source, texts, cards.how_to_measure(options))


def _write_cards(options, paths, texts):
    from ..quantizer import quality
    from ..quantizer.cost import card, measure

    if texts:
        report = measure.measure(options.source, list(paths), texts, cards.how_to_measure(options))
        costs = card.costs_on_texts(report)
    else:
        measured = [quality.measure(directory, options.source) for directory in paths]
        costs = [card.cost_of_weights(one, options.source) for one in measured]
    cards.write_cards(paths, options.source, options, costs)
    for path in paths.values():
        print(f"{path}: written")


# ---- the layout of another library -----------------------------------------------------------


def _export(options):
    from ..checkpoint import provenance
    from ..quantizer.compressed_tensors import export_compressed_tensors

    said = provenance.read(options.source)
    kind = said["output"]["kind"] if provenance.is_merge(said) else provenance.kind_of(said)
    if kind not in KINDS:
        raise InputError(f"{options.source}: want a checkpoint of INT8 or INT4, got {kind}")
    destination = getattr(options, kind)
    if destination is None:
        raise InputError(f"{options.source}: want --{kind} DIR for a checkpoint of this kind")
    for name in ("mix", "dry_run", "card"):
        if getattr(options, name):
            given = f"--{name.replace('_', '-')}"
            raise InputError(f"{given}: want it without --export, which copies a checkpoint as it is")
    export_compressed_tensors(options.source, destination)
    print(f"{destination}: written")
