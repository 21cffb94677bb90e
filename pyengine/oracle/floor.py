"""An engine's own floor: its trace of the unquantized model, subtracted from its trace of the quantized one.

The floor's errors and those of quantization have nothing to do with each other: their squares add up.  What
is allowed of the candidate is the budget above the floor, for each tensor end to end and on its own inputs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..errors import InputError
from .bits import check_ids
from .budget import Budget, Error
from .judge import judge
from .trace import Trace
from .verdict import Floor

SPREAD = Error(1.25, 2.0)  # times the floor, which is one sample: of its root mean square, its largest error


def with_floor(model, candidate: Trace, budget: Budget, floor: Trace, seconds: float) -> tuple[Budget, Floor]:
    """The budget above a floor, and what the floor is like.

    floor: of the candidate's ids, with its tensors at least.  Errors: InputError: other ids, tensors that it
    lacks or that hold other parts, values that are not finite.
    """
    check_ids(candidate, floor)
    missing = [name for name in candidate.tensors if name not in floor.tensors]
    if missing:
        raise InputError(
            f"floor: want the candidate's tensors, got a trace without {missing[0]} ({len(missing)} missing)"
        )
    floor = floor.kept(candidate.tensors)
    rows = judge(model, floor, budget, seconds, blame=False).rows
    total, own = dict(budget.total), dict(budget.own)
    for row in rows:
        if row.error is None or row.own is None:
            continue
        if not np.isfinite([row.error.rms, row.own.rms]).all():
            raise InputError(f"floor: want numbers, got NaN or infinity in {row.name}")
        total[row.name] = total[row.name].above(_spread(row.error))
        if row.name in own:
            own[row.name] = own[row.name].above(_spread(row.own))
    shares = [(row.total_share or 0.0, row.name) for row in rows]
    beyond = [row.name for row in rows if (row.total_share or 0.0) > 1]
    found = Floor(floor.path, *max(shares), len(beyond), beyond[0] if beyond else None)
    return replace(budget, total=total, own=own), found


def _spread(error: Error) -> Error:
    """What another run of the same engine may show."""
    return Error(error.rms * SPREAD.rms, error.largest * SPREAD.largest)
