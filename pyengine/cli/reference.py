"""reference: part of a model's trace and its budgets, to verify with where the model is not."""

from __future__ import annotations

import sys
import time

from .options import MODEL, add_prompt, check_output, new_command, positive, read_ids_option
from .verify import arithmetic


def add_commands(commands):
    from ..oracle.pre_built import FEATURES, ROWS
    from ..oracle.rounding import PARTS

    parser = new_command(
        commands,
        "reference",
        _reference,
        "Part of the reference's trace for given ids, with its budgets, as a file that `pyengine verify` "
        "takes in place of a model. Tokens and features are drawn with the seed 1729. The model is computed "
        "layer by layer: memory holds one layer's weights as far as they fit 1 GiB. Each budget takes 8 runs "
        "beside the reference's.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add_prompt(parser)
    parser.add_argument(
        "--budget",
        action="append",
        type=arithmetic,
        metavar="B",
        help=f"{', '.join(PARTS)}, or several joined by +; may be given again; the first is the default of "
        "`verify` (default: float32)",
    )
    parser.add_argument(
        "--rows",
        type=positive,
        default=ROWS,
        metavar="N",
        help="tokens of each tensor at most (default: %(default)s)",
    )
    parser.add_argument(
        "--features",
        type=positive,
        default=FEATURES,
        metavar="N",
        help="features of each tensor but lm_head at most (default: %(default)s)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="REF", help="the file to write")


def _reference(options):
    from .. import load
    from ..oracle.pre_built import make_reference, save_reference

    output, ids = check_output(options.output), read_ids_option(options)
    model = load(options.model, "float64")
    start = time.monotonic()
    trace, budgets = make_reference(
        model,
        ids,
        options.budget or ["float32"],
        rows=options.rows,
        features=options.features,
        on_layer=_Clock(model.config.num_hidden_layers),
    )
    save_reference(output, trace, budgets)
    size = output.stat().st_size
    print(
        f"{output}: {len(trace.tensors)} tensors, {len(ids)} tokens, {', '.join(budgets)}, {size:,} bytes, "
        f"in {time.monotonic() - start:.0f} s"
    )


class _Clock:
    """Says after each layer how long the rest takes, where no bar does."""

    def __init__(self, layers):
        self.layers, self.seconds = layers, 0.0

    def __call__(self, done, seconds):
        self.seconds += seconds
        if done > self.layers or sys.stderr.isatty() or self.seconds < 5:
            return
        left = self.seconds / done * (self.layers - done)
        rest = f"about {left:.0f} s and lm_head are left" if done < self.layers else "lm_head is left"
        print(f"layer {done} of {self.layers}: {seconds:.0f} s; {rest}", file=sys.stderr, flush=True)
