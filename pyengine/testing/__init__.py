"""What others import into their own tests: of a quantizer, or of a whole model.

Test your own symmetric group quantizer: 21 properties, each with its smallest counterexample.

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

They need Hypothesis: pip install 'pyengine[test]'.

Test your own implementation of the model: `record` (a transformers model), `record_llama_cpp` (a GGUF
through llama-cpp-python) or a trace file in the layout of `pyengine.trace` give a `Trace`; an `Oracle`
judges it, and `assert_trace_equal` fails with what is wrong.  Under pytest the fixture
`pyengine_oracle` is one for the model of `--pyengine-model`.
"""

import importlib

from ..errors import InputError

# Loaded when asked for: the properties need Hypothesis, the rest only what a user of it has.
_HOMES = {
    "PROPERTIES": ".properties", "Format": ".format", "Outcome": ".suite", "Report": ".suite",
    "check_quantizer": ".suite",
    "Oracle": "..oracle.check", "Trace": "..trace", "assert_trace_equal": ".traces",
    "record": "..oracle.record", "record_llama_cpp": "..oracle.llama_cpp",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name].startswith((".properties", ".suite")):
        _require_hypothesis()
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__():
    return sorted([*globals(), *_HOMES])


def _require_hypothesis():
    try:
        import hypothesis  # noqa: F401
    except ImportError:
        raise InputError("pyengine.testing: want the package hypothesis, got none: "
                         "pip install 'pyengine[test]'") from None
