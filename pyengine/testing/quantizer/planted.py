"""One planted fault per property.  Property 21 plants them to check that the suite detects each.

A fault breaks any given quantizer: it changes what goes in or what comes out, in a way that its property
forbids.  The property has to fail on it, with this format and this many examples.  Otherwise a result
"holds" would say nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .names import Name
from .subject import Subject


def broken(subject: Subject, number: Name) -> Subject:
    """The quantizer with the fault that property `number` is to see."""
    if number in _BESIDE:
        return _BESIDE[number](subject)
    return _with_output(subject, _OUTPUT[number])


def _with_output(subject, change):
    """change(x, codes int64, scales float64, s float64 per column) -> codes, scales."""

    def quantize(given):
        q = subject.run(subject.quantize, given)
        codes, scales = change(np.asarray(subject.turn(given)), q.codes, q.scales, q.s)
        return (np.ascontiguousarray(subject.turn(codes)), np.ascontiguousarray(subject.turn(scales)))

    return dataclasses.replace(subject, quantize=quantize)


def _smaller(codes, where=True):
    """Codes one nearer to zero."""
    return np.where(where, codes - np.sign(codes), codes)


def _other_side_of_ties(x, codes, scales, s):
    quotient = x / np.where(s == 0, 1, s)
    tie = abs(quotient - np.trunc(quotient)) == 0.5
    return np.where(tie, 2 * quotient - codes, codes).astype(np.int64), scales


_OUTPUT = {
    Name.CODES_IN_RANGE: lambda x, q, scales, s: (q + np.sign(q), scales),
    Name.SCALES_OF_ZERO: lambda x, q, scales, s: (q, np.where(scales == 0, 3.0, -scales)),
    Name.NOTHING_CLIPS: lambda x, q, scales, s: (q, scales / 2),
    Name.NEAREST_CODE: lambda x, q, scales, s: (_smaller(q), scales),
    Name.TIES: _other_side_of_ties,
    Name.NEGATION: lambda x, q, scales, s: (_smaller(q, q < 0), scales),
    Name.POWERS_OF_TWO: lambda x, q, scales, s: (_smaller(q, np.frexp(s)[1] % 2 == 1), scales),
    Name.ORDER: lambda x, q, scales, s: (-q, scales),
    Name.AGAIN: lambda x, q, scales, s: (_smaller(q), scales),
    Name.GROUP_FOR_ITSELF: lambda x, q, scales, s: (
        _smaller(q, abs(q).sum(1, keepdims=True) % 2 == 1),
        scales,
    ),
    Name.PERMUTATIONS: lambda x, q, scales, s: (_smaller(q, np.arange(q.shape[1]) % 3 == 0), scales),
    Name.ROW_BY_ROW: lambda x, q, scales, s: (_smaller(q, np.arange(len(q))[:, None] == len(q) - 1), scales),
    Name.SUBNORMAL_GROUPS: lambda x, q, scales, s: (q, np.full_like(scales, np.inf)),
    Name.DOT_PRODUCTS: lambda x, q, scales, s: (q + 2 * np.sign(q), scales),
}


# ---- faults beside the output ----------------------------------------------------------------


def _misread_layouts(subject):
    def quantize(given):
        plain = given.flags.c_contiguous and given.flags.aligned and given.flags.writeable
        return subject.quantize(given if plain else given * np.float32(0.5))

    return dataclasses.replace(subject, quantize=quantize)


def _swapped_padding(subject):
    def pack(codes):
        return np.asarray(subject.pack(codes)) ^ np.uint8(1)

    return dataclasses.replace(subject, pack=pack)


def _nan_as_zero(subject):
    def quantize(given):
        return subject.quantize(np.where(np.isfinite(given), given, np.float32(0)))

    return dataclasses.replace(subject, quantize=quantize)


def _another_native(subject):
    def native(given):
        return subject.quantize(-given)

    return dataclasses.replace(subject, native={"planted": native})


def _q8_0_negated(subject):
    def from_q8_0(blocks):
        codes, scales = subject.from_q8_0(blocks)
        return -np.asarray(codes), scales

    return dataclasses.replace(subject, from_q8_0=from_q8_0)


def _damage_unseen(subject):
    kept = []

    def load(directory):
        try:
            kept[:] = subject.load(directory)
        except Exception:  # the fault: an old result instead of the error
            pass
        return tuple(kept)

    return dataclasses.replace(subject, load=load)


def _calibrated(change):
    """change(samples, codes, scales) -> codes, scales, of what `calibrated` returns."""

    def plant(subject):
        def calibrated(given, samples):
            codes, scales = subject.calibrated(given, samples)
            return change(samples, np.asarray(codes), np.asarray(scales))

        return dataclasses.replace(subject, calibrated=calibrated)

    return plant


def _worse(samples, codes, scales):
    """Codes halved."""
    return codes // 2, scales


def _by_the_first(samples, codes, scales):
    """Another code where the first sample's sum is odd."""
    return (-codes if len(samples) and samples[0].sum() % 2 else codes), scales


def _nothing_of_nothing(samples, codes, scales):
    return codes, scales if samples.any() else scales * np.nan


_BESIDE = {
    Name.CALIBRATED_LOSS: _calibrated(_worse),
    Name.SAMPLES_IN_ANY_ORDER: _calibrated(_by_the_first),
    Name.NO_SAMPLES: _calibrated(_nothing_of_nothing),
    Name.LAYOUTS: _misread_layouts,
    Name.PACKING: _swapped_padding,
    Name.NOT_FINITE: _nan_as_zero,
    Name.SAME_BITS: _another_native,
    Name.FROM_Q8_0: _q8_0_negated,
    Name.FILES: _damage_unseen,
}
