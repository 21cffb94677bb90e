"""Makes the embedded default, `pyengine/demo/`, of the trained `tests/trained/bf16.gguf`.

    python tools/golden/make_default.py            # write it
    python tools/golden/make_default.py --check    # make it again elsewhere and compare every byte

The checkpoint in Q8_0, and what PyTorch computes from it: traces over a short prompt, and in
`tests/trained/LOCK.json` the sha256 of every module's output over 300 tokens of held-out text.
`tools/train/train_tiny.py` trained it; nothing is trained here.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import hf_float64
import locked_torch
import numpy as np
from make_golden import digest, rounded
from rewrite import write_q8_0

from pyengine import demo
from pyengine.oracle.trace import Trace
from pyengine.quantizer.quantize import quantize
from pyengine.text.tokenizer import Tokenizer

TESTS = Path(__file__).resolve().parents[2] / "tests"
TRAINED, LOCK = TESTS / "trained" / "bf16.gguf", TESTS / "trained" / "LOCK.json"
HELD_OUT = TESTS / "held_out" / "kjv.txt"
PROMPT = "In the beginning God"
LOCKED_TOKENS = 300


def make(directory: Path) -> dict[Path, Path]:
    """Write everything into the directory -> {file written: where it belongs}."""
    checkpoint, lock = directory / demo.CHECKPOINT.name, directory / LOCK.name
    write_q8_0(TRAINED, checkpoint)
    tokenizer = Tokenizer.open(checkpoint)
    ids = np.array(tokenizer.encode(PROMPT), np.int64)

    float64 = hf_float64.trace(hf_float64.load_float64(checkpoint), ids)
    float64 = {name: rounded(array) for name, array in float64.items()}
    Trace(ids, float64, "float64").save(directory / demo.GOLDEN_FLOAT64.name)

    text = np.array(tokenizer.encode(HELD_OUT.read_text())[:LOCKED_TOKENS], np.int64)
    digests = {}
    with tempfile.TemporaryDirectory() as scratch:
        quantize(checkpoint, int8=Path(scratch) / "int8")
        for arithmetic, source, golden in (
            ("locked", checkpoint, demo.GOLDEN_LOCKED),
            ("locked-int8", Path(scratch) / "int8", demo.GOLDEN_LOCKED_INT8),
        ):
            weights = locked_torch.Weights.load(source)
            Trace(ids, locked_torch.forward(weights, ids)[0], "locked").save(directory / golden.name)
            tensors, _ = locked_torch.forward(weights, text)
            digests[arithmetic] = {name: digest(array) for name, array in tensors.items()}
    lock.write_text(json.dumps(digests, indent=1) + "\n")
    return {lock: LOCK} | {
        directory / file.name: file
        for file in (demo.CHECKPOINT, demo.GOLDEN_FLOAT64, demo.GOLDEN_LOCKED, demo.GOLDEN_LOCKED_INT8)
    }


def check() -> int:
    """-> 0 if the files in place are what this tool makes, else 1."""
    with tempfile.TemporaryDirectory() as scratch:
        for made, committed in make(Path(scratch)).items():
            if made.read_bytes() != committed.read_bytes():
                print(f"{committed}: not what tools/golden/make_default.py makes")
                return 1
    print("embedded default: equal, every byte")
    return 0


def write() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for made, place in make(Path(scratch)).items():
            shutil.copyfile(made, place)
            print(f"{place} {place.stat().st_size} bytes")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    write()
