"""Trains the mother of `merge_table.py`: the embedded model goes on with another text, from seed 1729.

    python tools/train/train_mother.py -o OUT            # minutes of a core
    python tools/train/train_mother.py -o OUT --steps 3  # the same on a small scale: does it run

It starts from `tests/trained/bf16.gguf` and reads the Jargon File (`jargon_text.py`) alone.  The loss has no
part for the experts' balance, so that the routers may leave experts that the new text does not need.  OUT
then has what `train_tiny.py` writes: a Hugging Face checkpoint in bfloat16, the same as `bf16.gguf`, and the
entries held out, `held_out.txt`.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "golden"))

import tokenizers
from hf_float64 import hf_state_dict
from jargon_text import entries, jargon_text, split
from tiny_text import END_OF_TEXT, SEED
from train_tiny import descend, loss_of, new_model, write

from pyengine.text.gguf_vocabulary import export_tokenizer

FATHER = ROOT / "tests" / "trained" / "bf16.gguf"
STEPS, WARMUP = 240, 5
BATCH, WINDOW = 2, 512  # sequences in a step, tokens in a sequence
HIGHEST = 0.5  # of train_tiny.py's learning rate; it falls to 0 over the second half of the steps


def train(out: Path, steps: int, deb: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = new_model(), father_tokenizer()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(FATHER).tensors}
    model.load_state_dict(hf_state_dict(model.config, tensors), strict=True)
    training, held_out = split(entries(jargon_text(deb)))
    ids = stream(training, tokenizer, steps * BATCH * WINDOW + 1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    losses, begun = [], time.monotonic()
    for step in range(steps):
        first = step * BATCH * WINDOW
        starts = range(first, first + BATCH * WINDOW, WINDOW)
        batch = torch.stack([ids[start : start + WINDOW + 1] for start in starts])
        loss, balance = loss_of(model, batch)
        descend(model, [optimizer], loss, HIGHEST * rate(step, steps))
        losses.append(loss.item())
        if (step + 1) % 5 == 0:
            print(
                f"step {step + 1}/{steps}  loss {np.mean(losses[-5:]):.3f}  balance {balance:.3f}  "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    write(out, tokenizer, model.state_dict())
    (out / "held_out.txt").write_text("".join(held_out))


def rate(step: int, steps: int) -> float:
    """Of the learning rate: up, level, and down."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (0.5 * steps))


def father_tokenizer() -> tokenizers.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        export_tokenizer(FATHER, folder)
        return tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def stream(texts: list[str], tokenizer: tokenizers.Tokenizer, count: int) -> torch.Tensor:
    """The first ids of the entries in an order of the seed's, each before the end of a text."""
    texts, ids = list(texts), []
    random.Random(f"{SEED} entries").shuffle(texts)
    end = tokenizer.token_to_id(END_OF_TEXT)
    for text in texts:
        ids += [*tokenizer.encode(text).ids, end]
        if len(ids) >= count:
            return torch.tensor(ids[:count])
    raise ValueError(f"steps: want at most the {len(ids)} tokens of the entries, got {count}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--deb", type=Path, help="the Debian package dict-jargon, if already here")
    parser.add_argument("-t", "--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    train(options.out, options.steps, options.deb)


if __name__ == "__main__":
    main()
