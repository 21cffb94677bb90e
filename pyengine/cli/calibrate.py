"""calibrate: what a text does to a model's linears."""

from __future__ import annotations

import json

from .options import (
    add_json,
    add_model,
    add_texts,
    add_window,
    check_output,
    load_model,
    new_command,
    read_text,
)


def add_commands(commands):
    from ..calibration.calibrate import CONTEXT

    parser = new_command(
        commands,
        "calibrate",
        _calibrate,
        "Write the activation statistics of a text, for `quantize --calibration`. The file is an imatrix, as "
        "llama.cpp's, with the text's token ids beside it. A run that was killed continues when it is "
        "repeated, to the same bytes.",
    )
    add_model(parser)
    add_texts(parser)
    parser.add_argument("-o", "--output", required=True, metavar="STATS", help="the file to write")
    add_window(parser, CONTEXT)
    parser.add_argument(
        "--all-experts",
        action="store_true",
        help="send every token through every expert (default: through those that the router chooses)",
    )
    add_json(parser)


def _calibrate(options):
    from ..calibration.calibrate import describe_run, take_statistics
    from ..calibration.statistics import FEW
    from ..census.texts import encode
    from ..progress import progress

    output = check_output(options.output)
    contents = [(name, read_text(name)) for name in options.file]
    model = load_model(options)
    run = describe_run(
        model, [encode(model, name, text) for name, text in contents], options.ctx_size, options.all_experts
    )
    with progress(len(run.ids), "calibrate", "tokens") as bar:
        _, counts = take_statistics(model, run, output, bar.update)
    starved = _starved(counts)
    if options.json:
        figures = {"output": str(output), "tokens": len(run.ids), "few_below": FEW, "few": starved}
        return print(json.dumps(figures, indent=2))
    print(f"{output}: written, {len(run.ids)} tokens")
    for layer in starved:
        said = ", ".join(f"{e['expert']} ({e['tokens']})" for e in layer["experts"])
        print(f"layer {layer['layer']}: below {FEW:g} of the mean of {layer['mean']:.4g} tokens: {said}")
    if starved:
        print("experts with so few tokens are quantized by the statistics of their whole layer")


def _starved(counts):
    """[{layer, mean, experts: [{expert, tokens}]}] of the layers that have experts with few tokens."""
    from ..calibration.statistics import few_experts
    from ..checkpoint.names import layer_of

    found = []
    for name, tokens in counts.items():
        if name.endswith("mlp.experts.down_proj"):
            few = few_experts(tokens)
            experts = [{"expert": e, "tokens": int(tokens[e])} for e in few]
            if few:
                found.append({"layer": layer_of(name), "mean": float(tokens.mean()), "experts": experts})
    return found
