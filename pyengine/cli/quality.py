"""quality: the error that quantizing makes, of the weights and on texts."""

from __future__ import annotations

from ..checkpoint.layout import GROUP
from ..checkpoint.methods import METHODS
from ..errors import InputError
from ..plots import check_plot
from . import cards
from .options import MODEL, add_json, add_threads, check_output, integer, new_command, positive, warn_threads


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
    cards.add_texts(on_text)
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
    a_card = parser.add_argument_group("a model card, with --source")
    a_card.add_argument(
        "--card",
        metavar="FILE",
        help="write one of the MODEL there, as .md or as one .html page; without a text it has the "
        "weights' figures (default: no)",
    )
    cards.add_origin(a_card)


def _quality(options):
    _check_options(options)
    warn_threads(options.threads)
    if options.card:
        _check_card(options)
    if cards.on_texts(options):
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
    if options.card:
        from ..quantizer.cost import card

        _write_card(options, [card.cost_of_weights(measured[0], options.source)])
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
    on_texts = cards.on_texts(options)
    cards.check_options(options)
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
    if options.by_layer and not on_texts:
        raise InputError("--by-layer: want -f TEXT, which it measures")
    if options.card and not options.source:
        raise InputError("--card: want --source SRC, which MODEL is compared with")
    if options.card and len(options.models) > 1:
        raise InputError(f"--card: want one MODEL, got {len(options.models)}")


# ---- on texts --------------------------------------------------------------------------------


def _on_texts(options):
    from ..quantizer.cost import card, measure, tables

    how = cards.how_to_measure(options, floor_chunks=options.floor_chunks, by_layer=options.by_layer)
    report = measure.measure(options.source, options.models, cards.read_texts(options.source, options), how)
    if options.card:
        _write_card(options, card.costs_on_texts(report))
    form = "as_json" if options.json else "as_markdown" if options.markdown else "as_text"
    print(getattr(tables, form)(report))


# ---- the card --------------------------------------------------------------------------------


def _check_card(options):
    from ..checkpoint import provenance

    cards.check_card(options.card)
    if provenance.is_merge(provenance.read(options.models[0])):
        raise InputError(f"{options.models[0]}: --card: want a checkpoint that `quantize` wrote, got a merge")


def _write_card(options, costs):
    cards.write_cards({options.models[0]: options.card}, options.source, options, costs)
