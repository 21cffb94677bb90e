"""The keys of METHODS are the scale methods that exist, in Python and in C."""

import numpy as np
import pytest
from pyengine._core import lib

from pyengine.checkpoint.layout import GROUP
from pyengine.checkpoint.methods import METHODS, OLDER_METHODS
from pyengine.core import ops
from pyengine.core.matrices import Matrix
from pyengine.core.threads import Pool
from pyengine.quantizer.rule import quantize_groups


def test_c_has_these_methods_and_no_others():
    in_c = {name for name in dir(lib) if name.startswith("PE_SCALE_")}
    assert in_c == {f"PE_SCALE_{key.upper()}" for key in METHODS}
    assert lib.PE_GROUP == GROUP


@pytest.mark.parametrize("scale", METHODS)
def test_both_implementations_take_the_key(scale):
    x = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    codes, scales = ops.quantize_weights(Pool(1), Matrix("F32", 200, x), None, None, 0, 3, 127, GROUP, scale)
    want = quantize_groups(x, scale=scale)
    assert np.array_equal(codes, want[0]) and np.array_equal(scales, want[1])


def test_older_sentences_mean_a_key_and_words_are_not_keys():
    assert set(OLDER_METHODS.values()) == set(METHODS)
    assert not set(METHODS) & (set(OLDER_METHODS) | set(METHODS.values()))
