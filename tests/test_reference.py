"""The specification: prefill, token by token and chunks agree as float32 bits."""

import numpy as np
import pytest
from paths import GOLDEN

import pyengine
from pyengine import reference


@pytest.mark.parametrize("name", ["pattern31", "nextn", "fused"])
def test_split_and_chunk_agree(name):
    model = pyengine.load(GOLDEN / f"{name}.gguf", "float64")
    ids = np.random.default_rng(1729).integers(0, model.config.vocab_size, 20)
    whole = model.forward(ids)
    assert whole.dtype == np.float32 and whole.shape == (20, model.config.vocab_size)
    state = model.new_state()
    split = np.concatenate(
        [model.forward(ids[:7], state), model.forward(ids[7:8], state), model.forward(ids[8:], state)]
    )
    assert np.array_equal(split, whole)
    assert np.array_equal(model.forward(ids, chunk=6), whole)
    assert np.array_equal(model.forward(ids, chunk=6, last_only=True), whole[-1:])


def test_locked_is_near_float64():
    """Not a tolerance between kernels: the published distance of the two arithmetics."""
    path = GOLDEN / "pattern31.gguf"
    ids = np.random.default_rng(1729).integers(0, 288, 64)
    log_p = [
        np.log(reference.softmax(pyengine.load(path, a).forward(ids).astype(np.float64)))
        for a in ("float64", "locked")
    ]
    divergence = np.sum(np.exp(log_p[0]) * (log_p[0] - log_p[1]), axis=-1)
    assert divergence.mean() < 1e-7


def test_functions_at_their_ends():
    x = np.array([-800.0, -20.0, 0.0, 20.0, 800.0])
    assert np.all(np.isfinite(reference.sigmoid(x)))
    assert reference.softplus(np.array([20.5]))[0] == 20.5
    assert np.allclose(reference.softmax(x[None]).sum(), 1)


def test_decay_far_from_one():
    """log_decay from -20 to -1e-6: the recurrence against its closed form for a zero update."""
    for log_decay in (-20.0, -1.0, -1e-3, -1e-6):
        state = np.ones((1, 2, 3))
        start, tokens = state.copy(), 5
        zeros = np.zeros((tokens, 1, 2))
        out = reference.delta_rule(
            np.ones((tokens, 1, 2)),
            zeros,
            np.zeros((tokens, 1, 3)),
            np.zeros((tokens, 1)),
            np.full((tokens, 1), log_decay),
            state,
        )
        np.testing.assert_allclose(state, start * np.exp(tokens * log_decay), rtol=1e-13)
        np.testing.assert_allclose(out[-1, 0], 2 * np.exp(tokens * log_decay), rtol=1e-13)
