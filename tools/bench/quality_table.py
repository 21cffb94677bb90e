"""What each quantization costs: perplexity, KL divergence and likeliest token against the BF16 model.

    python tools/bench/quality_table.py MODEL-BF16.gguf -f TEXT [-c 512] [--chunks N] [-t N] [--json]
        [--mix LIST] [--calibration STATS]

From the BF16 GGUF it makes a Q8_0 GGUF (as llama.cpp's converter does) and INT8, INT4 and mixed
checkpoints of every method in a temporary directory, and runs all of them over the same chunks as
`pyengine perplexity` does.  A mixed one has INT4 routed experts, the rest INT8; with --mix also another.
With --calibration the methods that need statistics are among them.  Divergences are from the base's own
logits, not from a file's rounded ones; the routing term is that of pyengine/quantizer/cost.  Where
llama-cpp-python is installed, llama.cpp runs on the same Q8_0 file.

The base runs in the locked arithmetic, which sums the exact products of dense BF16 weights in float64
and rounds only between operations: `tools/bench/distance.py BF16.gguf` says how far that is from float64.
`--base-arithmetic float64` runs the specification itself, which takes ten times as long.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

from rewrite import write_q8_0

import pyengine
from pyengine.checkpoint.methods import CALIBRATED, METHODS
from pyengine.cli.options import positive
from pyengine.evaluation import perplexity
from pyengine.ids import as_ids, read_ids
from pyengine.progress import progress
from pyengine.quantizer.cost import compare, figures
from pyengine.quantizer.quantize import quantize
from pyengine.text.tokenizer import has_tokenizer

KINDS = ("Q8_0", "INT8", "INT4", "mixed", "--mix")  # the order of the rows

# ---- the models ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A row of the table: bytes of its weights, and a model as `pyengine.load` gives it."""

    name: str
    engine: str
    nbytes: int
    model: object


def make_candidates(options, directory: Path) -> list[Candidate]:
    """Written to the directory, opened."""
    paths = {"Q8_0": write_q8_0(options.model, directory / "Q8_0.gguf")}
    for scale in METHODS:
        paths |= quantized(options, directory, scale)
    if options.calibration:
        for scale in CALIBRATED:
            paths |= quantized(options, directory, scale, calibration=options.calibration)
    paths = dict(sorted(paths.items(), key=lambda item: KINDS.index(item[0].partition(",")[0])))
    candidates = []
    for name, path in paths.items():
        model = pyengine.load(path, threads=options.threads)
        candidates.append(Candidate(name, "pyengine, locked", model.checkpoint.summary.weight_bytes, model))
    if peer_available(options.model):
        model = LlamaCpp(paths["Q8_0"], options.ctx_size, options.threads)
        engine = f"llama.cpp, llama-cpp-python {model.lib.__version__}"
        candidates.append(Candidate("Q8_0", engine, candidates[0].nbytes, model))
    return candidates


def quantized(options, directory: Path, scale: str, **calibration) -> dict[str, Path]:
    """{name: directory} of one method; the checkpoints of one source and method come of one pass."""
    int8, int4, mixed, other = (directory / f"{kind}-{scale}" for kind in KINDS[1:])
    common = {"scale": scale, "threads": options.threads, **calibration}
    quantize(options.model, int8, int4, mixed, **common)
    paths = {"INT8": int8, "INT4": int4, "mixed": mixed}
    if options.mix:
        quantize(options.model, mixed=other, mix=options.mix, **common)
        paths["--mix"] = other
    return {f"{kind}, {scale}": path for kind, path in paths.items()}


def peer_available(model) -> bool:
    """llama-cpp-python is installed, and the file has the vocabulary without which it opens none."""
    return importlib.util.find_spec("llama_cpp") is not None and has_tokenizer(model)


