"""quantize: a checkpoint to INT8, to INT4, to a mix of both."""

from __future__ import annotations

from ..checkpoint.methods import ALL_METHODS
from ..errors import InputError
from .options import add_threads, new_command, positive, warn_threads

KINDS = ("int8", "int4", "mixed")


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
        default=128,
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


def _quantize(options):
    from ..quantizer.mix import ACTIVE
    from ..quantizer.quantize import plans_of, quantize

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
    if options.dry_run:
        return _print_sizes(plans_of(options.source, **directories, **how))
    quantize(
        options.source,
        **directories,
        **how,
        calibration=options.calibration,
        threads=options.threads,
        on_plans=_print_sizes if options.mixed else lambda plans: None,
    )
    for directory in filter(None, directories.values()):
        print(f"{directory}: written")


def _print_sizes(plans):
    from ..quantizer.sizes import as_table, sizes

    for kind, plan in plans.items():
        print("\n".join(as_table(kind, sizes(plan))), end="\n\n", flush=True)


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
    if options.mix is not None or options.dry_run:
        given = "--dry-run" if options.dry_run else "--mix"
        raise InputError(f"{given}: want it without --export, which copies a checkpoint as it is")
    export_compressed_tensors(options.source, destination)
    print(f"{destination}: written")
