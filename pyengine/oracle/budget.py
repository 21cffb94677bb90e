"""Error budgets: how far from the float64 reference rounding alone takes each tensor.

For each summation order the reference is run in the dtype (`rounding`), with the float64 run's choice
of experts.  The spread of a tensor is the largest error among these runs: end to end, and of the
operation alone, the reference's on the rounded run's own inputs.  A budget is FACTOR times the spread,
and never less than one rounding of the tensor's values to the dtype.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import FileFormatError, InputError
from ..progress import progress
from ..reference import ReferenceModel
from ..trace import Trace
from .rerun import is_choice, own_values
from .rounding import DTYPES, ORDERS, rounded_model

FACTOR = 4.0
FORMAT = "pyengine-budget-2"  # 1 did not say for which model


@dataclass(frozen=True)
class Error:
    """A tensor's distance: root of the mean square, and the largest, of its differences."""

    rms: float
    largest: float

    @classmethod
    def between(cls, values, truth) -> Error:
        """Of arrays of one shape; infinite where either has a NaN or infinity that the other lacks."""
        with np.errstate(all="ignore"):
            difference = np.abs(values.astype(np.float64) - truth)
            difference = np.where(values == truth, 0.0, difference)
        if not np.isfinite(difference).all():
            return cls(np.inf, np.inf)
        return cls(float(np.sqrt(np.mean(difference**2))), float(difference.max()))

    def most(self, other) -> Error:
        return Error(max(self.rms, other.rms), max(self.largest, other.largest))

    def times(self, factor) -> Error:
        return Error(self.rms * factor, self.largest * factor)

    def share_of(self, budget) -> float:
        """How much of a budget this uses: within it up to 1."""
        pairs = (self.rms, budget.rms), (self.largest, budget.largest)
        return max(0.0 if error == 0 else error / most if most else np.inf for error, most in pairs)


@dataclass(frozen=True)
class Budget:
    """What a candidate's tensors may differ by.

    total   {name: Error}  from the reference, end to end
    own     {name: Error}  from the reference's operation on the candidate's own inputs, where the
            candidate has the same tensors that this budget was made for: `recorded`
    """

    dtype: str
    factor: float
    orders: int
    ids_sha256: str
    model_sha256: str  # Checkpoint.fingerprint
    total: dict[str, Error]
    own: dict[str, Error]
    recorded: tuple[str, ...]

    def save(self, path) -> None:
        """JSON, written whole or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path) -> Budget:
        """Errors: FileFormatError."""
        fields = _read_json(path)
        try:
            total, own = ({name: Error(float(e["rms"]), float(e["largest"]))
                           for name, e in fields[key].items()} for key in ("total", "own"))
            return cls(str(fields["dtype"]), float(fields["factor"]), int(fields["orders"]),
                       str(fields["ids_sha256"]), str(fields["model_sha256"]), total, own,
                       tuple(str(name) for name in fields["recorded"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"want what Budget.save writes, got a fault at {error}"
            raise FileFormatError(path, "budget", problem) from None

    def check(self, candidate: Trace, model: ReferenceModel | None = None) -> None:
        """InputError unless it was made for these ids, these tensors and, where it is given, this model."""
        if model is not None and self.model_sha256 != model.checkpoint.fingerprint:
            raise InputError("budget: want one for this model, got one for another")
        if self.ids_sha256 != digest_of_ids(candidate.ids):
            raise InputError("budget: want one for the candidate's ids, got one for others")
        other = (set(self.recorded) ^ set(candidate.tensors)) & set(self.total)
        if other:
            raise InputError(f"budget: want one for the candidate's tensors, got one that differs in "
                             f"{min(other)}")


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


def measure(model: ReferenceModel, ids, dtype: str, names=None, factor: float = FACTOR,
            orders: int = ORDERS) -> Budget:
    """The budget of a dtype on this model and input.

    names: the tensors that the candidate has (all of them if None): an operation's own budget depends
    on where its inputs were recorded.  Costs 2 * orders + 1 runs of the reference.
    Errors: InputError.
    """
    if dtype not in DTYPES:
        raise InputError(f"budget: want {', '.join(DTYPES)}, got {dtype!r}")
    truth: dict[str, np.ndarray] = {}
    with progress(2 * orders + 1, f"budget {dtype}", "run") as bar:
        model.forward(ids, record=truth.__setitem__)
        bar.update()
        recorded = [n for n in truth if names is None or n in names]
        total, own = {}, {}
        for order in range(orders):
            run = _rounded_run(rounded_model(model, dtype, order), ids, truth)
            bar.update()
            _widen(total, ((name, run.tensors[name], value) for name, value in truth.items()))
            run.tensors = {name: run.tensors[name] for name in recorded}
            _widen(own, _own_pairs(model, run))
            bar.update()
    least = _one_rounding(truth, DTYPES[dtype][2])
    return Budget(dtype, factor, orders, digest_of_ids(ids), model.checkpoint.fingerprint,
                  _times(total, factor, least), _times(own, factor, least), tuple(recorded))


def _rounded_run(model, ids, truth) -> Trace:
    run = Trace(np.asarray(ids, np.int64))

    def record(name, value):
        run.tensors[name] = truth[name] if is_choice(name) else value
        return run.tensors[name]

    with np.errstate(all="ignore"):
        model.forward(ids, record=record)
    return run


def _own_pairs(model, run):
    pairs = []
    own_values(model, run, lambda name, own: pairs.append((name, run.tensors.get(name), own)))
    return ((name, value, own) for name, value, own in pairs if value is not None)


def _widen(spread, triples) -> None:
    for name, value, truth in triples:
        if not is_choice(name):
            error = Error.between(value, truth)
            spread[name] = error.most(spread[name]) if name in spread else error


def _one_rounding(truth, step):
    return {name: Error(float(np.sqrt(np.mean(value**2))) * step, float(np.abs(value).max()) * step)
            for name, value in truth.items() if not is_choice(name)}


def _times(spread, factor, least):
    return {name: error.times(factor).most(least[name]) for name, error in spread.items()}
