"""Hypothesis strategies for what a quantizer is given: groups of weights, matrices, Q8_0 blocks.

Everything is float32 and within the format's range.  Dense values come from a seed, a count and a
precision, so that a failing example shrinks to few values with few bits.
"""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import strategies as st

from ...files.ggml_blocks import Q8_0
from .format import Format

seeds = st.integers(0, 2**16 - 1)

# ---- one group -------------------------------------------------------------------------------


def zero(format: Format, n: int):
    """n zeros."""
    return st.just(np.zeros(n, np.float32))


def constant(format: Format, n: int):
    """One value n times."""
    return _values(format).map(lambda value: np.full(n, value, np.float32))


def sparse(format: Format, n: int):
    """Up to four values anywhere in the format's range, the rest zero."""
    return st.dictionaries(st.integers(0, n - 1), _values(format), min_size=1, max_size=4).map(
        lambda items: _scatter(n, items)
    )


def normal(format: Format, n: int):
    """A normal distribution of any width, like most weights."""
    return st.builds(
        functools.partial(_dense, format, n, np.random.Generator.standard_normal), *_DENSE, _exponents(format)
    )


def outliers(format: Format, n: int):
    """A normal distribution and one value far beyond it: the others get small codes."""

    def build(x, index, factor, sign):
        x = x.copy()
        with np.errstate(over="ignore"):
            value = np.abs(x).max() * np.float32(sign * factor)
        x[index] = np.clip(value, -format.limit, format.limit)
        return x

    return st.builds(
        build, normal(format, n), st.integers(0, n - 1), st.integers(2, 1000), st.sampled_from([1, -1])
    )


def mixed_magnitudes(format: Format, n: int):
    """Values of every exponent in one group."""

    def draw(rng, n):
        exponents = rng.integers(-149, int(np.log2(format.limit)), n)
        return rng.choice([-1, 1], n) * np.ldexp(rng.uniform(1, 2, n), exponents)

    return st.builds(functools.partial(_dense, format, n, draw), *_DENSE, st.just(0))


def subnormal(format: Format, n: int):
    """Subnormal float32 values, and values whose scale is a subnormal of the format or below it."""
    top = int(np.log2(format.least_normal_scale * format.largest))
    return st.builds(
        functools.partial(_dense, format, n, np.random.Generator.standard_normal),
        *_DENSE,
        st.one_of(st.integers(-149, -126), st.integers(max(-149, top - 14), top)),
    )


def ties(format: Format, n: int):
    """A largest value M * s for a scale s of the format, and values (j + 1/2) * s."""

    def build(seed, scale):
        j = np.random.default_rng(seed).integers(-format.largest, format.largest, n)
        x = (j + 0.5) * scale
        x[seed % n] = format.largest * scale
        return x.astype(np.float32)

    return st.builds(build, seeds, scales(format))


def extreme_scales(format: Format, n: int):
    """Largest values at the ends of the scale's range: greatest, least normal, least, half of that."""
    ends = [format.greatest_scale, format.least_normal_scale, format.least_scale]
    factors = [1, 0.5, 0.25, 0.75, 1.25, 1.5, 2.5, 1 - 2**-12, 1 + 2**-12, 1 + 1 / format.largest]

    def build(end, factor, sign, items):
        largest = min(end * factor * format.largest, format.limit)
        x = _scatter(n, {i: value * largest for i, value in items.items()})
        x[0] = sign * largest
        return x

    return st.builds(
        build,
        st.sampled_from(ends),
        st.sampled_from(factors),
        st.sampled_from([1, -1]),
        st.dictionaries(st.integers(0, n - 1), st.floats(-1, 1, width=32), max_size=3),
    )


KINDS = (zero, sparse, constant, normal, outliers, mixed_magnitudes, subnormal, ties, extreme_scales)


@functools.lru_cache(maxsize=512)  # making a strategy takes longer than drawing from it
def groups(format: Format, n: int | None = None):
    """One group, float32 [n] (default: a whole group), of any of the KINDS."""
    n = n or _usual(format)
    return st.one_of(*(kind(format, n) for kind in KINDS))


# ---- matrices --------------------------------------------------------------------------------


