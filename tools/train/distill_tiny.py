"""Trains students of half the embedded model's size, each by another kind of labels of this teacher.

    python tools/train/distill_tiny.py -o OUT                       # 3 seeds: 10 minutes of 2 cores
    python tools/train/distill_tiny.py -o OUT                       # again: what is in OUT is not done twice
    python tools/train/distill_tiny.py -o OUT --steps 2 --seeds 1   # on a small scale: does it run

The teacher is the package's `pyengine/demo/default.gguf`; the text is that which it was trained on
(`tiny_text.py`).  `pyengine labels` writes two data sets into OUT, of top-k and of sampled labels, and the
students read them; the full distribution comes from the teacher itself.

A student has the teacher's shape (three delta-net layers and one of full attention, experts, tokenizer), and
half its parameters.  Every student of a seed starts from the same weights and reads the same tokens in the
same order, once, in equal steps with the same rates.  They differ in the loss:

    true tokens                     cross-entropy of the text
    full                            KL divergence from the teacher's distribution over the vocabulary
    top-k, outside as a class       loss.top_k_loss, mode "class"
    top-k, renormalized             loss.top_k_loss, mode "renormalized": without the mass outside
    top-k, teacher renormalized     the mistake of a published trainer: the teacher's probabilities are
                                    normalised over the k, the student's over the vocabulary
    sampled                         loss.sampled_loss

Printed per loss, over chapters that neither teacher nor student has read: perplexity, and KL divergence
from the teacher, each as the mean over the seeds, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from tiny_text import END_OF_TEXT, SEED, bible_text, chapters, split
from train_tiny import BALANCE, CONFIG, descend, logits_of, new_model, optimizers, rate

import pyengine
from pyengine.demo import CHECKPOINT
from pyengine.distill.loss import full_loss, sampled_loss, top_k_loss
from pyengine.distill.parquet import read_rows
from pyengine.progress import progress
from pyengine.tables import markdown_table
from pyengine.text.tokenizer import Tokenizer

STUDENT = CONFIG | {
    "hidden_size": 192,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 96,
}
STEPS, SEEDS, BATCH, WINDOW = 150, 3, 8, 128  # BATCH: windows in a step; WINDOW: tokens in a window
LABELS = 8  # per token, of the top and of draws


# ---- the text and the teacher --------------------------------------------------------------------


def windows_of(chapters_, tokenizer: Tokenizer, count: int | None) -> np.ndarray:
    """int64 [count, WINDOW + 1]: chapters one after another, each after the end of another text."""
    end = tokenizer.encode(END_OF_TEXT, special=True)
    stream = [token for chapter in chapters_ for token in (*end, *tokenizer.encode(chapter.text))]
    starts = range(0, len(stream) - WINDOW, WINDOW)
    every = np.array([stream[start : start + WINDOW + 1] for start in starts])
    if count is None:
        return every
    if count > len(every):
        raise SystemExit(f"--steps: want at most {len(every) // BATCH}, which read the text once")
    return every[np.sort(np.random.default_rng(SEED).permutation(len(every))[:count])]


def log_probs(teacher, windows: np.ndarray) -> torch.Tensor:
    """float32 [B, WINDOW, vocabulary]: the teacher's about tokens 1 to WINDOW of each window."""
    logits = np.stack([teacher.forward(ids[:-1]) for ids in windows])
    return torch.from_numpy(logits).double().log_softmax(-1).float()


def write_labels(out: Path, windows: np.ndarray) -> None:
    """The two data sets, of one document per window; what is there already stays."""
    path = out / "windows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in windows))
    for name, kind in ("top-k", "--top-k"), ("sampled", "--sample"):
        given = ["-m", CHECKPOINT, "--ids", "-f", path.name, "-o", name, kind, LABELS]
        # Not in the folder it was called from: a clone's sources would stand before the package.
        subprocess.run([sys.executable, "-m", "pyengine", "labels", *map(str, given)], check=True, cwd=out)


class Columns:
    """A data set's labels of all windows, as tensors [N, WINDOW, ..]."""

    def __init__(self, directory: Path, windows: np.ndarray):
        rows = list(read_rows(directory))
        if not np.array_equal(np.stack([row.input_ids for row in rows]), windows):
            raise SystemExit(f"{directory}: want the labels of other windows")
        self.ids = _stacked([row.labels.ids for row in rows], -1).long()
        self.logprobs = _stacked([row.labels.logprobs for row in rows], -math.inf)
        self.outside = _stacked([row.labels.outside[:, None] for row in rows], 0)[..., 0]
        weights = [row.labels.weights for row in rows]
        self.weights = None if weights[0] is None else _stacked(weights, 0)


def _stacked(parts: list[np.ndarray], filler: float) -> torch.Tensor:
    # A window is a document of WINDOW + 1 tokens: its last row is about a token that is not here.
    width = max(part.shape[1] for part in parts)
    padded = (np.pad(p[:WINDOW], ((0, 0), (0, width - p.shape[1])), constant_values=filler) for p in parts)
    return torch.from_numpy(np.stack(list(padded)))


# ---- the losses ----------------------------------------------------------------------------------


