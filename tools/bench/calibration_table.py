"""What calibration gains: KL divergence and likeliest token of each method, against the BF16 model.

    python tools/bench/calibration_table.py MODEL-BF16.gguf -f TEXT [--evaluated 6144] [-c 512] [-t N]

TEXT is chapters: a heading, a blank line, lines, a blank line.  Of its first chapters `--evaluated` tokens
are evaluated, every token of each window; the methods are calibrated on the chapters behind, so that no token
does both.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path

import numpy as np

import pyengine
from pyengine.calibration.calibrate import describe_run, take_statistics
from pyengine.census.texts import encode
from pyengine.checkpoint.methods import CALIBRATED
from pyengine.evaluation.perplexity import text_ids
from pyengine.probabilities import log_softmax
from pyengine.quantizer.quantize import quantize

WAYS = [  # row, destination, scale
    ("INT4, absmax", "int4", "absmax"),
    ("INT4, mse", "int4", "mse"),
    ("INT4, weighted", "int4", "weighted"),
    ("INT4, gptq", "int4", "gptq"),
    ("INT4, awq", "int4", "awq"),
    ("mixed, absmax", "mixed", "absmax"),
    ("mixed, gptq", "mixed", "gptq"),
    ("mixed, awq", "mixed", "awq"),
]


def split(checkpoint, text: str, evaluated: int) -> tuple[np.ndarray, str]:
    """-> the ids to evaluate, and the text to calibrate on."""
    parts = text.split("\n\n")
    for count in range(2, len(parts), 2):
        ids = text_ids(checkpoint, "\n\n".join(parts[:count]) + "\n\n")
        if len(ids) >= evaluated:
            return np.array(ids[:evaluated]), "\n\n".join(parts[count:])
    raise SystemExit(f"calibration_table: want more than {evaluated} tokens of whole chapters")


def row(name: str, model, ids: np.ndarray, base: list[np.ndarray], window: int) -> str:
    kld, same = [], []
    for start, p in zip(range(0, len(ids), window), base):
        q = log_softmax(model.forward(ids[start : start + window]))
        kld.append((np.exp(p) * (p - q)).sum(axis=-1))
        same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    kld, same = np.concatenate(kld), np.concatenate(same)
    error, share = kld.std() / np.sqrt(len(kld)), same.mean()
    cells = [
        name,
        f"{model.checkpoint.summary.weight_bytes:,}",
        f"{kld.mean():.2e} ± {error:.0e}",
        f"{np.median(kld):.1e}",
        f"{np.percentile(kld, 99):.1e}",
        f"{kld.max():.2g}",
        f"{100 * share:.1f} ± {100 * np.sqrt(share * (1 - share) / len(same)):.1f} %",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL-BF16.gguf")
    parser.add_argument("-f", "--file", type=Path, required=True, metavar="TEXT")
    parser.add_argument("--evaluated", type=int, default=6144, metavar="N")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, metavar="N")
    parser.add_argument("-t", "--threads", type=int, metavar="N")
    options = parser.parse_args()
    source, window = pyengine.load(options.model, threads=options.threads), options.ctx_size
    text = options.file.read_text()
    ids, rest = split(source.checkpoint, text, options.evaluated)
    base = [log_softmax(source.forward(ids[i : i + window])) for i in range(0, len(ids), window)]
    with tempfile.TemporaryDirectory(prefix="pyengine-") as folder:
        stats = Path(folder) / "stats.gguf"
        run = describe_run(source, [encode(source, options.file.name, rest)], window)
        take_statistics(source, run, stats)
        digest = hashlib.sha256(rest.encode()).hexdigest()
        print(f"calibrated on {len(run.ids):,} tokens, sha256 {digest[:12]}; {len(ids):,} evaluated\n")
        print("| weights | bytes | mean KLD | median | p99 | max | same top token |")
        print("|---|--:|--:|--:|--:|--:|--:|")
        for number, (name, kind, scale) in enumerate(WAYS):
            directory = Path(folder) / str(number)
            calibration = stats if scale in CALIBRATED else None
            how = {"scale": scale, "calibration": calibration, "threads": options.threads}
            quantize(options.model, **{kind: directory}, **how)
            model = pyengine.load(directory, threads=options.threads)
            print(row(name, model, ids, base, window), flush=True)


if __name__ == "__main__":
    main()