class LlamaCpp:
    """llama.cpp behind `forward`, `new_state` and `config.vocab_size`, with its own defaults.

    It has one sequence: a new state ends the one before.
    """

    def __init__(self, path, n_ctx: int, threads: int | None):
        import llama_cpp

        self.lib = llama_cpp
        self.llama = llama_cpp.Llama(
            str(path),
            n_gpu_layers=0,
            n_ctx=n_ctx,
            n_batch=n_ctx,
            logits_all=True,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.config = SimpleNamespace(vocab_size=self.llama.n_vocab())

    def new_state(self) -> SimpleNamespace:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.llama.ctx), True)
        return SimpleNamespace(position=0)

    def forward(self, ids, state, last_only: bool = False) -> np.ndarray:
        """ids [T] -> logits float32 [T, vocab], or [1, vocab]."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = int(token), state.position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = not last_only or i == len(ids) - 1
            batch.n_tokens = len(ids)
            status = self.lib.llama_decode(self.llama.ctx, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if status:
            raise pyengine.PyengineError(f"llama_decode: status {status}")
        state.position += len(ids)
        shape = 1 if last_only else len(ids), self.config.vocab_size
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.llama.ctx), shape=shape).copy()


# ---- the comparison --------------------------------------------------------------------------


class Known:
    """A base whose log-probabilities of one chunk are at hand, float64 [scored, vocab]."""

    resolved = -np.inf

    def __init__(self, log_probs: np.ndarray):
        self._log_probs = log_probs

    def log_probs(self, chunk: int, rows: slice) -> np.ndarray:
        return self._log_probs[rows]


def evaluate(base, candidates: list[Candidate], chunks: np.ndarray, bos: int | None) -> list:
    """Of each candidate against the base its scores, and a `compare.Run`, or None of another engine."""
    own = [c.model for c in candidates if not isinstance(c.model, LlamaCpp)]
    with progress(2 * chunks.size, "quality", "tokens") as bar:
        runs = iter(compare.run(base, own, chunks, bos, bar.update)[0])
        found = []
        for candidate in candidates:
            if isinstance(candidate.model, LlamaCpp):
                found.append((of_peer(base, candidate.model, chunks, bos, bar.update), None))
            else:
                run = next(runs)
                found.append((run.scores, run))
    return found


def of_peer(base, model: LlamaCpp, chunks: np.ndarray, bos: int | None, advance) -> perplexity.Scores:
    parts = []
    for chunk in chunks:
        logits = perplexity.scored_logits(base, chunk, bos)
        known = Known(np.concatenate([perplexity.log_softmax(block) for block in logits]))
        parts += perplexity.evaluate(model, chunk[None], bos, base=known)
        advance(len(chunk))
    return perplexity.join(parts)


def row(name: str, engine: str, nbytes: int, scores: perplexity.Scores, run=None, n_ctx: int = 0) -> dict:
    said = figures.of_run(run, n_ctx) if run is not None else figures.of_scores(scores)
    keys = ("perplexity", "increase_percent", "kld", "same_top", "routing")
    return {"weights": name, "engine": engine, "bytes": nbytes} | {key: said.get(key) for key in keys}


def base_row(options, base, scores: perplexity.Scores) -> dict:
    """The base against itself, from what any candidate's scores keep of it."""
    zero = np.zeros_like(scores.kld)
    itself = perplexity.Scores(scores.nll_base, scores.nll_base, zero, zero, zero == 0)
    engine = f"pyengine, {options.base_arithmetic}"
    return row("BF16", engine, base.checkpoint.summary.weight_bytes, itself)


def measure(options) -> dict:
    """The whole table, as {what was run: value, "rows": one dict a model}."""
    base = pyengine.load(options.model, options.base_arithmetic, options.threads)
    ids = (
        read_ids(options.ids_file)
        if options.ids_file
        else perplexity.text_ids(base.checkpoint, perplexity.read_text(options.file))
    )
    chunks = perplexity.as_chunks(as_ids(ids, base.config.vocab_size), options.ctx_size, options.chunks)
    with tempfile.TemporaryDirectory(prefix="pyengine-") as directory:
        candidates = make_candidates(options, Path(directory))
        found = evaluate(base, candidates, chunks, perplexity.bos_id(base.checkpoint))
    rows = [
        row(c.name, c.engine, c.nbytes, scores, run, options.ctx_size)
        for c, (scores, run) in zip(candidates, found)
    ]
    scores, _ = found[0]
    return {
        "model": Path(options.model).name,
        "text": Path(options.file or options.ids_file).name,
        "n_ctx": options.ctx_size,
        "n_chunks": len(chunks),
        "scored_tokens": len(scores.nll),
        "rows": [base_row(options, base, scores), *rows],
    }


def as_markdown(report: dict) -> str:
    lines = [
        "{model}, {text}: {n_chunks} chunks of {n_ctx} tokens, {scored_tokens:,} of them scored".format(
            **report
        ),
        "",
        "| weights | computed by | bytes | perplexity | increase | KLD | p99 | routing term | same token |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in report["rows"]:
        ppl, more, kld, top = r["perplexity"], r["increase_percent"], r["kld"], r["same_top"]
        term = r["routing"] and r["routing"]["term"]
        cells = [r["weights"], r["engine"], f"{r['bytes']:,}", f"{ppl['value']:.4f} ± {ppl['error']:.4f}"]
        if r["weights"] == "BF16":
            cells += [""] * 5
        else:
            cells += [
                f"{more['value']:+.3f} ± {more['error']:.3f} %",
                f"{kld['value']:.2e} ± {kld['error']:.0e}",
                f"{kld['p99']:.1e}",
                f"{term['value']:.1e} ± {term['error']:.0e}" if term else "",
                f"{100 * top['value']:.2f} ± {100 * top['error']:.2f} %",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------


def _options(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL-BF16.gguf")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("-f", "--file", metavar="TEXT")
    text.add_argument("--ids-file", metavar="F", help="token ids as text or .npy, instead")
    parser.add_argument("-c", "--ctx-size", type=positive, default=512, metavar="N")
    parser.add_argument("--chunks", type=positive, metavar="N", help="the first N only")
    parser.add_argument("--mix", metavar="LIST", help="another mix, as of `pyengine quantize`")
    parser.add_argument("--calibration", metavar="STATS", help="as of `pyengine quantize`")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("--base-arithmetic", choices=("locked", "float64"), default="locked")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    options = _options(arguments)
    try:
        report = measure(options)
    except (pyengine.PyengineError, OSError) as error:
        print(f"quality_table: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if options.json else as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
