"""One tensor merged by pyengine from plain arrays, for tests against other implementations."""

import itertools

import numpy as np

from pyengine.checkpoint.tensor import Tensor
from pyengine.merge.arithmetic import METHODS, Recipe
from pyengine.merge.tensor_merge import Source, TensorMerge, new_keys

SEED, NAME = 1729, "model.layers.0.mlp.experts.3.up_proj.weight"
FLOAT32 = 0x7F7FFFFF


def merged(models, recipe, base=None):
    """models, base: float32 [rows, columns] -> the same; the recipe's masks are those of SEED and NAME."""

    def source(array):
        return Source("model", Tensor("x.weight", "F32", array.shape, array), None)

    rows, cols = models[0].shape
    part = TensorMerge(
        NAME,
        rows,
        cols,
        tuple(map(source, models)),
        None if base is None else source(base),
        recipe,
        new_keys(SEED, range(len(models)), NAME),
        FLOAT32,
    )
    return part.merged(0, rows)


def recipes(method, count):
    """Every combination of a method's options, for so many models."""
    sparse = METHODS[method].sparsify is not None
    weights = (0.7, -0.3, 1.0, 0.45)[:count]
    densities = [
        (),
        *([(0.5, 0.05, 1.0, 0.9)[:count], (1.0,) * count, (0.0, 0.3, 0.6, 0.2)[:count]] if sparse else []),
    ]
    rescales = [
        None,
        *(["l1"] if sparse else []),
        *(["density"] if METHODS[method].sparsify == "random" else []),
    ]
    scales = [1.0] if method == "linear" else [1.0, 1.7]
    for density, rescale, scale, normalize in itertools.product(densities, rescales, scales, (False, True)):
        yield Recipe(method, weights, density, normalize, rescale, scale)


def tensors(rng, count, shape, kind):
    """-> base and models, float32.

    kind   "normal"; "steps", few values, so that many magnitudes are equal; "mixed", zeros of both signs,
           subnormals and magnitudes far apart among them
    """
    draw = rng.standard_normal((count + 1, *shape)).astype(np.float32)
    if kind == "steps":
        draw = np.rint(draw * 4).astype(np.float32) / np.float32(8)
    if kind == "mixed":
        draw *= np.float32(10.0) ** rng.integers(-30, 10, draw.shape).astype(np.float32)
        draw[:, :, ::5] = np.float32(-0.0)
        draw[1:, :, 1::5] = draw[0, :, 1::5]
    return draw[0], list(draw[1:])
