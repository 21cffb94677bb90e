"""A progress bar for long work: on stderr, and only where somebody watches."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(total: int, what: str, unit: str = "B") -> tqdm:
    """A tqdm bar over total units; silent when stderr is no terminal."""
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, file=sys.stderr,
                disable=not sys.stderr.isatty(), leave=False)
