"""Which module outputs each module output is computed from.

The names are those of a trace.  The graph says whether the inputs of an operation are in a trace, and
which tensors would tell more.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint.config import LINEAR, Config
from ..checkpoint.families import family_of

EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


def _linear_attn(config: Config) -> dict[str, tuple[str, ...]]:
    in_proj = family_of(config).in_proj
    return {
        **dict.fromkeys(in_proj, ("input_layernorm",)),
        "norm": tuple(f"linear_attn.{part}" for part in in_proj),
        "out_proj": ("linear_attn.norm",),
        "": ("linear_attn.out_proj",),
    }


_SELF_ATTN = {
    "q_proj": ("input_layernorm",),
    "q_norm": ("self_attn.q_proj",),
    "k_proj": ("input_layernorm",),
    "k_norm": ("self_attn.k_proj",),
    "v_proj": ("input_layernorm",),
    "o_proj": ("self_attn.q_proj", "self_attn.q_norm", "self_attn.k_norm", "self_attn.v_proj"),
    "": ("self_attn.o_proj",),
}
_DENSE_MLP = {
    "gate_proj": ("post_attention_layernorm",),
    "up_proj": ("post_attention_layernorm",),
    "down_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "": ("mlp.down_proj",),
}
_SPARSE_MLP = {
    "shared_expert.gate_proj": ("post_attention_layernorm",),
    "shared_expert.up_proj": ("post_attention_layernorm",),
    "shared_expert.down_proj": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared_expert": ("mlp.shared_expert.down_proj",),
    "gate": ("post_attention_layernorm",),
    "gate.1": ("mlp.gate", "mlp.gate.2"),
    "gate.2": ("mlp.gate",),
    "experts": ("post_attention_layernorm", "mlp.gate.1", "mlp.gate.2"),
    "shared_expert_gate": ("post_attention_layernorm",),
    "": ("mlp.experts", "mlp.shared_expert", "mlp.shared_expert_gate"),
}


def module_inputs(config: Config) -> dict[str, tuple[str, ...]]:
    """{name: the names that the operation reads}, of every tensor of a complete trace."""
    graph: dict[str, tuple[str, ...]] = {EMBEDDING: ()}
    hidden, linear_attn = EMBEDDING, _linear_attn(config)
    for index, kind in enumerate(config.layer_types):
        layer = f"model.layers.{index}"
        mixer, parts = ("linear_attn", linear_attn) if kind == LINEAR else ("self_attn", _SELF_ATTN)
        graph[f"{layer}.input_layernorm"] = (hidden,)
        graph |= _within(layer, mixer, parts)
        graph[f"{layer}.post_attention_layernorm"] = (hidden, f"{layer}.{mixer}")
        graph |= _within(layer, "mlp", _SPARSE_MLP if config.has_experts(index) else _DENSE_MLP)
        graph[layer] = (hidden, f"{layer}.{mixer}", f"{layer}.mlp")
        hidden = layer
    return graph | {LAST_NORM: (hidden,), HEAD: (LAST_NORM,)}


def _within(layer, module, parts):
    return {
        f"{layer}.{module}.{part}".rstrip("."): tuple(f"{layer}.{name}" for name in inputs)
        for part, inputs in parts.items()
    }


def unknown_before(name: str, known, graph) -> list[str]:
    """The tensors between `name` and the known ones that it is computed from, in the order of execution.

    Empty: every input of the operation is known.  Without any known input, everything from the ids on.
    """
    found: set[str] = set()
    waiting = list(graph[name])
    while waiting:
        other = waiting.pop()
        if other not in known and other not in found:
            found.add(other)
            waiting.extend(graph[other])
    return [other for other in graph if other in found]


def is_within(names: Iterable[str], module: str) -> bool:
    """Whether every name is a part of the module: the module's inputs are known then."""
    return all(name.startswith(f"{module}.") for name in names)


def covered(names: Iterable[str], graph) -> set[str]:
    """`names` and all tensors that they are computed from: a comparison of `names` checks these."""
    found = set(names)
    for name in list(found):
        found.update(unknown_before(name, found, graph))
    return found


def next_to_dump(name: str, unknown: list[str]) -> list[str]:
    """The unknown tensors before `name` that narrow most: layers first, then the parts of one layer.

    unknown: of `unknown_before`, in the order of execution.
    """
    layers = [other for other in unknown if other.rpartition(".")[0] == "model.layers"]
    if layers:
        return layers
    fewest = min((_depth(other) for other in unknown), default=0)
    return [
        other for other in unknown if _depth(other) <= max(fewest, 4 if name.startswith("model.l") else 0)
    ]


def _depth(name: str) -> int:
    """Parts of a name, an output's number not counted: 4 for the modules of a layer."""
    return sum(not part.isdigit() or i == 2 for i, part in enumerate(name.split(".")))


def listed(names: list[str], most: int = 6) -> str:
    """For people: `model.layers.0 .. 3`, or the first names and the count of the others."""
    numbers = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == "model.layers"]
    if len(numbers) == len(names) > 1 and int(numbers[-1]) - int(numbers[0]) == len(names) - 1:
        return f"{names[0]} .. {numbers[-1]}"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
