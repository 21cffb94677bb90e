"""Makes the embedded default, `pyengine/models/`, of the trained `tests/trained/bf16.gguf`.

    python tools/make_default.py            # write it
    python tools/make_default.py --check    # make it again elsewhere and compare every byte

The checkpoint in Q8_0, and what PyTorch computes from it: traces over a short prompt, and in
`tests/trained/LOCK.json` the sha256 of every module's output over 300 tokens of held-out text.
`tools/train_tiny.py` trained it; nothing is trained here.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import hf_float64  # noqa: E402
import locked_torch  # noqa: E402
from make_golden import digest, rounded  # noqa: E402
from quality_table import write_q8_0  # noqa: E402

from pyengine import models  # noqa: E402
from pyengine.quantize import quantize  # noqa: E402
from pyengine.tokenizer import Tokenizer  # noqa: E402
from pyengine.trace import Trace  # noqa: E402

TESTS = Path(__file__).resolve().parents[1] / "tests"
TRAINED, LOCK = TESTS / "trained" / "bf16.gguf", TESTS / "trained" / "LOCK.json"
HELD_OUT = TESTS / "held_out" / "kjv.txt"
PROMPT = "In the beginning God"
LOCKED_TOKENS = 300


def make(directory: Path) -> dict[Path, Path]:
    """Write everything into the directory -> {file written: where it belongs}."""
    checkpoint, lock = directory / models.CHECKPOINT.name, directory / LOCK.name
    write_q8_0(TRAINED, checkpoint)
    tokenizer = Tokenizer.open(checkpoint)
    ids = np.array(tokenizer.encode(PROMPT), np.int64)

    float64 = hf_float64.trace(hf_float64.load_float64(checkpoint), ids)
    float64 = {name: rounded(array) for name, array in float64.items()}
    Trace(ids, float64, "float64").save(directory / models.GOLDEN_FLOAT64.name)

    text = np.array(tokenizer.encode(HELD_OUT.read_text())[:LOCKED_TOKENS], np.int64)
    digests = {}
    with tempfile.TemporaryDirectory() as scratch:
        quantize(checkpoint, int8=Path(scratch) / "int8")
        for arithmetic, source, golden in (
                ("locked", checkpoint, models.GOLDEN_LOCKED),
                ("locked-int8", Path(scratch) / "int8", models.GOLDEN_LOCKED_INT8)):
            weights = locked_torch.Weights.load(source)
            Trace(ids, locked_torch.forward(weights, ids)[0], "locked").save(directory / golden.name)
            tensors, _ = locked_torch.forward(weights, text)
            digests[arithmetic] = {name: digest(array) for name, array in tensors.items()}
    lock.write_text(json.dumps(digests, indent=1) + "\n")
    return {lock: LOCK} | {directory / file.name: file for file in (
        models.CHECKPOINT, models.GOLDEN_FLOAT64, models.GOLDEN_LOCKED, models.GOLDEN_LOCKED_INT8)}


def check() -> int:
    """-> 0 if the files in place are what this tool makes, else 1."""
    with tempfile.TemporaryDirectory() as scratch:
        for made, committed in make(Path(scratch)).items():
            if made.read_bytes() != committed.read_bytes():
                print(f"{committed}: not what tools/make_default.py makes")
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
