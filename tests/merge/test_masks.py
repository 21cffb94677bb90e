"""The masks that a seed fixes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_runs import examples

from pyengine.merge.masks import kept, mask_key

KEY = mask_key(1729, 0, "model.layers.0.self_attn.q_proj.weight")


def test_the_generator_is_philox4x64_10():
    """Random123's known answer for a counter and a key of zeros; NumPy adds 1 to the counter first."""
    words = np.random.Philox(counter=(1 << 256) - 1, key=0).random_raw(4)
    assert [f"{word:016x}" for word in words.tolist()] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]


@given(st.integers(0, 400), st.integers(0, 400), st.floats(0, 1))
@examples(40)
def test_a_slice_of_the_mask_is_the_mask_of_the_slice(start, length, density):
    whole = kept(KEY, density, 0, 1000)
    assert np.array_equal(kept(KEY, density, start, start + length), whole[start : start + length])


def test_a_higher_density_keeps_more_and_what_was_kept():
    masks = [kept(KEY, density, 0, 5000) for density in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for less, more in zip(masks, masks[1:]):
        assert not (less & ~more).any() and less.sum() < more.sum()
    assert not masks[0].any() and masks[-1].all()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_share_that_is_kept(density):
    n = 1 << 20
    share = kept(KEY, density, 0, n).mean()
    assert abs(share - density) < 5 * (density * (1 - density) / n) ** 0.5


def test_seed_model_and_name_each_give_another_mask():
    keys = [
        KEY,
        mask_key(1730, 0, "a"),
        mask_key(1729, 1, "a"),
        mask_key(1729, 0, "a"),
        mask_key(1729, 0, "b"),
    ]
    masks = {kept(key, 0.5, 0, 64).tobytes() for key in keys}
    assert len(masks) == len(keys)


def test_the_bits_do_not_change():
    """Published merges depend on them."""
    assert np.packbits(kept(mask_key(1729, 0, "a"), 0.5, 0, 64)).tobytes().hex() == "be00183f8071e186"
