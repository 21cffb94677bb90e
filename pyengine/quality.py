"""What quantising costs: the error of every tensor, layer and model, against the source.

    measured = measure("int8", "model.gguf")                 # a checkpoint that was written
    forecasts = forecast("model.gguf")                       # what `quantize` would give, unwritten
    print(as_table([measured]))

For a source's values x and a candidate's values y of the same parameters, in Hugging Face's order:

    relative error   ||x - y|| / ||x||, Frobenius; 0 where both are equal, infinite where only x is 0
    SNR              10 log10(||x||^2 / ||x - y||^2) in dB; infinite where both are equal
    worst group      of the columns that share a scale (128 where none do), the group of greatest
                     relative error

Sums are float64.  Rows are read and compared a block at a time: memory does not grow with the model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import ops
from .checkpoint import (
    BLOCK_TYPES,
    DENSE_TYPES,
    Checkpoint,
    Spec,
    Tensor,
    model_specs,
    open_checkpoint,
)
from .codes import GROUP, LARGEST, SCALES, to_bfloat16
from .errors import CheckpointError
from .figure import check_plot, new_figure, save_figure
from .progress import progress
from .quantize import Options, checked_options, open_source, plan, quantize_rows

PIECE = 1 << 20  # values compared at a time
BLOCK = 32  # of Q8_0 and Q4_0


class WorstGroup(NamedTuple):
    """Where a group lies: Hugging Face's row, and the group along it."""

    tensor: str
    expert: int | None
    row: int
    group: int
    relative_error: float


@dataclass(frozen=True)
class Figures:
    """Of a tensor, a layer or a model.

    name            Hugging Face's: "model.layers.3.self_attn.q_proj.weight", "model.layers.3"
    type            how the candidate stores it, INT8 and its like; of several tensors, ""
    values          how many
    signal, noise   sums of squares: of x, of x - y
    """

    name: str
    type: str
    values: int
    signal: float
    noise: float
    worst: WorstGroup

    @property
    def relative_error(self) -> float:
        return _relative(self.signal, self.noise)

    @property
    def snr_db(self) -> float:
        return -20 * math.log10(self.relative_error) if self.relative_error else math.inf


@dataclass(frozen=True)
class Measurement:
    """One candidate, tensor by tensor in the order of the forward pass."""

    label: str
    tensors: list[Figures]

    @property
    def layers(self) -> list[Figures]:
        """Every decoder layer: its quantised tensors together."""
        layers = {}
        for tensor in self._quantized():
            if tensor.name.startswith("model.layers."):
                layers.setdefault(".".join(tensor.name.split(".")[:3]), []).append(tensor)
        return [_together(name, tensors) for name, tensors in layers.items()]

    @property
    def quantized(self) -> Figures:
        return _together("quantized tensors", self._quantized())

    @property
    def whole(self) -> Figures:
        return _together("whole", self.tensors)

    def _quantized(self) -> list[Figures]:
        """All that is not kept as floats; where everything is, everything."""
        return [t for t in self.tensors if t.type not in DENSE_TYPES] or self.tensors


def _together(name: str, parts: list[Figures]) -> Figures:
    return Figures(name, "", sum(p.values for p in parts), math.fsum(p.signal for p in parts),
                   math.fsum(p.noise for p in parts),
                   max((p.worst for p in parts), key=lambda worst: worst.relative_error))


def _relative(signal, noise):
    if noise == 0:
        return 0.0
    return math.sqrt(noise / signal) if signal else math.inf


# ---- measuring -------------------------------------------------------------------------------


def measure(candidate, source) -> Measurement:
    """A checkpoint, as a rule a quantised directory, against what it was made from.

    Errors: InputError, FileFormatError, CheckpointError (a tensor that is missing or has another
    shape; a value that is not finite).
    """
    original, made = open_checkpoint(source), open_checkpoint(candidate)
    _check_alike(original, made)
    specs = model_specs(original.config)
    with progress(_values(specs), "quality", "weight") as bar:
        rows = [_compare(spec, original.tensors[spec.name], [_Stored(made.tensors[spec.name])],
                         bar.update) for spec in specs]
    return Measurement(str(candidate), [figures for (figures,) in rows])


