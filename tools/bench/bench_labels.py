"""Speed, size and memory of soft labels beside reading a prompt: the two in turn, medians.

    python tools/bench/bench_labels.py MODEL                       # 1,024 random ids, k = 50, 2 threads
    python tools/bench/bench_labels.py MODEL --tokens 256 -t 1 --cpu    # on a busy machine

Prints, in tokens per second and as the median ratio of neighbours:
    prompt    the forward pass alone, with the logits of the last token (what `pyengine bench` calls pp)
    logits    the forward pass with the logits of every token, which labels need; nothing is done with them
    labels    `Labeller.label`: logits, top-k (or draws), sums
    encoded   the same, encoded as a row of the data set
    32, alone; 32, together   the same tokens as documents of 32, one after the other and in shared passes
and the bytes per token of a Parquet file of these rows, and the most memory that the process has had.
With a slice (make_slice.py) the weights are random, and so are the likeliest ids: the bytes are the most that
a vocabulary of this size needs.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import pyengine
from pyengine.distill.codec import new_layout
from pyengine.distill.documents import Row
from pyengine.distill.labels import Labeller, LabelOptions
from pyengine.distill.layout import FRACTION_BITS
from pyengine.distill.parquet import Place, batch_of, schema_of, write_part
from pyengine.tables import table

SEED = 1729
SHORT = 32  # tokens of a short document


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--sample", type=int)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--cpu", action="store_true", help="processor time; of use with -t 1 on a busy machine"
    )
    parser.add_argument("--ids", help="a file of ids to take in place of random ones (pyengine.ids.read_ids)")
    options = parser.parse_args()
    model = pyengine.load(options.model, threads=options.threads, check=False)
    chosen = LabelOptions(top_k=None if options.sample else options.k, draws=options.sample)
    ids = _ids(options, model.config.vocab_size)
    row = Row("bench", 0, ids, np.ones(len(ids), np.int8), None)
    steps = _steps(model, chosen, row)
    _print_speed(steps, len(ids), options.runs, time.process_time if options.cpu else time.perf_counter)
    labels = Labeller(model, chosen).label(ids)
    for bits in FRACTION_BITS:
        nbytes = _bytes_per_token(model, chosen, row, labels, "packed", bits)
        print(f"packed, {bits} bits: {nbytes:.1f} bytes per token")
    for layout in ("lists", *(() if options.sample else ("distillkit",))):
        print(f"{layout}: {_bytes_per_token(model, chosen, row, labels, layout, 8):.1f} bytes per token")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"memory: {most:.2f} GiB at most, the model mapped")


def _ids(options, vocab_size):
    if options.ids:
        from pyengine.ids import read_ids

        return read_ids(options.ids)[: options.tokens].astype(np.int32)
    return np.random.default_rng(SEED).integers(0, vocab_size, options.tokens).astype(np.int32)


def _steps(model, chosen, row):
    labeller = Labeller(model, chosen)
    description = {"layout": new_layout("packed", chosen, model.config.vocab_size)}
    schema = schema_of(description)

    def logits():
        for _ in model.logits_in_pieces([row.ids], rows=labeller.rows):
            pass

    short = [(row.ids[i : i + SHORT], "bench", i, None) for i in range(0, len(row.ids), SHORT)]

    return {
        "prompt": lambda: model.forward(row.ids, last_only=True),
        "logits": logits,
        "labels": lambda: labeller.label(row.ids, row.document),
        f"{SHORT}, alone": lambda: [labeller.label(*one) for one in short],
        f"{SHORT}, together": lambda: list(labeller.label_many(short)),
        "encoded": lambda: batch_of(
            row, labeller.label(row.ids, row.document), schema, description["layout"]
        ),
    }


def _print_speed(steps, tokens, runs, clock):
    seconds = {name: [] for name in steps}
    for run in range(runs + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if run:  # the first run reads the weights from the disk
                seconds[name].append(clock() - start)
    rows = [["", "tokens/s", "of prompt", "of logits"]]
    for name, taken in seconds.items():
        ratios = (
            statistics.median(base / one for base, one in zip(seconds[of], taken))
            for of in ("prompt", "logits")
        )
        rows.append(
            [name, f"{tokens / statistics.median(taken):.1f}", *(f"{100 * ratio:.1f} %" for ratio in ratios)]
        )
    print("\n".join(table(rows, "<>>>")))


def _bytes_per_token(model, chosen, row, labels, layout, bits):
    described = new_layout(layout, chosen, model.config.vocab_size, bits)
    schema = schema_of({"layout": described})
    with tempfile.TemporaryDirectory() as directory:
        place = Place.open(directory)
        place.create()
        write_part(place, 0, [batch_of(row, labels, schema, described)], schema)
        return sum(place.parts().values()) / len(row.ids)


if __name__ == "__main__":
    main()
