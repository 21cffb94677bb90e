"""bisect: run an engine until one module is left."""

from __future__ import annotations

import argparse
import json

from .options import MODEL, add_prompt, check_output, new_command, read_ids_option
from .verify import add_names, arithmetic


def add_commands(commands):
    from ..oracle.diagnose import SECONDS

    parser = new_command(
        commands,
        "bisect",
        _bisect,
        "Run an engine until one module is left. COMMAND is run several times. Its environment has "
        "PYENGINE_IDS, the token ids between spaces; PYENGINE_TENSORS, the tensors wanted, between newlines; "
        "PYENGINE_TRACE, the file to write a trace of them to. `pyengine dumper c` prints a writer "
        "for C and C++, others for Rust, PyTorch and llama.cpp. The first run asks for lm_head alone. "
        "Exit 0: the logits are within the budget; 1: a module is to blame; 2: the command failed, or wrote "
        "no such trace.",
    )
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=MODEL)
    add_prompt(parser)
    _add_judging(parser)
    parser.add_argument(
        "--search-seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help="for the search for a known mistake, after the last run (default: %(default)g)",
    )
    parser.add_argument(
        "-o", "--output", metavar="TRACE", help="keep the last run's trace (default: nothing is kept)"
    )
    parser.add_argument("--html", metavar="FILE", help="the last verdict as a page (default: none)")
    parser.add_argument("--json", action="store_true", help="the runs and the last verdict as JSON")
    parser.add_argument("engine", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the engine, after --")


def _add_judging(parser):
    from ..oracle.rounding import PARTS

    parser.add_argument(
        "--budget",
        type=arithmetic,
        metavar="B",
        help=f"{', '.join(PARTS)}, or several joined by + (default: what the first trace's words or "
        "values suggest)",
    )
    add_names(parser)


def _bisect(options):
    from ..errors import InputError
    from ..oracle.bisect import bisect
    from ..oracle.oracle import Oracle
    from ..oracle.report.html import as_html
    from ..oracle.report.text import as_text

    command = options.engine[1:] if options.engine[:1] == ["--"] else options.engine
    if not command:
        raise InputError("COMMAND: want one after --, got none")
    for path in (options.output, options.html):
        if path:
            check_output(path)
    ids = read_ids_option(options)
    steps = bisect(
        Oracle(None, options.model),
        ids,
        command,
        options.budget,
        seconds=options.search_seconds,
        names=options.names,
        keep=options.output,
        on_step=None if options.json else _show,
    )
    verdict = steps[-1].verdict
    if options.html:
        from ..files.whole import write_text

        write_text(options.html, as_html(verdict, _again(options, command)))
    if options.json:
        runs = [{"asked": step.asked, "ok": step.verdict.ok} for step in steps]
        print(json.dumps({"runs": runs, "verdict": verdict.as_dict()}, indent=2))
    else:
        print(f"\n{as_text(verdict)}")
    return 0 if verdict.ok else 1


def _again(options, command) -> list[str]:
    return ["pyengine", "bisect", "-m", str(options.model), "--", *command]


def _show(step):
    from ..oracle.dataflow import listed

    accused = step.verdict.accused
    found = "within the budget" if accused is None else f"{accused.name} is {accused.status}"
    print(f"asked for {listed(step.asked)}: {found}", flush=True)
