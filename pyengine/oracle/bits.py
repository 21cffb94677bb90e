"""Two traces, tensor by tensor in the order of execution, bit by bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from ..errors import InputError
from .trace import Trace


@dataclass(frozen=True)
class NotFinite:
    """NaN or infinity where the reference has numbers: of the first one its kind and place, and the count."""

    kind: str
    index: tuple[int, ...]
    count: int

    def __str__(self):
        return f"{self.kind} at {list(self.index)}, the first of {self.count}"

    @classmethod
    def found(cls, reference: np.ndarray, candidate: np.ndarray, tokens=None) -> NotFinite | None:
        """Of floats of one shape.  tokens: of each row; None: row t is token t."""
        bad = ~np.isfinite(candidate) & np.isfinite(reference)
        if not bad.any():
            return None
        index = first_index(bad)
        kind = "NaN" if np.isnan(candidate[index]) else "infinity"
        return cls(kind, at_token(index, tokens), int(bad.sum()))


@dataclass(frozen=True)
class Difference:
    """How one tensor differs.  Values are rounded to float32 first; -0 differs from +0.

    index    of the first element that differs, [token, feature]; empty if the shapes differ
    count    elements that differ, of size
    ulp      the largest distance in units in the last place, of elements of one sign; None where there is
             a NaN, where every sign differs, for integers, and for shapes that differ
    reference, candidate   the first differing values, or the shapes, as text
    worst    of the element that is furthest off: its index, and both values as text; None as index is empty
    signs    elements that differ in sign: a distance in ulp has no meaning for them
    not_finite   NaN or infinity where the reference has numbers
    """

    name: str
    index: tuple[int, ...]
    count: int
    size: int
    ulp: int | None
    reference: str
    candidate: str
    worst: tuple[tuple[int, ...], str, str] | None = None
    signs: int = 0
    not_finite: NotFinite | None = None

    def __str__(self):
        if not self.index:
            return f"{self.name}: shape {self.candidate}, want {self.reference}"
        counted = f"{self.count} of {self.size} values differ"
        if self.not_finite:
            return f"{self.name}: {self.not_finite}; {counted}"
        distance = "" if self.ulp is None else f", largest distance {self.ulp} ulp"
        text = (
            f"{self.name}: {counted}{distance}; first at {list(self.index)}: "
            f"want {self.reference}, got {self.candidate}"
        )
        if self.worst is not None and self.worst[0] != self.index:
            index, want, got = self.worst
            text += f"; worst at {list(index)}: want {want}, got {got}"
        if self.signs:
            text += f"; {self.signs} differ in sign" + (", left out of the distance" if distance else "")
        return text


def first_index(mask: np.ndarray) -> tuple[int, ...]:
    """The place of the first True, token by token."""
    return tuple(int(i) for i in np.unravel_index(int(mask.argmax()), mask.shape))


def at_token(index: tuple[int, ...], tokens) -> tuple[int, ...]:
    """An index with the token in place of the row; tokens: of each row; None: row t is token t."""
    return index if tokens is None else (int(tokens[index[0]]), *index[1:])


@dataclass(frozen=True)
class Comparison:
    """The names compared, the differences in the order of execution, and the names that only one side has."""

    compared: list[str]
    differences: list[Difference]
    missing: list[str]  # in the reference only
    unknown: list[str]  # in the candidate only

    @property
    def equal(self) -> bool:
        return not self.differences

    def as_dict(self) -> dict:
        return {
            "equal": self.equal,
            "compared": len(self.compared),
            "missing": self.missing,
            "unknown": self.unknown,
            "differences": [asdict(d) for d in self.differences],
        }


def compare(reference: Trace, candidate: Trace) -> Comparison:
    """Compare the tensors that both traces have.

    Errors: InputError: other ids, nothing in common, shapes of another model.
    """
    check_ids(reference, candidate)
    common = [name for name in reference.tensors if name in candidate.tensors]
    if not common:
        raise InputError("traces: want tensors that both have, got none")
    _check_shapes(common, reference, candidate)
    differences = [
        compare_tensors(name, reference.tensors[name], candidate.tensors[name], candidate.tokens_of(name))
        for name in common
    ]
    return Comparison(
        common,
        [d for d in differences if d],
        [n for n in reference.tensors if n not in candidate.tensors],
        [n for n in candidate.tensors if n not in reference.tensors],
    )


def check_ids(reference: Trace, candidate: Trace) -> None:
    """InputError unless both traces are of the same ids."""
    ours, theirs = np.asarray(reference.ids), np.asarray(candidate.ids)
    if len(ours) != len(theirs):
        raise InputError(f"input_ids: want the reference's {len(ours)} ids, got {len(theirs)}")
    if not np.array_equal(ours, theirs):
        at = int((ours != theirs).argmax())
        raise InputError(
            f"input_ids: want the reference's {len(ours)} ids, got others: {theirs[at]} in place of "
            f"{ours[at]} at index {at}"
        )


def _check_shapes(common, reference, candidate):
    """A tensor of another shape is a finding.  Where most are, the trace is of another model."""
    odd = []
    for name in common:
        ours, theirs = reference.tensors[name].shape, candidate.tensors[name].shape
        if ours != theirs:
            odd.append((name, ours, theirs))
    if len(odd) > len(common) / 2:
        name, ours, theirs = odd[0]
        raise InputError(
            f"{name}: want shape {list(ours)}, got {list(theirs)}: {len(odd)} of {len(common)} tensors "
            "have another shape: the trace is of another model"
        )


def compare_tensors(
    name: str, reference: np.ndarray, candidate: np.ndarray, tokens: np.ndarray | None = None
) -> Difference | None:
    """None if they are equal in every bit, after rounding floats to float32.

    tokens: of each row; None: row t is token t.
    """
    if reference.shape != candidate.shape:
        shapes = str(list(reference.shape)), str(list(candidate.shape))
        return Difference(name, (), candidate.size, reference.size, None, *shapes)
    if "f" not in (reference.dtype.kind, candidate.dtype.kind):
        return _difference(name, reference, candidate, reference != candidate, tokens)
    with np.errstate(over="ignore"):  # float64 beyond float32's range is an infinity in both
        a, b = (np.ascontiguousarray(x, np.float32) for x in (reference, candidate))
    differ = a.view(np.int32) != b.view(np.int32)
    if not differ.any():
        return None
    other_sign = (a < 0) & (b > 0) | (a > 0) & (b < 0)
    near, ulp = differ & ~other_sign, None
    if near.any() and not (np.isnan(a[differ]).any() or np.isnan(b[differ]).any()):
        ulp = int(np.abs(_ordinal(a[near]) - _ordinal(b[near])).max())
    signs = int(other_sign.sum())
    not_finite = NotFinite.found(a, b, tokens)
    return _difference(name, a, b, differ, tokens, ulp=ulp, signs=signs, not_finite=not_finite)


def _ordinal(x: np.ndarray) -> np.ndarray:
    """float32 -> int64 that counts representable values upward; both zeros are 0."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _difference(name, a, b, differ, tokens, **more):
    if not differ.any():
        return None
    index = first_index(differ)
    with np.errstate(all="ignore"):
        apart = np.where(differ, np.abs(a.astype(np.float64) - b.astype(np.float64)), -1.0)
    worst = first_index(apart == apart.max()) if np.isfinite(apart).all() else index
    return Difference(
        name,
        at_token(index, tokens),
        int(differ.sum()),
        differ.size,
        more.pop("ulp", None),
        str(a[index]),
        str(b[index]),
        (at_token(worst, tokens), str(a[worst]), str(b[worst])),
        **more,
    )
