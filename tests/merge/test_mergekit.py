"""A tensor merged here and by mergekit 0.1.5's own methods: equal in every bit.

mergekit draws masks from torch's global generator: it is handed ours.  Two things it leaves open, and both
are shown apart.  torch adds up a norm in an order of its own: mergekit's code as it is on tensors whose sums
are exact in float32, and with the exact sum in place of `sum` on all others.  torch sorts equal magnitudes
as it likes: mergekit's code as it is where none of them is cut, and with a stable sort on all others.
"""

import math

import numpy as np
import pytest
from bits import assert_same_bits
from merge_cases import NAME, SEED, merged, recipes, tensors
from merge_models import METHODS

from pyengine.merge.masks import kept, mask_key

torch = pytest.importorskip("torch")
mergekit = pytest.importorskip("mergekit.merge_methods")

pytestmark = pytest.mark.golden


def of_mergekit(monkeypatch, models, recipe, base=None, exact_sums=False, stable=False):
    """The method's own code on the same tensors, with our masks."""
    shape = models[0].shape
    masks = [
        kept(mask_key(SEED, i, NAME), density, 0, models[0].size).reshape(shape)
        for i, density in enumerate(recipe.densities)
        if density < 1
    ]
    drawn = iter([torch.from_numpy(mask.astype(np.float32)) for mask in masks])
    inputs = [torch.from_numpy(array.copy()) for array in [*models, *([] if base is None else [base])]]
    group = mergekit.TensorGroup.from_tensors(inputs, base_index=None if base is None else len(models))
    parameters = {"weight": list(recipe.weights), "normalize": recipe.normalize}
    if base is not None:
        parameters["lambda"] = recipe.scale
        parameters["rescale"] = recipe.rescale == "l1"
    if recipe.densities:
        parameters["density"] = list(recipe.densities)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda _: next(drawn))
        if exact_sums:
            patch.setattr(torch.Tensor, "sum", exact_sum(torch.Tensor.sum))
        if stable:
            patch.setattr(
                torch, "argsort", lambda x, descending: torch.sort(x, descending=descending, stable=True)[1]
            )
        (result,) = mergekit.get(recipe.method)([group], parameters=parameters)
    return result.numpy()


def exact_sum(otherwise):
    def total(self, *arguments, **named):
        if arguments or named:
            return otherwise(self, *arguments, **named)
        return torch.tensor(math.fsum(self.reshape(-1).tolist()), dtype=torch.float64).to(self.dtype)

    return total


def cases(method, kind):
    rng = np.random.default_rng(1729)
    for count in (1, 2, 3):
        for shape in ((3, 5), (40, 70)) if count < 3 else ((200, 190),):
            base, models = tensors(rng, count, shape, kind)
            for recipe in recipes(method, count):
                if recipe.rescale != "density":  # of older versions: it has no name for it
                    yield models, recipe, None if method == "linear" else base


@pytest.mark.parametrize("kind", ["normal", "steps", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_every_option(monkeypatch, method, kind):
    for models, recipe, base in cases(method, kind):
        wanted = of_mergekit(monkeypatch, models, recipe, base, exact_sums=True, stable=True)
        assert_same_bits(merged(models, recipe, base), wanted, str(recipe))


@pytest.mark.parametrize("method", METHODS)
def test_its_code_as_it_is(monkeypatch, method):
    """Multiples of 1/1024 up to 8, so few that float32 adds up their magnitudes exactly; magnitudes that
    differ from each other, so that no equal ones are cut."""
    rng, compared = np.random.default_rng(1729), 0
    for count in (1, 2, 3):
        base = rng.integers(-512, 512, (40, 50)).astype(np.float32) / np.float32(1024)
        deltas = [
            (rng.permutation(4000)[:2000] + 1).reshape(40, 50) * rng.choice([-1, 1], (40, 50))
            for _ in range(count)
        ]
        models = [base + delta.astype(np.float32) / np.float32(1024) for delta in deltas]
        for recipe in recipes(method, count):
            if recipe.rescale == "density":
                continue
            start = None if method == "linear" else base
            wanted = of_mergekit(monkeypatch, models, recipe, start)
            assert_same_bits(merged(models, recipe, start), wanted, str(recipe))
            compared += 1
    assert compared >= 6


def test_the_defaults_are_mergekits():
    from pyengine.merge.arithmetic import METHODS as OURS

    for name, ours in OURS.items():
        spec = mergekit.get(name).spec
        defaults = {p.name: p.default for p in spec.parameters if not p.required}
        assert defaults["normalize"] == ours.normalize
        if ours.base:
            assert defaults["rescale"] == (ours.rescale == "l1")
            assert defaults["lambda"] == 1 and defaults["density"] == 1


def test_gradients_and_filters_are_mergekits():
    """Its own evaluation of a setting, by layer."""
    config = pytest.importorskip("mergekit.config")  # needs more of mergekit's packages than its methods do
    from merge_models import BASE, configuration

    from pyengine.checkpoint.open import open_checkpoint
    from pyengine.merge.configuration import parse_configuration
    from pyengine.merge.settings import Place, Settings

    rules = [{"filter": "mlp", "value": [0.1, 0.9, 0.35]}, {"filter": "*", "value": ["2e-1", 0.7]}]
    said = parse_configuration(configuration("ties", ["a"], own={"weight": rules}), "x")
    settings = Settings(said, open_checkpoint(BASE).config)
    parsed = [config.ConditionalParameter(**rule) for rule in rules]
    for layer in range(4):
        for name in (
            f"model.layers.{layer}.mlp.gate.weight",
            f"model.layers.{layer}.self_attn.q_proj.weight",
        ):
            wanted = config.evaluate_setting(name, parsed, layer / 3, validate=float)
            assert settings.recipe(Place(name, layer)).weights == (wanted,)
