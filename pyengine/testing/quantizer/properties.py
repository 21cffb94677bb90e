"""The properties of a symmetric group quantizer, one function each.

A property takes the quantizer and one example, and returns None where it holds, or what is wrong, in
words.  Its docstring's first line is its equation, in these letters: x float32 [rows, cols], q its
codes, s its scales (of the group that an element is in), M the largest code, D = q * s.

Sums, products and comparisons are exact in float64 here: x has 24 bits, q 8 and s at most 24.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from ...files.ggml_blocks import Q8_0
from . import strategies
from .format import Format
from .names import Name

# ---- the quantizer under test ----------------------------------------------------------------


class Fault(Exception):
    """What a quantizer returned cannot be looked at as codes and scales."""


class Quantized(NamedTuple):
    """codes int64 [rows, cols]; scales float64 [rows, n_groups]; s float64 [rows, cols];
    raw: the codes and scales as the quantizer returned them."""

    codes: np.ndarray
    scales: np.ndarray
    s: np.ndarray
    raw: tuple

    @property
    def values(self) -> np.ndarray:
        """D = q * s, exact."""
        return self.codes * self.s


@dataclass(frozen=True)
class Subject:
    """A quantizer with everything that it comes with; see `check_quantizer` for the arguments.

    The suite sees rows of groups whatever the format's axis: what is given and returned is
    transposed on the way.
    """

    quantize: Callable
    dequantize: Callable
    format: Format
    pack: Callable | None = None
    unpack: Callable | None = None
    save: Callable | None = None
    load: Callable | None = None
    from_q8_0: Callable | None = None
    native: Mapping[str, Callable] = field(default_factory=dict)
    calibrated: Callable | None = None

    def __call__(self, x: np.ndarray) -> Quantized:
        return self.run(self.quantize, np.ascontiguousarray(self.turn(x)))

    def run(self, quantize: Callable, given: np.ndarray) -> Quantized:
        """Codes and scales that `quantize` makes of an array in the quantizer's own orientation."""
        return self.read(self.turn(given).shape, *_pair(quantize(given)))

    def calibrate(self, x: np.ndarray, samples: np.ndarray) -> Quantized:
        """Codes and scales that `calibrated` makes of x, for samples [n, cols]."""
        assert self.calibrated is not None
        return self.run(lambda given: self.calibrated(given, samples), np.ascontiguousarray(self.turn(x)))

    def read(self, shape, codes, scales) -> Quantized:
        """The quantizer's own codes and scales, checked for their shapes."""
        q, per_group = self.turn(np.asarray(codes)), self.turn(np.asarray(scales))
        wanted = (shape[0], self.format.n_groups(shape[1]))
        if q.shape != tuple(shape) or per_group.shape != wanted:
            turned = "" if self.format.axis == 1 else ", all of them transposed"
            raise Fault(
                f"want codes {tuple(shape)} and scales {wanted}{turned}, got {q.shape} and {per_group.shape}"
            )
        if q.dtype.kind not in "iu":
            raise Fault(f"want codes of an integer dtype, got {q.dtype}")
        per_group = per_group.astype(np.float64)
        return Quantized(
            q.astype(np.int64), per_group, self.format.per_column(per_group, shape[1]), (codes, scales)
        )

    def values(self, q: Quantized) -> np.ndarray:
        """What dequantize makes of it, float64 [rows, cols]."""
        values = self.turn(np.asarray(self.dequantize(*q.raw)))
        if values.shape != q.codes.shape:
            raise Fault(f"dequantize: want {q.codes.shape}, got {values.shape}")
        return values.astype(np.float64)

    def turn(self, a: np.ndarray) -> np.ndarray:
        return a if self.format.axis == 1 else a.T


def _pair(result):
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Fault(f"want (codes, scales), got a {type(result).__name__}")
    return result


