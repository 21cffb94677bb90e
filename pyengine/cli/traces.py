"""logits, trace and verify: the oracle."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np

from .options import add_ids_run, check_output, load_model, new_command, read_ids_option


def add_commands(commands):
    _add_logits(commands)
    _add_trace(commands)
    _add_verify(commands)


def _add_logits(commands):
    parser = new_command(commands, "logits", _logits, "Next-token logits, float32 [T, vocab], as .npy.")
    add_ids_run(parser)


def _logits(options):
    output, ids = check_output(options.output), read_ids_option(options)
    logits = load_model(options).forward(ids, chunk=options.chunk)
    partial = output.with_name(output.name + ".partial")
    try:
        with open(partial, "wb") as file:
            # Given the file itself, NumPy writes past Python and loses the error of a full disk.
            np.save(SimpleNamespace(write=file.write), logits)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _add_trace(commands):
    parser = new_command(commands, "trace", _trace, "Every module's output, as a safetensors file.")
    add_ids_run(parser)


def _trace(options):
    from ..trace import record_trace

    output, ids = check_output(options.output), read_ids_option(options)
    record_trace(load_model(options), ids, chunk=options.chunk).save(output)


def _add_verify(commands):
    parser = new_command(commands, "verify", _verify, "Two traces compared bit by bit, in the order "
                      "of execution. Exit 0: equal, 1: different, 2: unusable.")
    parser.add_argument("reference", metavar="REFERENCE")
    parser.add_argument("candidate", metavar="CANDIDATE")
    parser.add_argument("--json", action="store_true")


def _verify(options):
    from ..trace import Trace
    from ..verify import compare

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
