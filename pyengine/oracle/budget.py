"""Error budgets: the error per tensor that rounding alone explains.

For each summation order, the reference is run in the dtype (`rounding`), with the experts that the float64
run chose.  The spread of a tensor is its largest error among these runs, end to end and of the operation
alone.  The error of the operation alone is its distance from the float64 operation on the rounded run's own
inputs.  A budget is FACTOR times the spread, and at least one rounding of the tensor's values to the dtype.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import FileFormatError, InputError
from ..files.whole import write_json
from ..progress import progress
from ..reference import ReferenceModel
from .rerun import is_choice, own_values
from .rounding import ORDERS, Arithmetic, rounded_model
from .trace import Trace

FACTOR = 4.0
FORMAT = "pyengine-budget-2"  # 1 did not say for which model


@dataclass(frozen=True)
class Error:
    """A tensor's error: the root mean square of its differences, and the largest difference."""

    rms: float
    largest: float

    @classmethod
    def between(cls, values, truth) -> Error:
        """Of arrays of one shape; infinite where one has a NaN or an infinity and the other a number."""
        with np.errstate(all="ignore"):
            difference = np.abs(values.astype(np.float64) - truth)
            same = (values == truth) | ~(np.isfinite(values) | np.isfinite(truth))
            difference = np.where(same, 0.0, difference)
        if not np.isfinite(difference).all():
            return cls(np.inf, np.inf)
        return cls(float(np.sqrt(np.mean(difference**2))), float(difference.max()))

    def most(self, other) -> Error:
        return Error(max(self.rms, other.rms), max(self.largest, other.largest))

    def plus(self, other) -> Error:
        return Error(self.rms + other.rms, self.largest + other.largest)

    def above(self, floor) -> Error:
        """What may be seen of two errors that have nothing to do with each other: their squares add up, their
        largest values may meet."""
        return Error(float(np.hypot(self.rms, floor.rms)), self.largest + floor.largest)

    def times(self, factor) -> Error:
        return Error(self.rms * factor, self.largest * factor)

    def of_part(self, elements: int, held: int) -> Error:
        """What `held` of a tensor's elements may be off by, where all `elements` are off by this: few of them
        may be the worst ones."""
        return Error(min(self.largest, self.rms * (elements / held) ** 0.5), self.largest)

    def share_of(self, budget) -> float:
        """The error in units of a budget: up to 1 is within it."""
        pairs = (self.rms, budget.rms), (self.largest, budget.largest)
        return max(0.0 if error == 0 else error / most if most else np.inf for error, most in pairs)


