"""quality: the error that quantizing makes, of the weights and on texts."""

from __future__ import annotations

from ..checkpoint.layout import GROUP
from ..checkpoint.methods import METHODS
from ..errors import InputError
from ..plots import check_plot
from .options import (
    MODEL,
    add_arithmetic,
    add_json,
    add_threads,
    check_output,
    integer,
    new_command,
    positive,
    read_ids_file,
    read_text,
    warn_threads,
)

CONTEXT = 512


def _count(text):
    value = integer(text, "a number of chunks")
    return value if value >= 0 else positive(text)


def add_commands(commands):
    parser = new_command(
        commands,
        "quality",
        _quality,
        "Measure the error that quantizing makes. The table has the relative error, the signal to noise "
        "and the worst group of every tensor and layer. With --source, it measures MODELs that were made "
        "from SRC; without, it forecasts what `quantize` would make of a MODEL. With -f, it measures what "
        "quantizing costs on texts instead, token by token.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL)
    parser.add_argument(
        "--source", metavar="SRC", help="a GGUF or a Hugging Face directory (default: none, a forecast)"
    )
    parser.add_argument("--int8", action="store_true", help="without --source: INT8 only (default: both)")
    parser.add_argument("--int4", action="store_true", help="without --source: INT4 only (default: both)")
    parser.add_argument("--scale", choices=METHODS, help="without --source: only this scale (default: both)")
    parser.add_argument(
        "--group-size",
        type=positive,
        metavar="N",
        help="without --source: columns that share a scale (default: 128)",
    )
    parser.add_argument(
        "--mix", metavar="LIST", help="without --source: this mix, as of `quantize` (default: none)"
    )
    add_threads(parser)
    form = parser.add_mutually_exclusive_group()
    add_json(form)
    form.add_argument("--markdown", action="store_true", help="print tables for a model card")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw signal to noise against the layer, as .png or .svg (default: no)"
    )
    on_text = parser.add_argument_group("on texts, with --source")
    on_text.add_argument(
        "-f",
        "--file",
        metavar="TEXT",
        action="append",
        default=[],
        help="a text in UTF-8; of each kind of text one, with an -f of its own (default: none)",
    )
    on_text.add_argument("--ids-file", metavar="F", help="token ids as text or .npy, instead (default: none)")
    on_text.add_argument(
        "-c",
        "--ctx-size",
        type=positive,
        default=CONTEXT,
        metavar="N",
        help=f"tokens of a chunk, of which the second half counts (default: {CONTEXT})",
    )
    on_text.add_argument(
        "--chunks", type=positive, metavar="N", help="of each text, the first N (default: all)"
    )
    add_arithmetic(on_text)
    on_text.add_argument(
        "--by-layer",
        action="store_true",
        help="measure each layer alone, the others the source's (default: no)",
    )
    on_text.add_argument(
        "--floor-chunks",
        type=_count,
        default=1,
        metavar="N",
        help="chunks that float64 runs too, for the arithmetic's own divergence; 0: none (default: 1)",
    )
    on_text.add_argument(
        "--card",
        metavar="FILE",
        help="write a model card of the MODEL there, as .md or as one .html page (default: no)",
    )
    on_text.add_argument(
        "--base-model", metavar="NAME", help="on the card (default: what SRC says, or not stated)"
    )
    on_text.add_argument(
        "--license", metavar="NAME", help="on the card (default: what SRC says, or not stated)"
    )


def _quality(options):
    _check_options(options)
    warn_threads(options.threads)
    if options.file or options.ids_file:
        return _on_texts(options)
    from ..quantizer import quality, quality_report

    if options.plot:
        check_plot(check_output(options.plot))
    if options.source:
        measured = [quality.measure(model, options.source) for model in options.models]
    else:
        measured = quality.forecast(
            options.models[0], _bits(options), _scales(options), options.group_size or GROUP, options.threads
        )
    form = "as_json" if options.json else "as_markdown" if options.markdown else "as_table"
    print(getattr(quality_report, form)(measured))
    if options.plot:
        quality_report.plot(measured, options.plot)


def _bits(options):
    from ..quantizer.mix import Mix

    if options.mix is not None:
        return [Mix.parse(options.mix)]
    return [b for b, wanted in ((8, options.int8), (4, options.int4)) if wanted] or [8, 4]


def _scales(options):
    return [options.scale] if options.scale else METHODS


def _check_options(options):
    on_texts = options.file or options.ids_file
    if not options.source and len(options.models) > 1:
        raise InputError("quality: want --source SRC, or a single MODEL to forecast from")
    given = [n for n in ("int8", "int4", "scale", "group_size", "mix") if getattr(options, n)]
    if options.source and given:
        raise InputError(
            f"--{given[0].replace('_', '-')}: want it without --source, which measures "
            "checkpoints as they are"
        )
    if on_texts and not options.source:
        raise InputError("-f: want --source SRC, which MODELs are compared with")
    if on_texts and options.plot:
        raise InputError("--plot: want it without -f; --card FILE.html has charts of texts")
    if options.file and options.ids_file:
        raise InputError("--ids-file: want it without -f, got both")
    needs = [
        name for name in ("by_layer", "card", "base_model", "license", "chunks") if getattr(options, name)
    ]
    if needs and not on_texts:
        raise InputError(f"--{needs[0].replace('_', '-')}: want -f TEXT, which it measures")
    if options.card and len(options.models) > 1:
        raise InputError(f"--card: want one MODEL, got {len(options.models)}")


# ---- on texts --------------------------------------------------------------------------------


def _on_texts(options):
    from ..quantizer.cost import measure, tables

    if options.card:
        _check_card(options)
    report = measure.measure(
        options.source,
        options.models,
        _texts(options),
        measure.Options(
            options.ctx_size,
            options.chunks,
            options.arithmetic,
            options.threads,
            options.floor_chunks,
            options.by_layer,
        ),
    )
    if options.card:
        _write_card(options, report)
    form = "as_json" if options.json else "as_markdown" if options.markdown else "as_text"
    print(getattr(tables, form)(report))


def _texts(options):
    """By the source's tokenizer."""
    import hashlib

    from ..census.texts import Text, encode
    from ..checkpoint.open import open_checkpoint
    from ..ids import as_ids

    if options.ids_file:
        ids = as_ids(read_ids_file(options.ids_file), open_checkpoint(options.source).config.vocab_size)
        digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        return [Text(options.ids_file, digest, 8 * len(ids), ids)]
    model = _Tokenized(options.source)
    return [encode(model, name, read_text(name)) for name in options.file]


class _Tokenized:
    """What `encode` reads of a model."""

    def __init__(self, source):
        from ..checkpoint.open import open_checkpoint
        from ..text.tokenizer import Tokenizer

        checkpoint = open_checkpoint(source)
        self.config, self.tokenizer = checkpoint.config, Tokenizer.open(checkpoint)


def _check_card(options):
    from ..checkpoint import provenance
    from ..quantizer.cost import card

    card.check_card(check_output(options.card))
    if provenance.is_merge(provenance.read(options.models[0])):
        raise InputError(f"{options.models[0]}: --card: want a checkpoint that `quantize` wrote, got a merge")


def _write_card(options, report):
    from ..files.whole import write_text
    from ..quantizer.cost import card

    origin = card.origin_of(options.source, options.base_model, options.license)
    as_page = str(options.card).lower().endswith(".html")
    write = card.as_html if as_page else card.as_markdown
    write_text(options.card, write(options.models[0], origin, report))
