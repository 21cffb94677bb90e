"""logits, trace and verify: the oracle."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np

from ..errors import InputError
from ..model import ARITHMETICS
from .options import (add_ids_run, check_output, load_model, new_command, read_ids_option, write_text)


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
    from ..oracle.budget import FACTOR
    from ..oracle.check import BUDGETS

    parser = new_command(
        commands, "verify", _verify, "A candidate's trace against a reference, in the order of "
        "execution: which tensor differs first, which operation is to blame, what mistake it looks "
        "like. Exit 0: equal, or within the budget; 1: not; 2: unusable.")
    parser.add_argument("reference", metavar="REFERENCE", help="a trace, or a MODEL: its trace is then "
                        "made for the candidate's ids")
    parser.add_argument("candidate", metavar="CANDIDATE", help="a trace, also of part of the tensors")
    parser.add_argument("--budget", default="exact", metavar="B", help=f"{', '.join(BUDGETS)} or a "
                        "FILE of --write-budget: what rounding to that dtype alone explains "
                        "(default: exact)")
    parser.add_argument("--factor", type=_factor, metavar="X", help="of the measured spread that is "
                        f"allowed (default: {FACTOR:g})")
    parser.add_argument("-m", "--model", metavar="MODEL", help="the model behind a REFERENCE that is a "
                        "trace: for budgets and blame")
    parser.add_argument("--arithmetic", choices=ARITHMETICS, help="of a MODEL's trace, compared in "
                        "bits (default: float64)")
    parser.add_argument("--write-budget", metavar="FILE", help="keep the budget as JSON")
    parser.add_argument("--all", action="store_true", help="every tensor in the table")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--junit", metavar="FILE", help="JUnit XML, a test case a tensor")
    parser.add_argument("--markdown", metavar="FILE", help="a summary for a pull request")
    parser.add_argument("--plot", metavar="FILE", help="error by layer, as .png or .svg")


def _factor(text):
    value = float(text)
    if not 1 <= value < float("inf"):
        raise ValueError
    return value


_factor.__name__ = "number from 1 on"


def _verify(options):
    from ..figure import check_plot
    from ..oracle import report
    from ..oracle.check import Oracle, is_model

    for path in (options.junit, options.markdown, options.plot, options.write_budget):
        if path:
            check_output(path)
    if options.plot:
        check_plot(options.plot)
    _check_verify(options)
    if is_model(options.reference):
        oracle = Oracle(None, options.reference, options.arithmetic or "float64")
    else:
        oracle = Oracle(options.reference, options.model)
    candidate = oracle.candidate(options.candidate)
    budget = _budget(options, oracle, candidate)
    verdict = oracle.verify(candidate, budget)
    if options.write_budget:
        budget.save(options.write_budget)
    if options.junit:
        write_text(options.junit, report.as_junit(verdict))
    if options.markdown:
        write_text(options.markdown, report.as_markdown(verdict))
    if options.plot:
        report.plot(verdict, options.plot)
    print(json.dumps(verdict.as_dict(), indent=2) if options.json
          else report.as_text(verdict, options.all))
    return 0 if verdict.ok else 1


def _check_verify(options):
    """Options that do not go together."""
    from ..oracle.rounding import DTYPES

    if options.budget not in DTYPES and (options.write_budget or options.factor):
        option = "--write-budget" if options.write_budget else "--factor"
        raise InputError(f"{option}: want --budget {' or '.join(DTYPES)}, got {options.budget}")
    if options.arithmetic and options.budget != "exact":
        raise InputError(f"--arithmetic: want --budget exact, got {options.budget}: budgets are "
                         "distances from float64")


def _budget(options, oracle, candidate):
    from ..oracle.budget import FACTOR
    from ..oracle.rounding import DTYPES

    if options.budget in DTYPES:
        return oracle.budget(options.budget, candidate, options.factor or FACTOR)
    return options.budget
