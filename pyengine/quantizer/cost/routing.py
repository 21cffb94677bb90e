"""Experts that are noted, and experts that are followed: two recorders for `forward`.

The routing term of a divergence is what the other choice of experts costs.  A candidate is run twice: on its
own choices, and on the base's.  On the second run a token whose chosen experts are the same set keeps its own
order of them.  So where no token of a text has other experts, both runs are one to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...oracle.rerun import is_choice

Choices = dict[str, NDArray[np.int64]]  # {"model.layers.I.mlp.gate.2": [tokens, top_k]}


class Noted:
    """A recorder that notes the experts of the tokens of one `forward`."""

    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[np.int64]]] = {}

    def __call__(self, name: str, value: NDArray[Any]) -> None:
        if is_choice(name):
            self._parts.setdefault(name, []).append(np.array(value, np.int64))

    @property
    def choices(self) -> Choices:
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


class Followed:
    """A recorder that gives the tokens of one `forward` the experts that another model chose for them."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self._seen = dict.fromkeys(choices, 0)  # a long `forward` records a tensor piece by piece

    def __call__(self, name: str, value: NDArray[Any]) -> NDArray[np.int64] | None:
        if not is_choice(name):
            return None
        start = self._seen[name]
        self._seen[name] += len(value)
        theirs = self.choices[name][start : start + len(value)]
        return np.where(changed(theirs, value)[:, None] > 0, theirs, value)


def changed(theirs: NDArray[Any], own: NDArray[Any]) -> NDArray[np.int64]:
    """Experts [tokens, top_k] of two models -> how many of `theirs` are not among `own` [tokens]."""
    kept = (theirs[:, :, None] == own[:, None, :]).any(axis=2)
    return (~kept).sum(axis=1)
