"""How far the locked arithmetics, and llama.cpp, are from float64, on models of one's own.

    python tools/bench/distance.py MODEL ... [--tokens 300]
    python tools/bench/distance.py MODEL.gguf --types all          # quantized by llama.cpp to each type first
    python tools/bench/distance.py MODEL.gguf --types Q4_0,Q4_K_M --limit 1e-7

KL divergence of the next-token distribution in nats, mean and greatest of all positions, and agreement of
the likeliest token, over random ids of seed 1729.  float64 computes with the values that the file holds, so
what quantizing them cost is not in it.

A router whose last two experts are all but equal chooses another one after any rounding.  That position and
those behind it differ by an expert and not by arithmetic.  Where it happens, the cell has the mean of the
positions before it as well.  With --limit the exit status is 1 if that mean of `locked` is above it.  A dash
is what does not run the file; the reasons follow the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from quantizer_types import FILE_TYPES

import pyengine
from pyengine.checkpoint.summary import stored_bytes
from pyengine.decoder.model import LOCKED_ARITHMETICS
from pyengine.errors import CheckpointError
from pyengine.probabilities import log_softmax
from pyengine.progress import progress
from pyengine.tables import markdown_table

sys.path.append(str(Path(__file__).parents[1] / "golden"))
SEED = 1729
LLAMA_CPP = "llama.cpp"


class Distance(NamedTuple):
    """KL divergence from float64, mean and greatest; agreement of the likeliest token; the first position at
    which a router chose other experts, or None; the mean before it."""

    mean: float
    most: float
    agreement: float
    other_experts: int | None = None
    mean_before: float | None = None

    @property
    def of_arithmetic(self) -> float | None:
        """The mean without other experts; None: they are other from the first position on."""
        return self.mean if self.other_experts is None else self.mean_before

    def __str__(self) -> str:
        cell = f"{self.mean:.1e} ({self.most:.1e})"
        if self.other_experts is None:
            return cell
        before = "" if self.mean_before is None else f"{self.mean_before:.1e} "
        return f"{cell}; {before}before position {self.other_experts}"


def distance(p: np.ndarray, q: np.ndarray, other_experts: int | None = None) -> Distance:
    """Log-probabilities float64 [T, vocab] of float64 and of what is compared."""
    each = (np.exp(p) * (p - q)).sum(axis=-1)
    before = each[:other_experts].mean() if other_experts else None
    return Distance(each.mean(), each.max(), (p.argmax(-1) == q.argmax(-1)).mean(), other_experts, before)


def run(model, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """-> log-probabilities float64 [T, vocab]; {router: the experts that it chose [T, top_k], sorted}."""
    chosen = {}

    def record(name, array):
        if name.endswith(".mlp.gate.2"):
            chosen[name] = np.sort(array, axis=-1)

    return log_softmax(model.forward(ids, record=record)), chosen


def first_other(chosen: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> int | None:
    """The first position at which any router chose other experts."""
    rows = [np.flatnonzero((chosen[name] != others[name]).any(axis=-1)) for name in chosen]
    return min((int(found[0]) for found in rows if len(found)), default=None)


def distances(path: str, tokens: int) -> tuple[str, dict[str, Distance | str]]:
    """-> the types of the matrices; {arithmetic: its distance from float64, or why it does not run}."""
    truth = pyengine.load(path, "float64")
    ids = np.random.default_rng(SEED).integers(0, truth.config.vocab_size, tokens)
    (p, chosen), found = run(truth, ids), {}
    for arithmetic in LOCKED_ARITHMETICS:
        try:
            q, others = run(pyengine.load(path, arithmetic), ids)
            found[arithmetic] = distance(p, q, first_other(chosen, others))
        except CheckpointError as error:
            found[arithmetic] = str(error)
    try:
        found[LLAMA_CPP] = distance(p, log_softmax(llama_cpp_logits(path, ids)))
    except (ImportError, ValueError) as error:
        found[LLAMA_CPP] = " ".join(str(error).split())
    return types_of(truth.checkpoint), found


def types_of(checkpoint) -> str:
    """Of matrices, those with the most bytes first."""
    sizes = Counter()
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) > 1 and tensor.type != "F32":
            sizes[tensor.type] += stored_bytes(tensor)
    return " ".join(name for name, _ in sizes.most_common()) or "F32"


def llama_cpp_logits(path: str, ids: np.ndarray) -> np.ndarray:
    """float32 [T, vocab], as llama.cpp computes a prompt.  Errors: ImportError; ValueError, not its model."""
    import llama_cpp

    if not Path(path).is_file():
        raise ValueError("want a GGUF file, got none")
    llama = llama_cpp.Llama(
        str(path), n_gpu_layers=0, n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False
    )
    llama.eval(ids.tolist())
    logits = llama.scores[: len(ids)].copy()
    llama.close()
    return logits


def quantized(models: list[str], types: list[str] | None, folder: Path) -> Iterator[tuple[str, str]]:
    """[(name, path)] of the models, or of what llama.cpp makes of each, one at a time."""
    if types is None:
        yield from ((path.rsplit("/", 1)[-1], path) for path in models)
        return
    from gguf import LlamaFileType
    from quantized_models import quantize

    out = folder / "quantized.gguf"
    for model in models:
        for name in types:
            quantize(Path(model), out, LlamaFileType[f"MOSTLY_{name}"])
            yield f"{Path(model).name} as {name}", str(out)


def table(rows: list[tuple[str, str, dict]]) -> list[str]:
    """rows: (name, types, {arithmetic: distance or reason})."""
    columns = (*LOCKED_ARITHMETICS, LLAMA_CPP)
    cells = [("model", "types", *(f"{name} mean (max)" for name in columns), "same top token")]
    reasons: dict[str, list[str]] = {}
    for model, types, found in rows:
        for name in columns:
            if isinstance(found[name], str):
                reasons.setdefault(f"{model}: {found[name]}", []).append(name)
        ran = [None if isinstance(found[name], str) else found[name] for name in columns]
        agreements = ", ".join("-" if one is None else f"{one.agreement:.1%}" for one in ran)
        cells.append((model, types, *("-" if one is None else str(one) for one in ran), agreements))
    lines = markdown_table(cells, "<<" + ">" * (len(columns) + 1)) + [""] * bool(reasons)
    return lines + [f"{' and '.join(names)} of {reason}" for reason, names in reasons.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=300, metavar="N")
    parser.add_argument("--types", metavar="all|Q4_0,..", help=f"of {' '.join(FILE_TYPES)}")
    parser.add_argument("--limit", type=float, metavar="KLD", help="that no mean of locked may pass")
    options = parser.parse_args()
    types = options.types and (list(FILE_TYPES) if options.types == "all" else options.types.split(","))
    if types and (unknown := set(types) - set(FILE_TYPES)):
        parser.error(f"--types: want all or some of {' '.join(FILE_TYPES)}, got {' '.join(sorted(unknown))}")
    rows, total = [], len(options.models) * len(types or [0])
    try:
        with tempfile.TemporaryDirectory() as folder, progress(total, "distance", unit="model") as bar:
            for name, path in quantized(options.models, types, Path(folder)):
                rows.append((name, *distances(path, options.tokens)))
                bar.update(1)
    except (pyengine.PyengineError, ImportError) as error:
        print(f"distance: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(rows)))
    return above(rows, options.limit)


def above(rows, limit: float | None) -> int:
    """1 if a mean of `locked` is above the limit, and which."""
    status = 0
    for name, _, found in rows:
        if limit is None or isinstance(found["locked"], str):
            continue
        mean = found["locked"].of_arithmetic
        if mean is not None and mean > limit:
            print(f"distance: {name}: want at most {limit:g}, got {mean:.1e}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
