"""Which experts a census found dead: the part of its JSON that a merge reads.

    {"layers": [{"layer": 0, "experts": [{"expert": 0, "tokens": 1234, ...}, ...], ...}, ...], ...}

tokens    how often the expert was chosen, an integer of at least 0
Every layer and every expert of the model is there once, in any order.  Other keys are not read.

An expert is dead where its tokens are fewer than `below` times the even share, the mean of its layer.  A
layer of no tokens has seen nothing, and is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import FileFormatError, quote
from ..files.strict_json import read_object

BELOW = 0.05

Counts = tuple[tuple[int, ...], ...]  # tokens of each expert of each layer


def read_census(path: str | Path, layers: int, experts: int) -> Counts:
    """The tokens of a census of a model with so many layers and experts.  FileFormatError names the field."""
    said = read_object(path, constants=True).get("layers")
    by_layer = _by_number(path, "layers", said, "layer", layers)
    return tuple(
        tuple(
            _tokens(path, f"layers[{i}].experts[{e}]", expert)
            for e, expert in enumerate(
                _by_number(path, f"layers[{i}].experts", layer.get("experts"), "expert", experts)
            )
        )
        for i, layer in enumerate(by_layer)
    )


def check_counts(where: str | Path, field: str, counts: Any, layers: int, experts: int) -> Counts:
    """The same from lists of counts, as a provenance has them."""
    if not isinstance(counts, list) or len(counts) != layers:
        got = len(counts) if isinstance(counts, list) else quote(counts)
        raise FileFormatError(where, field, f"want {layers} lists, one per layer, got {got}")
    for i, layer in enumerate(counts):
        if not isinstance(layer, list) or len(layer) != experts:
            got = len(layer) if isinstance(layer, list) else quote(layer)
            raise FileFormatError(where, f"{field}[{i}]", f"want {experts} counts, got {got}")
        for e, tokens in enumerate(layer):
            _tokens(where, f"{field}[{i}][{e}]", {"tokens": tokens})
    return tuple(map(tuple, counts))


def dead_experts(where: str | Path, counts: Counts, below: float) -> tuple[frozenset[int], ...]:
    """The dead experts of each layer."""
    dead = []
    for i, layer in enumerate(counts):
        if not sum(layer):
            raise FileFormatError(where, f"layers[{i}]", "want a layer that has seen tokens, got 0 tokens")
        dead.append(frozenset(e for e, n in enumerate(layer) if n * len(layer) < below * sum(layer)))
    return tuple(dead)


def _by_number(path: str | Path, field: str, entries: Any, key: str, count: int) -> list[dict[str, Any]]:
    """Objects with numbers 0 to count - 1, each once -> in the order of the numbers."""
    if not isinstance(entries, list):
        raise FileFormatError(path, field, f"want a list, got {quote(entries)}")
    found: dict[int, dict[str, Any]] = {}
    for place, entry in enumerate(entries):
        number = entry.get(key) if isinstance(entry, dict) else None
        if type(number) is not int or not 0 <= number < count:
            wanted = f"want 0 to {count - 1}, as the model has them, got {quote(number)}"
            raise FileFormatError(path, f"{field}[{place}].{key}", wanted)
        if number in found:
            raise FileFormatError(
                path, f"{field}[{place}].{key}", f"want each number once, got {number} twice"
            )
        found[number] = entry
    missing = next((number for number in range(count) if number not in found), None)
    if missing is not None:
        raise FileFormatError(
            path, field, f"want {count} of them, as the model has, got none of {key} {missing}"
        )
    return [found[number] for number in range(count)]


def _tokens(path: str | Path, field: str, expert: dict[str, Any]) -> int:
    tokens = expert.get("tokens")
    if type(tokens) is not int or tokens < 0:
        raise FileFormatError(path, f"{field}.tokens", f"want an integer of at least 0, got {quote(tokens)}")
    return tokens
