"""The locked forward pass: the layers as their equations, each step an operation of the C core."""

# "locked-kv16" differs from "locked" in one rounding: keys and values are kept as float16.
LOCKED_ARITHMETICS = ("locked", "locked-kv16")
