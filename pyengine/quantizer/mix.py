"""Bits where they count: which quantized parameters are INT8 and which are INT4.

    PATTERN=int8,PATTERN=int4,...

A pattern is a shell's (fnmatch: `*`, `?`, `[0-3]`), of Hugging Face's parameter names.  Their last ".weight"
may be left out.  Routed experts are `model.layers.N.mlp.experts.gate_up_proj` and `.down_proj`: each is one
parameter, of all experts of a layer.  The first pattern that matches a parameter decides.  A parameter that
no pattern matches is INT4.  Parameters that stay floats are not chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..checkpoint.did_you_mean import hint, nearest_name
from ..errors import InputError, quote

KINDS = {"int8": 8, "int4": 4}
REST = 4  # bits of a parameter that no pattern matches

# INT8 for what every token is multiplied with, INT4 for the experts, of which a token needs a few.
ACTIVE = "*.mlp.experts.*=int4,*=int8"


@dataclass(frozen=True)
class Mix:
    """rules: (pattern, bits), of which the first that matches decides."""

    rules: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """InputError: a part that is not PATTERN=int8 or PATTERN=int4, a pattern twice, no part."""
        rules: dict[str, int] = {}
        for part in text.split(","):
            pattern, equals, kind = part.strip().rpartition("=")
            if not equals or not pattern or kind not in KINDS:
                raise InputError(f"mix: want PATTERN=int8 or PATTERN=int4 between commas, got {quote(part)}")
            if pattern in rules:
                raise InputError(f"mix: {quote(pattern)}: want each pattern once, got it twice")
            rules[pattern] = KINDS[kind]
        return cls(tuple(rules.items()))

    def bits_of(self, name: str) -> int:
        """8 or 4, of a parameter that is quantized."""
        return next((bits for pattern, bits in self.rules if _matches(pattern, name)), REST)

    def check(self, quantized: Sequence[str], floats: Sequence[str]) -> None:
        """InputError: a pattern that decides no parameter.

        quantized, floats: names of the model's parameters that are quantized, and that stay floats.
        """
        left = list(quantized)
        for pattern, _ in self.rules:
            decided = [name for name in left if _matches(pattern, name)]
            if not decided:
                raise InputError(f"mix: {quote(pattern)}: {_why_nothing(pattern, quantized, floats)}")
            left = [name for name in left if name not in set(decided)]

    def __str__(self) -> str:
        return ",".join(f"{pattern}=int{bits}" for pattern, bits in self.rules)


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


def _why_nothing(pattern: str, quantized: Sequence[str], floats: Sequence[str]) -> str:
    if any(_matches(pattern, name) for name in quantized):
        return "want parameters that no earlier pattern matches, got none"
    kept = next((name for name in floats if _matches(pattern, name)), None)
    if kept is not None:
        return f"want parameters that are quantized, got only ones that stay floats: {kept}"
    return f"want a pattern of quantized parameters, got one of none{_nearest(pattern, quantized)}"


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """A pattern is compared with whole names; without its stars, with what stands behind a layer's number."""
    whole = hint(pattern, names, "nearest name")
    if whole:
        return whole
    ends = {name.split(".", 3)[-1].removesuffix(".weight"): name for name in reversed(names)}
    near = nearest_name(pattern.replace("*", "").strip("."), ends)
    return f"; nearest name: {ends[near]}" if near else f"; their names end in {', '.join(sorted(ends))}"
