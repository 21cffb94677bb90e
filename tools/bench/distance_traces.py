"""How far other implementations are from the truth, tensor by tensor.

    python tools/bench/distance_traces.py MODEL.gguf [--tokens 64] [--every]

One row for each kind of tensor (with --every, for each tensor): the root mean square of the difference
from the float64 reference, relative to the reference's own, end to end; the worst of the layers.  The
reference goes on with the implementation's experts at near-ties, whose number is in the last row.  The
row before says how much of its budget the worst tensor uses.  The ids are random, of seed 1729.

transformers in float32 and bfloat16 (of the weights dequantised from the file) needs the golden extra,
llama.cpp needs the peers extra.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

import pyengine
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.trace import record_trace
from pyengine.testing import record, record_llama_cpp

SEED = 1729


def transformers_trace(path, ids, dtype):
    """With the rotary frequencies float32, as from_pretrained keeps them."""
    import torch
    from hf_float64 import load_float64

    model = load_float64(path)
    inv_freq = model.model.rotary_emb.inv_freq.float()
    model = model.to(getattr(torch, dtype))
    model.model.rotary_emb.inv_freq = inv_freq
    return record(model, ids)


PEERS = {  # name: (budget, its trace)
    "transformers float32": ("float32", lambda path, ids: transformers_trace(path, ids, "float32")),
    "transformers bfloat16": ("bfloat16", lambda path, ids: transformers_trace(path, ids, "bfloat16")),
    "llama.cpp": ("int8-activations", record_llama_cpp),
    "pyengine locked": ("int8-activations", lambda path, ids: record_trace(pyengine.load(path), ids)),
}


def kind(name: str) -> str:
    return re.sub(r"^model\.layers\.\d+", "layer", name)


def column(verdict, every) -> dict[str, float]:
    """{tensor or kind: relative error, the worst of its layers}."""
    errors: dict[str, float] = {}
    for row in verdict.rows:
        if row.error is not None:
            name = row.name if every else kind(row.name)
            errors[name] = max(errors.get(name, 0.0), row.error.rms / row.scale)
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=64, metavar="N")
    parser.add_argument("--every", action="store_true", help="a row for each tensor")
    options = parser.parse_args()
    try:
        oracle = Oracle(None, options.model)
        ids = np.random.default_rng(SEED).integers(0, oracle.model.config.vocab_size, options.tokens)
        verdicts = {
            name: oracle.verify(run(options.model, ids), budget) for name, (budget, run) in PEERS.items()
        }
    except pyengine.PyengineError as error:
        print(f"distance_traces: {error}", file=sys.stderr)
        return 2
    print_table({name: (PEERS[name][0], verdict) for name, verdict in verdicts.items()}, options.every)
    return 0


def print_table(verdicts, every) -> None:
    columns = [column(verdict, every) for _, verdict in verdicts.values()]
    names = dict.fromkeys(name for errors in columns for name in errors)
    print("| tensor | " + " | ".join(verdicts) + " |")
    print("|---|" + "--:|" * len(verdicts))
    for name in names:
        print(
            f"| {name} | " + " | ".join(f"{errors.get(name, float('nan')):.1e}" for errors in columns) + " |"
        )
    shares = [
        max(max(row.own_share or 0, row.total_share or 0) for row in verdict.rows)
        for _, verdict in verdicts.values()
    ]
    print(
        "| most of its budget | "
        + " | ".join(f"{share:.2f} of {budget}" for share, (budget, _) in zip(shares, verdicts.values()))
        + " |"
    )
    print(
        "| experts chosen otherwise, near-ties | "
        + " | ".join(
            f"{len(verdict.flips)}, {sum(flip.kind == 'near-tie' for flip in verdict.flips)}"
            for _, verdict in verdicts.values()
        )
        + " |"
    )


if __name__ == "__main__":
    sys.exit(main())