def lengths(format: Format, max_groups: int = 3):
    """Numbers of columns: whole groups, and short last ones where the format has them."""
    size = _usual(format)
    step = size * format.multiple // np.gcd(size, format.multiple)
    whole = st.integers(1, max(1, max_groups * size // step)).map(lambda n: n * step)
    any_length = st.integers(1, max(1, max_groups * size // format.multiple)).map(
        lambda n: n * format.multiple
    )
    return whole if format.multiple % size == 0 else st.one_of(any_length, whole)


@functools.lru_cache(maxsize=64)
def matrices(format: Format, max_rows: int = 3, max_groups: int = 3, kind=groups):
    """float32 [rows, cols], C-contiguous, of at most three different groups drawn from `kind`."""
    size = format.group_size or _usual(format) * max_groups
    different = st.lists(kind(format, size), min_size=1, max_size=3)
    return st.builds(
        functools.partial(_assemble, format),
        st.integers(1, max_rows),
        lengths(format, max_groups),
        different,
        seeds,
    )


def _assemble(format, rows, cols, different, seed):
    parts = format.slices(cols)
    # Seed 0, to which examples shrink, has the first group everywhere.
    high = len(different) if seed else 1
    which = np.random.default_rng(seed).integers(0, high, (rows, len(parts)))
    x = np.empty((rows, cols), np.float32)
    for (row, i), choice in np.ndenumerate(which):
        part = parts[i]
        x[row, part] = different[choice][: part.stop - part.start]
    return x


@st.composite
def code_matrices(draw, format: Format):
    """Codes int8 or int16 [rows, cols] of the format, all of them valid."""
    dtype = np.int8 if format.largest < 128 else np.int16
    rows, cols = draw(st.integers(1, 3)), draw(lengths(format, 2))
    rng, count = np.random.default_rng(draw(seeds)), draw(st.integers(1, rows * cols))
    codes = np.zeros(rows * cols, dtype)
    codes[:count] = rng.integers(-format.largest, format.largest + 1, count)
    return codes.reshape(rows, cols)


@st.composite
def q8_0_blocks(draw, format: Format):
    """uint8 [rows, bytes]: llama.cpp's Q8_0, a float16 scale and 32 int8 codes per block."""
    elements = Q8_0.elements
    step = format.multiple * elements // np.gcd(format.multiple, elements)
    rows, cols = draw(st.integers(1, 2)), step * draw(st.integers(1, max(1, 256 // step)))
    bound = min(65504.0, format.limit / 128)
    bound = float(np.nextafter(np.float16(bound), np.float16(0)))
    blocks = np.zeros((rows, Q8_0.stored_columns(cols)), np.uint8)
    for block in blocks.reshape(-1, Q8_0.nbytes):
        block[:2].view(np.float16)[:] = draw(st.floats(-bound, bound, width=16))
        rng, ends = np.random.default_rng(draw(seeds)), draw(st.booleans())
        codes = rng.choice([-128, -127, 1, 127], elements) if ends else rng.integers(-128, 128, elements)
        codes[draw(st.integers(1, elements)) :] = 0
        block[2:] = codes.astype(np.int8).view(np.uint8)
    return blocks


# ---- parts -----------------------------------------------------------------------------------


def _scales(precision, low, high):
    def build(significand, exponent):
        return float(np.ldexp(float(significand), exponent - precision + 1))

    return st.builds(build, st.integers(2 ** (precision - 1), 2**precision - 1), st.integers(low, high))


def scales(format: Format):
    """Normal scales whose multiples by half-integers up to M are float32 values."""
    # (j + 1/2) * s has as many bits as both together: at most 24.
    precision = min(format.precision, 24 - (2 * format.largest).bit_length())
    low = max(-100, int(np.log2(format.least_normal_scale)))
    high = min(100, int(np.log2(format.limit / format.largest)) - 1)
    middle = min(max(0, low), high)
    return st.one_of(_scales(precision, middle, middle), _scales(precision, low, high))


def _usual(format):
    """The group's size, or some length where the whole row is the group."""
    return format.group_size or max(32, format.multiple)


def _values(format):
    return st.floats(-format.limit, format.limit, width=32)


def _exponents(format):
    top = int(np.log2(format.limit)) - 4
    return st.one_of(st.integers(-12, 2), st.integers(max(-60, top - 48), top))


# seed, how many values are not zero (as a share of the group), bits kept of each
_DENSE = (seeds, st.floats(0, 1), st.sampled_from([3, 11, 24]))


def _dense(format, n, draw, seed, share, bits, exponent):
    x = np.ldexp(draw(np.random.default_rng(seed), n), exponent)
    x[int(np.ceil(share * (n - 1))) + 1 :] = 0
    significand, power = np.frexp(x)
    x = np.ldexp(np.rint(np.ldexp(significand, bits)), power - bits)
    return np.clip(x, -format.limit, format.limit).astype(np.float32)


def _scatter(n, items):
    x = np.zeros(n, np.float32)
    for index, value in items.items():
        x[index] = value
    return x
