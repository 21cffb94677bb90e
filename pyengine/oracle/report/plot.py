"""A verdict as a picture."""

from __future__ import annotations

from ...plots import check_plot, new_figure, save_figure
from ..rerun import layer_of
from ..verdict import DIFFERENT, GUILTY, INHERITED, OK, SUSPECT, Row, Verdict
from .summary import WORDS, headline

NAMED = 6  # accused dots with their names
TICKS = 20
WIDTH = 0.8  # of a layer, in layers: between two of them there is a gap


def plot(verdict: Verdict, path) -> None:
    """Each tensor's relative error within its layer, and the budget of the layers' outputs."""
    path = check_plot(path)
    figure = new_figure((9, 4.5))
    panel = figure.subplots()
    places = places_of(verdict)
    drawn = [row for row in verdict.rows if row.error and row.scale and 0 < row.error.rms < float("inf")]
    for status, color in (
        (OK, "tab:gray"),
        (INHERITED, "tab:orange"),
        (DIFFERENT, "tab:orange"),
        (SUSPECT, "tab:purple"),
        (GUILTY, "tab:red"),
    ):
        rows = [row for row in drawn if row.status == status]
        if rows:
            panel.scatter(
                [places[row.name] for row in rows],
                [row.error.rms / row.scale for row in rows],
                s=14,
                c=color,
                label=WORDS[status] or "ok",
            )
    accused = [row for row in drawn if row.status in (GUILTY, SUSPECT)]
    for row in accused[:NAMED]:
        panel.annotate(
            short_name(row),
            (places[row.name], row.error.rms / row.scale),
            xytext=(2, 4),
            textcoords="offset points",
            fontsize="x-small",
            rotation=35,
        )
    _layers(panel, [row for row in drawn if row.name.rpartition(".")[0] == "model.layers"], places, verdict)
    panel.set(yscale="log", xlabel="layer", ylabel="error, relative to the reference's size")
    ticks = layer_ticks(verdict)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_title(headline(verdict), fontsize="small", wrap=True)
    panel.grid(alpha=0.3)
    if drawn:
        panel.legend()
    save_figure(figure, path)


def _layers(panel, layers, places, verdict):
    budget = verdict.nearest.budget if verdict.nearest else verdict.budget
    x = [places[row.name] for row in layers]
    panel.plot(
        x, [row.error.rms / row.scale for row in layers], c="tab:blue", lw=1, label="the layer's output"
    )
    if layers and all(row.total_share for row in layers):
        allowed = [row.error.rms / row.scale / row.total_share for row in layers]
        panel.plot(x, allowed, c="black", lw=1, ls="--", label=f"{budget} budget")


def places_of(verdict: Verdict) -> dict[str, float]:
    """x of each tensor: those of layer I between I - 0.4 and I + 0.4, in the order of execution; the
    embedding before the first layer, the last norm and lm_head behind the last."""
    after = max(_layer_numbers(verdict), default=-1) + 1
    groups: dict[int, list[str]] = {}
    for row in verdict.rows:
        groups.setdefault(layer_of(row.name, after), []).append(row.name)
    places = {}
    for layer, group in groups.items():
        start, step = layer - WIDTH / 2, WIDTH / max(1, len(group) - 1)
        if len(group) == 1:
            start = layer
        places |= {name: start + i * step for i, name in enumerate(group)}
    return places


def layer_ticks(verdict: Verdict) -> list[int]:
    """Numbers of layers that were compared, at most TICKS of them, evenly spaced."""
    layers = _layer_numbers(verdict)
    return layers[:: -(-len(layers) // TICKS) or 1]


def _layer_numbers(verdict) -> list[int]:
    return sorted({layer_of(row.name, -1) for row in verdict.rows} - {-1})


def short_name(row: Row) -> str:
    """Without the part that the axis says."""
    parts = row.name.split(".")
    return ".".join(parts[3:]) or f"layer {parts[2]}" if row.name.startswith("model.layers.") else row.name
