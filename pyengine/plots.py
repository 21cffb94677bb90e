"""Plots: matplotlib where it is installed, files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import InputError
from .files.whole import open_whole
from .optional import require

PLOT_SUFFIXES = (".png", ".svg")


def check_plot(path: str | os.PathLike[str]) -> Path:
    """Checked before the work begins: matplotlib is installed and can draw a file of this suffix."""
    path = Path(path)
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"{path}: want a file name that ends in {' or '.join(PLOT_SUFFIXES)}")
    _matplotlib_figure()
    return path


def new_figure(size: tuple[float, float]) -> Any:
    """A matplotlib figure of width and height in inches.  InputError without matplotlib."""
    return _matplotlib_figure()(figsize=size, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    with open_whole(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:].lower())


def _matplotlib_figure() -> Any:
    return require("matplotlib.figure", extra="plot", what="plot").Figure
