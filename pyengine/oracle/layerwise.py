"""The reference and its budgets layer by layer: for models of real size, in bounded memory.

`budget.measure` runs the whole model nine times and keeps every tensor of a run.  Here all the runs go
through one layer before any goes on to the next: the reference, and for each dtype and summation order the
rounded run and the reference on its values.  One layer's tensors are kept, of one run at a time, and as many
of its weights as fit `CACHE_BYTES`.  lm_head is computed by blocks of its rows.  The numbers are those of
`budget.measure` for a trace that holds every tensor, but for the order in which BLAS adds up lm_head's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..progress import progress
from ..reference import ReferenceModel
from .budget import FACTOR, Budget, Error, digest_of_ids
from .dataflow import EMBEDDING, HEAD
from .rerun import is_choice
from .rounding import ORDERS, Arithmetic, rounded_model

CACHE_BYTES = 1 << 30  # of one layer's weights, as they are stored, in float32
HEAD_ROWS = 8192  # of lm_head at a time: 128 MiB in float64 at 2,048 columns


@dataclass
class _Run:
    """One rounded run: where it is, and the largest errors so far."""

    dtype: str
    model: ReferenceModel
    hidden: np.ndarray
    total: dict[str, Error] = field(default_factory=dict)
    own: dict[str, Error] = field(default_factory=dict)


def measure_by_layer(
    model: ReferenceModel,
    ids,
    dtypes: Sequence[str],
    *,
    factor: float = FACTOR,
    orders: int = ORDERS,
    keep: Callable[[str, np.ndarray], None] | None = None,
    on_layer: Callable[[int, float], None] | None = None,
) -> dict[str, Budget]:
    """-> {dtype: Budget}, for a trace that holds every tensor.

    keep: called with every tensor of the reference.
    on_layer: called with how many of the layers and the head are done, and the seconds that the last took.
    """
    cached = _Cached(model)
    model, keep = cached.model, _listing(names := [], keep)
    runs = [
        _Run(dtype, rounded_model(cached.narrow, dtype, order), np.empty(0))
        for dtype in dtypes
        for order in range(orders)
    ]
    least: dict[str, dict[str, Error]] = {dtype: {} for dtype in dtypes}
    hidden = model.embed(ids).astype(np.float64)
    for run in runs:
        run.hidden = run.model.embed(ids)
    steps = model.config.num_hidden_layers + 1
    with progress(steps, "layers", "layer") as bar, np.errstate(all="ignore"):
        _compare({EMBEDDING: hidden}, runs, {EMBEDDING: [run.hidden for run in runs]}, least, keep)
        for index in range(steps - 1):
            start = time.monotonic()
            hidden = _layer(model, index, hidden, runs, least, keep)
            cached.clear()
            bar.update()
            if on_layer is not None:
                on_layer(index + 1, time.monotonic() - start)
        start = time.monotonic()
        _head(model, hidden, runs, least, keep)
        bar.update()
        if on_layer is not None:
            on_layer(steps, time.monotonic() - start)
    return {dtype: _budget(model, ids, dtype, factor, orders, runs, least[dtype], names) for dtype in dtypes}


def _listing(names, keep):
    """A `keep` that lists what it is called with."""

    def listing(name, value):
        names.append(name)
        if keep is not None:
            keep(name, value)

    return listing


class _Cached:
    """A model whose weights of the layer at hand are kept, in float32 where that is exact.

    narrow: the same model, with its weights as they are kept: rounded runs take float32 anyway
    """

    def __init__(self, model: ReferenceModel):
        self.tensors, self.kept, self.left = model.checkpoint.tensors, {}, CACHE_BYTES
        self.model = type(model)(model.checkpoint)
        self.model.weight = lambda name, expert=None: self.stored(name, expert).astype(np.float64)
        self.narrow = copy.copy(self.model)
        self.narrow.weight = self.stored

    def stored(self, name, expert=None) -> np.ndarray:
        key = name, expert
        if key in self.kept:
            return self.kept[key]
        tensor = self.tensors[name]
        value = tensor.float64(expert)
        if tensor.decode is None:  # float32 values, put into another order
            value = value.astype(np.float32)
        if value.nbytes <= self.left:
            self.left -= value.nbytes
            value.flags.writeable = False
            self.kept[key] = value
        return value

    def clear(self) -> None:
        self.kept, self.left = {}, CACHE_BYTES


def _layer(model, index, hidden, runs, least, keep) -> np.ndarray:
    truth: dict[str, np.ndarray] = {}
    after = model.run_layer(index, hidden, truth.__setitem__)
    _keep(truth, least, keep)
    for run in runs:
        values: dict[str, np.ndarray] = {}

        def record(name, value, values=values):
            values[name] = truth[name] if is_choice(name) else value
            return values[name]

        before, run.hidden = run.hidden, run.model.run_layer(index, run.hidden, record)
        _widen(run.total, ((name, values[name], value) for name, value in truth.items()))
        pairs: list[tuple[str, np.ndarray, np.ndarray]] = []

        def follow(name, own, values=values, pairs=pairs):
            pairs.append((name, values[name], own))
            return values[name].astype(own.dtype)

        model.run_layer(index, before.astype(np.float64), follow)
        _widen(run.own, pairs)
    return after


def _head(model, hidden, runs, least, keep) -> None:
    truth: dict[str, np.ndarray] = {}
    normed = model.norm(hidden, "model.norm", _noted(truth))
    truth[HEAD] = _logits(model, normed, lambda weight: weight.astype(np.float64))
    _keep(truth, least, keep)
    for run in runs:
        values, own = {}, {}
        x = run.model.norm(run.hidden, "model.norm", _noted(values))
        values[HEAD] = _logits(run.model, x, _narrowing(run.dtype))
        model.norm(run.hidden.astype(np.float64), "model.norm", _noted(own))
        own[HEAD] = _logits(model, x.astype(np.float64), lambda weight: weight.astype(np.float64))
        _widen(run.total, ((name, values[name], value) for name, value in truth.items()))
        _widen(run.own, ((name, values[name], value) for name, value in own.items()))


def _noted(values):
    def record(name, value):
        values[name] = value
        return value

    return record


def _narrowing(dtype):
    """What an arithmetic makes of rows of lm_head's weight; HEAD_ROWS is a multiple of any block's rows."""
    arithmetic = Arithmetic.named(dtype)
    return lambda weight: arithmetic.weight(weight, f"{HEAD}.weight")


def _logits(model, x, widened) -> np.ndarray:
    tensor, parts = model.checkpoint.tensors["lm_head.weight"], []
    for start in range(0, tensor.shape[0], HEAD_ROWS):
        weight = tensor.rows_float32(None, start, min(start + HEAD_ROWS, tensor.shape[0]))
        parts.append(model.op.linear(x, widened(weight)))
    return np.concatenate(parts, axis=1)


def _compare(truth, runs, values, least, keep):
    """Of tensors that no operation makes."""
    _keep(truth, least, keep)
    for at, run in enumerate(runs):
        pairs = [(name, values[name][at], value) for name, value in truth.items()]
        _widen(run.total, pairs)
        _widen(run.own, pairs)


def _keep(truth, least, keep):
    for name, value in truth.items():
        keep(name, value)
        if is_choice(name):
            continue
        size = Error(float(np.sqrt(np.mean(value**2))), float(np.abs(value).max()))
        for dtype, found in least.items():
            found[name] = size.times(Arithmetic.named(dtype).step)


def _widen(spread, triples) -> None:
    for name, value, truth in triples:
        if not is_choice(name):
            error = Error.between(value, truth)
            spread[name] = error.most(spread[name]) if name in spread else error


def _budget(model, ids, dtype, factor, orders, runs, least, names) -> Budget:
    mine = [run for run in runs if run.dtype == dtype]
    total, own = (
        {n: _most(mine, which, n).times(factor).most(least[n]) for n in least} for which in ("total", "own")
    )
    return Budget(
        dtype, factor, orders, digest_of_ids(ids), model.checkpoint.fingerprint, total, own, tuple(names)
    )


def _most(runs, which, name) -> Error:
    found = Error(0.0, 0.0)
    for run in runs:
        found = getattr(run, which)[name].most(found)
    return found
