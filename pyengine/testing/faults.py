"""One planted fault for each property: what property 21 finds out whether the suite would see.

A fault makes a broken quantizer of any: it changes what goes in or what comes out, in a way that its
property forbids.  The properties must fail on it, with this format and this many examples; otherwise
that they hold says nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .properties import Subject


def broken(subject: Subject, number: int) -> Subject:
    """The quantizer with the fault that property `number` is to see."""
    if number in _BESIDE:
        return _BESIDE[number](subject)
    return _with_output(subject, _OUTPUT[number])


def _with_output(subject, change):
    """change(x, codes int64, scales float64, s float64 per column) -> codes, scales."""
    def quantize(given):
        q = subject.run(subject.quantize, given)
        codes, scales = change(np.asarray(subject.turn(given)), q.codes, q.scales, q.s)
        return (np.ascontiguousarray(subject.turn(codes)),
                np.ascontiguousarray(subject.turn(scales)))
    return dataclasses.replace(subject, quantize=quantize)


def _smaller(codes, where=True):
    """Codes one nearer to zero."""
    return np.where(where, codes - np.sign(codes), codes)


def _other_side_of_ties(x, codes, scales, s):
    quotient = x / np.where(s == 0, 1, s)
    tie = abs(quotient - np.trunc(quotient)) == 0.5
    return np.where(tie, 2 * quotient - codes, codes).astype(np.int64), scales


_OUTPUT = {
    1: lambda x, q, scales, s: (q + np.sign(q), scales),
    2: lambda x, q, scales, s: (q, np.where(scales == 0, 3.0, -scales)),
    3: lambda x, q, scales, s: (q, scales / 2),
    4: lambda x, q, scales, s: (_smaller(q), scales),
    5: _other_side_of_ties,
    6: lambda x, q, scales, s: (_smaller(q, q < 0), scales),
    7: lambda x, q, scales, s: (_smaller(q, np.frexp(s)[1] % 2 == 1), scales),
    8: lambda x, q, scales, s: (-q, scales),
    9: lambda x, q, scales, s: (_smaller(q), scales),
    10: lambda x, q, scales, s: (_smaller(q, abs(q).sum(1, keepdims=True) % 2 == 1), scales),
    11: lambda x, q, scales, s: (_smaller(q, np.arange(q.shape[1]) % 3 == 0), scales),
    12: lambda x, q, scales, s: (_smaller(q, np.arange(len(q))[:, None] == len(q) - 1), scales),
    16: lambda x, q, scales, s: (q, np.full_like(scales, np.inf)),
    19: lambda x, q, scales, s: (q + 2 * np.sign(q), scales),
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


_BESIDE = {13: _misread_layouts, 14: _swapped_padding, 15: _nan_as_zero, 17: _another_native,
           18: _q8_0_negated, 20: _damage_unseen}
