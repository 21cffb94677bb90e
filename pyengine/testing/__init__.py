"""Test your own symmetric group quantizer: 21 properties, each with its smallest counterexample.

    from pyengine.testing import Format, check_quantizer

    def quantize(x):                                  # float32 [rows, cols]
        groups = x.reshape(len(x), -1, 32)
        scales = (abs(groups).max(-1) / 127).astype(np.float16)
        codes = np.rint(groups / np.where(scales == 0, 1, scales)[..., None])
        return codes.astype(np.int8).reshape(x.shape), scales

    def dequantize(codes, scales):
        return codes * np.repeat(scales, 32, axis=1).astype(np.float32)

    report = check_quantizer(quantize, dequantize, Format(group_size=32, multiple=32))
    assert report.ok, f"\\n{report}"

`report` says that this one takes NaN for a number and gives some tiny groups the scale 0.  `Format`
is what the quantizer declares, with `not_promised` for guarantees that it does not make.
`pyengine.testing.strategies` has the Hypothesis strategies for weights, for tests of one's own.

Needs Hypothesis: pip install 'pyengine[test]'.
"""

from ..errors import InputError

try:
    import hypothesis  # noqa: F401
except ImportError:
    raise InputError("pyengine.testing: want the package hypothesis, got none: "
                     "pip install 'pyengine[test]'") from None

from .format import Format
from .properties import PROPERTIES
from .suite import Outcome, Report, check_quantizer

__all__ = ["PROPERTIES", "Format", "Outcome", "Report", "check_quantizer"]