def forecast(source, bits=(8, 4), scales=SCALES, group_size: int = GROUP,
             threads: int | None = None) -> list[Measurement]:
    """What `quantize` would make of a source, for each number of bits and each way to a scale.

    Errors: those of `quantize`.
    """
    ways = [(b, checked_options(group_size, scale)) for b in bits for scale in scales]
    checkpoint, pool = open_source(source), ops.Pool(threads)
    specs = model_specs(checkpoint.config)
    types = {b: _types_written(checkpoint, b, group_size) for b in bits}
    rows = []
    with progress(_values(specs), "quality", "weight") as bar:
        for spec in specs:
            x = checkpoint.tensors[spec.name]
            made = [_Forecast(pool, x, types[b][spec.name], b, options) for b, options in ways]
            rows.append(_compare(spec, x, made, bar.update))
    return [Measurement(f"int{b} {options.scale}", list(column))
            for (b, options), column in zip(ways, zip(*rows))]


def _values(specs):
    return sum(math.prod(spec.shape) for spec in specs)


def _check_alike(original: Checkpoint, made: Checkpoint) -> None:
    wanted, got = ({spec.name: spec.shape for spec in model_specs(checkpoint.config)}
                   for checkpoint in (original, made))
    for name in wanted | got:
        if wanted.get(name) != got.get(name):
            raise CheckpointError(
                f"{made.path}: {name}: want {wanted.get(name, 'no such tensor')}, as in "
                f"{original.path}, got {got.get(name, 'no such tensor')}")


def _types_written(checkpoint, bits, group_size) -> dict[str, str]:
    """{parameter: INT8, INT4, BF16 or F32}."""
    return {tensor.name: f"INT{bits}" if len(unit) == 2 else unit[0].dtype
            for unit in plan(checkpoint, bits, group_size) for tensor in unit[0].sources}


# ---- one tensor ------------------------------------------------------------------------------

# Rows of a matrix, or of one expert's: (expert or None, start, stop).  None: a vector, as one row.
Piece = tuple[int | None, int, int] | None


