"""How far the locked arithmetics are from float64, on models of one's own.

    python tools/distance.py MODEL ... [--tokens 300]

KL divergence of the next-token distribution in nats, and agreement of the likeliest token, over
random ids of seed 1729.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

import pyengine
from pyengine.perplexity import log_softmax

SEED = 1729


def distance(path: str, arithmetic: str, tokens: int) -> tuple[float, float, float]:
    """-> mean and greatest KL divergence from float64, agreement of the likeliest token."""
    truth = pyengine.load(path, "float64")
    ids = np.random.default_rng(SEED).integers(0, truth.config.vocab_size, tokens)
    p = log_softmax(truth.forward(ids))
    q = log_softmax(pyengine.load(path, arithmetic).forward(ids))
    divergence = (np.exp(p) * (p - q)).sum(axis=-1)
    agreement = (p.argmax(axis=-1) == q.argmax(axis=-1)).mean()
    return divergence.mean(), divergence.max(), agreement


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=300, metavar="N")
    options = parser.parse_args()
    print("| model | arithmetic | mean KLD | max KLD | same top token |")
    print("|---|---|--:|--:|--:|")
    try:
        for path in options.models:
            for arithmetic in ("locked", "locked-kv16"):
                mean, worst, agreement = distance(path, arithmetic, options.tokens)
                print(f"| {path.rsplit('/', 1)[-1]} | {arithmetic} | {mean:.1e} | {worst:.1e} "
                      f"| {agreement:.1%} |")
    except pyengine.PyengineError as error:
        print(f"distance: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
