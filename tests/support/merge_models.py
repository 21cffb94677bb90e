"""Parents of a merge: a golden model with its weights changed; configurations and censuses."""

import json

import numpy as np
from hf_directory import hf_tensors, stored, write_single
from paths import GOLDEN

BASE = GOLDEN / "pattern31.gguf"
DRAWN = ("dare_linear", "dare_ties")
METHODS = ("linear", "task_arithmetic", "ties", *DRAWN)
OF_METHOD = {
    "linear": {"weight": 0.6},
    "task_arithmetic": {"weight": 0.6},
    **dict.fromkeys(("ties", *DRAWN), {"weight": 0.6, "density": [0.3, 0.7]}),
}


def write_child(directory, seed, source=BASE, dtype="BF16", apart=False, extra=None, **changes):
    """A directory of floats: the source's weights, each changed a little; extra: more tensors."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (_, array) in hf_tensors(source, apart=apart).items():
        noise = rng.standard_normal((2, *array.shape)).astype(np.float32)
        tensors[name] = stored(array * (1 + 0.1 * noise[0]) + 0.01 * noise[1], dtype)
    return write_single(directory, source, tensors | (extra or {}), **changes)


def configuration(method, models, base=BASE, own=None, **more):
    """A document; models: paths, each with the parameters of OF_METHOD or `own`."""
    said = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": own or OF_METHOD[method]} for model in models],
        **more,
    }
    return said if method == "linear" else said | {"base_model": str(base)}


def write_configuration(path, method, models, **more):
    path.write_text(json.dumps(configuration(method, models, **more)))  # JSON is YAML
    return path


def census(layers, experts, dead=()):
    """A census's document; dead: pairs of layer and expert that saw no token."""
    return {
        "layers": [
            {
                "layer": i,
                "experts": [
                    {"expert": e, "tokens": 0 if (i, e) in dead else 100 + e, "share": 0.5}
                    for e in range(experts)
                ],
            }
            for i in range(layers)
        ],
        "texts": "not read",
    }
