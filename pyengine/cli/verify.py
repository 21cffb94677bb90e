"""verify: a candidate's trace against a reference."""

from __future__ import annotations

import argparse
import json

from ..errors import InputError
from ..files.whole import write_text
from ..load import ARITHMETICS
from ..oracle.report.html import as_html
from ..oracle.report.junit import as_junit
from ..oracle.report.markdown import as_markdown
from ..oracle.report.plot import plot
from ..oracle.trace import Trace
from .options import check_output, new_command


def add_commands(commands):
    from ..oracle.budget import FACTOR
    from ..oracle.diagnose import SECONDS
    from ..oracle.oracle import BUDGETS

    parser = new_command(
        commands,
        "verify",
        _verify,
        "Compare a candidate's trace with a reference, in the order of execution: which tensor differs "
        "first, which operation is to blame, what mistake it looks like. Exit 0: equal in bits, or within "
        "the --budget; 1: not; 2: unusable input. Without --budget, bits are compared and nothing is "
        "blamed: the exit code is 1 unless they are equal, and the verdict names the budget that the "
        "candidate is within.",
    )
    parser.add_argument(
        "reference",
        metavar="REFERENCE",
        help="a trace, a file of `pyengine reference`, or a MODEL: run on the candidate's ids",
    )
    parser.add_argument(
        "candidate", metavar="CANDIDATE", help="a trace, also of some tensors: of lm_head alone, of layers"
    )
    parser.add_argument(
        "--budget",
        metavar="B",
        help=f"the error that rounding alone explains: {', '.join(BUDGETS)}; several joined by + "
        "(fp8+fp8-activations+bfloat16); or a FILE of --write-budget (default: exact, or the first that a "
        "REFERENCE brings). A budget takes 9 runs of the reference; without --budget, a "
        "candidate that is not bit-equal is tried with one budget, or with the wider ones that it may be "
        "within",
    )
    parser.add_argument(
        "--factor",
        type=_factor,
        metavar="X",
        help=f"of the measured spread that is allowed (default: {FACTOR:g})",
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="the model behind a REFERENCE that is a trace: for budgets and blame",
    )
    parser.add_argument(
        "--arithmetic",
        choices=ARITHMETICS,
        help="of a MODEL's trace, compared in bits (default: the one that the candidate's trace names, else "
        "float64)",
    )
    add_names(parser)
    parser.add_argument(
        "--allow-unknown",
        action="store_true",
        help="leave out tensors whose names the reference does not know, and list them",
    )
    parser.add_argument(
        "--search-seconds",
        type=_seconds,
        default=SECONDS,
        metavar="S",
        help="for the search for a known mistake (default: %(default)g; 0: none), and as long for choices of "
        "experts that the trace does not hold. Each of about 150 mistakes takes a run of the reference from "
        "the last layer in the trace to the wrong tensor, most of them on a few tokens; mistakes in a state "
        "that is carried on take up to 8 runs",
    )
    parser.add_argument(
        "--floor",
        metavar="TRACE",
        help="of the same engine and the unquantized model, with the CANDIDATE's ids and tensors: its errors "
        "are subtracted, so that what is left is the quantization's",
    )
    parser.add_argument(
        "--added",
        action="store_true",
        help="say which block adds the error (mixer, MLP, residual of each layer), which inherits it, and "
        "how much of it is the routing's: 9 more runs of the reference",
    )
    parser.add_argument("--write-budget", metavar="FILE", help="keep the budget as JSON")
    parser.add_argument("--all", action="store_true", help="every tensor in the table")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON, on standard output")
    parser.add_argument("--junit", metavar="FILE", help="JUnit XML, one test case per tensor")
    parser.add_argument("--markdown", metavar="FILE", help="a summary for a pull request")
    parser.add_argument("--plot", metavar="FILE", help="error by layer, as .png or .svg")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="one page for a browser: errors by layer, token and module, and the rest",
    )


def add_names(parser):
    from ..oracle.trace import NAMES

    parser.add_argument(
        "--names",
        metavar="N",
        help=f"whose names the candidate's tensors have: {', '.join(NAMES[1:])}, or the FILE of a map "
        "(default: what the trace says, else Hugging Face's)",
    )


