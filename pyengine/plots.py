"""Drawing, with matplotlib where there is one."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError

PLOT_SUFFIXES = (".png", ".svg")


def check_plot(path) -> Path:
    """Known before the work begins: matplotlib is there and the file has a kind it can draw."""
    path = Path(path)
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"{path}: want a file name that ends in {' or '.join(PLOT_SUFFIXES)}")
    _figure_class()
    return path


def new_figure(width: float, height: float):
    """A matplotlib Figure of that many inches."""
    return _figure_class()(figsize=(width, height), layout="constrained")


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plot: want matplotlib (pip install 'pyengine[plot]'), got none") from None
    return Figure