def _pieces(spec: Spec):
    if not spec.linear:
        yield None
        return
    *stack, rows, cols = spec.shape
    step = max(1, PIECE // cols)
    for expert in range(stack[0]) if stack else [None]:
        for start in range(0, rows, step):
            yield expert, start, min(start + step, rows)


def _read(tensor: Tensor, piece: Piece) -> np.ndarray:
    """[rows, cols] in Hugging Face's order and convention."""
    return tensor.float64().reshape(1, -1) if piece is None else tensor.rows_float32(*piece)


class _Stored:
    """A candidate's tensor as it lies in its file."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.type = tensor, tensor.type
        self.group = BLOCK if tensor.type in BLOCK_TYPES else tensor.group

    def read(self, piece: Piece) -> np.ndarray:
        return _read(self.tensor, piece)


class _Forecast:
    """What `quantize` would write of a tensor."""

    def __init__(self, pool: ops.Pool, tensor: Tensor, kind: str, bits: int, options: Options):
        self.pool, self.tensor, self.type = pool, tensor, kind
        self.largest, self.options, self.group = LARGEST[bits], options, options.group_size

    def read(self, piece: Piece) -> np.ndarray:
        if self.type == "F32":
            return _read(self.tensor, piece).astype(np.float32)
        if self.type == "BF16":
            return (to_bfloat16(_read(self.tensor, piece)).astype(np.uint32) << 16).view(np.float32)
        codes, scales = quantize_rows(self.pool, self.tensor, *piece, self.largest, self.options)
        return codes * np.repeat(scales.astype(np.float32), self.group, axis=1)[:, : codes.shape[1]]


def _compare(spec: Spec, x: Tensor, made, advance) -> list[Figures]:
    """One Figures for each of the candidates `made`."""
    signals, noises = [0.0] * len(made), [0.0] * len(made)
    worst = [WorstGroup(spec.name, None, 0, 0, 0.0)] * len(made)
    for piece in _pieces(spec):
        values = _read(x, piece).astype(np.float64)
        for i, candidate in enumerate(made):
            signal = _sums_of_groups(values * values, candidate.group)
            error = values - candidate.read(piece)
            noise = _sums_of_groups(error * error, candidate.group)
            if not (np.isfinite(signal).all() and np.isfinite(noise).all()):
                raise CheckpointError(f"{spec.name}: want finite values, got NaN or infinity")
            signals[i] += signal.sum()
            noises[i] += noise.sum()
            worst[i] = max(worst[i], _worst(spec.name, piece, signal, noise),
                           key=lambda group: group.relative_error)
        advance(values.size)
    return [Figures(spec.name, candidate.type, math.prod(spec.shape), float(signals[i]),
                    float(noises[i]), worst[i]) for i, candidate in enumerate(made)]


def _sums_of_groups(terms, group):
    """[rows, cols] -> [rows, n_groups]"""
    return np.add.reduceat(terms, np.arange(0, terms.shape[1], group), axis=1)


def _worst(name, piece, signal, noise) -> WorstGroup:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(noise == 0, 0.0, noise / signal)
    row, group = np.unravel_index(int(ratios.argmax()), ratios.shape)
    expert, start = (None, 0) if piece is None else piece[:2]
    return WorstGroup(name, expert, start + int(row), int(group), math.sqrt(ratios[row, group]))


# ---- output ----------------------------------------------------------------------------------


def as_json(measurements: list[Measurement]) -> str:
    """An infinite figure is null: JSON has no infinity."""
    return json.dumps([{
        "label": m.label,
        "whole": _plain(m.whole),
        "quantized": _plain(m.quantized),
        "layers": [_plain(figures) for figures in m.layers],
        "tensors": [_plain(figures) for figures in m.tensors],
    } for m in measurements], indent=2, allow_nan=False)


def _plain(figures: Figures) -> dict:
    worst = figures.worst._asdict()
    worst["relative_error"] = _finite(worst["relative_error"])
    return {"name": figures.name, "type": figures.type, "values": figures.values,
            "relative_error": _finite(figures.relative_error), "snr_db": _finite(figures.snr_db),
            "worst_group": worst}


def _finite(value):
    return value if math.isfinite(value) else None


def as_table(measurements: list[Measurement]) -> str:
    """Tensors, then layers, then the quantised tensors and the whole.

    Of one candidate also where the worst group lies, [expert, row]; of several, the figures side by
    side.
    """
    alone = len(measurements) == 1
    columns = [[m.tensors, m.layers, [m.quantized, m.whole]] for m in measurements]
    heads = [["type", "error", "SNR, dB", "worst group"][not alone:] for _ in measurements]
    sections = [[["", *sum(heads, [])]]]
    if not alone:
        sections[0].insert(0, ["", *(c for m in measurements for c in (m.label, "", ""))])
    for section in zip(*columns):
        sections.append([_line(figures, alone) for figures in zip(*section)])
    rows = [row for section in sections for row in section]
    widths = [max(len(row[i]) for row in rows[not alone:]) for i in range(len(rows[0]))]
    return "\n\n".join("\n".join(_aligned(row, widths) for row in section) for section in sections)


def _line(figures: tuple[Figures, ...], alone: bool) -> list[str]:
    cells = [figures[0].name]
    for f in figures:
        cells += [f.type] * alone
        cells += [f"{f.relative_error:.3e}", f"{f.snr_db:.2f}", f"{f.worst.relative_error:.3e}"]
        cells[-1] += _place(f) * alone
    return cells


def _place(figures: Figures) -> str:
    worst = figures.worst
    if worst.relative_error == 0:
        return ""
    tensor = "" if worst.tensor == figures.name else f" {worst.tensor}"
    expert = "" if worst.expert is None else f"{worst.expert}, "
    return f"{tensor} [{expert}{worst.row}] group {worst.group}"


def _aligned(row, widths):
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


# ---- a plot ----------------------------------------------------------------------------------


def plot(measurements: list[Measurement], path) -> None:
    """SNR against the layer: a line for the layers, a dot for each of their quantised tensors.

    Not drawn is what is equal to the source.
    """
    path = check_plot(path)
    figure = new_figure((8, 4.5))
    panel = figure.subplots()
    for i, m in enumerate(measurements):
        dots, line = _points(m._quantized()), _points(m.layers)
        label = f"{m.label}: {m.quantized.snr_db:.1f} dB"
        panel.plot(*zip(*line), color=f"C{i}", marker="_", label=label)
        panel.scatter(*zip(*dots), color=f"C{i}", s=9, alpha=0.5)
    panel.set(xlabel="layer", ylabel="signal to noise, dB")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    panel.legend()
    save_figure(figure, path)


def _points(figures: list[Figures]) -> list[tuple[int, float]]:
    """(layer, SNR)"""
    return [(int(f.name.split(".")[2]), f.snr_db) for f in figures
            if f.name.startswith("model.layers.") and math.isfinite(f.snr_db)] or [(0, math.nan)]
