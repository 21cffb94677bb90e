"""quality."""

from __future__ import annotations

from ..errors import InputError
from .options import check_output, new_command, positive


def add_commands(commands):
    parser = new_command(commands, "quality", _quality, "What quantizing costs: relative error, "
                      "signal to noise and worst group of every tensor and layer. With --source, of "
                      "MODELs that were made from it; without, what `quantize` would make of a MODEL.")
    parser.add_argument("models", metavar="MODEL", nargs="+")
    parser.add_argument("--source", metavar="SRC", help="a GGUF or a Hugging Face directory")
    parser.add_argument("--int8", action="store_true", help="without --source: INT8 only")
    parser.add_argument("--int4", action="store_true", help="without --source: INT4 only")
    parser.add_argument("--scale", choices=("absmax", "mse"),
                        help="without --source: of both, this one")
    parser.add_argument("--group-size", type=positive, metavar="N",
                        help="without --source: columns that share a scale (default: 128)")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw signal to noise against the layer, as "
                        ".png or .svg")


def _quality(options):
    from .. import quality

    _check_options(options)
    if options.plot:
        quality.check_plot(check_output(options.plot))
    if options.source:
        measured = [quality.measure(model, options.source) for model in options.models]
    else:
        bits = [b for b, wanted in ((8, options.int8), (4, options.int4)) if wanted] or [8, 4]
        scales = [options.scale] if options.scale else quality.SCALES
        measured = quality.forecast(options.models[0], bits, scales,
                                    options.group_size or quality.GROUP, options.threads)
    print(quality.as_json(measured) if options.json else quality.as_table(measured))
    if options.plot:
        quality.plot(measured, options.plot)


def _check_options(options):
    if not options.source and len(options.models) > 1:
        raise InputError("quality: want --source SRC, or a single MODEL to forecast from")
    given = [name for name in ("int8", "int4", "scale", "group_size") if getattr(options, name)]
    if options.source and given:
        raise InputError(f"--{given[0].replace('_', '-')}: want it without --source, which measures "
                         "checkpoints as they are")
