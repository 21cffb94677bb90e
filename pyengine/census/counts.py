"""What a census adds up.  T tokens, E experts, k of them per token.

Counts are integers.  Sums are float64, one addition after another: token by token in the order of the texts.
So neither chunks nor threads change a bit of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..probabilities import log_softmax

Array = NDArray[Any]


class Counts:
    """One model's, [layers, ...]:

    tokens         int64 [E]     how many tokens chose the expert
    pairs          int64 [E, E]  [a, b], a < b: how many tokens chose both
    weight         float64 [E]   sum of the routing weights of the tokens that chose it
    saliency       float64 [E]   sum of routing weight * norm
    norm           float64 [E]   sum of the Euclidean norms of its outputs, before the weight
    router_entropy float64       sum over all tokens of the entropy of the router's E probabilities, in bits
    """

    def __init__(self, layers: int, experts: int):
        self.tokens = np.zeros((layers, experts), np.int64)
        self.pairs = np.zeros((layers, experts, experts), np.int64)
        self.weight, self.saliency, self.norm = (np.zeros((layers, experts)) for _ in range(3))
        self.router_entropy = np.zeros(layers)

    def add(self, layer: int, logits: Array, weights: Array, selected: Array, norms: Array) -> None:
        """logits [T, E]; weights, selected, norms [T, k]."""
        experts = self.tokens.shape[1]
        flat = selected.reshape(-1)
        self.tokens[layer] += np.bincount(flat, minlength=experts)
        pairs = np.sort(selected, axis=1)
        for i in range(pairs.shape[1]):
            for j in range(i + 1, pairs.shape[1]):
                both = pairs[:, i] * experts + pairs[:, j]
                self.pairs[layer] += np.bincount(both, minlength=experts**2).reshape(experts, experts)
        weights = weights.astype(np.float64)
        for sums, values in ((self.weight, weights), (self.norm, norms), (self.saliency, weights * norms)):
            np.add.at(sums[layer], flat, values.reshape(-1))  # one after another, unlike np.bincount's total
        log_p = log_softmax(logits)
        entropy = -(np.exp(log_p) * log_p).sum(axis=1) / np.log(2)
        np.add.at(self.router_entropy, np.full(len(entropy), layer), entropy)


class Observer:
    """A `record` that counts: it waits for a layer's inputs, and then asks the model for each chosen
    expert's output."""

    def __init__(self, model: Any):
        self.model = model
        self.counts = Counts(model.config.num_hidden_layers, model.config.num_experts)
        self.known: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> None:
        part = name.removeprefix("model.layers.").partition(".")[2]
        if part == "mlp.experts":  # the last of those that are needed, in either arithmetic
            self._add(int(name.split(".")[2]))
        elif part in ("post_attention_layernorm", "mlp.gate", "mlp.gate.1", "mlp.gate.2"):
            self.known[part] = value

    def _add(self, layer: int) -> None:
        x, selected = self.known["post_attention_layernorm"], self.known["mlp.gate.2"]
        norms = np.empty(selected.shape)
        for expert in np.unique(selected):
            token, place = np.nonzero(selected == expert)
            norms[token, place] = norm(self.model.expert_output(layer, int(expert), x[token]))
        self.counts.add(layer, self.known["mlp.gate"], self.known["mlp.gate.1"], selected, norms)
        self.known = {}


def norm(y: Array) -> NDArray[np.float64]:
    """y [T, n] -> Euclidean norms [T]: squares in float64, added in the order of the columns.

    (cumsum has one order; sum has another for a single row.)
    """
    squares = np.square(y, dtype=np.float64)
    return np.sqrt(np.cumsum(squares, axis=1, out=squares)[:, -1])
