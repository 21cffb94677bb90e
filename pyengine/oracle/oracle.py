"""A reference that judges candidates: the part that `pyengine verify` and the pytest plugin share."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import InputError, quote
from ..ids import as_ids
from ..load import ARITHMETICS, load
from .added import blocks_alone, who_adds
from .bits import check_ids
from .budget import FACTOR, Budget, measure
from .dataflow import module_inputs
from .diagnose import SECONDS
from .floor import with_floor
from .judge import first_in_bits, judge, judge_bits, judge_traces, unchecked
from .memories import with_memories
from .name_map import name_map
from .names import check_names
from .nearest import nearest_budget, other_arithmetic
from .pre_built import budgets_of, judge_pre_built
from .recorders.llama_cpp import modules_of, to_hugging_face
from .rounding import PARTS, is_arithmetic
from .trace import LLAMA_CPP, Trace, record_trace
from .verdict import DIFFERENT, EXACT, OK, Added, Verdict
from .widths import state_inputs, widths

BUDGETS = (EXACT, *PARTS)


def is_model(path) -> bool:
    """A checkpoint directory or a GGUF, not a trace."""
    path = Path(path)
    if path.is_dir():
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


class Oracle:
    """A model, a reference trace, or both, to judge candidates by.

    reference   a trace or its file, or None: made of the model, for each candidate's ids
    model       a GGUF file or checkpoint directory, or None: nothing is run again then
    arithmetic  of the reference made for a comparison in bits: "locked", "locked-kv16" or "float64"; None:
                the one that the candidate's trace names, else float64.  Budgets are about float64
    """

    def __init__(
        self,
        reference: Trace | str | Path | None = None,
        model: str | Path | None = None,
        arithmetic: str | None = None,
    ):
        if reference is None and model is None:
            raise InputError("oracle: want a reference or a model, got neither")
        self.reference = None if reference is None else _as_trace(reference, "reference")
        self.pre_built = budgets_of(reference) if isinstance(reference, (str, Path)) else {}
        if model is not None and not isinstance(model, (str, Path)):
            raise InputError(f"model: want a path, got {type(model).__name__}")
        if arithmetic not in (None, *ARITHMETICS):
            raise InputError(f"arithmetic: want {' or '.join(ARITHMETICS)}, got {arithmetic!r}")
        self.path, self.arithmetic = model, arithmetic
        self.model = None if model is None else load(model, "float64")
        self._budgets: dict[tuple, Budget] = {}

    def trace(self, ids, arithmetic: str | None = None, states=()) -> Trace:
        """The reference's trace: the one given, or the model's for these ids.  states: as `record_trace`."""
        if self.reference is not None:
            return self.reference
        model, arithmetic = self.model, arithmetic or self.arithmetic or "float64"
        if arithmetic != model.arithmetic:
            model = load(self.path, arithmetic, check=False)
        return record_trace(model, ids, states=states)

    def budget(self, dtype: str, candidate: Trace, factor: float = FACTOR) -> Budget:
        """The budget of a dtype for this candidate's ids and tensors; measured once."""
        if self.model is None:
            raise InputError(f"budget {dtype}: want the model to compute it with, got a trace alone")
        alone = candidate.last_row_alone()
        parts = candidate.parts_key()
        key = dtype, factor, np.asarray(candidate.ids).tobytes(), tuple(candidate.tensors), alone, parts
        if key not in self._budgets:
            self._budgets[key] = measure(
                with_memories(self.model, candidate.tensors),
                candidate.ids,
                dtype,
                candidate.tensors,
                factor,
                last_row_alone=alone,
                like=candidate,
            )
        return self._budgets[key]

    def needs_model(self, budget: str) -> bool:
        """Whether a budget has to be measured: a reference made beforehand brings its own."""
        return self.model is not None or not self.pre_built

    def candidate(self, trace: Trace | str | Path, allow_unknown: bool = False) -> Trace:
        """A trace or its file, with Hugging Face's names, as it can be compared.

        Errors: FileFormatError, InputError: another count of rows, names that the reference does not know,
        unless allow_unknown.
        """
        trace = _as_trace(trace, "candidate")
        with _in_file(trace):
            return self._with_known_names(trace, allow_unknown)

    def _with_known_names(self, trace, allow_unknown):
        trace, _ = self._renamed(trace)
        if self.model is not None:
            _check_vocabulary(trace.ids, self.model)
        if not allow_unknown:
            check_names(trace.tensors, self._names())
        return trace

    def _renamed(self, trace) -> tuple[Trace, list[str]]:
        """-> the trace with Hugging Face's names; the tensors that no module has."""
        if trace.names == LLAMA_CPP:
            if self.model is None:
                raise InputError(
                    "candidate: want the model, to turn llama.cpp's names and head order, got a trace alone"
                )
            config = self.model.config
            return to_hugging_face(trace, config), [n for n in trace.tensors if not modules_of(n, config)]
        if not trace.names:
            return trace, []
        return name_map(trace.names).apply(trace, self._sizes())

    def _sizes(self) -> dict[str, int]:
        """The features of each tensor that the reference has."""
        if self.model is not None:
            return widths(self.model.config)
        tokens = len(self.reference.ids)
        whole = next((budget.sizes for budget in self.pre_built.values()), {})  # the trace has a part of them
        return {
            name: whole[name] // tokens if name in whole else array.shape[-1]
            for name, array in self.reference.tensors.items()
        }

    def _names(self):
        if self.model is None:
            return self.reference.tensors
        return {**module_inputs(self.model.config), **state_inputs(self.model.config)}

    def verify(
        self,
        candidate: Trace | str | Path,
        budget: Budget | str | Path = EXACT,
        *,
        allow_unknown: bool = False,
        seconds: float = SECONDS,
        floor: Trace | str | Path | None = None,
        added: bool = False,
    ) -> Verdict:
        """budget: one of BUDGETS, several joined by `+`, the path of a budget that was saved, or a Budget.

        allow_unknown: names that the reference does not know are left out, and listed in the verdict.
        seconds: that the search for a known mistake may take.
        floor: a trace of the same engine and the unquantized model: its errors are subtracted.
        added: say which block adds the error, which measures a second budget.
        Errors: InputError: other ids, nothing in common, names that the reference does not know, a budget
        that needs the model or is another run's; FileFormatError.
        """
        budget = as_budget(budget)
        given = _as_trace(candidate, "candidate")
        with _in_file(given):
            return self._verify(given, budget, allow_unknown, seconds, floor, added)

    def _verify(self, given, budget, allow_unknown, seconds, floor, added) -> Verdict:
        candidate = self.candidate(given, allow_unknown)
        if (floor is not None or added) and (budget == EXACT or self.model is None):
            wanted = "floor" if floor is not None else "added"
            got = "a comparison in bits" if self.model else "a trace alone"
            raise InputError(f"{wanted}: want a budget and the model, got {got}")
        if budget == EXACT:
            verdict = self._verify_bits(candidate)
        else:
            floor = None if floor is None else self.candidate(floor, allow_unknown)
            verdict = self._verify_within(candidate, budget, seconds, floor, added)
        return replace(verdict, unknown=[*verdict.unknown, *self._renamed(given)[1]])

    def _verify_within(self, candidate, budget, seconds, floor, added) -> Verdict:
        if self.model is None and self.pre_built and not isinstance(budget, Budget):
            return self._verify_pre_built(candidate, budget)
        if not isinstance(budget, Budget):
            budget = self.budget(budget, candidate)
        budget = budget.with_resolution(candidate.resolution)
        if self.reference is not None:
            check_ids(self.reference, candidate)
        if self.model is None:
            verdict = judge_traces(self.reference, candidate, budget)
        else:
            verdict = self._verify_with_model(candidate, budget, seconds, floor)
            if added:
                verdict = replace(verdict, added=self._added(candidate, budget, seconds, floor))
        hints = (
            [] if verdict.ok else other_arithmetic(candidate, budget.dtype) + _at_a_step(candidate, verdict)
        )
        return replace(verdict, hints=hints)

    def _verify_with_model(self, candidate, budget, seconds, floor, blame=True) -> Verdict:
        model, found = with_memories(self.model, candidate.tensors), None
        if floor is not None:
            budget, found = with_floor(model, candidate, budget, floor, seconds)
        return replace(judge(model, candidate, budget, seconds, blame), floor=found)

    def _added(self, candidate, budget, seconds, floor) -> Added:
        """Which block adds the error, by a budget of what blocks put out alone."""
        alone = blocks_alone(candidate, self.model.config.num_hidden_layers)
        if not alone.tensors:
            raise InputError("added: want outputs of layers, mixers or MLPs in the trace, got none")
        allowed = self.budget(budget.dtype, alone, budget.factor).with_resolution(candidate.resolution)
        judged = self._verify_with_model(alone, allowed, seconds, floor, blame=False)
        return who_adds(self.model, alone, judged, allowed)

    def _verify_pre_built(self, candidate, dtype) -> Verdict:
        if dtype not in self.pre_built:
            raise InputError(
                f"budget: want one that the reference has, {', '.join(self.pre_built)}, got {dtype}"
            )
        check_ids(self.reference, candidate)
        verdict = judge_pre_built(self.reference, candidate, self.pre_built[dtype], candidate.resolution)
        hints = [] if verdict.ok else other_arithmetic(candidate, dtype)
        return replace(verdict, hints=[*verdict.hints, *hints])

    def _verify_bits(self, candidate) -> Verdict:
        """Equal bits, or how far off by which budget: nothing is accused, as no budget was asked for."""
        theirs = candidate.arithmetic if candidate.arithmetic in ARITHMETICS else None
        reference = self.trace(candidate.ids, self.arithmetic or theirs, candidate.tensors.keys())
        verdict = judge_bits(reference, candidate)
        if self.model is None:
            return verdict
        verdict = replace(
            verdict, unchecked=unchecked([row.name for row in verdict.rows], module_inputs(self.model.config))
        )
        if verdict.ok:
            return verdict
        nearest, judged = nearest_budget(candidate, lambda dtype: self._judge_without_blame(candidate, dtype))
        rows = {row.name: row for row in judged.rows}
        return replace(
            verdict,
            rows=[_in_bits(rows[row.name], row) if row.name in rows else row for row in verdict.rows],
            flips=judged.flips,
            rerun=True,
            nearest=nearest,
            logits=judged.logits,
            hints=[] if self.reference is None else [self._where_bits_part(verdict, nearest)],
        )

    def _where_bits_part(self, verdict, nearest) -> str:
        """Two traces of one engine, alone and in a batch, are to be equal in bits: what is not, first."""
        name, between = first_in_bits(verdict, module_inputs(self.model.config))
        where = f"bits part in {name}, whose inputs are equal"
        if between:
            where = f"bits part in {name}, or before it: {len(between)} tensors are not compared"
        if not nearest.within:
            return where
        return f"{where}; within rounding: another order of a sum, or another kernel, by size of batch?"

    def _judge_without_blame(self, candidate, dtype) -> Verdict:
        model = with_memories(self.model, candidate.tensors)
        budget = self.budget(dtype, candidate).with_resolution(candidate.resolution)
        return judge(model, candidate, budget, blame=False)


