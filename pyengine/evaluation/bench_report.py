"""What `bench` measured: as JSON, CSV, a table or a plot."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields

from ..plots import check_plot, new_figure, save_figure
from ..tables import markdown_table
from .bench import Result

FIRST_DEPTH = 512  # of a plot, which then doubles it


def as_json(results: list[Result]) -> str:
    return json.dumps([asdict(result) for result in results], indent=2)


def as_csv(results: list[Result]) -> str:
    """One line per test, no samples, as llama-bench."""
    names = [field.name for field in fields(Result) if not field.name.startswith("samples_")]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    for result in results:
        values = [getattr(result, name) for name in names]
        table.writerow(["" if value is None else value for value in values])
    return text.getvalue().rstrip("\n")


COLUMNS = {  # heading: (alignment, text)
    "model": ("<", lambda r: r.model_type),
    "size": (">", lambda r: _binary_size(r.model_size)),
    "params": (
        ">",
        lambda r: (
            f"{r.model_n_params / 1e9:.2f} B"
            if r.model_n_params >= 1e9
            else f"{r.model_n_params / 1e6:.2f} M"
        ),
    ),
    "isa": ("<", lambda r: r.isa),
    "threads": (">", lambda r: str(r.n_threads)),
    "cache": ("<", lambda r: r.type_k),
    "test": (">", lambda r: r.test),
    "state": (">", lambda r: _binary_size(r.state_size)),
    "t/s": (">", lambda r: f"{r.avg_ts:.2f} ± {r.stddev_ts:.2f}"),
    "GMAC/s": (">", lambda r: f"{r.gmac_per_s:.2f}"),
    "GB/s": (">", lambda r: "" if r.gb_per_s is None else f"{r.gb_per_s:.2f}"),
    "of read bandwidth": (
        ">",
        lambda r: (
            ""
            if r.bandwidth_share is None
            else f"{r.bandwidth_share:.0%} of {r.read_bandwidth_gb_per_s:.1f} GB/s"
        ),
    ),
}


# Of a model that is larger than its memory.
STREAMED_COLUMNS = {
    "hits": (">", lambda r: "" if r.expert_hit_rate is None else f"{r.expert_hit_rate:.1%}"),
    "missed MB/token": (
        ">",
        lambda r: "" if r.missed_bytes_per_token is None else f"{r.missed_bytes_per_token / 1e6:.1f}",
    ),
    "read MB/token": (
        ">",
        lambda r: "" if r.read_bytes_per_token is None else f"{r.read_bytes_per_token / 1e6:.1f}",
    ),
    "waiting": (">", lambda r: "" if r.waiting_share is None else f"{r.waiting_share:.0%}"),
}


def _binary_size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def as_markdown(results: list[Result]) -> str:
    """A table as llama-bench prints it, with the bandwidth of the machine."""
    streamed = any(result.memory is not None for result in results)
    columns = COLUMNS | (STREAMED_COLUMNS if streamed else {})
    align = "".join(align for align, _ in columns.values())
    rows = [list(columns), *([text(result) for _, text in columns.values()] for result in results)]
    return "\n".join(markdown_table(rows, align))


# ---- a plot ------------------------------------------------------------------------------------


def plot_depths(max_depth: int) -> list[int]:
    """0, 512, 1024, 2048, ... up to max_depth."""
    depths, depth = [0], FIRST_DEPTH
    while depth <= max_depth:
        depths.append(depth)
        depth *= 2
    return depths


def plot(results: list[Result], path) -> None:
    """Tokens per second against the tokens already seen: prompts above, generations below."""
    path = check_plot(path)
    kinds = [("prompt", "n_prompt"), ("generation", "n_gen")]
    kinds = [(name, field) for name, field in kinds if any(getattr(r, field) for r in results)]
    figure = new_figure((7, 0.5 + 3 * len(kinds)))
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(f"{results[0].model_type}, {results[0].isa}")
    for panel, (name, field) in zip(panels, kinds):
        _draw_panel(panel, [r for r in results if getattr(r, field)], field)
        panel.set(ylabel=f"{name}, tokens/s", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    panels[-1].set_xlabel("tokens in the context")
    save_figure(figure, path)


def _draw_panel(panel, results, field) -> None:
    """One line for each length and number of threads."""
    for length, threads in sorted({(getattr(r, field), r.n_threads) for r in results}):
        line = sorted(
            (r for r in results if (getattr(r, field), r.n_threads) == (length, threads)),
            key=lambda r: r.n_depth,
        )
        label = line[0].test.partition(" ")[0] + f", {threads} thread" + "s" * (threads > 1)
        panel.errorbar(
            [r.n_depth for r in line],
            [r.avg_ts for r in line],
            [r.stddev_ts for r in line],
            marker="o",
            capsize=3,
            label=label,
        )
