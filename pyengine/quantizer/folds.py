"""Scales of channels, folded into what comes before: the first step of `awq` of METHODS.

    folds = Folds(pool, checkpoint, statistics, bits, group)
    fold = folds.layer(index)            # of one decoder layer
    fold.rows(rows, tensor, expert, first), fold.plain(tensor)   # its parameters, folded

A channel is what one column of a linear reads.  Column j of every linear that reads it is multiplied by s_j,
and what makes the channel is divided by s_j:

    the channels of         linears                                             divided
    input_layernorm         q_proj, k_proj, v_proj; in_proj_*                   1 + weight
    post_attention_layernorm  gate and up of the MLP, or of every expert;       1 + weight
                            router; shared_expert_gate
    v_proj                  o_proj; query heads of one key-value head share s   rows of v_proj
    the delta net's norm    out_proj; value heads share s                       weight
    up_proj                 down_proj; of each expert, of the shared one        rows of up_proj

s_j is a power of two, from 2^-MOST to 2^MOST.  So every product and sum behind it is what it was, times a
power of two, and the folded model is the source: a weight times s_j is exact in float32 and in bfloat16 (from
2^-120 up), and so is a norm's weight / s_j.  One thing is rounded: float32((1 + weight) / s_j - 1), where 24
bits are too few for it.

Which s, from the statistics alone, each line of the table by itself:

    m_j   the mean square of column j, `Statistics.weights` of the first linear that is quantized; over
          columns that share s: the mean
    s_j = 2^rint(alpha / 2 * (lg m_j - the mean of lg m)), for alpha = 0, 1/4, 1/2, 3/4, 1
    lg(f 2^e) = e + 2 f - 2, 1/2 <= f < 1: log2, but linear between powers of two

The alpha of the least error is taken, of several the first: the error is never greater than with alpha 0,
which folds nothing.  The error: each quantized linear's weights, times s, are rounded as `weighted` rounds
them, each column weighed by its own mean square / s_j^2; the sum of these weights times
(w s_j - code * scale)^2, over all rows and those linears.  Rounding them in earnest is left to moments.py.

All is float64; sums are taken in order (a row's columns, then rows, then linears in the order above; of a
stack of experts, gate and up of each in turn), so that no thread or processor changes a bit.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..calibration.layer import Inputs, inputs_of
from ..calibration.statistics import Statistics
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import LINEAR, Config
from ..checkpoint.layout import MAX_CODE
from ..checkpoint.names import layer_name
from ..checkpoint.tensor import Tensor
from ..core import rounding
from ..core.threads import Pool
from .weighted import Floats, Rounded, by_rows

ALPHAS = (0.25, 0.5, 0.75, 1.0)  # beside 0
MOST = 4  # the greatest exponent of a scale

Array = NDArray[np.float64]
Exponents = NDArray[np.int32]


class _Site(NamedTuple):
    """Linears that read the same channels.

    linears   (parameter, expert)
    shared    int [n]: the channel of each column; None: column j is channel j
    """

    linears: list[tuple[str, int | None]]
    shared: NDArray[np.int64] | None = None


class LayerFold:
    """Exponents of a layer's scales, by parameter and expert.

    columns are multiplied; divided: rows, or a norm's entries.
    """

    def __init__(self) -> None:
        self.columns: dict[tuple[str, int | None], Exponents] = {}
        self.divided: dict[tuple[str, int | None], Exponents] = {}

    def scale(self, name: str, expert: int | None = None) -> Floats | None:
        """s of a linear's columns, float32 [n]; None: all are 1."""
        exponents = self._of(self.columns, name, expert)
        return None if exponents is None else np.ldexp(np.float32(1), exponents)

    def rows(self, rows: Floats, name: str, expert: int | None, first: int) -> Floats:
        """rows float32 [m, n] of a linear's weight from row `first` on -> folded."""
        columns, divided = (self._of(which, name, expert) for which in (self.columns, self.divided))
        if columns is not None:
            rows = np.ldexp(rows, columns)
        if divided is not None:
            rows = np.ldexp(rows, -divided[first : first + len(rows), None])
        return rows

    def plain(self, tensor: Tensor) -> Tensor:
        """A parameter that stays floats, in Hugging Face's order and convention."""
        name = tensor.name
        if (divided := self.divided.get((name, None))) is not None:
            added = 1.0 if name.endswith("layernorm.weight") else 0.0
            values = np.ldexp(tensor.float64() + added, -divided) - added
        elif (columns := self.columns.get((name, None))) is not None:
            values = np.ldexp(tensor.float64(), columns)
        else:
            return tensor
        return Tensor(name, "F32", tensor.shape, values.astype(np.float32), file_name=tensor.file_name)

    @staticmethod
    def _of(which, name: str, expert: int | None) -> Exponents | None:
        """Of one expert; or what all experts of a stack share."""
        found = which.get((name, expert))
        return which.get((name, None)) if found is None else found


