"""What a model is, what it was made from, and what this machine runs it with."""

from __future__ import annotations

import json

from ..errors import InputError
from .options import add_arithmetic, new_command, positive


def add_commands(commands):
    parser = new_command(commands, "info", _info, "What a model is, and what this machine runs it with.")
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", action="store_true",
                        help="what a sequence takes beside the weights, in bytes")
    parser.add_argument("-c", "--context", type=positive, default=4096, metavar="N",
                        help="tokens of that sequence (default: 4096)")
    parser.add_argument("--chunk", type=positive, metavar="N", help="prompt tokens at a time")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    add_arithmetic(parser)
    parser.add_argument("--provenance", action="store_true",
                        help="what a quantized checkpoint was made from")


def _info(options):
    if options.provenance:
        return _print_provenance(options)
    facts = _machine_facts()
    if options.model:
        facts = _model_facts(options.model) | facts
    memory = _memory_facts(options) if options.memory else {}
    if options.json:
        print(json.dumps(facts | ({"memory": memory} if memory else {}), indent=2))
        return
    for key, value in facts.items():
        print(f"{key:<24} {_as_text(value)}")
    for key, value in memory.items():
        print(f"{key:<24} {value:>15,} bytes")


def _memory_facts(options):
    from .. import ops
    from ..checkpoint import open_checkpoint
    from ..decoder.model import DEFAULT_CHUNK
    from ..memory import footprint

    if not options.model or options.arithmetic == "float64":
        raise InputError("info --memory: want a MODEL and a locked arithmetic")
    return footprint(open_checkpoint(options.model), options.context,
                     options.chunk or DEFAULT_CHUNK, options.threads or ops.physical_cores(),
                     options.arithmetic)


def _print_provenance(options):
    from .. import provenance

    if not options.model:
        raise InputError("info --provenance: want a checkpoint directory")
    said = provenance.read(options.model)
    if options.json:
        print(json.dumps(said, indent=2))
        return
    for file in said["source"]["files"]:
        print(f"source       {file['name']}, {file['size']:,} bytes, sha256 {file['sha256']}")
    print(f"types        {_as_text(said['source']['tensor_types'])}")
    print(f"method       {said['method']}; groups of {said['group_size']}, {said['bits']} bits")
    print(f"engine       {said['engine']['name']} {said['engine']['version']}, seed {said['seed']}")
    print(f"twin         {said['twin']['kind']} of {said['twin']['id']}")
    print(f"tensors      {len(said['tensors'])}")


def _as_text(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _machine_facts():
    from .. import __version__, ops

    return {"engine": f"pyengine {__version__}", "isa": ops.active_isa(),
            "isas_available": ops.available_isas(), "physical_cores": ops.physical_cores()}


def _model_facts(path):
    import collections
    import math

    from ..checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    tensors = {t.file_name: t for t in checkpoint.tensors.values()}  # a tied head counts once
    types = collections.Counter(t.type for t in tensors.values())
    return {
        "path": str(path),
        "kind": checkpoint.kind,
        "bytes": checkpoint.file.size,
        "parameters": sum(math.prod(t.shape) for name, t in checkpoint.tensors.items()
                          if not (config.tie_word_embeddings and name == "lm_head.weight")),
        "tensor_types": dict(sorted(types.items())),
        "layers": config.num_hidden_layers,
        "full_attention_layers": [i for i, kind in enumerate(config.layer_types)
                                  if kind == "full_attention"],
        "next_token_blocks": config.num_nextn_predict_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "attention_heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rotary_dim": config.rotary_dim,
        "rope_theta": config.rope_theta,
        "linear_key_heads": config.linear_num_key_heads,
        "linear_value_heads": config.linear_num_value_heads,
        "linear_head_dim": config.linear_key_head_dim,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_size": config.moe_intermediate_size,
        "shared_expert_size": config.shared_expert_intermediate_size,
        "tied_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "end_ids": list(config.eos_token_ids),
    }
