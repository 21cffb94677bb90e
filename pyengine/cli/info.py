"""info: the facts of a model, its source, and this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .._version import __version__
from ..core.processors import physical_cores
from ..core.threads import active_isa, available_isas
from ..errors import InputError
from .options import (
    MODEL,
    add_arithmetic,
    add_chunk,
    add_json,
    add_threads,
    memory_size,
    new_command,
    positive,
    warn_threads,
)


def add_commands(commands):
    parser = new_command(commands, "info", _info, "Show the facts of a model and of this machine.")
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help=MODEL + " (default: none, the machine alone)"
    )
    add_json(parser, "the facts")
    parser.add_argument(
        "--memory",
        nargs="?",
        const=True,
        type=_memory_or_model,
        metavar="SIZE",
        help="the memory that a sequence takes beside the weights, in bytes; and which weights stay in "
        "memory, if they may take SIZE (default: as `--memory` of generate)",
    )
    parser.add_argument(
        "-c",
        "--context",
        type=positive,
        metavar="N",
        help="with --memory: tokens of that sequence (default: the context that the model was made for)",
    )
    add_chunk(parser)
    add_threads(parser)
    add_arithmetic(parser)
    parser.add_argument(
        "--provenance",
        action="store_true",
        help="the source of a checkpoint that `quantize` wrote, and how it was made",
    )


def _info(options):
    if isinstance(options.memory, str):
        if options.model:
            options.parser.error(f"--memory: want a size such as 512M or 4G, got {options.memory[:40]!r}")
        options.model, options.memory = options.memory, True
    if options.context and not options.memory:
        raise InputError("-c: want it with --memory")
    warn_threads(options.threads)
    if options.provenance:
        return _print_provenance(options)
    facts = _machine_facts()
    if options.model:
        facts = _model_facts(options.model) | facts
    memory = _memory_facts(options) if options.memory else {}
    weights = _weights_facts(options) if options.memory else {}
    if options.json:
        print(json.dumps(facts | ({"memory": memory, "weights": weights} if memory else {}), indent=2))
        return
    layers = facts.pop("types_by_layer", [])
    for key, value in facts.items():
        print(f"{key:<24} {_as_text(value)}")
    if layers:
        _print_layers(layers)
    if memory:
        _print_memory(memory)
        _print_weights(weights)


def _memory_or_model(text: str):
    """A size; or the model, of `info --memory MODEL`."""
    try:
        return memory_size(text)
    except argparse.ArgumentTypeError:
        return text


def _weights_facts(options) -> dict:
    """`MemoryPlan`, and what a token reads if a router chooses all experts equally often."""
    from ..checkpoint.open import open_checkpoint
    from ..decoder.residency import missed_bytes_per_token, plan_memory

    checkpoint = open_checkpoint(options.model)
    plan = plan_memory(
        checkpoint,
        None if options.memory is True else options.memory,
        context=options.context,
        arithmetic=options.arithmetic,
    )
    if plan is None:
        return {"hit_rate": 1.0, "read_bytes_per_token": 0}
    return {
        "memory": plan.memory,
        "always_used": plan.always,
        "experts": plan.experts,
        "hit_rate": round(plan.share, 4),
        "read_bytes_per_token": missed_bytes_per_token(checkpoint, plan),
    }


def _print_weights(weights):
    if "memory" not in weights:
        print("\nall weights stay in memory")
        return
    print(f"\nweights, of which {weights['memory']:,} bytes may be in memory")
    print(f"{'always used':<24} {weights['always_used']:>15,} bytes")
    print(f"{'experts':<24} {weights['experts']:>15,} bytes, {weights['hit_rate']:.1%} in memory at a time")
    print(
        f"{'read per token':<24} {weights['read_bytes_per_token']:>15,} bytes, if all experts are chosen "
        "equally often"
    )


def _memory_facts(options) -> dict[str, int]:
    """`footprint`, behind the number of tokens that it is for."""
    from ..checkpoint.open import open_checkpoint
    from ..decoder.footprint import footprint
    from ..decoder.model import DEFAULT_CHUNK

    if not options.model or options.arithmetic == "float64":
        raise InputError("info --memory: want a MODEL and a locked arithmetic")
    checkpoint = open_checkpoint(options.model)
    context = options.context or checkpoint.config.context
    sizes = footprint(
        checkpoint,
        context,
        options.chunk or DEFAULT_CHUNK,
        options.threads or physical_cores(),
        options.arithmetic,
    )
    return {"context": context} | sizes


def _print_layers(layers):
    """A line for each type, behind the layers that have it."""
    print("\ntypes of the matrices")
    for row in layers:
        label = f"layers {_ranges(row['layers'])}" if row["layers"] else "in no layer"
        for kind, names in row["types"].items():
            print(f"{label:<24} {kind:<7} {', '.join(names)}")
            label = ""


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 4] -> "0-2, 4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _print_memory(memory):
    """The parts, their sum, and apart from it the file, of which the system may drop any page."""
    print(f"\nmemory of a sequence of {memory['context']:,} tokens")
    apart = {"context", "weights_mapped", "total"}
    rows = {name: size for name, size in memory.items() if name not in apart}
    for name, size in (rows | {"total": memory["total"]}).items():
        print(f"{name:<24} {size:>15,} bytes")
    print(
        f"{'weights_mapped':<24} {memory['weights_mapped']:>15,} bytes, not in the total: the mapped file, "
        "whose pages the system may drop"
    )


def _print_provenance(options):
    from ..checkpoint import provenance

    _check_has_provenance(options.model, provenance.FILE_NAME)
    said = provenance.read(options.model)
    if options.json:
        print(json.dumps(said, indent=2))
        return
    if provenance.is_merge(said):
        return _print_merge(said)
    for file in said["source"]["files"]:
        print(f"source       {file['name']}, {file['size']:,} bytes, sha256 {file['sha256']}")
    print(f"types        {_as_text(said['source']['tensor_types'])}")
    bits = "mixed bits" if "mix" in said else f"{said['bits']} bits"
    words = f" ({said['method_in_words']})" if "method_in_words" in said else ""
    print(f"method       {said['method']}{words}; groups of {said['group_size']}, {bits}")
    for pattern, count in said.get("mix", ()):
        print(f"mix          {pattern}: {count} bits")
    print(f"engine       {said['engine']['name']} {said['engine']['version']}, seed {said['seed']}")
    print(f"twin         {said['twin']['kind']} of {said['twin']['id']}")
    print(f"tensors      {len(said['tensors'])}")


def _print_merge(said):
    for model in said["models"]:
        print(f"{model['role']:<12} {model['name']}, {_as_text(model['tensor_types'])}")
        for file in model["files"]:
            print(f"             {file['name']}, {file['size']:,} bytes, sha256 {file['sha256']}")
    print(f"method       {said['configuration']['merge_method']}, seed {said['seed']}")
    print(f"output       {', '.join(str(value) for value in said['output'].values())}")
    print(f"engine       {said['engine']['name']} {said['engine']['version']}")
    print(f"tensors      {len(said['tensors'])}")


def _check_has_provenance(model, name) -> None:
    want = "--provenance: want a directory that `quantize` or `merge` wrote, got"
    if not model:
        raise InputError(f"{want} none")
    path = Path(model)
    if not path.is_dir():
        raise InputError(f"{path}: {want} {'a file' if path.exists() else 'no such path'}")
    if not (path / name).exists():
        raise InputError(f"{path}: {want} one without {name}")


def _as_text(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _yarn_in_words(yarn) -> str:
    return f"yarn, factor {yarn.factor:g} of {yarn.original_max_position_embeddings} positions"


def _machine_facts():
    return {
        "engine": f"pyengine {__version__}",
        "isa": active_isa(),
        "isas_available": available_isas(),
        "physical_cores": physical_cores(),
    }


def _model_facts(path):
    from ..checkpoint.open import open_checkpoint
    from ..checkpoint.summary import types_by_layer

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    layers = [{"layers": list(row.layers), "types": row.types} for row in types_by_layer(checkpoint)]
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    return {
        "path": str(path),
        "kind": checkpoint.kind,
        "architecture": config.architecture,
        "bytes": checkpoint.file.size,
        "parameters": checkpoint.summary.parameters,
        "tensor_types": checkpoint.summary.tensor_types,
        "layers": config.num_hidden_layers,
        "linear_attention_layers": len(config.layer_types) - len(full),
        "full_attention_layers": len(full),
        "full_attention_indices": full,
        "next_token_blocks": config.num_nextn_predict_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "attention_heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rotary_dim": config.rotary_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": "none" if config.yarn is None else _yarn_in_words(config.yarn),
        "linear_key_heads": config.linear_num_key_heads,
        "linear_value_heads": config.linear_num_value_heads,
        "linear_head_dim": config.linear_key_head_dim,
        **_mlp(config),
        "tied_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "end_ids": list(config.eos_token_ids),
        "types_by_layer": layers,
    }


def _mlp(config) -> dict:
    if not config.num_experts:
        return {"mlp_size": config.intermediate_size}
    dense = {"mlp_layers": list(config.dense_layers), "mlp_size": config.intermediate_size}
    return {
        **(dense if config.dense_layers else {}),
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_size": config.moe_intermediate_size,
        "shared_expert_size": config.shared_expert_intermediate_size,
    }
