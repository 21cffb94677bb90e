"""A small model's statistics, for tests of calibration."""

import hashlib

import gguf
import numpy as np
from paths import GOLDEN

import pyengine
from pyengine.calibration.calibrate import describe_run, take_statistics
from pyengine.census.texts import Text


def texts_of(vocab, *lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Text(f"{i}.txt", hashlib.sha256(b"%d" % i).hexdigest(), n, rng.integers(0, vocab, n))
        for i, n in enumerate(lengths)
    ]


def calibrate(name, path, *lengths, threads=2, context=24, advance=lambda tokens: None, **options):
    """Statistics of a golden model, written to path -> path."""
    model = pyengine.load(GOLDEN / f"{name}.gguf", threads=threads)
    run = describe_run(
        model, texts_of(model.config.vocab_size, *(lengths or (60, 20))), context=context, **options
    )
    take_statistics(model, run, path, advance)
    return path


def exaggerate(path):
    """Statistics as of a model in which one channel of eight is great, in place -> path."""
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name.endswith(".in_sum2"):
            tensor.data[..., 3::8] *= np.float32(2**10)
    return path
