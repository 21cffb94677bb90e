"""A progress bar for long work, on stderr, if stderr is a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, what: str, unit: str = "B", shown: bool = True) -> tqdm[Any]:
    """A tqdm bar over total units; silent when stderr is not a terminal, or when it is not to be shown."""
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        disable=not (shown and sys.stderr.isatty()),
        leave=False,
    )


def already_done(bar: tqdm[Any], amount: int) -> None:
    """Move the bar over what an earlier run did: it does not count for the rate and the time that is left."""
    if not bar.disable:
        bar.initial += amount
        bar.n += amount
        bar.refresh()
