"""Properties of groups, rows and layouts against each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import strategies as st

from .. import strategies
from ..names import Name
from .registry import a_matrix, matrix_and, register
from .words import compare


@register(
    Name.GROUP_FOR_ITSELF,
    "a group for itself",
    parts=(
        a_matrix,
        lambda format: st.fixed_dictionaries({"other": strategies.groups(format), "which": strategies.seeds}),
    ),
)
def group_for_itself(subject, x, other, which):
    """Other values in one group change no other group's codes and scale."""
    parts = subject.format.slices(x.shape[1])
    row, group = which % x.shape[0], which // x.shape[0] % len(parts)
    part, changed = parts[group], x.copy()
    changed[row, part] = other[: part.stop - part.start]
    elsewhere = np.ones(x.shape, bool)
    elsewhere[row, part] = False
    found = compare(x, subject(x), subject(changed), where=elsewhere)
    return found and f"with row {row}, group {group} changed: {found}"


@register(Name.PERMUTATIONS, "permutations", parts=matrix_and(seed=strategies.seeds))
def permutations(subject, x, seed):
    """Permuting a group's values permutes its codes; permuting whole groups permutes both."""
    rng, columns = np.random.default_rng(seed), np.arange(x.shape[1])
    within = np.concatenate([rng.permutation(columns[part]) for part in subject.format.slices(x.shape[1])])
    size = subject.format.group_size or x.shape[1]
    n_whole = x.shape[1] // size
    across = columns.copy()
    across[: n_whole * size] = (rng.permutation(n_whole)[:, None] * size + np.arange(size)).ravel()
    q = subject(x)
    for name, order_ in (("values within the groups", within), ("groups", across)):
        moved = q._replace(codes=q.codes[:, order_], s=q.s[:, order_])
        found = compare(x[:, order_], moved, subject(np.ascontiguousarray(x[:, order_])))
        if found:
            return f"with {name} permuted: {found}"
    return None


@register(Name.ROW_BY_ROW, "row by row, twice, in threads")
def row_by_row(subject, x):
    """q and s of x = those of its rows put together, one after another or in threads at once; and
    those of x a second time."""
    whole = subject(x)
    found = compare(x, whole, subject(x))
    if found:
        return f"the same input again: {found}"
    rows = [x[i : i + 1] for i in range(x.shape[0])]
    with ThreadPoolExecutor(2) as threads:
        for name, results in (
            ("row by row", map(subject, rows)),
            ("in two threads", threads.map(subject, rows)),
        ):
            results = list(results)
            joined = whole._replace(
                codes=np.concatenate([r.codes for r in results]), s=np.concatenate([r.s for r in results])
            )
            found = compare(x, whole, joined)
            if found:
                return f"{name}: {found}"
    return None


@register(Name.LAYOUTS, "layouts of the input")
def layouts(subject, x):
    """Strided, reversed, Fortran-ordered, unaligned or read-only input gives what contiguous input
    gives, and no input is written to."""
    expected = subject(x)
    for name, array in _layouts(np.ascontiguousarray(subject.turn(x))):
        kept = array.copy()
        found = compare(x, expected, subject.run(subject.quantize, array))
        if found:
            return f"{name}: {found}"
        if not np.array_equal(array, kept):
            return f"{name}: the input was written to"
    return None


def _layouts(x):
    """(name, an array equal to x that lies otherwise in memory)"""
    rows, cols = x.shape
    yield "Fortran-ordered", np.asfortranarray(x)
    wide = np.full((rows, 2 * cols + 1), 7, np.float32)
    wide[:, 1::2] = x
    yield "every other column of a wider array", wide[:, 1::2]
    tall = np.full((3 * rows, cols), 7, np.float32)
    tall[::3] = x
    yield "every third row of a taller array", tall[::3]
    yield "columns reversed in memory", np.ascontiguousarray(x[:, ::-1])[:, ::-1]
    yield "rows reversed in memory", np.ascontiguousarray(x[::-1])[::-1]
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(rows, cols)
    unaligned[:] = x
    yield "unaligned", unaligned
    fixed = x.copy()
    fixed.flags.writeable = False
    yield "read-only", fixed
