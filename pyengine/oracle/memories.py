"""The layers' memories as tensors of a trace: convolution and recurrent states, keys and values."""

from __future__ import annotations

import copy

import numpy as np

from ..checkpoint.families import value_head_orders
from ..reference import ReferenceModel
from .widths import state_widths


class WithMemories(ReferenceModel):
    """A reference that hands the memories to `record`, after the last token of a run."""

    wanted: frozenset[str] = frozenset()

    def forward(self, ids, state=None, *, chunk=None, last_only=False, record=None):
        """As the reference's; `record` gets memories too, and cannot replace them."""
        state = self.new_state() if state is None else state
        start = state.position
        logits = super().forward(ids, state, chunk=chunk, last_only=last_only, record=record)
        if record is not None:
            for name, value in memories(state, start).items():
                if name in self.wanted:
                    record(name, value)
        return logits


def orders_of(model) -> dict[str, np.ndarray] | None:
    """What `memories` needs of a model: None where its value heads lie as Hugging Face's."""
    if isinstance(model, ReferenceModel) or model.checkpoint.value_head_order != "tiled":
        return None
    return value_head_orders(model.config)


def with_memories(model: ReferenceModel, names) -> ReferenceModel:
    """The model, with those of the names that are memories among what it records."""
    wanted = frozenset(names) & state_widths(model.config).keys()
    if not wanted:
        return model
    twin = copy.copy(model)
    twin.__class__ = WithMemories
    twin.wanted = wanted
    return twin


def memories(state, start: int = 0, orders=None) -> dict[str, np.ndarray]:
    """A state's memories by name: [1, n], keys and values [T, kv heads * n] of the tokens from `start` on.

    orders: of `value_head_orders`, where the model computes in a GGUF's order of value heads.
    """
    found = {}
    for index, layer in enumerate(state.layers):
        name = f"model.layers.{index}"
        arrays = layer.arrays()
        if "keys" in arrays:
            for part, of in (("key_cache", "keys"), ("value_cache", "values")):
                found[f"{name}.self_attn.{part}"] = arrays[of][start:].reshape(len(arrays[of]) - start, -1)
        else:
            conv, recurrent = arrays["conv_state"], arrays["recurrent_state"]
            if orders is not None:
                conv, recurrent = conv[:, orders["channels"]], recurrent[orders["heads"]]
            found[f"{name}.linear_attn.conv_state"] = conv.reshape(1, -1)
            found[f"{name}.linear_attn.recurrent_state"] = recurrent.reshape(1, -1)
    return found