class Folds:
    """bits: {parameter: of its codes} of those that are quantized.  Errors: `by_rows`'."""

    def __init__(
        self, pool: Pool, checkpoint: Checkpoint, statistics: Statistics, bits: dict[str, int], group: int
    ):
        self.pool, self.tensors, self.config = pool, checkpoint.tensors, checkpoint.config
        self.statistics, self.bits, self.group = statistics, bits, group
        self._last: tuple[int, LayerFold] = (-1, LayerFold())

    def layer(self, index: int) -> LayerFold:
        """Computed when it is asked for, and kept until another is."""
        if self._last[0] != index:
            self._last = index, self._search(index)
        return self._last[1]

    def _search(self, index: int) -> LayerFold:
        fold, name, inputs = LayerFold(), layer_name(index), inputs_of(self.config, index)
        experts = range(self.config.num_experts) if inputs.experts else ()

        mixer = [(parameter, None) for parameter in inputs.mixer]
        self._set(fold, _Site(mixer), mixer, (f"{name}.input_layernorm.weight", None))
        maker, shared = _mixer_channels(self.config, index, inputs)
        output = [(inputs.mixer_output, None)]
        self._set(fold, _Site(output, shared), output, (maker, None))

        both = [(parameter, None) for parameter in (*inputs.mlp, *inputs.experts)]
        read = [(p, None) for p in inputs.mlp] + [(p, e) for e in experts for p in inputs.experts]
        self._set(fold, _Site(read), both, (f"{name}.post_attention_layernorm.weight", None))
        up = inputs.mlp[-2] if inputs.experts else inputs.mlp[-1]
        down = [(inputs.down, None)]
        self._set(fold, _Site(down), down, (up, None))
        for expert in experts:
            assert inputs.experts_down is not None
            down = [(inputs.experts_down, expert)]
            self._set(fold, _Site(down), down, (inputs.experts[1], expert))
        return fold

    def _set(self, fold: LayerFold, site: _Site, columns, divided: tuple[str, int | None]) -> None:
        site = site._replace(linears=[one for one in site.linears if one[0] in self.bits])
        exponents = self._best(site)
        if not exponents.any():
            return
        of_columns = exponents if site.shared is None else exponents[site.shared]
        fold.columns.update(dict.fromkeys(columns, of_columns))
        fold.divided[divided] = exponents

    # ---- one site ----

    def _best(self, site: _Site) -> Exponents:
        """int32 [channels]"""
        means = self._means(*site.linears[0])
        if site.shared is not None:
            sums = np.zeros(int(site.shared.max()) + 1)
            np.add.at(sums, site.shared, means)  # one after another
            means = sums / (len(means) // len(sums))
        tried = [np.zeros(len(means), np.int32)]
        for alpha in ALPHAS:
            exponents = exponents_of(means, alpha)
            if not any(np.array_equal(exponents, other) for other in tried):
                tried.append(exponents)
        if len(tried) == 1:
            return tried[0]
        errors = [self._error(site, exponents) for exponents in tried]
        return tried[errors.index(min(errors))]

    def _means(self, name: str, expert: int | None) -> Array:
        return self.statistics.weights(name, expert, self.tensors[name].shape[-1])

    def _error(self, site: _Site, exponents: Exponents) -> float:
        of_columns = exponents if site.shared is None else exponents[site.shared]
        total = 0.0
        for name, expert in site.linears:
            means = self._means(name, expert)
            total = self._add_errors(total, self.tensors[name], expert, means, of_columns)
        return total

    def _add_errors(
        self, total: float, tensor: Tensor, expert: int | None, means: Array, exponents: Exponents
    ) -> float:
        largest, weights = MAX_CODE[self.bits[tensor.name]], np.ldexp(means, -2 * exponents)

        def some(rows: Floats, first: int) -> Rounded:
            nonlocal total
            rows = np.ldexp(rows, exponents)
            codes, scales = rounding.round_weights(self.pool, rows, weights, largest, self.group)
            made = codes * np.repeat(scales.astype(np.float64), self.group, axis=1)[:, : rows.shape[1]]
            errors = np.cumsum((rows - made) ** 2 * weights, axis=1)[:, -1]
            total = float(np.cumsum(np.concatenate([[total], errors]))[-1])
            return codes, scales

        by_rows(tensor, expert, self.group, some)
        return total


def exponents_of(means: Array, alpha: float) -> Exponents:
    """means float64 [n], above 0 -> int32 [n], as stated above."""
    fraction, power = np.frexp(means)
    logs = power + 2 * fraction - 2
    centred = logs - np.cumsum(logs)[-1] / len(logs)
    return np.clip(np.rint(alpha / 2 * centred), -MOST, MOST).astype(np.int32)


def _mixer_channels(config: Config, index: int, inputs: Inputs) -> tuple[str, NDArray[np.int64] | None]:
    """What makes the channels that a mixer's output projection reads, and which channel each column reads."""
    if config.layer_types[index] == LINEAR:
        width, heads = config.linear_value_head_dim, config.linear_num_value_heads
        return f"{layer_name(index)}.linear_attn.norm.weight", np.tile(np.arange(width), heads)
    heads, keys, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    channels = np.arange(keys * width).reshape(keys, 1, width)
    return inputs.mixer[2], np.tile(channels, (1, heads // keys, 1)).reshape(-1)
