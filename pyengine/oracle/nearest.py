"""The budget that a trace would be within, where none was asked for."""

from __future__ import annotations

import numpy as np

from ..load import ARITHMETICS
from .formats import to_bfloat16, to_float16
from .rerun import is_choice
from .rounding import DTYPES
from .trace import Trace
from .verdict import OK, Nearest, Verdict

_WORDS = {
    "bfloat16": ("bfloat16", "bf16"),
    "float16": ("float16", "fp16", "f16", "half"),
    "int8-activations": ("llama.cpp", "ggml", "int8", "q8_0"),
}
# Words of weights that an engine has quantized itself.
_QUANTIZED = {
    "q4_k": ("q4_k",),
    "int4": ("int4", "4bit", "4-bit", "w4a16", "awq", "gptq"),
    "fp8": ("fp8", "float8", "e4m3"),
}
_FEW = 1 << 16  # values looked at of each tensor
# A candidate this many times beyond the float32 budget is beyond the others as well.
_HOPELESS = {"float32": np.inf, "float16": 2.0**18, "bfloat16": 2.0**21, "int8-activations": 2.0**21}


def likely_budget(candidate: Trace) -> str:
    """By the words of its `arithmetic`, else by its values: those of 16 bits, or float32."""
    words = candidate.arithmetic.lower()
    for dtype, names in _WORDS.items():
        if any(name in words for name in names):
            return dtype
    values = [
        np.asarray(array).reshape(-1)[:_FEW].astype(np.float32)
        for name, array in candidate.tensors.items()
        if np.asarray(array).dtype.kind == "f" and not is_choice(name)
    ]
    for dtype, narrow in (("bfloat16", to_bfloat16), ("float16", to_float16)):
        with np.errstate(all="ignore"):
            same = sum(bool(np.array_equal(narrow(x), x, equal_nan=True)) for x in values)
        if same > len(values) / 2:
            return dtype
    return "float32"


def nearest_budget(candidate: Trace, judged) -> tuple[Nearest, Verdict]:
    """The first budget that the candidate is within, from the likely one on, or the likely one.

    judged: of a name, the verdict by that budget.  Each costs 9 runs of the reference.  Budgets that
    cannot be are left out.
    """
    likely = likely_budget(candidate)
    first = None
    for dtype in dict.fromkeys((likely, *DTYPES)):
        if first is not None and not _worth_trying(first[0], dtype):
            continue
        verdict = judged(dtype)
        found = _nearest(dtype, verdict), verdict
        if found[0].within:
            return found
        first = first or found
    return first


def _worth_trying(nearest: Nearest, dtype: str) -> bool:
    if list(DTYPES).index(dtype) < list(DTYPES).index(nearest.budget) and nearest.budget != "float32":
        return dtype != "float32"
    return nearest.share < _HOPELESS[dtype]


def _nearest(dtype, verdict) -> Nearest:
    shares = [(max(row.total_share or 0.0, row.own_share or 0.0), row.name) for row in verdict.rows]
    share, tensor = max(shares, key=lambda pair: pair[0])
    first = next((row.name for row in verdict.rows if row.status != OK), None)
    return Nearest(dtype, share, verdict.ok, tensor, first)


def other_arithmetic(candidate: Trace, budget: str) -> list[str]:
    """A line if the candidate was not made in the arithmetic of the budget that it is beyond."""
    if candidate.arithmetic in ARITHMETICS and candidate.arithmetic != "float64":
        return [
            f"the candidate's arithmetic is {candidate.arithmetic}, this engine's own: "
            "without --budget its bits are compared"
        ]
    words = candidate.arithmetic.lower()
    quantized = next((name for name, of in _QUANTIZED.items() if any(word in words for word in of)), None)
    if quantized and not set(_QUANTIZED).intersection(budget.split("+")):
        return [
            f"the candidate's arithmetic is {candidate.arithmetic!r}: if the reference is what it was "
            f"quantized from, --budget {quantized} is made for it"
        ]
    likely = likely_budget(candidate)
    if likely in (budget, "float32"):
        return []
    said = any(name in candidate.arithmetic.lower() for name in _WORDS[likely])
    why = f"arithmetic is {candidate.arithmetic!r}" if said else f"values are those of {likely}"
    return [f"the candidate's {why}: --budget {likely} is made for it"]