@dataclass(frozen=True)
class Budget:
    """The errors that a candidate's tensors may have.

    total   {name: Error}  from the reference, end to end
    own     {name: Error}  from the reference's operation on the candidate's own inputs, where the
            candidate has the same tensors that this budget was made for: `recorded`
    last_row_alone  of `recorded`, those of which the candidate has the last token's row alone
    """

    dtype: str
    factor: float
    orders: int
    ids_sha256: str
    model_sha256: str  # Checkpoint.fingerprint
    total: dict[str, Error]
    own: dict[str, Error]
    recorded: tuple[str, ...]
    last_row_alone: tuple[str, ...] = ()
    parts: str = ""  # Trace.parts_key of the candidate

    def save(self, path) -> None:
        """JSON, written whole or not at all."""
        write_json(path, {"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def load(cls, path) -> Budget:
        """Errors: FileFormatError."""
        fields = _read_json(path)
        try:
            total, own = (
                {name: Error(float(e["rms"]), float(e["largest"])) for name, e in fields[key].items()}
                for key in ("total", "own")
            )
            return cls(
                str(fields["dtype"]),
                float(fields["factor"]),
                int(fields["orders"]),
                str(fields["ids_sha256"]),
                str(fields["model_sha256"]),
                total,
                own,
                tuple(str(name) for name in fields["recorded"]),
                tuple(str(name) for name in fields.get("last_row_alone", ())),
                str(fields.get("parts", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"want what Budget.save writes, got a fault at {error}"
            raise FileFormatError(path, "budget", problem) from None

    def with_resolution(self, resolution: float) -> Budget:
        """Of values that are known to `resolution` alone."""
        if not resolution:
            return self
        known = Error(resolution, resolution)
        total, own = ({n: e.plus(known) for n, e in part.items()} for part in (self.total, self.own))
        return replace(self, total=total, own=own)

    def check(self, candidate: Trace, model: ReferenceModel | None = None) -> None:
        """InputError unless it was made for these ids, these tensors and, where it is given, this model."""
        if model is not None and self.model_sha256 != model.checkpoint.fingerprint:
            raise InputError("budget: want one for this model, got one for another")
        if self.ids_sha256 != digest_of_ids(candidate.ids):
            raise InputError("budget: want one for the candidate's ids, got one for others")
        if self.parts != candidate.parts_key():
            raise InputError("budget: want one for the candidate's tokens and features, got one for others")
        if self.last_row_alone != candidate.last_row_alone():
            raise InputError("budget: want one for the candidate's rows, got one for the last token's or all")
        other = (set(self.recorded) ^ set(candidate.tensors)) & set(self.total)
        if other:
            raise InputError(
                f"budget: want one for the candidate's tensors, got one that differs in {min(other)}"
            )


def _read_json(path) -> dict:
    try:
        fields = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, "file", f"want JSON, got {error}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise FileFormatError(path, "format", f"want {FORMAT!r}")
    return fields


def digest_of_ids(ids) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()


# ---- computing one ---------------------------------------------------------------------------


def measure(
    model: ReferenceModel,
    ids,
    dtype: str,
    names=None,
    factor: float = FACTOR,
    orders: int = ORDERS,
    last_row_alone: tuple[str, ...] = (),
    like: Trace | None = None,
) -> Budget:
    """The budget of an arithmetic (`rounding`) on this model and input.

    names: the tensors that the candidate has (all of them if None): an operation's own budget depends
    on where its inputs were recorded.  last_row_alone: those of which it has the last token's row alone.
    like: the candidate, where it holds parts of tensors: a budget is for these parts (Error.of_part).
    Costs 2 * orders + 1 runs of the reference.
    Errors: InputError.
    """
    step = Arithmetic.named(dtype).step
    truth: dict[str, np.ndarray] = {}
    with progress(2 * orders + 1, f"budget {dtype}", "run") as bar:
        model.forward(ids, record=truth.__setitem__)
        bar.update()
        recorded = [n for n in truth if names is None or n in names]
        total, own = {}, {}
        for order in range(orders):
            run = _rounded_run(rounded_model(model, dtype, order), ids, truth)
            bar.update()
            _widen(total, ((name, run.tensors[name], value) for name, value in truth.items()), last_row_alone)
            run.tensors = {name: run.tensors[name] for name in recorded}
            if like is not None:  # parts of tensors are no inputs
                run.rows, run.columns = like.rows, like.columns
            _widen(own, _own_pairs(model, run, truth), last_row_alone)
            bar.update()
    least = _one_rounding(truth, step, last_row_alone)
    total, own = (_for_parts(_times(e, factor, least), truth, like, last_row_alone) for e in (total, own))
    return Budget(
        dtype,
        factor,
        orders,
        digest_of_ids(ids),
        model.checkpoint.fingerprint,
        total,
        own,
        tuple(recorded),
        tuple(name for name in last_row_alone if name in recorded),
        "" if like is None else like.parts_key(),
    )


def _for_parts(errors, truth, like, last_row_alone):
    """Of tensors of which the candidate holds a part, for that part."""
    if like is None:
        return errors
    return {
        name: error
        if name in last_row_alone
        else error.of_part(truth[name].size, like.part(name, truth[name]).size or 1)
        for name, error in errors.items()
    }


def _rounded_run(model, ids, truth) -> Trace:
    run = Trace(np.asarray(ids, np.int64))

    def record(name, value):
        run.tensors[name] = truth[name] if is_choice(name) else value
        return run.tensors[name]

    with np.errstate(all="ignore"):
        model.forward(ids, record=record)
    return run


def _own_pairs(model, run, truth):
    """The rounded run chose the reference's experts: so does each operation on its inputs."""
    pairs = []
    choices = {name: value for name, value in truth.items() if is_choice(name)}
    own_values(model, run, lambda name, own: pairs.append((name, run.tensors.get(name), own)), choices)
    return ((name, value, own) for name, value, own in pairs if value is not None)


def _widen(spread, triples, last_row_alone) -> None:
    for name, value, truth in triples:
        if not is_choice(name):
            rows = slice(-1, None) if name in last_row_alone else slice(None)
            error = Error.between(value[rows], truth[rows])
            spread[name] = error.most(spread[name]) if name in spread else error


def _one_rounding(truth, step, last_row_alone):
    least = {}
    for name, value in truth.items():
        if not is_choice(name):
            value = value[-1:] if name in last_row_alone else value
            least[name] = Error(float(np.sqrt(np.mean(value**2))) * step, float(np.abs(value).max()) * step)
    return least


def _times(spread, factor, least):
    return {name: error.times(factor).most(least[name]) for name, error in spread.items()}
