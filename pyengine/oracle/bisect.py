"""Runs an engine again and again, each time asking for the tensors that narrow an error most.

The engine is a command.  It gets in its environment

    PYENGINE_IDS      the token ids to run, between spaces
    PYENGINE_TENSORS  the tensors wanted, between newlines: Hugging Face's module paths
    PYENGINE_TRACE    the file to write a trace to (oracle/trace.py; oracle/dumpers has writers)

It may write more tensors than it is asked for.  The first run asks for lm_head, the next ones for what the
verdict names, together with all that were asked for before: so one trace holds everything that is known.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError, PyengineError
from .budget import FACTOR
from .dataflow import HEAD
from .diagnose import SECONDS
from .nearest import likely_budget
from .oracle import Oracle
from .trace import Trace
from .verdict import GUILTY, Verdict
from .widths import widths

IDS, TENSORS, TRACE = "PYENGINE_IDS", "PYENGINE_TENSORS", "PYENGINE_TRACE"
MOST_RUNS = 8
MOST_IDS = 10_000  # Linux takes 128 KiB in one variable
SHOWN = 200  # characters of the command's last line


@dataclass(frozen=True)
class Step:
    """One run of the engine: what was asked for, and what was said of it."""

    asked: list[str]
    verdict: Verdict


def bisect(
    oracle: Oracle,
    ids,
    command: Sequence[str],
    budget: str | None = None,
    *,
    factor: float = FACTOR,
    seconds: float = SECONDS,
    names: str | None = None,
    keep: str | Path | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[Step]:
    """-> the runs.  The last one's verdict is ok, or accuses one module, or has nothing left to ask for.

    budget: one of DTYPES; None: the one that the first trace's words or values suggest.
    names: whose names the engine writes, if its traces do not say so.  keep: a file for the last trace.
    Errors: InputError: the command fails, writes no trace, or another run's; as of Oracle.verify.
    """
    if len(ids) > MOST_IDS:
        raise InputError(f"ids: want at most {MOST_IDS} for one variable of the environment, got {len(ids)}")
    wanted, steps = [HEAD], []
    with tempfile.TemporaryDirectory(prefix="pyengine-bisect-") as directory:
        while True:
            path = Path(directory) / f"run{len(steps) + 1}.safetensors"
            trace = _trace_of(oracle, command, ids, wanted, path, names)
            budget = budget or likely_budget(trace)
            verdict = _verdict(oracle, trace, budget, factor, 0)
            asked = _next(verdict, wanted)
            last = verdict.ok or not asked or len(steps) + 1 == MOST_RUNS
            if last and not verdict.ok:  # the search for the mistake, once
                verdict = _verdict(oracle, trace, budget, factor, seconds)
            steps.append(Step(list(wanted), verdict))
            if on_step is not None:
                on_step(steps[-1])
            if last:
                if keep is not None:
                    trace.save(keep)
                return steps
            wanted = _in_order(oracle, {*wanted, *asked})


def _verdict(oracle, trace, budget, factor, seconds):
    measured = oracle.budget(budget, oracle.candidate(trace, True), factor)
    return oracle.verify(trace, measured, allow_unknown=True, seconds=seconds)


def _next(verdict, wanted) -> list[str]:
    """What to ask for: what the verdict says, as far as it was not asked for."""
    accused = verdict.accused
    if accused is None:
        return []
    more = verdict.next if accused.status != GUILTY or verdict.between else []
    return [name for name in more or verdict.between if name not in wanted]


def _in_order(oracle, names):
    return [name for name in widths(oracle.model.config) if name in names]


# ---- running the command -----------------------------------------------------------------------


def _trace_of(oracle, command, ids, wanted, path, names) -> Trace:
    environment = {
        **os.environ,
        IDS: " ".join(str(int(i)) for i in ids),
        TENSORS: "\n".join(wanted),
        TRACE: str(path),
    }
    try:
        run = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except OSError as error:
        raise InputError(f"{command[0]}: want a command that runs, got {error.strerror}") from None
    if run.returncode:
        raise InputError(f"{command[0]}: want exit code 0, got {run.returncode}{_last_line(run.stderr)}")
    if not path.is_file():
        raise InputError(
            f"{command[0]}: want a trace in the file of {TRACE}, got none{_last_line(run.stderr)}"
        )
    try:
        trace = replace(Trace.load(path, names), path="")
        candidate = oracle.candidate(trace, True)
    except PyengineError as error:
        text = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{command[0]}: its trace: {text}") from None
    _check(command, candidate, ids, wanted, oracle)
    return trace


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").split("\n")
    text = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {''.join(c if c.isprintable() else '?' for c in text[:SHOWN])}" if text else ""


def _check(command, trace, ids, wanted, oracle):
    """InputError unless it is of these ids, holds what was asked for, and in the model's shapes."""
    if trace.ids.tolist() != [int(i) for i in ids]:
        raise InputError(f"{command[0]}: want a trace of the {len(ids)} ids of {IDS}, got one of others")
    missing = [name for name in wanted if name not in trace.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{command[0]}: want {missing[0]}{more} of {TENSORS} in its trace, got none")
    sizes = widths(oracle.model.config)
    for name in wanted:
        held, width = trace.tensors[name], sizes[name]
        if name not in trace.columns and held.shape[-1] != width:
            raise InputError(f"{command[0]}: want {width} features of {name}, got shape {list(held.shape)}")
