"""Plots: matplotlib where it is installed, files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError

PLOT_SUFFIXES = (".png", ".svg")


def check_plot(path) -> Path:
    """Known before the work begins: matplotlib is there and the file has a kind it can draw."""
    path = Path(path)
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"{path}: want a file name that ends in {' or '.join(PLOT_SUFFIXES)}")
    _matplotlib_figure()
    return path


def new_figure(size: tuple[float, float]):
    """A matplotlib figure of width and height in inches.  InputError without matplotlib."""
    return _matplotlib_figure()(figsize=size, layout="constrained")


def save_figure(figure, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, dpi=150, format=path.suffix[1:].lower())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _matplotlib_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plot: want matplotlib (pip install 'pyengine[plot]'), got none") from None
    return Figure