def arithmetic(text: str) -> str:
    """An option's value: a budget that is measured."""
    from ..oracle.rounding import PARTS, is_arithmetic

    if not is_arithmetic(text):
        raise argparse.ArgumentTypeError(
            f"want {', '.join(PARTS)}, or several joined by +, got {text[:40]!r}"
        )
    return text


def _factor(text):
    value = float(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"want a number from 1 on, got {text!r}")
    return value


def _seconds(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"want a number of seconds, got {text!r}")
    return value


def _verify(options):
    from ..oracle.report import text as report
    from ..plots import check_plot

    for path in (options.junit, options.markdown, options.plot, options.html, options.write_budget):
        if path:
            check_output(path)
    if options.plot:
        check_plot(options.plot)
    if options.budget is None:
        options.budget = _default_budget(options)
    _check_verify(options)
    verdict = _judged(options)
    if options.junit:
        write_text(options.junit, as_junit(verdict))
    if options.markdown:
        write_text(options.markdown, as_markdown(verdict))
    if options.plot:
        plot(verdict, options.plot)
    if options.html:
        files = {"reference": options.reference, "candidate": options.candidate}
        write_text(options.html, as_html(verdict, _again(options), files))
    print(json.dumps(verdict.as_dict(), indent=2) if options.json else report.as_text(verdict, options.all))
    return 0 if verdict.ok else 1


def _again(options) -> list[str]:
    """The command that repeats the verdict."""
    command = ["pyengine", "verify", options.reference, options.candidate, "--budget", options.budget]
    for option, value in (
        ("--factor", options.factor),
        ("--model", options.model),
        ("--names", options.names),
        ("--arithmetic", options.arithmetic),
        ("--floor", options.floor),
    ):
        command += [option, str(value)] if value else []
    return command + ["--allow-unknown"] * options.allow_unknown + ["--added"] * options.added


def _default_budget(options) -> str:
    """exact, or the first that a reference has which was made beforehand."""
    from ..oracle.oracle import is_model
    from ..oracle.pre_built import budgets_of

    if is_model(options.reference) or options.model:
        return "exact"
    Trace.load(options.reference)  # its errors name the kind of the file
    return next(iter(budgets_of(options.reference)), "exact")


def _check_verify(options):
    """Options that do not go together, and a budget that is none."""
    from ..oracle.oracle import as_budget
    from ..oracle.rounding import PARTS, is_arithmetic

    try:
        as_budget(options.budget)
    except InputError as error:
        raise InputError(f"--{error}") from None
    if not is_arithmetic(options.budget) and (options.write_budget or options.factor):
        option = "--write-budget" if options.write_budget else "--factor"
        raise InputError(f"{option}: want --budget {' or '.join(PARTS)}, got {options.budget}")
    if options.arithmetic and options.budget != "exact":
        raise InputError(
            f"--arithmetic: want --budget exact, got {options.budget}: budgets are distances from float64"
        )


def _judged(options):
    from ..oracle.budget import FACTOR
    from ..oracle.oracle import Oracle, is_model
    from ..oracle.rounding import is_arithmetic

    of_model = is_model(options.reference)
    given = Trace.load(options.candidate, options.names)
    if of_model:
        oracle = Oracle(None, options.reference, options.arithmetic)
    else:
        oracle = Oracle(options.reference, options.model)
    budget = options.budget
    if is_arithmetic(budget) and oracle.needs_model(budget):
        candidate = oracle.candidate(given, options.allow_unknown)
        budget = oracle.budget(budget, candidate, options.factor or FACTOR)
    elif options.factor or options.write_budget:
        option = "--write-budget" if options.write_budget else "--factor"
        raise InputError(
            f"{option}: want a model to measure the budget with, got a reference that brings its own"
        )
    verdict = oracle.verify(
        given,
        budget,
        allow_unknown=options.allow_unknown,
        seconds=options.search_seconds,
        floor=None if options.floor is None else Trace.load(options.floor),
        added=options.added,
    )
    if options.write_budget:
        budget.save(options.write_budget)
    return verdict
