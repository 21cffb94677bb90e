"""A reference and what is held against it: what `pyengine verify` and the pytest plugin share."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..model import load
from ..trace import LLAMA_CPP, Trace, record_trace
from .budget import FACTOR, Budget, measure
from .judge import EXACT, Verdict, judge, judge_bits, judge_traces
from .llama_cpp import to_hugging_face
from .rounding import DTYPES

BUDGETS = (EXACT, *DTYPES)


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
    arithmetic  of the reference made for a comparison in bits; budgets are about float64
    """

    def __init__(self, reference: Trace | str | Path | None = None, model=None,
                 arithmetic: str = "float64"):
        if reference is None and model is None:
            raise InputError("oracle: want a reference or a model, got neither")
        self.reference = reference
        if reference is not None and not isinstance(reference, Trace):
            self.reference = Trace.load(reference)
        self.path, self.arithmetic = model, arithmetic
        self.model = None if model is None else load(model, "float64")
        self._budgets: dict[tuple, Budget] = {}

    def trace(self, ids) -> Trace:
        """The reference's trace: the one given, or the model's for these ids."""
        if self.reference is not None:
            return self.reference
        model = self.model
        if self.arithmetic != model.arithmetic:
            model = load(self.path, self.arithmetic, check=False)
        try:
            return record_trace(model, ids)
        except InputError as error:
            raise InputError(f"input_ids: {error}") from None

    def budget(self, dtype: str, candidate: Trace, factor: float = FACTOR) -> Budget:
        """The budget of a dtype for this candidate's ids and tensors; measured once."""
        if self.model is None:
            raise InputError(f"budget {dtype}: want the model to compute it with, got a trace alone")
        key = dtype, factor, candidate.ids.tobytes(), tuple(candidate.tensors)
        if key not in self._budgets:
            self._budgets[key] = measure(self.model, candidate.ids, dtype, candidate.tensors, factor)
        return self._budgets[key]

    def candidate(self, trace: Trace | str | Path) -> Trace:
        """A trace or its file, with Hugging Face's names."""
        trace = trace if isinstance(trace, Trace) else Trace.load(trace)
        if trace.names != LLAMA_CPP:
            return trace
        if self.model is None:
            raise InputError("candidate: want the model, to turn llama.cpp's names and head order, "
                             "got a trace alone")
        return to_hugging_face(trace, self.model.config)

    def verify(self, candidate: Trace | str | Path, budget: Budget | str = EXACT) -> Verdict:
        """budget: one of BUDGETS, the path of a budget that was saved, or a Budget.

        Errors: InputError: other ids, nothing in common, a budget that needs the model or is another
        run's; FileFormatError.
        """
        candidate = self.candidate(candidate)
        if budget == EXACT:
            return judge_bits(self.trace(candidate.ids), candidate, self.model)
        if not isinstance(budget, Budget):
            budget = (self.budget(budget, candidate) if budget in DTYPES
                      else Budget.load(budget))
        if self.model is None:
            return judge_traces(self.reference, candidate, budget)
        return judge(self.model, candidate, budget)
