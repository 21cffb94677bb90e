"""What each quantization costs: perplexity, KL divergence and likeliest token against the BF16 model.

    python tools/quality_table.py MODEL-BF16.gguf -f TEXT [-c 512] [--chunks N] [-t N] [--json]

From the BF16 GGUF it makes a Q8_0 GGUF (as llama.cpp's converter does) and INT8 and INT4 checkpoints
with scales of both kinds in a temporary directory, and runs all of them over the same chunks as
`pyengine perplexity` does.  Divergences are from the base's own logits, not from a file's rounded ones.
Where llama-cpp-python is installed, llama.cpp runs on the same Q8_0 file.

The base runs in the locked arithmetic, which sums the exact products of dense BF16 weights in float64
and rounds only between operations: `tools/distance.py BF16.gguf` says how far that is from float64.
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
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quantize as quantize_blocks
from rewrite import rewrite

import pyengine
from pyengine import perplexity
from pyengine.cli.options import positive
from pyengine.files.gguf import GGUF, dequantize
from pyengine.ids import as_ids, read_ids
from pyengine.memory import stored_bytes
from pyengine.progress import progress
from pyengine.quantize import quantize
from pyengine.tokenizer import has_tokenizer

Q8_0, BLOCK = GGMLQuantizationType.Q8_0, 32
SCALES = ("absmax", "mse")


# ---- the models ------------------------------------------------------------------------------


def write_q8_0(source, destination) -> Path:
    """A GGUF with its BF16 and F16 matrices as Q8_0; a row that blocks do not fill stays."""
    tensors = {}
    for name, tensor in GGUF.open(source).tensors.items():
        if tensor.type.name in ("BF16", "F16") and tensor.shape[-1] % BLOCK == 0:
            tensors[name] = quantize_blocks(dequantize(tensor), Q8_0), Q8_0
    kind = int(LlamaFileType.MOSTLY_Q8_0), GGUFValueType.UINT32
    return rewrite(source, destination, metadata={"general.file_type": kind}, tensors=tensors)


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
    for bits in "int8", "int4":
        for scale in SCALES:
            paths[f"{bits.upper()}, {scale}"] = path = directory / f"{bits}-{scale}"
            quantize(options.model, **{bits: path}, scale=scale, threads=options.threads)
    candidates = []
    for name, path in paths.items():
        model = pyengine.load(path, threads=options.threads)
        candidates.append(Candidate(name, "pyengine, locked", weight_bytes(model.checkpoint), model))
    if peer_available(options.model):
        model = LlamaCpp(paths["Q8_0"], options.ctx_size, options.threads)
        engine = f"llama.cpp, llama-cpp-python {model.lib.__version__}"
        candidates.append(Candidate("Q8_0", engine, candidates[0].nbytes, model))
    return candidates


def peer_available(model) -> bool:
    """llama-cpp-python is installed, and the file has the vocabulary without which it opens none."""
    return importlib.util.find_spec("llama_cpp") is not None and has_tokenizer(model)


def weight_bytes(checkpoint) -> int:
    """Of the forward pass's tensors, codes and scales; a tied head counts once."""
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors.values()}
    return sum(map(stored_bytes, tensors.values()))


class LlamaCpp:
    """llama.cpp behind `forward`, `new_state` and `config.vocab_size`, with its own defaults.

    It has one sequence: a new state ends the one before.
    """

    def __init__(self, path, n_ctx: int, threads: int | None):
        import llama_cpp

        self.lib = llama_cpp
        self.llama = llama_cpp.Llama(str(path), n_gpu_layers=0, n_ctx=n_ctx, n_batch=n_ctx,
                                     logits_all=True, n_threads=threads, n_threads_batch=threads,
                                     verbose=False)
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
    """`perplexity.Scores` of each candidate against the base, which sees each chunk once."""
    parts = [[] for _ in candidates]
    with progress(chunks.size, "quality", "tokens") as bar:
        for chunk in chunks:
            logits = perplexity.scored_logits(base, chunk, bos)
            known = Known(np.concatenate([perplexity.log_softmax(block) for block in logits]))
            for candidate, scores in zip(candidates, parts):
                scores += perplexity.evaluate(candidate.model, chunk[None], bos, base=known)
            bar.update(len(chunk))
    return [perplexity.join(scores) for scores in parts]


def row(name: str, engine: str, nbytes: int, scores: perplexity.Scores) -> dict:
    figures = perplexity.statistics(scores)
    ratio = figures["perplexity_ratio"]
    return {"weights": name, "engine": engine, "bytes": nbytes,
            "perplexity": figures["perplexity"]._asdict(),
            "increase_percent": {"value": 100 * (ratio.value - 1), "error": 100 * ratio.error},
            "kld": figures["kld"]["mean"]._asdict(), "same_top": figures["same_top"]._asdict()}


def base_row(options, base, scores: perplexity.Scores) -> dict:
    """The base against itself, from what any candidate's scores keep of it."""
    zero = np.zeros_like(scores.kld)
    itself = perplexity.Scores(scores.nll_base, scores.nll_base, zero, zero, zero == 0)
    engine = f"pyengine, {options.base_arithmetic}"
    return row("BF16", engine, weight_bytes(base.checkpoint), itself)


def measure(options) -> dict:
    """The whole table, as {what was run: value, "rows": one dict a model}."""
    base = pyengine.load(options.model, options.base_arithmetic, options.threads)
    ids = (read_ids(options.ids_file) if options.ids_file
           else perplexity.text_ids(base.checkpoint, perplexity.read_text(options.file)))
    chunks = perplexity.as_chunks(as_ids(ids, base.config.vocab_size), options.ctx_size, options.chunks)
    with tempfile.TemporaryDirectory(prefix="pyengine-") as directory:
        candidates = make_candidates(options, Path(directory))
        scores = evaluate(base, candidates, chunks, perplexity.bos_id(base.checkpoint))
    rows = [row(c.name, c.engine, c.nbytes, s) for c, s in zip(candidates, scores)]
    return {"model": Path(options.model).name, "text": Path(options.file or options.ids_file).name,
            "n_ctx": options.ctx_size, "n_chunks": len(chunks), "scored_tokens": len(scores[0].nll),
            "rows": [base_row(options, base, scores[0]), *rows]}


def as_markdown(report: dict) -> str:
    lines = ["{model}, {text}: {n_chunks} chunks of {n_ctx} tokens, {scored_tokens:,} of them scored"
             .format(**report), "",
             "| weights | computed by | bytes | perplexity | increase | mean KLD | same top token |",
             "|---|---|--:|--:|--:|--:|--:|"]
    for r in report["rows"]:
        ppl, more, kld, top = r["perplexity"], r["increase_percent"], r["kld"], r["same_top"]
        cells = [r["weights"], r["engine"], f"{r['bytes']:,}",
                 f"{ppl['value']:.4f} ± {ppl['error']:.4f}"]
        if r["weights"] == "BF16":
            cells += [""] * 3
        else:
            cells += [f"{more['value']:+.3f} ± {more['error']:.3f} %",
                      f"{kld['value']:.2e} ± {kld['error']:.0e}",
                      f"{100 * top['value']:.2f} ± {100 * top['error']:.2f} %"]
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
