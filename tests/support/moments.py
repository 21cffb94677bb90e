"""Second moments of activations, for tests of rounding with compensation."""

import numpy as np

from pyengine.core import rounding
from pyengine.core.threads import Pool


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def moments(n, seed=0, tokens=None):
    """A damped second-moment matrix [n, n]."""
    x = normal(seed, tokens or n + 3, n) * np.exp(normal(seed + 1, n))
    return x.T @ x + 0.01 * np.eye(n) * (x * x).sum() / n


def factored(h):
    made = h.copy()
    rounding.factor(Pool(2), made)
    return made
