"""What a quantizer says about itself, and what the suite reads off that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...errors import InputError
from .names import Name, property_of

# dtype: (bits of the significand, least and greatest exponent of a normal number)
_FLOATS = {"float16": (11, -14, 15), "bfloat16": (8, -126, 127), "float32": (24, -126, 127)}
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Format:
    """The declared format of a symmetric group quantizer: value = code * scale.

    largest       M, the largest code: codes are -M .. M (127 for INT8, 7 for INT4)
    group_size    values along a row that share a scale; None: the whole row
    scale_dtype   "float16", "bfloat16" or "float32": what a stored scale can be (its NumPy dtype
                  may be a wider one)
    axis          1: groups run along a row, scales are [rows, n_groups];
                  0: groups run down a column, scales are [n_groups, cols]
    ties          where x / s halfway between two codes goes: "even", "away" (from zero), or None
                  when either code will do
    zero_scale    the scale of a group of zeros; None: any finite one
    multiple      the length along the axis must be a multiple of it: 1 when a short last group is
                  fine, 2 for pairs of nibbles, the group size when there are only whole groups
    scale_returns which scales come back when the dequantised values are quantised again (property
                  9): "normal", those that are normal numbers of scale_dtype, or "always"
    largest_input the greatest |x| that is accepted; None: M times the greatest scale
    tensor_name   a name that an error about NaN must contain (property 15); None: none asked for
    not_promised  {property's number or name: reason}: guarantees that the quantizer does not make.  They are
                  tried all the same, but a failure is reported as declared and is none of
                  `Report.failures`

    Errors: InputError naming the field.
    """

    largest: int = 127
    group_size: int | None = 128
    scale_dtype: str = "float16"
    axis: int = 1
    ties: str | None = "even"
    zero_scale: float | None = 0.0
    multiple: int = 1
    scale_returns: str = "normal"
    largest_input: float | None = None
    tensor_name: str | None = None
    not_promised: Mapping[int | str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        _want(
            isinstance(self.largest, int) and self.largest >= 1, "largest", "a code from 1 on", self.largest
        )
        _want(self.group_size is None or self.group_size >= 1, "group_size", "None or 1 on", self.group_size)
        _want(self.scale_dtype in _FLOATS, "scale_dtype", " or ".join(_FLOATS), self.scale_dtype)
        _want(self.axis in (0, 1), "axis", "0 or 1", self.axis)
        _want(self.ties in ("even", "away", None), "ties", "'even', 'away' or None", self.ties)
        _want(self.multiple >= 1, "multiple", "1 on", self.multiple)
        _want(
            self.scale_returns in ("normal", "always"),
            "scale_returns",
            "'normal' or 'always'",
            self.scale_returns,
        )
        _want(
            all(property_of(key) for key in self.not_promised),
            "not_promised",
            f"numbers of properties, 1 to {max(Name)}, or their names",
            list(self.not_promised),
        )
        named = {property_of(key): reason for key, reason in self.not_promised.items()}
        object.__setattr__(self, "not_promised", named)

    @property
    def precision(self) -> int:
        """Bits of a scale's significand."""
        return _FLOATS[self.scale_dtype][0]

    @property
    def least_scale(self) -> float:
        """The smallest positive scale, a subnormal one."""
        return 2.0 ** (_FLOATS[self.scale_dtype][1] - self.precision + 1)

    @property
    def least_normal_scale(self) -> float:
        return 2.0 ** _FLOATS[self.scale_dtype][1]

    @property
    def greatest_scale(self) -> float:
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0 ** _FLOATS[self.scale_dtype][2]

    @property
    def limit(self) -> float:
        """The greatest |x| that the suite tries, a float32."""
        # Half of float32's range: M times a rounded scale must not overflow.
        limit = self.largest_input or min(self.largest * self.greatest_scale, _FLOAT32_MAX / 2)
        rounded = np.float32(limit)
        return float(np.nextafter(rounded, np.float32(0)) if rounded > limit else rounded)

    def can_store(self, scales: np.ndarray) -> np.ndarray:
        """Which of some float64 scales are numbers of scale_dtype."""
        exponent = np.maximum(np.frexp(scales)[1] - 1, _FLOATS[self.scale_dtype][1])
        steps = np.ldexp(scales, self.precision - 1 - exponent)
        return np.isfinite(scales) & (steps == np.rint(steps)) & (np.abs(scales) <= self.greatest_scale)

    def n_groups(self, cols: int) -> int:
        return 1 if self.group_size is None else -(-cols // self.group_size)

    def per_column(self, scales: np.ndarray, cols: int) -> np.ndarray:
        """[rows, n_groups] -> [rows, cols], each value that of its column's group."""
        return np.repeat(scales, self.group_size or cols, axis=1)[:, :cols]

    def slices(self, cols: int) -> list[slice]:
        """The columns of each group."""
        size = self.group_size or cols
        return [slice(start, min(start + size, cols)) for start in range(0, cols, size)]


def _want(condition, name, wanted, got):
    if not condition:
        raise InputError(f"Format: {name}: want {wanted}, got {got!r}")
