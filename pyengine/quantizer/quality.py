"""What quantizing costs: the error of every tensor, layer and model, against the source.

    measured = measure("int8", "model.gguf")                 # a checkpoint that was written
    forecasts = forecast("model.gguf")                       # what `quantize` would give, unwritten
    print(as_table([measured]))                              # of quality_report.py

For a source's values x and a candidate's values y of the same parameters, in Hugging Face's order:

    relative error   ||x - y|| / ||x||, Frobenius; 0 where both are equal, infinite where only x is 0
    SNR              10 log10(||x||^2 / ||x - y||^2) in dB; infinite where both are equal
    worst group      of the columns that share a scale (128 where none do), the group of greatest
                     relative error

Sums are float64.  Rows are read and compared a block at a time: memory does not grow with the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.families import Spec, model_specs
from ..checkpoint.layout import BITS, GROUP, MAX_CODE
from ..checkpoint.methods import METHODS
from ..checkpoint.names import layer_name, layer_of
from ..checkpoint.open import open_checkpoint
from ..checkpoint.tensor import Tensor
from ..core.threads import Pool
from ..errors import CheckpointError, InputError
from ..files.ggml_blocks import DENSE_TYPES
from ..files.numbers import float32_in_bfloat16
from ..progress import progress
from .mix import Mix
from .options import QuantizeOptions, open_source
from .plan import plan
from .quantize_pass import quantize_rows, source_rows

COMPARED_VALUES = 1 << 20  # values compared at a time


class WorstGroup(NamedTuple):
    """The place of a group: Hugging Face's row, and the group along the row."""

    tensor: str
    expert: int | None
    row: int
    group: int
    relative_error: float