# ---- the list --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Property:
    """number and title; parts: functions Format -> strategy of keyword arguments, drawn apart and
    put together; needs: what the Subject must have; cost: of one example, as a multiple of others'."""

    number: Name
    title: str
    check: Callable
    parts: tuple[Callable, ...]
    needs: tuple[str, ...]
    cost: int

    def cases(self, format: Format):
        """The strategy of all keyword arguments."""
        return st.tuples(*(part(format) for part in self.parts)).map(merged)

    @property
    def equation(self) -> str:
        return " ".join(self.check.__doc__.split("\n\n")[0].split())

    def lacks(self, subject: Subject) -> str | None:
        """Why the property does not apply to this quantizer, or None."""
        missing = [name for name in self.needs if not getattr(subject, name)]
        if missing:
            return "needs " + " and ".join(missing)
        if self.number is Name.GROUP_FOR_ITSELF and subject.format.group_size is None:
            return "needs more than one group in a row"
        return None


def merged(parts) -> dict:
    return {name: value for part in parts for name, value in part.items()}


PROPERTIES: dict[Name, Property] = {}


def _matrix(format):
    return st.fixed_dictionaries({"x": strategies.matrices(format)})


def _and(**others):
    """Cases of a matrix and whatever each of the strategies gives."""
    return _matrix, lambda format: st.fixed_dictionaries(others)


def _property(number, title, parts=(_matrix,), needs=(), cost=1):
    def register(check):
        PROPERTIES[number] = Property(number, title, check, parts, needs, cost)
        return check

    return register


# ---- one matrix ------------------------------------------------------------------------------


@_property(Name.CODES_IN_RANGE, "codes within -M .. M")
def codes_in_range(subject, x):
    """-M <= q <= M."""
    q = subject(x)
    return _first(abs(q.codes) > subject.format.largest, x, q, "a code beyond M")


@_property(Name.SCALES_OF_ZERO, "scales finite, zero for zeros")
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
    return _first(wrong, x, q, "the scale") or _first(odd, x, q, f"no {format.scale_dtype}")


@_property(Name.NOTHING_CLIPS, "nothing clips")
def nothing_clips(subject, x):
    """D = q * s and |x - D| <= s / 2."""
    q = subject(x)
    values = subject.values(q)
    wrong = (values != q.values) & (values != _float32(q.values))
    found = _first(wrong, x, q, "dequantize gives another value than q * s", D=values)
    return found or _first(~(abs(x - q.values) <= q.s / 2), x, q, "|x - q s| > s / 2")


@_property(Name.NEAREST_CODE, "nearest code")
def nearest_code(subject, x):
    """|x - q * s| <= |x - c * s| for every code c of -M .. M."""
    q, largest = subject(x), subject.format.largest
    distance = abs(x - q.values)
    # The distance is convex in the code: no neighbour nearer, none at all nearer.
    below = np.where(q.codes > -largest, abs(x - (q.codes - 1) * q.s), np.inf)
    above = np.where(q.codes < largest, abs(x - (q.codes + 1) * q.s), np.inf)
    return _first(~(distance <= np.minimum(below, above)), x, q, "another code is nearer")


@_property(
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
            f"x = {x[0, i + 1]!r} with s = {s!r}, x / s = {_quotient(x[0, i + 1], s)}: want the "
            f"code {' or '.join(str(sign * code) for code in codes)}, got {q.codes[0, i + 1]}"
            for i, codes in enumerate(wanted)
            if x.shape[1] > i + 1 and sign * q.codes[0, i + 1] not in codes
        ),
        None,
    )


@_property(Name.NEGATION, "negation")
def negation(subject, x):
    """q(-x) = -q(x), s(-x) = s(x)."""
    return _compare(x, subject(x), subject(-x), sign=-1)


