"""Known mistakes in routers and experts."""

from __future__ import annotations

import numpy as np

from ... import reference as ref
from ..formats import to_bfloat16
from .mistake import Mistake, with_operation, with_result


def _weights(function):
    return with_operation(routing_weights=function)


def _chosen(p, selected):
    return np.take_along_axis(p, selected, axis=-1)


def _gelu(gate, up):
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def _interleaved_gate_up(model, token):
    stored = model.weight

    def weight(name, expert=None):
        for start, part in enumerate(("gate_proj", "up_proj")):
            if name.endswith(f".experts.{part}"):
                stem = name.removesuffix(part)
                both = [stored(f"{stem}{one}", expert) for one in ("gate_proj", "up_proj")]
                return np.concatenate(both)[start::2]
        return stored(name, expert)

    model.weight = weight


def _next_expert(model, token):
    stored, count = model.weight, model.config.num_experts
    model.weight = lambda name, expert=None: stored(name, None if expert is None else (expert + 1) % count)


def _without_the_last(renormalised):
    def routing_weights(p, selected):
        chosen = ref.routing_weights(p, selected)
        chosen[:, -1] = 0
        return chosen / chosen.sum(axis=-1, keepdims=True) if renormalised else chosen

    return routing_weights


def _routed(contribution, add):
    """Each expert's contribution(its function, its inputs, their weights), added one after another."""

    def change(model, token):
        def experts(x, name, weights, selected):
            routed = np.zeros_like(x)
            for expert in np.unique(selected):
                row, place = np.nonzero(selected == expert)
                y = contribution(
                    lambda inputs, e=expert: model._expert(inputs, name, e), x[row], weights[row, place, None]
                )
                routed[row] = add(routed[row], y)
            return routed

        model._experts = experts

    return change


def _gate_after_the_sum(model, token):
    """The shared expert's gate multiplies the routed experts too."""
    gated, add, gate_of = model.op.gated, model.op.add, {}

    def noted(x, gate):
        if x.ndim == 3:
            return gated(x, gate)
        y = x.copy()
        gate_of[id(y)] = y, ref.sigmoid(gate)
        return y

    def added(x, y):
        _, gate = gate_of.pop(id(y), (None, 1.0))
        return add(x, y) * gate

    model.op.gated, model.op.add = noted, added


def _narrow(x):
    return to_bfloat16(x).astype(np.float64)


EXPERTS = [
    Mistake("the routing weights are not renormalised", _weights(_chosen)),
    Mistake(
        "the routing weights are a softmax of the chosen probabilities",
        _weights(lambda p, selected: ref.softmax(_chosen(p, selected))),
    ),
    Mistake(
        "the routing weights belong to the experts in the opposite order",
        _weights(lambda p, selected: ref.routing_weights(p, selected)[:, ::-1]),
    ),
    Mistake("the router uses sigmoid, not softmax", with_operation(router_probabilities=ref.sigmoid)),
    Mistake("the routed experts are not weighted", with_operation(weighted=lambda y, weight: y)),
    Mistake(
        "the router takes the experts of the smallest probability",
        with_operation(select_experts=lambda p, top_k: ref.select_experts(-p, top_k)),
    ),
    Mistake("gate and up are swapped", with_operation(swiglu=lambda gate, up: ref.swiglu(up, gate))),
    Mistake("gate and up of the routed experts are taken as interleaved", _interleaved_gate_up),
    Mistake("silu is left out of the experts", with_operation(swiglu=lambda gate, up: gate * up)),
    Mistake("the experts use gelu, not silu", with_operation(swiglu=_gelu)),
    Mistake("the experts are numbered from 1", _next_expert),
    Mistake(
        "the last of the chosen experts is left out, the others' weights are made to add up to 1",
        _weights(_without_the_last(True)),
    ),
    Mistake("the last of the chosen experts is left out", _weights(_without_the_last(False))),
    Mistake(
        "the routing weights multiply the experts' inputs, not their outputs",
        _routed(lambda f, x, weight: f(x * weight), ref.add),
    ),
    Mistake(
        "the routed experts are added up in bfloat16",
        _routed(lambda f, x, weight: _narrow(f(x) * weight), lambda x, y: _narrow(x + y)),
    ),
    Mistake(
        "the router's logits are rounded to bfloat16", with_result("mlp.gate", lambda y, x, m: _narrow(y))
    ),
    Mistake("the shared expert's gate comes after the sum with the routed experts", _gate_after_the_sum),
    Mistake(
        "the shared expert is left out",
        with_operation(gated=lambda x, gate: ref.gated(x, gate) if x.ndim == 3 else np.zeros_like(x)),
    ),
]
