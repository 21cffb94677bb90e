"""`locked` on the files that llama.cpp quantized to every block type that the C core has."""

import json

import numpy as np
import pytest
from bits import assert_same_bits
from kernel_runs import LEVELS, level
from paths import QUANTIZED

import pyengine
from pyengine.core.matrices import TYPES
from pyengine.probabilities import log_softmax

LOCK = json.loads((QUANTIZED / "LOCK.json").read_text())["files"]
FILES = [name for name, facts in LOCK.items() if set(facts["types"]) <= set(TYPES)]
ALWAYS = ("Q4_0", "UD")  # which has a type of its own in almost every tensor
IDS = np.random.default_rng(1729).integers(0, 128, 40)


def path_of(name):
    return QUANTIZED / f"{name}.gguf"


def test_all_but_the_files_of_float64():
    assert set(LOCK) - set(FILES) == {"IQ", "NVFP4"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in FILES]
)
def test_one_output_on_every_level_with_any_threads_and_chunks(name):
    want = pyengine.load(path_of(name), threads=1).forward(IDS)
    for isa in LEVELS:
        with level(isa):
            for threads, pieces in [(1, (40,)), (2, (40,)), (3, (1, 2, 3, 4, 13, 17)), (2, (1,) * 40)]:
                model = pyengine.load(path_of(name), threads=threads)
                state, parts = model.new_state(), np.split(IDS, np.cumsum(pieces)[:-1])
                got = np.concatenate([model.forward(part, state) for part in parts])
                assert_same_bits(got, want, f"{isa}, {threads} threads, {len(pieces)} pieces")


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.parametrize("name", FILES)
def test_equals_the_pytorch_restatement(name):
    pytest.importorskip("torch")
    import locked_torch

    trace, _ = locked_torch.forward(locked_torch.Weights.load(path_of(name)), IDS.tolist())
    assert_same_bits(pyengine.load(path_of(name)).forward(IDS), trace["lm_head"], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_distance_from_float64(name):
    """Mean KL divergence of the next-token distribution: at most 1e-7."""
    ids = np.random.default_rng(1729).integers(0, 128, 300)
    p = log_softmax(pyengine.load(path_of(name), "float64").forward(ids))
    q = log_softmax(pyengine.load(path_of(name)).forward(ids))
    assert (np.exp(p) * (p - q)).sum(axis=-1).mean() <= 1e-7
