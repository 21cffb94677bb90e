"""Plots of a census and of a probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..plots import new_figure, save_figure

FLOOR = 1e-3  # of the colours, in even shares: what is never chosen has a place on a logarithmic scale


def plot_census(path: Path, censuses: list[dict[str, Any]]) -> None:
    """Layers x experts, a column of panels per model: the share in even shares, and the saliency.

    A cross is a dead expert; white in the saliency was not chosen at all.
    """
    layers, experts = len(censuses[0]["layers"]), censuses[0]["experts"]
    width, height = 2 + min(14, 2.5 + experts / 16), 1.2 + min(10, 1 + layers / 6)
    figure = new_figure((width * len(censuses), 2 * height))
    axes = figure.subplots(2, len(censuses), squeeze=False)
    saliencies = [_grid(census, "saliency") for census in censuses]
    highest = max(float(np.nanmax(saliency)) for saliency in saliencies)
    for column, (census, saliency) in enumerate(zip(censuses, saliencies, strict=True)):
        share = _grid(census, "share") * experts
        share_axes, saliency_axes = axes[0][column], axes[1][column]
        image = share_axes.imshow(
            np.log10(np.maximum(share, FLOOR)), aspect="auto", cmap="viridis", vmin=-2, vmax=1
        )
        figure.colorbar(image, ax=share_axes, label="log10 of the share, in even shares")
        dead = [(expert, i) for i, layer in enumerate(census["layers"]) for expert in layer["dead"]]
        if dead:
            share_axes.plot(*zip(*dead, strict=True), "x", color="tab:red", markersize=4)
        share_axes.set_title(Path(census["model"]).name)
        image = saliency_axes.imshow(saliency, aspect="auto", cmap="magma", vmin=0, vmax=highest)
        figure.colorbar(image, ax=saliency_axes, label="saliency")
        for one in (share_axes, saliency_axes):
            one.set(xlabel="expert", ylabel="layer")
            one.yaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def _grid(census: dict[str, Any], key: str) -> Any:
    """float64 [layers, experts]; NaN where there is no figure."""
    rows = [[expert[key] for expert in layer["experts"]] for layer in census["layers"]]
    return np.array(rows, np.float64)


def plot_probe(path: Path, probe: dict[str, Any]) -> None:
    """Distances by layer: hidden states, and each layer's two modules; the core is marked."""
    figure = new_figure((8, 4.5))
    axes = figure.subplots()
    numbers = [layer["layer"] for layer in probe["layers"]]
    for key, label, style in (
        ("distance", "hidden state", "o-"),
        ("mixer", "attention or delta net", "."),
        ("mlp", "MLP", "+"),
    ):
        axes.plot(numbers, [layer[key] for layer in probe["layers"]], style, label=label)
    if probe["core"] is not None:
        axes.axvline(probe["core"], color="tab:gray", linestyle=":", label=f"core: layer {probe['core']}")
    axes.set(xlabel="layer", ylabel="cosine distance", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    save_figure(figure, path)
