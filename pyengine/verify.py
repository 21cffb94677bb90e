"""Two traces, tensor by tensor in the order of execution, bit by bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from .errors import InputError
from .trace import Trace


@dataclass(frozen=True)
class Difference:
    """How one tensor differs.  Values are rounded to float32 first; -0 differs from +0.

    index    of the first element that differs, [token, feature]; empty if the shapes differ
    count    elements that differ, of size
    ulp      the largest distance in units in the last place; None where one side is NaN, for
             integers, and for shapes that differ
    reference, candidate   the first differing values, or the shapes, as text
    """

    name: str
    index: tuple[int, ...]
    count: int
    size: int
    ulp: int | None
    reference: str
    candidate: str

    def __str__(self):
        if not self.index:
            return f"{self.name}: shape {self.candidate}, want {self.reference}"
        distance = "" if self.ulp is None else f", largest distance {self.ulp} ulp"
        return (f"{self.name}: {self.count} of {self.size} values differ{distance}; first at "
                f"{list(self.index)}: want {self.reference}, got {self.candidate}")


@dataclass(frozen=True)
class Comparison:
    """differences in the order of execution; names compared; names only one side has."""

    compared: list[str]
    differences: list[Difference]
    missing: list[str]  # in the reference only
    unknown: list[str]  # in the candidate only

    @property
    def equal(self) -> bool:
        return not self.differences

    def as_dict(self) -> dict:
        return {"equal": self.equal, "compared": len(self.compared), "missing": self.missing,
                "unknown": self.unknown, "differences": [asdict(d) for d in self.differences]}


def compare(reference: Trace, candidate: Trace) -> Comparison:
    """What both traces have, compared.  InputError: other ids, or nothing in common."""
    if not np.array_equal(reference.ids, candidate.ids):
        raise InputError(f"input_ids: want the reference's {len(reference.ids)} ids, "
                         f"got {len(candidate.ids)} others")
    common = [name for name in reference.tensors if name in candidate.tensors]
    if not common:
        raise InputError("traces: want tensors that both have, got none")
    differences = [compare_tensors(name, reference.tensors[name], candidate.tensors[name])
                   for name in common]
    return Comparison(common, [d for d in differences if d],
                      [n for n in reference.tensors if n not in candidate.tensors],
                      [n for n in candidate.tensors if n not in reference.tensors])


def compare_tensors(name: str, reference: np.ndarray, candidate: np.ndarray) -> Difference | None:
    """None if they are equal in every bit, after rounding floats to float32."""
    if reference.shape != candidate.shape:
        return Difference(name, (), candidate.size, reference.size, None,
                          str(list(reference.shape)), str(list(candidate.shape)))
    if "f" not in (reference.dtype.kind, candidate.dtype.kind):
        return _difference(name, reference, candidate, reference != candidate, None)
    a, b = (np.ascontiguousarray(x, np.float32) for x in (reference, candidate))
    differ = a.view(np.int32) != b.view(np.int32)
    if not differ.any():
        return None
    ulp = None
    if not (np.isnan(a[differ]).any() or np.isnan(b[differ]).any()):
        ulp = int(np.abs(_ordinal(a[differ]) - _ordinal(b[differ])).max())
    return _difference(name, a, b, differ, ulp)


def _ordinal(x: np.ndarray) -> np.ndarray:
    """float32 -> int64 that counts representable values upward; both zeros are 0."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _difference(name, a, b, differ, ulp):
    if not differ.any():
        return None
    index = tuple(int(i) for i in np.unravel_index(int(differ.argmax()), differ.shape))
    return Difference(name, index, int(differ.sum()), differ.size, ulp, str(a[index]), str(b[index]))
