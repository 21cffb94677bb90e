"""pyengine.testing on calibrated quantizers: ours have the properties, and each sees a fault."""

import numpy as np
import pytest

from pyengine.core import rounding
from pyengine.core.threads import Pool
from pyengine.quantizer.moments import Moments
from pyengine.quantizer.rule import quantize_groups
from pyengine.testing import Format, check_quantizer

CALIBRATED = (22, 23, 24)
POOL = Pool(1)


def dequantize(codes, scales):
    return codes * np.repeat(scales.astype(np.float32), 16, axis=1)[:, : codes.shape[1]]


def gptq(largest):
    def calibrated(x, samples):
        moments = Moments(POOL, x.shape[1])
        moments.add(samples, samples)
        moments.finish()
        return moments.round(np.ascontiguousarray(x), 0, largest, 16)

    return calibrated


def weighted(largest):
    def calibrated(x, samples):
        weights = (samples.astype(np.float64) ** 2).mean(axis=0) if len(samples) else np.ones(x.shape[1])
        weights = np.where(weights > 0, weights, 1.0)
        return rounding.round_weights(POOL, np.ascontiguousarray(x), weights, largest, 16)

    return calibrated


def check(calibrated, largest, **options):
    def quantize(x):
        return quantize_groups(x, largest, 16, "absmax")

    return check_quantizer(
        quantize,
        dequantize,
        Format(largest, 16),
        calibrated=calibrated,
        properties=(*CALIBRATED, 21),
        **options,
    )


@pytest.mark.parametrize("largest", [7, 127])
def test_gptq_has_the_properties(largest):
    report = check(gptq(largest), largest, examples=30)
    assert report.ok, f"\n{report}"
    assert {report[n].status for n in (*CALIBRATED, 21)} == {"holds"}


def test_column_weights_are_seen_through():
    """They know nothing of what goes together: order and silence are right, and the loss need not fall."""
    report = check(weighted(7), 7, examples=30, shrink=False)
    assert report[23].status == report[24].status == "holds"


@pytest.mark.parametrize("number", CALIBRATED)
def test_broken_ones(number):
    def broken(x, samples):
        if number == 24 and not samples.any():
            raise ZeroDivisionError("no samples")
        codes, scales = gptq(7)(x, samples)
        if number == 22:
            codes = np.clip(codes + 1, -7, 7)
        if number == 23:
            codes = codes * (1 if samples[:1].sum() > 0 else -1)
        return codes, scales

    assert number in check(broken, 7, examples=30, shrink=False).failures


def test_without_a_calibrated_one():
    report = check(None, 7, examples=10)
    assert {report[n].status for n in CALIBRATED} == {"not applicable"}
