"""The properties by name.  A name is also its number, in the order in which a report lists them."""

from __future__ import annotations

from enum import IntEnum


class Name(IntEnum):
    """A number and a name for each property: Name.TIES == 5."""

    CODES_IN_RANGE = 1
    SCALES_OF_ZERO = 2
    NOTHING_CLIPS = 3
    NEAREST_CODE = 4
    TIES = 5
    NEGATION = 6
    POWERS_OF_TWO = 7
    ORDER = 8
    AGAIN = 9
    GROUP_FOR_ITSELF = 10
    PERMUTATIONS = 11
    ROW_BY_ROW = 12
    LAYOUTS = 13
    PACKING = 14
    NOT_FINITE = 15
    SUBNORMAL_GROUPS = 16
    SAME_BITS = 17
    FROM_Q8_0 = 18
    DOT_PRODUCTS = 19
    FILES = 20
    SELF_CHECK = 21
    CALIBRATED_LOSS = 22
    SAMPLES_IN_ANY_ORDER = 23
    NO_SAMPLES = 24

    def __str__(self):
        return str(int(self))


def property_of(key) -> Name | None:
    """A number, or a name in lower case ("ties"), as the property; None of anything else."""
    if isinstance(key, str):
        return Name.__members__.get(key.upper()) if key == key.lower() else None
    try:
        return Name(key)
    except ValueError:
        return None
