"""Properties of a calibrated quantizer."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from .. import strategies
from ..names import Name
from ..subject import Quantized
from .registry import register
from .words import compare, first_where


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


@register(
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


@register(
    Name.SAMPLES_IN_ANY_ORDER,
    "samples in any order",
    parts=(_weights_and_samples, lambda format: st.fixed_dictionaries({"seed": strategies.seeds})),
    needs=("calibrated",),
    cost=10,
)
def samples_in_any_order(subject, x, samples, seed):
    """Permuting the samples, whose sums are exact, changes no code and no scale."""
    other = samples[np.random.default_rng(seed).permutation(len(samples))]
    return compare(x, subject.calibrate(x, samples), subject.calibrate(x, np.ascontiguousarray(other)))


@register(
    Name.NO_SAMPLES,
    "no samples, or silent ones",
    parts=(_weights_and_samples, lambda format: st.fixed_dictionaries({"count": st.integers(0, 3)})),
    needs=("calibrated",),
    cost=10,
)
def no_samples(subject, x, samples, count):
    """Without a sample, and with samples of zeros: finite s, -M <= q <= M, |x - D| <= |x| over the rows."""
    q = subject.calibrate(x, np.zeros((count, x.shape[1]), np.float32))
    found = first_where(~np.isfinite(q.s) | (abs(q.codes) > subject.format.largest), x, q, "of no samples")
    if found:
        return found
    error, size = (float((v.astype(np.float64) ** 2).sum()) for v in (x - q.values, x))
    return None if error <= size else f"|x - D|^2 is {error:.6g}, and |x|^2 {size:.6g}"
