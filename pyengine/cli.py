"""The command line.  Everything that prints or exits is here; flags are llama.cpp's where it has
them.  Exit codes: 0 done (verify: equal), 1 verify: different, 2 unusable input, one line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from .errors import InputError, PyengineError


def main(arguments=None) -> int:
    """Run one command; -> exit code.  Never a traceback for what a user can get wrong."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options) or 0
    except PyengineError as error:
        return _fail(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except MemoryError:
        return _fail("out of memory")
    except KeyboardInterrupt:
        return 130


def _fail(error) -> int:
    print(f"pyengine: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(prog="pyengine", description="Reference inference for Qwen3.5-35B-A3B-class "
                     "models. MODEL is a GGUF file (or the first of its splits) or a directory.")
    parser.add_argument("--version", action="version", version=f"pyengine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     parser_class=_Parser)
    for add in (_add_info, _add_quantize, _add_verify_files, _add_logits, _add_trace, _add_verify,
                _add_generate, _add_bench, _add_demo):
        add(commands)
    return parser


def _command(commands, name, run, text):
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


# ---- options that several commands share -----------------------------------------------------


def _positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive integer"  # argparse names the type in its message


def _add_model(parser):
    parser.add_argument("-m", "--model", required=True, metavar="MODEL")
    parser.add_argument("-t", "--threads", type=_positive, metavar="N",
                        help="of the locked arithmetic (default: physical cores)")
    parser.add_argument("--pin", action="store_true", help="one processor a thread")


def _add_arithmetic(parser):
    from .model import ARITHMETICS

    parser.add_argument("--arithmetic", choices=ARITHMETICS, default="locked")


def _add_run(parser):
    _add_model(parser)
    ids = parser.add_mutually_exclusive_group(required=True)
    ids.add_argument("--ids", metavar='"1 2 3"', help="token ids")
    ids.add_argument("--ids-file", metavar="F", help="token ids as text or .npy")
    _add_arithmetic(parser)
    parser.add_argument("--chunk", type=_positive, metavar="N",
                        help="prompt tokens computed at a time; changes no bit")
    parser.add_argument("-o", "--output", required=True, metavar="OUT")


def _load(options):
    from . import load

    return load(options.model, getattr(options, "arithmetic", "locked"), options.threads,
                pin=options.pin)


def _ids(options):
    from .ids import parse_ids, read_ids

    return parse_ids(options.ids, "--ids") if options.ids is not None else read_ids(options.ids_file)


def _check_output(path) -> Path:
    """Known to be writable before the work begins."""
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{path}: want a file in a directory that exists")
    return path


# ---- info ------------------------------------------------------------------------------------


def _add_info(commands):
    parser = _command(commands, "info", _info, "What a model is, and what this machine runs it with.")
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", action="store_true",
                        help="what a sequence takes beside the weights, in bytes")
    parser.add_argument("-c", "--context", type=_positive, default=4096, metavar="N",
                        help="tokens of that sequence (default: 4096)")
    parser.add_argument("--chunk", type=_positive, metavar="N", help="prompt tokens at a time")
    parser.add_argument("-t", "--threads", type=_positive, metavar="N")
    _add_arithmetic(parser)
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
    from . import ops
    from .checkpoint import open_checkpoint
    from .decoder.model import DEFAULT_CHUNK
    from .memory import footprint

    if not options.model or options.arithmetic == "float64":
        raise InputError("info --memory: want a MODEL and a locked arithmetic")
    return footprint(open_checkpoint(options.model), options.context,
                     options.chunk or DEFAULT_CHUNK, options.threads or ops.physical_cores(),
                     options.arithmetic)


def _print_provenance(options):
    from . import provenance

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
    from . import __version__, ops

    return {"engine": f"pyengine {__version__}", "isa": ops.active_isa(),
            "isas_available": ops.available_isas(), "physical_cores": ops.physical_cores()}


def _model_facts(path):
    import collections
    import math

    from .checkpoint import open_checkpoint

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


# ---- quantize --------------------------------------------------------------------------------


def _add_quantize(commands):
    parser = _command(commands, "quantize", _quantize, "A GGUF, or a Hugging Face directory, to a "
                      "symmetric INT8 checkpoint, its INT4 twin, or both in one pass.")
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("--int8", metavar="DIR", help="a new directory")
    parser.add_argument("--int4", metavar="DIR", help="a new directory")
    parser.add_argument("--group-size", type=_positive, default=128, metavar="N",
                        help="columns that share a scale (default: 128, which the locked "
                        "arithmetic needs)")
    parser.add_argument("--scale", choices=("absmax", "mse"), default="absmax")
    parser.add_argument("-t", "--threads", type=_positive, metavar="N")
    parser.add_argument("--export", choices=("compressed-tensors",),
                        help="write --int8 or --int4, a new directory, from SRC, a directory that "
                        "this command wrote, in the layout of another library")


def _quantize(options):
    from .quantize import quantize

    if options.export:
        return _export(options)
    quantize(options.source, options.int8, options.int4, group_size=options.group_size,
             scale=options.scale, threads=options.threads)
    for directory in filter(None, (options.int8, options.int4)):
        print(f"{directory}: written")


def _export(options):
    from . import provenance
    from .export import export_compressed_tensors

    bits = provenance.read(options.source)["bits"]
    destination = {8: options.int8, 4: options.int4}.get(bits)
    if destination is None:
        raise InputError(f"{options.source}: want --int{bits} DIR for a checkpoint of {bits} bits")
    export_compressed_tensors(options.source, destination)
    print(f"{destination}: written")


def _add_verify_files(commands):
    parser = _command(commands, "verify-files", _verify_files, "A quantized checkpoint against its "
                      "provenance: every tensor's sha256; that a twin has the same source; that a "
                      "source gives these bytes. Exit 0: it does, 1: it does not.")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--twin", metavar="DIR2")
    parser.add_argument("--source", metavar="SRC")


def _verify_files(options):
    from .verify_files import verify_files

    faults = verify_files(options.directory, options.twin, options.source)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{options.directory}: every tensor is as its provenance says")
    return 1 if faults else 0


# ---- logits and traces -----------------------------------------------------------------------


def _add_logits(commands):
    parser = _command(commands, "logits", _logits, "Next-token logits, float32 [T, vocab], as .npy.")
    _add_run(parser)


def _logits(options):
    output, ids = _check_output(options.output), _ids(options)
    logits = _load(options).forward(ids, chunk=options.chunk)
    partial = output.with_name(output.name + ".partial")
    try:
        with open(partial, "wb") as file:
            np.save(file, logits)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _add_trace(commands):
    parser = _command(commands, "trace", _trace, "Every module's output, as a safetensors file.")
    _add_run(parser)


def _trace(options):
    from .trace import record_trace

    output, ids = _check_output(options.output), _ids(options)
    record_trace(_load(options), ids, chunk=options.chunk).save(output)


# ---- verify ----------------------------------------------------------------------------------


def _add_verify(commands):
    parser = _command(commands, "verify", _verify, "Two traces compared bit by bit, in the order "
                      "of execution. Exit 0: equal, 1: different, 2: unusable.")
    parser.add_argument("reference", metavar="REFERENCE")
    parser.add_argument("candidate", metavar="CANDIDATE")
    parser.add_argument("--json", action="store_true")


def _verify(options):
    from .trace import Trace
    from .verify import compare

    result = compare(Trace.load(options.reference), Trace.load(options.candidate))
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _print_comparison(result)
    return 0 if result.equal else 1


def _print_comparison(result):
    if result.missing or result.unknown:
        print(f"not compared: {len(result.missing)} tensors that only the reference has, "
              f"{len(result.unknown)} that only the candidate has")
    if result.equal:
        print(f"equal: {len(result.compared)} tensors, every bit")
        return
    print(f"different: {len(result.differences)} of {len(result.compared)} tensors; the first:")
    print(result.differences[0])


# ---- generate --------------------------------------------------------------------------------


def _add_generate(commands):
    parser = _command(commands, "generate", _generate, "Continue a text, or token ids.")
    _add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("--ids", metavar='"1 2 3"')
    _add_arithmetic(parser)
    parser.add_argument("-n", "--predict", type=_positive, default=128, metavar="N",
                        help="tokens at most (default: 128)")
    parser.add_argument("--temp", type=float, default=0.0, metavar="T",
                        help="0: the likeliest token each time (default)")
    parser.add_argument("-s", "--seed", type=int, default=1729, metavar="SEED")


def _generate(options):
    from .generate import generate
    from .ids import parse_ids
    from .sampling import Sampler
    from .tokenizer import Tokenizer

    sampler = Sampler(temperature=options.temp, seed=options.seed)
    model = _load(options)
    tokenizer = None
    if options.prompt is not None:
        tokenizer = Tokenizer.open(options.model)
        ids = tokenizer.encode(options.prompt)
        print(options.prompt, end="", flush=True)
    else:
        ids = parse_ids(options.ids, "--ids")
    end_ids = tokenizer.end_ids if tokenizer else model.config.eos_token_ids
    for token in generate(model, ids, options.predict, sampler, end_ids, tokenizer=tokenizer):
        print(token.text if tokenizer else f"{token.id} ", end="", flush=True)
    print()


# ---- bench -----------------------------------------------------------------------------------


def _lengths(text):
    values = [int(word) for word in text.split(",")]
    if min(values) < 0:
        raise ValueError
    return values


def _positives(text):
    return [_positive(word) for word in text.split(",")]


_lengths.__name__, _positives.__name__ = "list of lengths", "list of positive integers"


def _add_bench(commands):
    parser = _command(commands, "bench", _bench, "Tokens a second, as llama-bench measures them, "
                      "and how much of this machine that is. -p, -n and -t take lists: 1,2.")
    parser.add_argument("-m", "--model", required=True, metavar="MODEL")
    parser.add_argument("-p", "--n-prompt", type=_lengths, default=[512], metavar="N",
                        help="prompt tokens (default: 512; 0: none)")
    parser.add_argument("-n", "--n-gen", type=_lengths, default=[64], metavar="N",
                        help="generated tokens (default: 64; 0: none)")
    parser.add_argument("-t", "--threads", type=_positives, default=[None], metavar="N",
                        help="default: physical cores")
    parser.add_argument("-r", "--repetitions", type=_positive, default=5, metavar="N")
    parser.add_argument("--arithmetic", choices=("locked", "locked-kv16"), default="locked")
    parser.add_argument("--chunk", type=_positive, metavar="N", help="prompt tokens at a time")
    parser.add_argument("-o", "--output", choices=("md", "json", "csv"), default="md")
    parser.add_argument("--plot", metavar="FILE", help="draw tokens/s against context length, as "
                        ".png or .svg")
    parser.add_argument("-c", "--max-depth", type=_positive, default=4096, metavar="N",
                        help="longest context of the plot (default: 4096)")


def _bench(options):
    from . import bench

    depths = [0]
    if options.plot:
        bench.check_plot(_check_output(options.plot))
        depths = bench.plot_depths(options.max_depth)
    results = bench.run(options.model, options.n_prompt, options.n_gen, options.threads,
                        options.repetitions, options.chunk, depths, options.arithmetic)
    write = {"md": bench.as_markdown, "json": bench.as_json, "csv": bench.as_csv}
    print(write[options.output](results))
    if options.plot:
        bench.plot(results, options.plot)


# ---- demo ------------------------------------------------------------------------------------


def _add_demo(commands):
    _command(commands, "demo", _demo, "The embedded model, end to end: quantize, continue a "
             "prompt, check the bits.")


def _demo(options):
    from .demo import demo

    return 0 if demo(print) else 1