def _in_bits(judged, row):
    """A row with the shares of a budget, and the status and the difference of the bits."""
    status = DIFFERENT if row.difference else OK
    return replace(judged, status=status, difference=row.difference, token=row.token, place=None)


def _at_a_step(candidate, verdict) -> list[str]:
    """A line if the error begins where the run's next step begins: a decoded token, a piece of the prompt."""
    row = verdict.accused or verdict.first
    starts = np.cumsum(candidate.steps)[:-1].tolist() if candidate.steps else []
    if row is None or row.token not in starts:
        return []
    step = starts.index(row.token) + 1
    return [
        f"token {row.token} begins step {step + 1} of {len(candidate.steps)}, of {candidate.steps[step]} "
        "tokens: look at what one step hands on to the next"
    ]


def _check_vocabulary(ids, model) -> None:
    try:
        as_ids(ids, model.config.vocab_size)
    except InputError as error:
        raise InputError(f"input_ids: {error}") from None


@contextlib.contextmanager
def _in_file(trace):
    """Messages about a trace name its file."""
    try:
        yield
    except InputError as error:
        if trace.path and not str(error).startswith(("budget", "candidate", trace.path)):
            raise InputError(f"{trace.path}: {error}") from None
        raise


def _as_trace(trace, what) -> Trace:
    if isinstance(trace, Trace):
        return trace.with_rows()
    if not isinstance(trace, (str, Path)):
        raise InputError(
            f"{what}: want a Trace, or the path of one, got {type(trace).__name__}: "
            "Trace(ids, {name: array}) makes one"
        )
    return Trace.load(trace)


def as_budget(budget) -> Budget | str:
    """A Budget, or a name of BUDGETS or of several.  Errors: InputError, FileFormatError: of its file."""
    if isinstance(budget, Budget) or budget == EXACT or is_arithmetic(budget):
        return budget
    if isinstance(budget, (str, Path)) and Path(budget).is_file():
        return Budget.load(budget)
    raise InputError(
        f"budget: want {', '.join(BUDGETS)}, several joined by +, or the file of one that was saved, "
        f"got {quote(budget)}"
    )