@_property(Name.POWERS_OF_TWO, "powers of two", parts=_and(k=st.integers(-24, 24)))
def powers_of_two(subject, x, k):
    """q(x * 2^k) = q(x), s(x * 2^k) = s(x) * 2^k, while the scales are normal and nothing rounds."""
    format = subject.format
    scaled = _float32(np.ldexp(x.astype(np.float64), k))
    fits = (np.ldexp(scaled, -k) == x) & (abs(scaled) <= format.limit)
    x, scaled = np.where(fits, x, np.float32(0)), np.where(fits, scaled, 0).astype(np.float32)
    before, after = subject(x), subject(scaled)
    where = _nonzero_groups(x, format) & (np.minimum(before.s, after.s) >= format.least_normal_scale)
    return _compare(x, before._replace(s=np.ldexp(before.s, k)), after, where=where)


@_property(Name.ORDER, "order")
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


@_property(Name.AGAIN, "quantizing D again")
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
    return _compare(x, first, second, where=where, slack=ulp)


@_property(
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
    return _first(wrong | (q.codes * np.sign(x) < 0), x, q, "of a subnormal group", D=values)


@_property(Name.DOT_PRODUCTS, "dot products", parts=_and(seed=strategies.seeds))
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


# ---- calibrated quantizers -------------------------------------------------------------------


def _weights_and_samples(format):
    """16 rows that are near a normal distribution, and samples whose columns go together: integers, so that
    no order of their sums rounds anything."""
    columns = max(format.multiple, 2 * (format.group_size or 16) if (format.group_size or 16) < 16 else 32)
    columns = -(-columns // format.multiple) * format.multiple

    def build(seed):
        rng = np.random.default_rng(seed)
        x = (rng.standard_normal((16, columns)) * min(1.0, format.limit / 8)).astype(np.float32)
        common = rng.integers(-4, 5, (4 * columns, 3)) @ rng.integers(-2, 3, (3, columns))
        samples = common + rng.integers(-1, 2, common.shape)
        return {"x": x, "samples": samples.astype(np.float32)}

    return strategies.seeds.map(build)


def loss(x, samples, q: Quantized) -> float:
    """The sum over samples and rows of (x . sample - D . sample)^2."""
    error = (x - q.values) @ samples.T.astype(np.float64)
    return float((error * error).sum())


@_property(
    Name.CALIBRATED_LOSS,
    "calibration lowers the loss",
    parts=(_weights_and_samples,),
    needs=("calibrated",),
    cost=10,
)
def calibrated_loss(subject, x, samples):
    """The sum over samples y of |x y - D y|^2 is at most that of the uncalibrated D."""
    before, after = loss(x, samples, subject(x)), loss(x, samples, subject.calibrate(x, samples))
    return None if after <= before else f"a loss of {after:.6g}, and uncalibrated {before:.6g}"


@_property(
    Name.SAMPLES_IN_ANY_ORDER,
    "samples in any order",
    parts=(_weights_and_samples, lambda format: st.fixed_dictionaries({"seed": strategies.seeds})),
    needs=("calibrated",),
    cost=10,
)
def samples_in_any_order(subject, x, samples, seed):
    """Permuting the samples, whose sums are exact, changes no code and no scale."""
    other = samples[np.random.default_rng(seed).permutation(len(samples))]
    return _compare(x, subject.calibrate(x, samples), subject.calibrate(x, np.ascontiguousarray(other)))


@_property(
    Name.NO_SAMPLES,
    "no samples, or silent ones",
    parts=(_weights_and_samples, lambda format: st.fixed_dictionaries({"count": st.integers(0, 3)})),
    needs=("calibrated",),
    cost=10,
)
def no_samples(subject, x, samples, count):
    """Without a sample, and with samples of zeros: finite s, -M <= q <= M, |x - D| <= |x| over the rows."""
    q = subject.calibrate(x, np.zeros((count, x.shape[1]), np.float32))
    found = _first(~np.isfinite(q.s) | (abs(q.codes) > subject.format.largest), x, q, "of no samples")
    if found:
        return found
    error, size = (float((v.astype(np.float64) ** 2).sum()) for v in (x - q.values, x))
    return None if error <= size else f"|x - D|^2 is {error:.6g}, and |x|^2 {size:.6g}"


# ---- groups against each other ---------------------------------------------------------------


@_property(
    Name.GROUP_FOR_ITSELF,
    "a group for itself",
    parts=(
        _matrix,
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
    found = _compare(x, subject(x), subject(changed), where=elsewhere)
    return found and f"with row {row}, group {group} changed: {found}"


@_property(Name.PERMUTATIONS, "permutations", parts=_and(seed=strategies.seeds))
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
        found = _compare(x[:, order_], moved, subject(np.ascontiguousarray(x[:, order_])))
        if found:
            return f"with {name} permuted: {found}"
    return None


@_property(Name.ROW_BY_ROW, "row by row, twice, in threads")
def row_by_row(subject, x):
    """q and s of x = those of its rows put together, one after another or in threads at once; and
    those of x a second time."""
    whole = subject(x)
    found = _compare(x, whole, subject(x))
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
            found = _compare(x, whole, joined)
            if found:
                return f"{name}: {found}"
    return None


@_property(Name.LAYOUTS, "layouts of the input")
def layouts(subject, x):
    """Strided, reversed, Fortran-ordered, unaligned or read-only input gives what contiguous input
    gives, and no input is written to."""
    expected = subject(x)
    for name, array in _layouts(np.ascontiguousarray(subject.turn(x))):
        kept = array.copy()
        found = _compare(x, expected, subject.run(subject.quantize, array))
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


# ---- bytes and files -------------------------------------------------------------------------


@_property(
    Name.PACKING,
    "packing",
    needs=("pack", "unpack"),
    parts=(lambda format: st.fixed_dictionaries({"codes": strategies.code_matrices(format)}),),
)
def packing(subject, codes):
    """unpack(pack(q)) = q, for every pair of codes; columns beyond q's are padding, and codes of 0."""
    columns = max(2, subject.format.multiple)
    found = _round_trip(subject, codes)
    if found or columns % 2:
        return found
    every = np.arange(-subject.format.largest, subject.format.largest + 1, dtype=codes.dtype)
    pairs = np.stack(np.meshgrid(every, every), axis=-1).reshape(-1, 2)
    return _round_trip(subject, np.tile(pairs, columns // 2))


def _round_trip(subject, codes):
    packed = np.asarray(subject.pack(subject.turn(codes)))
    got = subject.turn(np.asarray(subject.unpack(packed)))
    if got.shape[0] != codes.shape[0] or got.shape[1] < codes.shape[1]:
        return f"want codes {codes.shape}, got {got.shape}"
    padded = np.zeros(got.shape, np.int64)
    padded[:, : codes.shape[1]] = codes
    wrong = np.argwhere(got != padded)
    if not len(wrong):
        return None
    row, column = (int(i) for i in wrong[0])
    start = column - column % 2
    return (
        f"row {row}, columns {start} and {start + 1}: want the codes "
        f"{padded[row, start : start + 2].tolist()}, got {got[row, start : start + 2].tolist()}"
    )


@_property(
    Name.NOT_FINITE,
    "NaN and infinity",
    parts=_and(where=strategies.seeds, value=st.sampled_from([math.nan, math.inf, -math.inf])),
)
def not_finite(subject, x, where, value):
    """A NaN or infinity is an error that names the group ("group 3", from 0 in each row), and the
    tensor where the format has a name for it."""
    x = x.copy()
    row, column = where % x.shape[0], where // x.shape[0] % x.shape[1]
    x[row, column] = value
    group = column // (subject.format.group_size or x.shape[1])
    try:
        q = subject(x)
    except Fault:
        raise
    except Exception as error:  # whatever a quantizer calls its error
        said = str(error)
        wanted = [rf"group {group}\b", re.escape(subject.format.tensor_name or "")]
        missing = [want for want in wanted if not re.search(want, said)]
        if not missing:
            return None
        return f"{value} in group {group}: the error does not say so: {type(error).__name__}: {said:.200}"
    return f"{value} in row {row}, group {group}: no error, but the code {q.codes[row, column]}"


@_property(Name.SAME_BITS, "the same bits everywhere", needs=("native",))
def same_bits(subject, x):
    """Every implementation gives the same q and s."""
    expected = subject(x)
    for name, quantize in subject.native.items():
        found = _compare(x, expected, subject.run(quantize, np.ascontiguousarray(subject.turn(x))))
        if found:
            return f"{name}: {found}"
    return None


@_property(
    Name.FROM_Q8_0,
    "from Q8_0",
    needs=("from_q8_0",),
    parts=(lambda format: st.fixed_dictionaries({"blocks": strategies.q8_0_blocks(format)}),),
)
def from_q8_0(subject, blocks):
    """from_q8_0(blocks) = quantize(dequantised blocks)."""
    x = q8_0_values(blocks)
    return _compare(x, subject(x), subject.read(x.shape, *_pair(subject.from_q8_0(blocks))))


def q8_0_values(blocks: np.ndarray) -> np.ndarray:
    """Q8_0 blocks uint8 [rows, bytes] -> their exact values, float32 [rows, columns]."""
    parts = Q8_0.blocks_of(blocks)
    scales = np.ascontiguousarray(parts[..., :2]).view(np.float16).astype(np.float32)
    return (scales * parts[..., 2:].view(np.int8)).reshape(blocks.shape[0], -1)


@_property(
    Name.FILES,
    "files",
    needs=("save", "load"),
    cost=8,
    parts=_and(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7)),
)
def files(subject, x, place, bit):
    """load(save(q, s)) = q, s with their dtypes; any bit turned in any file written is an error."""
    q = subject(x)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        subject.save(directory, *q.raw)
        loaded = _pair(subject.load(directory))
        found = _compare(x, q, subject.read(x.shape, *loaded))
        dtypes = [[getattr(a, "dtype", None) for a in pair] for pair in (q.raw, loaded)]
        if found or dtypes[0] != dtypes[1]:
            return f"written and read: {found or f'want dtypes {dtypes[0]}, got {dtypes[1]}'}"
        written = sorted(path for path in directory.rglob("*") if path.is_file())
        for path in written:
            content = path.read_bytes()
            position = int(place * len(content))
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                subject.load(directory)
            except Exception:  # whatever a reader calls its error
                path.write_bytes(content)
                continue
            return (
                f"{path.relative_to(directory)}: bit {bit} of byte {position} of {len(content)} "
                "was turned: no error"
            )
    return None


# ---- what is wrong, in words -----------------------------------------------------------------


def _first(wrong, x, q: Quantized, what: str, **others) -> str | None:
    """The first place where `wrong` is true, with its x, q and s."""
    places = np.argwhere(wrong)
    if not len(places):
        return None
    row, column = (int(i) for i in places[0])
    more = "".join(f", {name} = {_number(a[row, column])}" for name, a in others.items())
    return (
        f"row {row}, column {column}: {what}: x = {_number(x[row, column])}, "
        f"q = {q.codes[row, column]}, s = {_number(q.s[row, column])}, "
        f"x / s = {_quotient(x[row, column], q.s[row, column])}{more}"
    )


def _compare(x, expected, got, sign=1, where=True, slack=0) -> str | None:
    """The first place whose code is not sign * the expected one, or whose scale is another."""
    differ = (got.codes != sign * expected.codes) | ~(
        (abs(got.s - expected.s) <= slack) | (np.isnan(got.s) & np.isnan(expected.s))
    )
    places = np.argwhere(differ & where)
    if not len(places):
        return None
    row, column = (int(i) for i in places[0])
    return (
        f"row {row}, column {column}: x = {_number(x[row, column])}: want "
        f"q = {sign * expected.codes[row, column]}, s = {_number(expected.s[row, column])}, "
        f"got q = {got.codes[row, column]}, s = {_number(got.s[row, column])}"
    )


def _number(value) -> str:
    return f"{float(value):.9g}"


def _quotient(x, s) -> str:
    return f"{float(x) / float(s):.9g}" if s else "none"


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
