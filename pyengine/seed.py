"""The seed of every random draw for which the user names no other seed."""

SEED = 1729
