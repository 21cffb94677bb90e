"""Checks for other projects' tests: of a quantizer, or of a whole model.

Test your own symmetric group quantizer: 21 properties, and 3 of
a calibrated one, each with its smallest counterexample.

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
`pyengine.testing.quantizer.strategies` has the Hypothesis strategies for weights, for tests of one's own.

They need Hypothesis: pip install 'pyengine-lm[test]'.

Test your own implementation of the model: `record` (a transformers model), `record_llama_cpp` (a GGUF
through llama-cpp-python) or a trace file in the layout of `pyengine.oracle.trace` give a `Trace`; an `Oracle`
judges it, and `assert_trace_equal` fails with what is wrong.  Under pytest the fixture
`pyengine_oracle` is one for the model of `--pyengine-model`.
"""

import importlib

from ..optional import require

# Loaded when asked for: the properties need Hypothesis, the rest only what a user of it has.
_HOMES = {
    "PROPERTIES": ".quantizer.properties",
    "Format": ".quantizer.format",
    "Outcome": ".quantizer.suite",
    "Report": ".quantizer.suite",
    "check_quantizer": ".quantizer.suite",
    "Oracle": "..oracle.oracle",
    "Trace": "..oracle.trace",
    "assert_trace_equal": ".model.traces",
    "record": "..oracle.recorders.transformers",
    "record_llama_cpp": "..oracle.recorders.llama_cpp",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] in (".quantizer.properties", ".quantizer.suite"):
        require("hypothesis", extra="test", what="pyengine.testing")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
