"""A merge against PyTorch's restatement of its rule, in every bit."""

import json

import numpy as np
import pytest
from bits import assert_same_bits
from merge_cases import NAME, SEED, merged, recipes, tensors
from merge_models import METHODS, census, write_child
from paths import GOLDEN

from pyengine.checkpoint.families import model_specs
from pyengine.checkpoint.open import open_checkpoint
from pyengine.files.numbers import float32_to_bfloat16
from pyengine.merge.masks import kept, mask_key
from pyengine.merge.merge import merge

torch = pytest.importorskip("torch")

import merge_torch  # noqa: E402

pytestmark = pytest.mark.golden


def restated(method, name, models, weights, **options):
    """float32 arrays of any shape -> the same."""
    flat = [torch.from_numpy(np.array(array).reshape(-1)) for array in models]
    base = options.pop("base", None)
    base = None if base is None else torch.from_numpy(np.array(base).reshape(-1))
    return merge_torch.merge_tensor(method, name, flat, weights, base=base, **options).numpy()


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_masks(size):
    for seed, position, name in ((0, 0, "a"), (1729, 3, "model.norm.weight"), (2**63 - 1, 12, "é")):
        wanted = merge_torch.drawn_mask(seed, position, name, 0.37, size).numpy()
        assert np.array_equal(kept(mask_key(seed, position, name), 0.37, 0, size), wanted)


@pytest.mark.parametrize("kind", ["normal", "steps", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_every_option(method, kind):
    rng = np.random.default_rng(1729)
    for count in (1, 2, 4):
        for shape in ((1, 1), (3, 5), (40, 70)):
            base, models = tensors(rng, count, shape, kind)
            for recipe in recipes(method, count):
                found = merged(models, recipe, None if method == "linear" else base)
                wanted = restated(
                    method,
                    NAME,
                    models,
                    recipe.weights,
                    base=base,
                    densities=recipe.densities,
                    normalize=recipe.normalize,
                    rescale=recipe.rescale,
                    scale=recipe.scale,
                    seed=SEED,
                    positions=range(count),
                )
                assert_same_bits(found.reshape(-1), wanted, f"{recipe} {shape}")


OPTIONS = {  # of the document: (of the whole, of both models)
    "linear": ({}, {"weight": [0.2, 0.7]}),
    "task_arithmetic": ({"lambda": 0.8}, {"weight": [{"filter": "mlp", "value": 0.4}, {"value": 1.0}]}),
    "ties": ({"rescale": True}, {"weight": 0.5, "density": [0.9, 0.2]}),
    "dare_linear": ({"normalize": True, "rescale": "density"}, {"weight": 0.5, "density": 0.4}),
    "dare_ties": (
        {},
        {"weight": 0.5, "density": [{"census": "c.json", "dead": 0.1, "living": 0.6}, {"value": 1}]},
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.gguf")))
def test_what_is_written(tmp_path, monkeypatch, name, method):
    """Every tensor of a merged directory, its values restated from what the sources hold."""
    monkeypatch.chdir(tmp_path)
    base = GOLDEN / f"{name}.gguf"
    config = open_checkpoint(base).config
    experts, layers = config.num_experts, config.num_hidden_layers
    whole, own = OPTIONS[method]
    if method == "dare_ties" and not experts:
        own = {"weight": 0.5, "density": 0.5}
    (tmp_path / "c.json").write_text(json.dumps(census(layers, experts, dead={(0, 1), (2, 0)})))
    parents = [write_child(tmp_path / f"p{i}", i, source=base) for i in range(2)]
    said = {
        "merge_method": method,
        "parameters": whole,
        "seed": 7,
        "models": [{"model": str(p), "parameters": own} for p in parents],
    }
    if method != "linear":
        said["base_model"] = str(base)
        said["other_tensors"] = [{"filter": "blk.", "leave_out": True}]
        if not open_checkpoint(base).other_tensors:
            del said["other_tensors"]
    (tmp_path / "m.yaml").write_text(json.dumps(said))
    merge("m.yaml", "out")
    sources, written = [open_checkpoint(p).tensors for p in (*parents, base)], open_checkpoint("out").tensors

    def weight(layer, unit):
        value = own["weight"]
        if isinstance(value, list) and isinstance(value[0], dict):
            return 0.4 if "mlp" in unit else 1.0
        return between(value, layer)

    def density(layer, expert):
        value = own["density"]
        if isinstance(value, list) and isinstance(value[0], dict):
            return 1.0 if expert is None else 0.1 if (layer, expert) in {(0, 1), (2, 0)} else 0.6
        return between(value, layer)

    def between(value, layer):
        if not isinstance(value, list):
            return value
        t = 0.0 if layer is None else layer / (layers - 1)
        return (1 - t) * value[0] + t * value[1] if t < 1 else value[1]

    for spec in model_specs(config):
        layer = int(spec.name.split(".")[2]) if ".layers." in spec.name else None
        stack = len(spec.shape) == 3 and spec.linear
        found = float32_to_bfloat16(written[spec.name].float64().astype(np.float32))
        for expert in range(spec.shape[0]) if stack else [None]:
            stem, _, part = spec.name.rpartition(".")
            unit = f"{stem}.{expert}.{part}.weight" if stack else spec.name
            x = [s[spec.name].float64(expert).astype(np.float32) for s in sources]
            wanted = restated(
                method,
                unit,
                x[:2],
                [weight(layer, unit)] * 2,
                base=x[2],
                densities=[density(layer, expert)] * 2 if "density" in own else None,
                normalize=whole.get("normalize", method in ("linear", "ties")),
                rescale={True: "l1"}.get(whole.get("rescale", method == "dare_ties"), whole.get("rescale")),
                scale=whole.get("lambda", 1.0),
                seed=7,
                positions=(0, 1),
            )
            rounded = torch.from_numpy(wanted).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
            assert_same_bits((found[expert] if stack else found).reshape(-1), rounded, unit)
