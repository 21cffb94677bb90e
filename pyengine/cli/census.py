"""census: which experts of a model, or of two, a text uses."""

from __future__ import annotations

import argparse
import json

from ..errors import InputError
from ..tables import table
from .options import (
    MODEL,
    add_arithmetic,
    add_chunk,
    add_json,
    add_model,
    add_texts,
    add_window,
    check_output,
    integer,
    load_model,
    new_command,
    read_text,
)


def add_commands(commands):
    from ..census.census import BELOW, CONTEXT

    parser = new_command(
        commands,
        "census",
        _census,
        "Count which experts a text uses. Per layer and expert: tokens, share, mean routing weight, and "
        "REAP's saliency, the mean of routing weight times the norm of the expert's output. An expert is "
        "dead where fewer tokens chose it than --dead times the mean of its layer. A census knows its own "
        "texts alone: an expert that is rare on them may be a specialist of others.",
    )
    add_model(parser)
    add_texts(parser)
    parser.add_argument(
        "-m2",
        "--other",
        metavar="MODEL",
        help=f"a second model of the same shape and vocabulary, beside the first: {MODEL} (default: none)",
    )
    add_window(parser, CONTEXT)
    parser.add_argument(
        "--dead",
        type=_threshold,
        default=BELOW,
        metavar="X",
        help="an expert is dead where fewer tokens chose it than X times the mean of its layer's experts, "
        f"which is tokens * experts per token / experts (default: {BELOW})",
    )
    parser.add_argument(
        "--layer",
        type=integer,
        metavar="N",
        help="print the experts of layer N (default: every layer as a line)",
    )
    add_arithmetic(parser)
    add_chunk(parser)
    add_json(parser)
    parser.add_argument(
        "--plot", metavar="FILE", help="draw layers and experts, as .png or .svg (default: no)"
    )


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"want a number above 0, at most 1, got {text[:40]!r}")
    return value


def _census(options):
    from ..census.census import check_alike, check_experts, compare, describe, take_census
    from ..census.texts import encode
    from ..plots import check_plot
    from ..progress import progress

    plot = check_plot(check_output(options.plot)) if options.plot else None
    contents = [(name, read_text(name)) for name in options.file]
    models = [load_model(options)]
    check_experts(models[0])
    _check_layer(options, models[0])
    if options.other:
        models.append(load_model(options, options.other))
        check_alike(*models)
    texts = [encode(models[0], name, text) for name, text in contents]
    with progress(sum(len(text.ids) for text in texts) * len(models), "census", "tokens") as bar:
        context = options.ctx_size
        counted = [
            take_census(model, texts, context=context, chunk=options.chunk, advance=bar.update)
            for model in models
        ]
    censuses = [
        describe(model, texts, counts, context=context, dead=options.dead)
        for model, counts in zip(models, counted)
    ]
    said = censuses[0]
    if options.other:
        said = said | {"comparison": compare(*censuses), "other": censuses[1]}
    if plot:
        from ..census.plots import plot_census

        plot_census(plot, censuses)
    if options.json:
        print(json.dumps(said, indent=2))
    else:
        _print(censuses, said, options)


def _check_layer(options, model):
    layers = model.config.num_hidden_layers
    if options.layer is not None and not 0 <= options.layer < layers:
        raise InputError(f"--layer: want 0 to {layers - 1}, got {options.layer}")


# ---- output ------------------------------------------------------------------------------------


def _print(censuses, said, options):
    first = censuses[0]
    for text in first["texts"]:
        print(f"text       {text['name']}: {text['tokens']} tokens, sha256 {text['sha256']}")
    for census in censuses:
        dead = sum(len(layer["dead"]) for layer in census["layers"])
        count = len(census["layers"]) * census["experts"]
        print(f"model      {census['model']}: {dead} of {count} experts dead ({100 * dead / count:.1f} %)")
    print(
        f"dead       chosen by fewer than {first['dead_below'] * first['mean_tokens']:.4g} tokens: "
        f"{first['dead_below']:g} of the mean, {first['mean_tokens']:.4g}"
    )
    print(f"note       {first['note']}\n")
    if options.layer is not None:
        rows, align = _experts([census["layers"][options.layer]["experts"] for census in censuses])
    elif options.other:
        rows, align = _beside(said)
    else:
        rows, align = _layers(first)
    print("\n".join(table(rows, align)))


def _layers(census):
    rows = [("layer", "dead", "entropy", "effective", "router entropy", "most", "least", "pair", "lift")]
    for layer in census["layers"]:
        shares = [expert["share"] for expert in layer["experts"]]
        pair = layer["pairs"][0] if layer["pairs"] else None
        rows.append(
            (
                str(layer["layer"]),
                str(len(layer["dead"])),
                f"{layer['entropy_bits']:.3f}",
                f"{layer['effective_experts']:.1f}",
                f"{layer['router_entropy_bits']:.3f}",
                _share(shares, max(shares)),
                _share(shares, min(shares)),
                "{}+{}".format(*pair["experts"]) if pair else "-",
                f"{pair['lift']:.2f}" if pair else "-",
            )
        )
    return rows, ">>>>>>>>>"


def _share(shares, share):
    return f"{shares.index(share)}: {100 * share:.2f} %"


def _beside(said):
    rows = [("layer", "dead", "dead 2", "in both", "entropy", "entropy 2", "distance of shares")]
    for one, other, both in zip(said["layers"], said["other"]["layers"], said["comparison"]):
        rows.append(
            (
                str(one["layer"]),
                str(len(one["dead"])),
                str(len(other["dead"])),
                str(len(both["dead_in_both"])),
                f"{one['entropy_bits']:.3f}",
                f"{other['entropy_bits']:.3f}",
                f"{both['distance']:.4f}",
            )
        )
    return rows, ">>>>>>>"


def _experts(models):
    """One table; of two models a second group of columns."""
    heads = ("tokens", "share %", "weight", "norm", "saliency", "")
    rows = [("expert", *(head + (" 2" if i and head else "") for i in range(len(models)) for head in heads))]
    for experts in zip(*models):
        cells = [str(experts[0]["expert"])]
        for expert in experts:
            cells += [str(expert["tokens"]), f"{100 * expert['share']:.3f}"]
            cells += [_figure(expert[key]) for key in ("mean_weight", "mean_norm", "saliency")]
            cells += ["dead" if expert["dead"] else ""]
        rows.append(tuple(cells))
    return rows, ">" + ">>>>><" * len(models)


def _figure(value):
    return "-" if value is None else f"{value:.4f}"
