"""An assertion that says which operation went wrong."""

from __future__ import annotations

from ..oracle.check import Oracle
from ..oracle.judge import EXACT, Verdict
from ..oracle.report import as_text


def assert_trace_equal(candidate, reference=None, *, model=None, budget=EXACT, oracle=None) -> Verdict:
    """AssertionError with the table of `pyengine verify` unless the candidate is within the budget.

    candidate   a Trace or the path of one; also with part of the tensors
    reference   a Trace or its path, or None: made of the model for the candidate's ids
    model       a GGUF or checkpoint directory: for what it costs to say which operation is guilty
    budget      "exact", "float32", "bfloat16", "float16", "int8-activations", a Budget or a file of one
    oracle      an Oracle that is there already (the fixture's), in place of reference and model
    Errors: InputError, FileFormatError: what cannot be compared.
    """
    __tracebackhide__ = True
    verdict = (oracle or Oracle(reference, model)).verify(candidate, budget)
    if not verdict.ok:
        raise AssertionError(as_text(verdict))
    return verdict
