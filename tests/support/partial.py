"""Parts of a trace, as ports dump them."""

import re

from pyengine.oracle.trace import Trace

PARTS = {
    "full": lambda name: True,
    "layers": lambda name: re.fullmatch(r"model\.layers\.\d+|lm_head", name),
    "layers and embedding": lambda name: re.fullmatch(
        r"model\.layers\.\d+|lm_head|model\.embed_tokens", name
    ),
    "layer 1 and logits": lambda name: name in ("model.layers.1", "lm_head"),
    "modules of layer 1": lambda name: name.startswith(("model.layers.1", "model.layers.0")),
    "logits": lambda name: name == "lm_head",
}


def part(trace: Trace, kind: str) -> Trace:
    tensors = {name: array for name, array in trace.tensors.items() if PARTS[kind](name)}
    return Trace(trace.ids, tensors, trace.arithmetic)


def changed(trace: Trace, name: str, change) -> Trace:
    """The trace with change(a copy of one tensor) in its place."""
    tensors = dict(trace.tensors)
    tensors[name] = change(tensors[name].copy())
    return Trace(trace.ids, tensors, trace.arithmetic)


def renamed(trace: Trace, new_name) -> Trace:
    return Trace(trace.ids, {new_name(n): v for n, v in trace.tensors.items()}, trace.arithmetic)
