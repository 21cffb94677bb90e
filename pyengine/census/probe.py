"""The distance of two models, module by module, on given probes.

For every token the outputs of a module in the two models, x and y [n], are widened to float64 and scaled to
length 1.  The cosine distance, 1 - cos, is half the squared length of their difference: that form is exactly
0 for equal outputs.  It is 0 between two zero vectors, and 1 between a zero vector and another.  A module's
distance is the mean over all tokens of all probes.

The core is the layer that adds most to the distance of the hidden states: the distance of its output exceeds
that of its input by most.  The first of equals counts.  The input of layer 0 is the embedding.  Where no
layer adds to the distance there is no core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.names import layer_name
from .texts import Text

PIECE = 64  # tokens computed at a time: bounds the outputs that are kept
EMBEDDING = "model.embed_tokens"
MIXERS = ("linear_attn", "self_attn")
ROUTING = (".mlp.gate.1", ".mlp.gate.2")  # lists by falling probability: no vectors to compare


def cosine_distance(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
    """x, y [T, n] -> [T], as above."""
    u, v = _unit(x), _unit(y)
    distance = np.asarray(0.5 * np.square(u - v).sum(axis=1), np.float64)
    distance[u.any(axis=1) != v.any(axis=1)] = 1.0
    return distance


def _unit(x: NDArray[Any]) -> NDArray[np.float64]:
    x = np.array(x, np.float64)
    length = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
    np.divide(x, length, out=x, where=length > 0)
    return x


@dataclass
class Distances:
    """Sums over tokens, by module in the order of execution; of each probe the sums of the hidden states.

    common   by layer: experts that both models chose, added over tokens
    """

    tokens: int = 0
    modules: dict[str, float] = field(default_factory=dict)
    common: dict[int, int] = field(default_factory=dict)
    probes: list[dict[str, float]] = field(default_factory=list)


def measure(
    first: Any, second: Any, probes: list[Text], advance: Callable[[int], object] = lambda tokens: None
) -> Distances:
    """Two models of one shape and vocabulary, over probes that each start from an empty state.

    advance: called with tokens.  Errors: those of `forward`.
    """
    distances = Distances()
    for probe in probes:
        states = first.new_state(), second.new_state()
        distances.probes.append({})
        for start in range(0, len(probe.ids), PIECE):
            ids = probe.ids[start : start + PIECE]
            one: dict[str, NDArray[Any]] = {}
            first.forward(ids, states[0], record=_keep(one))
            second.forward(ids, states[1], record=_compare(one, distances))
            distances.tokens += len(ids)
            advance(len(ids))
    return distances


def _keep(kept: dict[str, NDArray[Any]]) -> Callable[[str, NDArray[Any]], None]:
    def record(name: str, value: NDArray[Any]) -> None:
        kept[name] = value.copy()  # the model may go on in the same array

    return record


def _compare(one: dict[str, NDArray[Any]], distances: Distances) -> Callable[[str, NDArray[Any]], None]:
    def record(name: str, value: NDArray[Any]) -> None:
        other = one.pop(name)
        if name.endswith(".mlp.gate.2"):
            layer = int(name.split(".")[2])
            common = int((other[:, :, None] == value[:, None, :]).sum())
            distances.common[layer] = distances.common.get(layer, 0) + common
        elif not name.endswith(ROUTING):
            total = float(cosine_distance(other, value).sum())
            distances.modules[name] = distances.modules.get(name, 0.0) + total
            if is_hidden_state(name):
                own = distances.probes[-1]
                own[name] = own.get(name, 0.0) + total

    return record


def is_hidden_state(name: str) -> bool:
    """The embedding, or the output of a layer."""
    return name == EMBEDDING or name.count(".") == 2 and name.startswith("model.layers.")


def describe(first: Any, second: Any, probes: list[Text], distances: Distances) -> dict[str, Any]:
    """The JSON of `pyengine probe`; README.md has its keys."""
    config = first.config
    modules = {name: total / distances.tokens for name, total in distances.modules.items()}
    layers, before = [], modules[EMBEDDING]
    for i in range(config.num_hidden_layers):
        name = layer_name(i)
        hidden = modules[name]
        layer = {
            "layer": i,
            "distance": hidden,
            "increase": hidden - before,
            "mixer": next(modules[f"{name}.{mixer}"] for mixer in MIXERS if f"{name}.{mixer}" in modules),
            "mlp": modules[f"{name}.mlp"],
        }
        if i in distances.common:
            slots = distances.tokens * config.num_experts_per_tok
            layer["experts_in_common"] = distances.common[i] / slots
        layers.append(layer)
        before = hidden
    return {
        "format": "pyengine probe",
        "version": 1,
        "models": [str(model.checkpoint.path) for model in (first, second)],
        "arithmetic": first.arithmetic,
        "tokens": distances.tokens,
        "embedding": modules[EMBEDDING],
        "layers": layers,
        "core": core(layers),
        "core_rule": "the layer whose output's distance exceeds that of its input by most",
        "modules": modules,
        "probes": [
            probe.describe()
            | {"layers": [own[layer_name(i)] / len(probe.ids) for i in range(config.num_hidden_layers)]}
            for probe, own in zip(probes, distances.probes, strict=True)
        ],
    }


def core(layers: list[dict[str, Any]]) -> int | None:
    most = max(layers, key=lambda layer: layer["increase"])
    return int(most["layer"]) if most["increase"] > 0 else None
