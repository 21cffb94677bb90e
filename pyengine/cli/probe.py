"""probe: where two models part on given texts."""

from __future__ import annotations

import json

from ..errors import InputError
from ..tables import table
from .options import (
    MODEL,
    add_arithmetic,
    add_json,
    add_threads,
    check_output,
    load_model,
    new_command,
    read_text,
)


def add_commands(commands):
    parser = new_command(
        commands,
        "probe",
        _probe,
        "Measure the cosine distance of two models, layer by layer and module by module. Each probe is a "
        "text; a distance is the mean over all tokens. The core is the layer that adds most to the distance "
        "of the hidden states.",
    )
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        required=True,
        metavar="MODEL",
        help=f"twice, two models of the same shape and vocabulary: {MODEL}",
    )
    add_threads(parser)
    parser.add_argument("--pin", action="store_true", help="pin each thread to one processor")
    parser.add_argument(
        "-f",
        "--file",
        required=True,
        metavar="PROBES",
        help="a probe per line, in UTF-8; in a .jsonl file a line is a string, or an object with a text; "
        "-: standard input",
    )
    parser.add_argument(
        "--modules", action="store_true", help="print every module (default: every layer as a line)"
    )
    add_arithmetic(parser)
    add_json(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw it, as .png or .svg (default: no)")


def _probe(options):
    from ..census.census import check_alike
    from ..census.probe import describe, measure
    from ..census.texts import encode, split_probes
    from ..plots import check_plot
    from ..progress import progress

    if len(options.model) != 2:
        raise InputError(f"-m: want it twice, got it {len(options.model)} times")
    plot = check_plot(check_output(options.plot)) if options.plot else None
    contents = split_probes(options.file, read_text(options.file))
    first, second = (load_model(options, path) for path in options.model)
    check_alike(first, second)
    probes = [encode(first, name, text) for name, text in contents]
    with progress(sum(len(probe.ids) for probe in probes), "probe", "tokens") as bar:
        distances = measure(first, second, probes, bar.update)
    said = describe(first, second, probes, distances)
    if plot:
        from ..census.plots import plot_probe

        plot_probe(plot, said)
    if options.json:
        print(json.dumps(said, indent=2))
    else:
        _print(said, options.modules)


def _print(said, modules):
    print(f"probes     {len(said['probes'])}, {said['tokens']} tokens")
    core = "none: no layer adds to the distance" if said["core"] is None else f"layer {said['core']}"
    print(f"core       {core}\n")
    rows, align = _modules(said) if modules else _layers(said)
    print("\n".join(table(rows, align)))


def _modules(said):
    return [("module", "distance"), *((name, _figure(d)) for name, d in said["modules"].items())], "<>"


def _layers(said):
    rows = [("layer", "distance", "increase", "mixer", "MLP", "experts in common", "")]
    rows.append(("embedding", _figure(said["embedding"]), "", "", "", "", ""))
    for layer in said["layers"]:
        common = layer.get("experts_in_common")
        rows.append(
            (
                str(layer["layer"]),
                *(_figure(layer[key]) for key in ("distance", "increase", "mixer", "mlp")),
                "-" if common is None else f"{100 * common:.1f} %",
                "core" if layer["layer"] == said["core"] else "",
            )
        )
    return rows, ">>>>>><"


def _figure(value):
    return f"{value:.6f}"
