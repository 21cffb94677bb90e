"""An assertion that says which operation went wrong."""

from __future__ import annotations

from ...oracle.oracle import Oracle
from ...oracle.report.text import as_text
from ...oracle.verdict import EXACT, Verdict


def assert_trace_equal(
    candidate, reference=None, *, model=None, budget=EXACT, oracle=None, allow_unknown=False
) -> Verdict:
    """AssertionError with the table of `pyengine verify` unless the candidate is within the budget.

    candidate   a Trace or the path of one; also with part of the tensors
    reference   a Trace or its path, or None: made of the model for the candidate's ids
    model       a GGUF or checkpoint directory: needed to name the guilty operation; costs reference runs
    budget      "exact", "float32", "bfloat16", "float16", "int8-activations", a Budget or a file of one
    oracle      an Oracle that is there already (the fixture's), in place of reference and model
    allow_unknown  leave out tensors whose names the reference does not know
    Errors: InputError, FileFormatError: a candidate that cannot be compared.
    """
    __tracebackhide__ = True
    verdict = (oracle or Oracle(reference, model)).verify(candidate, budget, allow_unknown=allow_unknown)
    if not verdict.ok:
        raise AssertionError(as_text(verdict))
    return verdict