def losses(top: Columns, sampled: Columns) -> dict:
    """name -> function(student's logits [B, T, V], the windows' places, teacher's log-probabilities
    [B, T, V], true tokens [B, T])."""

    def true_tokens(logits, at, p, tokens):
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def full(logits, at, p, tokens):
        return full_loss(logits, p)

    def outside_as_a_class(logits, at, p, tokens):
        return top_k_loss(logits, top.ids[at], top.logprobs[at], top.outside[at], mode="class")

    def renormalized(logits, at, p, tokens):
        return top_k_loss(logits, top.ids[at], top.logprobs[at], mode="renormalized")

    def teacher_renormalized(logits, at, p, tokens):
        target = top.logprobs[at].softmax(-1)
        return -(target * logits.log_softmax(-1).gather(-1, top.ids[at])).sum(-1).mean()

    def drawn(logits, at, p, tokens):
        return sampled_loss(logits, sampled.ids[at], sampled.logprobs[at], sampled.weights[at])

    return {
        "true tokens": true_tokens,
        "full": full,
        f"top-{LABELS}, outside as a class": outside_as_a_class,
        f"top-{LABELS}, renormalized": renormalized,
        f"top-{LABELS}, teacher renormalized": teacher_renormalized,
        f"{LABELS} sampled": drawn,
    }


# ---- training ------------------------------------------------------------------------------------


def train_seed(seed: int, out: Path, steps: int, deb: Path | None) -> dict[str, dict[str, float]]:
    """Loss -> {"perplexity", "kl"} on the held-out chapters.  One thread; every student in turn, per step."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    tokenizer, teacher = Tokenizer.open(CHECKPOINT), pyengine.load(CHECKPOINT, threads=1)
    training, _, held_out = split(chapters(bible_text(deb)))
    windows = windows_of(training, tokenizer, steps * BATCH)
    top, sampled = (Columns(out / name, windows) for name in ("top-k", "sampled"))
    order = np.random.default_rng([SEED, seed]).permutation(len(windows)).reshape(steps, BATCH)
    students = {}
    for name, loss in losses(top, sampled).items():
        model = new_model(STUDENT, SEED + seed)
        students[name] = model, optimizers(model), loss
    with progress(steps, f"seed {seed}", "steps") as bar:
        for step in range(steps):
            at = order[step]
            p, ids = log_probs(teacher, windows[at]), torch.from_numpy(windows[at])
            for model, optimizing, loss in students.values():
                logits, balance = logits_of(model, ids[:, :-1])
                total = loss(logits, at, p, ids[:, 1:]) + BALANCE * balance
                descend(model, optimizing, total, rate(step, steps))
            bar.update(1)
    models = {name: model for name, (model, _, _) in students.items()}
    return scores(models, teacher, windows_of(held_out, tokenizer, None))


@torch.no_grad()
def scores(models: dict, teacher, windows: np.ndarray) -> dict[str, dict[str, float]]:
    """Also of the teacher itself."""
    sums = {name: np.zeros(2) for name in ("teacher", *models)}
    for start in range(0, len(windows), 8):
        batch = windows[start : start + 8]
        p, ids = log_probs(teacher, batch), torch.from_numpy(batch)
        for name in sums:
            q = p if name == "teacher" else logits_of(models[name], ids[:, :-1])[0].log_softmax(-1)
            true = -q.gather(-1, ids[:, 1:, None]).double().sum()
            sums[name] += true.item(), full_loss(q, p, reduction="sum").item()
    tokens = len(windows) * WINDOW
    return {name: {"perplexity": math.exp(a / tokens), "kl": b / tokens} for name, (a, b) in sums.items()}


def run(out: Path, steps: int, seeds: int, jobs: int, deb: Path | None) -> None:
    out = out / f"steps-{steps}"
    out.mkdir(parents=True, exist_ok=True)
    write_labels(
        out, windows_of(split(chapters(bible_text(deb)))[0], Tokenizer.open(CHECKPOINT), steps * BATCH)
    )
    path = out / "results.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    left = [seed for seed in range(seeds) if str(seed) not in done]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        work = {pool.submit(train_seed, seed, out, steps, deb): seed for seed in left}
        for future in as_completed(work):
            done[str(work[future])] = future.result()
            print(f"seed {work[future]}: done", file=sys.stderr, flush=True)
            path.write_text(json.dumps(done, indent=1) + "\n")
    results = [done[str(seed)] for seed in range(seeds)]
    size = sum(parameter.numel() for parameter in new_model(STUDENT).parameters())
    print(
        f"{seeds} seeds; students of {size:,} parameters; {steps} steps of {BATCH * WINDOW} tokens, read "
        f"once; teacher's perplexity {results[0]['teacher']['perplexity']:.3f}\n"
    )
    print("\n".join(table(results)))


def table(results: list[dict]) -> list[str]:
    rows = [("labels", "perplexity", "least to greatest", "less than true tokens'", "KL from the teacher")]
    base = np.array([result["true tokens"]["perplexity"] for result in results])
    for name in results[0]:
        if name == "teacher":
            continue
        values, kl = (np.array([result[name][key] for result in results]) for key in ("perplexity", "kl"))
        less = base - values
        rows.append(
            (
                name,
                f"{values.mean():.2f}",
                f"{values.min():.2f} to {values.max():.2f}",
                "" if name == "true tokens" else f"{less.min():.2f} to {less.max():.2f}",
                f"{kl.mean():.4f} ({kl.min():.4f} to {kl.max():.4f})",
            )
        )
    return markdown_table(rows, "<>>>>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("-j", "--jobs", type=int, default=2, help="seeds at a time, of one thread each")
    parser.add_argument("--deb", type=Path, help="the Debian package bible-kjv-text, if already here")
    options = parser.parse_args()
    run(options.out, options.steps, options.seeds, options.jobs, options.deb)


if __name__ == "__main__":
    main()
