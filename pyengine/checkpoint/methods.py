"""How a quantizer chooses scales and codes: the keys that files hold, and the words for people."""

from __future__ import annotations

METHODS = {
    "absmax": "symmetric; scale: absmax / largest code, as float16; code: the nearest, ties to even",
    "mse": "symmetric; scale: the float16 of least squared error; code: the nearest, ties to even",
}

# Methods that need activation statistics: `quantizer/calibrated.py`.
CALIBRATED = {
    "weighted": "symmetric; scale: the float16 of least squared error, each column weighed by the mean "
    "square of what it is multiplied with on the calibration text; code: the nearest, ties to even",
    "gptq": "symmetric; layer after layer, for what the quantized layers before give on the calibration "
    "text; "
    "codes compensate each other's errors, and the errors of the layers before; scale: the float16 of least "
    "error among 16",
    "awq": "symmetric; channels scaled by powers of two, which are folded into what comes before them, "
    "chosen by the error weighed by the mean squares of the calibration text; then as gptq",
}
ALL_METHODS = METHODS | CALIBRATED

# `noesis-provenance-1` and `-2` have these sentences in place of the key, and hash them: do not edit them.
OLDER_METHODS = {
    "symmetric, absmax / largest code as float16, nearest code, ties to even": "absmax",
    "symmetric, float16 scale of least squared error, nearest code, ties to even": "mse",
}
