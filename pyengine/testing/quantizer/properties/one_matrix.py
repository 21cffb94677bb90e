"""Properties of the codes and scales of one matrix."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from .. import strategies
from ..names import Name
from .registry import matrix_and, register
from .words import compare, first_where, quotient


@register(Name.CODES_IN_RANGE, "codes within -M .. M")
def codes_in_range(subject, x):
    """-M <= q <= M."""
    q = subject(x)
    return first_where(abs(q.codes) > subject.format.largest, x, q, "a code beyond M")


@register(Name.SCALES_OF_ZERO, "scales finite, zero for zeros")
def scales_of_zero(subject, x):
    """s is a finite number of the declared dtype, never negative; s = 0 exactly where the group is.

    Where the format declares another scale for a group of zeros, that one.
    """
    q, format = subject(x), subject.format
    zero = ~_nonzero_groups(x, format)
    wrong = ~np.isfinite(q.s) | (q.s < 0) | (~zero & (q.s == 0))
    if format.zero_scale is not None:
        wrong |= zero & (q.s != format.zero_scale)
    odd = np.isfinite(q.s) & ~format.can_store(q.s)
    return first_where(wrong, x, q, "the scale") or first_where(odd, x, q, f"no {format.scale_dtype}")


@register(Name.NOTHING_CLIPS, "nothing clips")
def nothing_clips(subject, x):
    """D = q * s and |x - D| <= s / 2."""
    q = subject(x)
    values = subject.values(q)
    wrong = (values != q.values) & (values != _float32(q.values))
    found = first_where(wrong, x, q, "dequantize gives another value than q * s", D=values)
    return found or first_where(~(abs(x - q.values) <= q.s / 2), x, q, "|x - q s| > s / 2")


@register(Name.NEAREST_CODE, "nearest code")
def nearest_code(subject, x):
    """|x - q * s| <= |x - c * s| for every code c of -M .. M."""
    q, largest = subject(x), subject.format.largest
    distance = abs(x - q.values)
    # The distance is convex in the code: no neighbour nearer, none at all nearer.
    below = np.where(q.codes > -largest, abs(x - (q.codes - 1) * q.s), np.inf)
    above = np.where(q.codes < largest, abs(x - (q.codes + 1) * q.s), np.inf)
    return first_where(~(distance <= np.minimum(below, above)), x, q, "another code is nearer")


@register(
    Name.TIES,
    "ties",
    parts=(
        lambda format: st.fixed_dictionaries(
            {
                "scale": strategies.scales(format),
                "j": st.integers(0, format.largest - 1),
                "sign": st.sampled_from([1, -1]),
            }
        ),
    ),
)
def ties(subject, scale, j, sign):
    """x = (j + 1/2) * s goes to the even code, or away from zero, as declared; one ulp less goes to
    j, one ulp more to j + 1.

    s is the scale that the quantizer itself gives to a group whose largest value is M * scale.
    """
    largest = np.float32(scale * subject.format.largest)
    s = float(subject(_row(subject, [largest])).scales[0, 0])
    tie = np.float32((j + 0.5) * s)
    if float(tie) != (j + 0.5) * s or not 0 < np.nextafter(tie, np.float32(np.inf)) <= largest:
        return None  # no float32 is the tie
    x = _row(
        subject,
        [
            largest,
            sign * tie,
            sign * np.nextafter(tie, np.float32(0)),
            sign * np.nextafter(tie, np.float32(np.inf)),
        ],
    )
    q = subject(x)
    even = j + (j & 1)
    allowed = {"even": [even], "away": [j + 1], None: [j, j + 1]}[subject.format.ties]
    wanted = [allowed, [j], [j + 1]]
    return next(
        (
            f"x = {x[0, i + 1]!r} with s = {s!r}, x / s = {quotient(x[0, i + 1], s)}: want the "
            f"code {' or '.join(str(sign * code) for code in codes)}, got {q.codes[0, i + 1]}"
            for i, codes in enumerate(wanted)
            if x.shape[1] > i + 1 and sign * q.codes[0, i + 1] not in codes
        ),
        None,
    )


@register(Name.NEGATION, "negation")
def negation(subject, x):
    """q(-x) = -q(x), s(-x) = s(x)."""
    return compare(x, subject(x), subject(-x), sign=-1)


@register(Name.POWERS_OF_TWO, "powers of two", parts=matrix_and(k=st.integers(-24, 24)))
def powers_of_two(subject, x, k):
    """q(x * 2^k) = q(x), s(x * 2^k) = s(x) * 2^k, while the scales are normal and nothing rounds."""
    format = subject.format
    scaled = _float32(np.ldexp(x.astype(np.float64), k))
    fits = (np.ldexp(scaled, -k) == x) & (abs(scaled) <= format.limit)
    x, scaled = np.where(fits, x, np.float32(0)), np.where(fits, scaled, 0).astype(np.float32)
    before, after = subject(x), subject(scaled)
    where = _nonzero_groups(x, format) & (np.minimum(before.s, after.s) >= format.least_normal_scale)
    return compare(x, before._replace(s=np.ldexp(before.s, k)), after, where=where)


@register(Name.ORDER, "order")
def order(subject, x):
    """x_i <= x_j in one group implies q_i <= q_j."""
    q = subject(x)
    for part in subject.format.slices(x.shape[1]):
        by_value = np.argsort(x[:, part], axis=1, kind="stable")
        values = np.take_along_axis(x[:, part], by_value, 1)
        codes = np.take_along_axis(q.codes[:, part], by_value, 1)
        falls = (np.diff(codes, axis=1) < 0) & (np.diff(values, axis=1) >= 0)
        if falls.any():
            row, i = np.argwhere(falls)[0]
            return (
                f"row {row}: x = {values[row, i]!r} has the code {codes[row, i]}, and "
                f"x = {values[row, i + 1]!r} of the same group {codes[row, i + 1]}"
            )
    return None


@register(Name.AGAIN, "quantizing D again")
def again(subject, x):
    """q(D) = q(x), and s(D) = s(x), in the groups whose scale the format says returns.

    That is every group whose scale is a normal number of scale_dtype, or ("always") every group
    with a code that is not 0: where all are, D is a group of zeros, and has the scale of one.
    float32 scales may come back one ulp away, since D itself is rounded.
    """
    first, format = subject(x), subject.format
    second = subject(_float32(first.values))
    if format.scale_returns == "normal":
        where = first.s >= format.least_normal_scale
    else:
        where = _nonzero_groups(first.codes, format)
    ulp = np.spacing(_float32(first.s)) if format.scale_dtype == "float32" else 0
    return compare(x, first, second, where=where, slack=ulp)


@register(
    Name.SUBNORMAL_GROUPS,
    "subnormal groups",
    parts=(
        lambda format: st.fixed_dictionaries({"x": strategies.matrices(format, kind=strategies.subnormal)}),
    ),
)
def subnormal_groups(subject, x):
    """Groups of subnormal size give finite s and D, -M <= q <= M, and no code of the wrong sign."""
    q = subject(x)
    values = subject.values(q)
    wrong = ~np.isfinite(q.s) | ~np.isfinite(values) | (abs(q.codes) > subject.format.largest)
    return first_where(wrong | (q.codes * np.sign(x) < 0), x, q, "of a subnormal group", D=values)


@register(Name.DOT_PRODUCTS, "dot products", parts=matrix_and(seed=strategies.seeds))
def dot_products(subject, x, seed):
    """|dot(D, y) - dot(x, y)| <= sum over the groups of s / 2 * sum |y|."""
    q = subject(x)
    difference = subject.values(q) - x
    y = np.random.default_rng(seed).integers(1, 9, x.shape[1]).astype(np.float64)
    for row in range(x.shape[0]):
        # The signs that make the difference greatest.
        signed = y * np.where(difference[row] < 0, -1.0, 1.0)
        got, bound = math.fsum(difference[row] * signed), math.fsum(q.s[row] / 2 * y)
        # Some ulp: dequantize may round D to float32.
        slack = 2.0**-23 * math.fsum(abs(q.values[row]) * y) if subject.format.precision > 16 else 0
        if not got <= bound * (1 + 2.0**-40) + slack:
            return f"row {row}: a difference of {got!r}, and a bound of {bound!r}"
    return None


# ---- their helpers ---------------------------------------------------------------------------


def _row(subject, values) -> np.ndarray:
    """One row, its first group beginning with the values, of a length that the format takes."""
    size, multiple = subject.format.group_size or len(values), subject.format.multiple
    values = values[:size]
    length = -(-max(len(values), min(size, 4)) // multiple) * multiple
    x = np.zeros((1, length), np.float32)
    x[0, : len(values)] = values
    return x


def _nonzero_groups(values, format) -> np.ndarray:
    """bool [rows, cols]: whether anything in the element's group is not zero."""
    groups = [values[:, part].any(axis=1) for part in format.slices(values.shape[1])]
    return format.per_column(np.stack(groups, axis=1), values.shape[1])


def _float32(values) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.asarray(values).astype(np.float32)
