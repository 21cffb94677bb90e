"""Figures of a checkpoint as it is stored: types, parameters, bytes, multiply-adds."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .families import model_specs
from .names import is_routed_expert, layer_of
from .tensor import Tensor

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Summary:
    """Figures of a checkpoint.

    tensor_types     {type: tensors of the file}; experts that lie apart in their file count as one
    parameter_types  {type: parameters}: a fused tensor holds two, and a tied head is a parameter too
    parameters       weights in all; a tied head has none of its own
    active           weights of matrices that one token is multiplied with
    weight_bytes     of all weights and scales, as stored
    model_type       "qwen35moe 35B.A3B Q8_0": architecture, parameters in all and, where there are
                     experts, active, and the type that has the most bytes
    """

    tensor_types: dict[str, int]
    parameter_types: dict[str, int]
    parameters: int
    active: int
    weight_bytes: int
    model_type: str


def summarize(checkpoint: Checkpoint) -> Summary:
    tensors = [stored for tensor in checkpoint.tensors.values() for stored in tensor.stored]
    weights = list({id(tensor): tensor for tensor in tensors}.values())  # a tied head is the embedding
    bytes_of_types: Counter[str] = Counter()
    for tensor in weights:
        bytes_of_types[tensor.type] += stored_bytes(tensor)
    parameters = sum(math.prod(tensor.shape) for tensor in weights)
    active = multiply_adds(checkpoint, 1, 1)
    (commonest, _), *_ = bytes_of_types.most_common(1)
    size = f"{_short(parameters)}.A{_short(active)}" if checkpoint.config.num_experts else _short(parameters)
    return Summary(
        tensor_types=_count({tensor.file_name: tensor.type for tensor in tensors}.values()),
        parameter_types=_count(tensor.type for tensor in tensors),
        parameters=parameters,
        active=active,
        weight_bytes=bytes_of_types.total(),
        model_type=f"{checkpoint.config.architecture} {size} {commonest}",
    )


def stored_bytes(tensor: Tensor) -> int:
    """Of the tensor and its scales, in the file."""
    return sum(_bytes_of_one(part) for part in tensor.stored)


def _bytes_of_one(tensor: Tensor) -> int:
    pieces = tensor.data if isinstance(tensor.data, tuple) else (tensor.data,)
    return sum(piece.nbytes for piece in pieces) + (0 if tensor.scales is None else tensor.scales.nbytes)


def multiply_adds(checkpoint: Checkpoint, tokens: int, outputs: int) -> int:
    """Multiply-adds of the weight matrices, for that many tokens and that many rows of logits.

    Attention over the cache, which grows with the context, and the delta rule, which has no weights, are
    not counted.
    """
    config = checkpoint.config
    layers = sum(
        needed_by_a_token(checkpoint, spec.name, math.prod(spec.shape))
        for spec in model_specs(config)
        if spec.linear and ".layers." in spec.name
    )
    return tokens * layers + outputs * config.vocab_size * config.hidden_size


def needed_by_a_token(checkpoint: Checkpoint, name: str, amount: int) -> int:
    """The part of a parameter's amount that one token needs: of the routed experts, the chosen ones."""
    config = checkpoint.config
    if is_routed_expert(name):
        return amount // config.num_experts * config.num_experts_per_tok
    return amount


class LayerTypes(NamedTuple):
    """Layers whose matrices have the same names and types.

    layers   their numbers; empty: what is in no layer, embeddings and the head
    types    {type: the matrices' names in the file, within their layer}
    """

    layers: tuple[int, ...]
    types: dict[str, tuple[str, ...]]


def types_by_layer(checkpoint: Checkpoint) -> list[LayerTypes]:
    """The types of all matrices, layers with the same ones together, in the order of their first layers;
    embeddings and the head come first."""
    layers: dict[int | None, dict[str, str]] = {None: {}}
    for name in (spec.name for spec in model_specs(checkpoint.config) if spec.linear):
        types = layers.setdefault(layer_of(name), {})
        for tensor in checkpoint.tensors[name].stored:
            in_file = tensor.file_name if checkpoint.kind == "gguf" else name
            types[_within_its_layer(in_file)] = tensor.type
    alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for layer, types in layers.items():
        alike.setdefault(tuple(types.items()), []).extend([] if layer is None else [layer])
    return [LayerTypes(tuple(numbers), _names_of_types(types)) for types, numbers in alike.items()]


def _names_of_types(types: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for name, kind in types:
        names[kind] = (*names.get(kind, ()), name)
    return names


def _within_its_layer(name: str) -> str:
    """ "blk.3.ffn_up.weight" and "model.layers.3.mlp.up_proj.weight" -> "ffn_up" and "mlp.up_proj"."""
    return re.sub(r"^(blk|model\.layers)\.\d+\.|^model\.", "", name).removesuffix(".weight")


def _count(types: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(types).items()))


def _short(count: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            digits = 1 if count < 9.95 * unit else 0
            return f"{count / unit:.{digits}f}{letter}"
    return str(count)