@dataclass(frozen=True)
class Figures:
    """Of a tensor, a layer or a model.

    name            Hugging Face's: "model.layers.3.self_attn.q_proj.weight", "model.layers.3"
    type            INT8 and its like, as the candidate stores the tensor; of several tensors, ""
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
        """Every decoder layer: its quantized tensors together."""
        layers: dict[int, list[Figures]] = {}
        for tensor in self.quantized_tensors:
            layer = layer_of(tensor.name)
            if layer is not None:
                layers.setdefault(layer, []).append(tensor)
        return [_together(layer_name(layer), tensors) for layer, tensors in layers.items()]

    @property
    def quantized(self) -> Figures:
        return _together("quantized tensors", self.quantized_tensors)

    @property
    def whole(self) -> Figures:
        return _together("whole", self.tensors)

    @property
    def quantized_tensors(self) -> list[Figures]:
        """Tensors that are not floats; where every tensor is floats, every tensor."""
        return [t for t in self.tensors if t.type not in DENSE_TYPES] or self.tensors


def _together(name: str, parts: list[Figures]) -> Figures:
    return Figures(
        name,
        "",
        sum(p.values for p in parts),
        math.fsum(p.signal for p in parts),
        math.fsum(p.noise for p in parts),
        max((p.worst for p in parts), key=lambda worst: worst.relative_error),
    )


def _relative(signal, noise):
    if noise == 0:
        return 0.0
    return math.sqrt(noise / signal) if signal else math.inf


# ---- measuring -------------------------------------------------------------------------------


def measure(candidate, source) -> Measurement:
    """A checkpoint, as a rule a quantized directory, against its source.

    Errors: InputError (a candidate whose weights are not the source's but for rounding: `awq`),
    FileFormatError, CheckpointError (a tensor that is missing or has another shape; a value that is not
    finite).
    """
    original, made = open_checkpoint(source), open_checkpoint(candidate)
    _check_alike(original, made)
    if provenance.has_scaled_channels(made.path):
        raise InputError(
            f"{candidate}: method: want weights to compare with {source}, got awq, whose channels are scaled "
            "(compare on a text: -f TEXT)"
        )
    specs = model_specs(original.config)
    with progress(_values(specs), "quality", "weight") as bar:
        rows = [
            _compare(spec, original.tensors[spec.name], [_Stored(made.tensors[spec.name])], bar.update)
            for spec in specs
        ]
    return Measurement(str(candidate), [figures for (figures,) in rows])


def forecast(
    source, bits=(8, 4), scales=tuple(METHODS), group_size: int = GROUP, threads: int | None = None
) -> list[Measurement]:
    """The checkpoints that `quantize` would write of a source, for each of `bits` and each method.

    bits: 8, 4, and what is a `Mix`.

    Errors: those of `quantize`.
    """
    ways = [(b, QuantizeOptions(group_size, scale)) for b in bits for scale in scales]
    checkpoint, pool = open_source(source), Pool(threads)
    specs = model_specs(checkpoint.config)
    types = {b: _types_written(checkpoint, b, group_size) for b in bits}
    rows = []
    with progress(_values(specs), "quality", "weight") as bar:
        for spec in specs:
            x = checkpoint.tensors[spec.name]
            made = [_Forecast(pool, x, types[b][spec.name], options) for b, options in ways]
            rows.append(_compare(spec, x, made, bar.update))
    return [
        Measurement(f"{'mixed' if isinstance(b, Mix) else f'int{b}'} {options.scale}", list(column))
        for (b, options), column in zip(ways, zip(*rows))
    ]


def _values(specs):
    return sum(math.prod(spec.shape) for spec in specs)


def _check_alike(original: Checkpoint, made: Checkpoint) -> None:
    wanted, got = (
        {spec.name: spec.shape for spec in model_specs(checkpoint.config)} for checkpoint in (original, made)
    )
    for name in wanted | got:
        if wanted.get(name) != got.get(name):
            raise CheckpointError(
                f"{made.path}: {name}: want {wanted.get(name, 'no such tensor')}, as in "
                f"{original.path}, got {got.get(name, 'no such tensor')}"
            )


def _types_written(checkpoint, bits, group_size) -> dict[str, str]:
    """{parameter: INT8, INT4, BF16 or F32}."""
    return {
        tensor.name: f"INT{parameter.bits}" if parameter.bits else parameter.entries[0].dtype
        for parameter in plan(checkpoint, bits, group_size)
        for tensor in parameter.sources
    }


# ---- one tensor ------------------------------------------------------------------------------

# Rows of a matrix, or of one expert's: (expert or None, start, stop).  None: a vector, as one row.
Piece = tuple[int | None, int, int] | None


def _pieces(spec: Spec):
    if not spec.linear:
        yield None
        return
    *stack, rows, cols = spec.shape
    step = max(1, COMPARED_VALUES // cols)
    for expert in range(stack[0]) if stack else [None]:
        for start in range(0, rows, step):
            yield expert, start, min(start + step, rows)


def _read(tensor: Tensor, piece: Piece) -> np.ndarray:
    """[rows, cols] in Hugging Face's order and convention."""
    return tensor.float64().reshape(1, -1) if piece is None else tensor.rows_float32(*piece)


class _Stored:
    """A candidate's tensor as its file has it."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.type = tensor, tensor.type
        self.group = tensor.scale_columns

    def read(self, piece: Piece) -> np.ndarray:
        return _read(self.tensor, piece)


class _Forecast:
    """The values of a tensor that `quantize` would write."""

    def __init__(self, pool: Pool, tensor: Tensor, kind: str, options: QuantizeOptions):
        self.pool, self.tensor, self.type = pool, tensor, kind
        self.options, self.group = options, options.group_size

    def read(self, piece: Piece) -> np.ndarray:
        if self.type == "F32":
            return _read(self.tensor, piece).astype(np.float32)
        if self.type == "BF16":
            return float32_in_bfloat16(_read(self.tensor, piece))
        codes, scales = quantize_rows(
            self.pool, source_rows(self.tensor, *piece), MAX_CODE[BITS[self.type]], self.options
        )
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
            worst[i] = max(
                worst[i], _worst(spec.name, piece, signal, noise), key=lambda group: group.relative_error
            )
        advance(values.size)
    return [
        Figures(
            spec.name, candidate.type, math.prod(spec.shape), float(signals[i]), float(noises[i]), worst[i]
        )
        for i, candidate in enumerate(made)
    ]


def _sums_of_groups(terms, group):
    """[rows, cols] -> [rows, n_groups]"""
    return np.add.reduceat(terms, np.arange(0, terms.shape[1], group), axis=1)


def _worst(name, piece, signal, noise) -> WorstGroup:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(noise == 0, 0.0, noise / signal)
    row, group = np.unravel_index(int(ratios.argmax()), ratios.shape)
    expert, start = (None, 0) if piece is None else piece[:2]
    return WorstGroup(name, expert, start + int(row), int(group), math.sqrt(ratios[row, group]))
