"""Codes that are chosen by calibration: CALIBRATED of METHODS.

    rounding = calibrated_rounding(pool, checkpoint, statistics, options, plan)
    codes, scales = rounding.matrix(tensor, expert)       # in the order of the plan

`weighted` looks at the statistics alone (weighted.py).

`gptq` compensates errors (moments.py), one layer after another: a linear is rounded for what the quantized
layers before it give, so as to come near what the source gives.  It runs the calibration text through the
source and through what is made so far, both in the locked arithmetic, and needs statistics that have their
text's ids.  Within a layer the order is that of the forward pass:

    the mixer's input projections; its output projection, which also makes up for the residual stream's error
    so far; router; each routed expert's gate and up, then its down; the shared expert's gate and up, its down

`awq` scales channels first (folds.py), which leaves the source what it is, and rounds the folded weights so.

A routed expert sees the tokens that the quantized router sends it, by their routing weights.  One with fewer
than FEW of the mean of its layer (or every one, with --all-experts) stands by its layer: every token goes
through it, with weight 1.

A run that continues reads what an earlier run wrote (rounded_before.py), and takes no moments for it.  It
runs the text through all layers again, since later layers need what these give.

Memory beside the mapped source: the hidden states of source and made [T, H] and the mixers' inner states,
or the experts' sums, all float32; 3 n^2 float64 for a linear of n columns; a layer's codes of
`experts.down_proj`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from ..calibration import imatrix
from ..calibration.layer import Layer, embed, tokens_of
from ..calibration.statistics import Run, Statistics, few_experts
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import MAX_CODE
from ..checkpoint.methods import CALIBRATED
from ..checkpoint.names import layer_of
from ..checkpoint.tensor import Tensor
from ..core import ops
from ..core.matrices import as_matrix
from ..core.threads import Pool
from ..errors import InputError
from ..files.numbers import float32_in_bfloat16
from .as_written import as_written
from .folds import Folds, LayerFold
from .moments import Moments
from .options import QuantizeOptions
from .quantize_pass import QuantizePass, Rounding, Target
from .rounded_before import RoundedBefore
from .weighted import Floats, Rounded, WeightedRounding, by_rows, warn_of_few


def read_statistics(path, checkpoint: Checkpoint, options: QuantizeOptions) -> Statistics | None:
    """The statistics that the options' method needs; None: it needs none.

    Errors: InputError, a method without the statistics that it needs, or the other way round; those of
    `imatrix.read`.
    """
    if options.scale not in CALIBRATED:
        if path is not None:
            wanted = " or ".join(CALIBRATED)
            raise InputError(f"{path}: calibration: want scale {wanted}, which uses it, got {options.scale}")
        return None
    if path is None:
        raise InputError(
            f"scale: {options.scale}: want --calibration STATS (see `pyengine calibrate`), got none"
        )
    return imatrix.read(path, checkpoint)


def run_pass(
    pool: Pool,
    checkpoint: Checkpoint,
    statistics: Statistics | None,
    options: QuantizeOptions,
    targets: list[Target],
    advance: Callable[[int], object],
) -> None:
    """A pass for all targets; with statistics one for each, since each has quantized layers of its own."""
    if statistics is None:
        return QuantizePass(pool, options, advance).run(targets)
    for target in targets:
        rounding = calibrated_rounding(pool, checkpoint, statistics, options, target)
        QuantizePass(pool, options, advance, rounding).run([target])


def calibrated_rounding(
    pool: Pool, checkpoint: Checkpoint, statistics: Statistics, options: QuantizeOptions, target: Target
) -> Rounding:
    """InputError: statistics without the ids of their text, which `gptq` and `awq` need."""
    bits = {
        tensor.name: parameter.bits
        for parameter in target.parameters
        if parameter.bits is not None
        for tensor in parameter.sources
    }
    if options.scale == "weighted":
        return WeightedRounding(pool, statistics, bits, options.group_size)
    if statistics.run is None:
        raise InputError(
            f"{statistics.path}: {options.scale}: want statistics of `pyengine calibrate`, with their text's "
            "ids, got an imatrix without (--scale weighted takes it)"
        )
    group = options.group_size
    folds = Folds(pool, checkpoint, statistics, bits, group) if options.scale == "awq" else None
    before = RoundedBefore(target.parameters, target.sink)
    return CompensatedRounding(pool, checkpoint, statistics.run, bits, group, before, folds)


# ---- one layer after another -------------------------------------------------------------------


class CompensatedRounding:
    """folds: `awq`'s; None: `gptq` has none."""

    def __init__(
        self,
        pool: Pool,
        checkpoint: Checkpoint,
        run: Run,
        bits: dict[str, int],
        group: int,
        before: RoundedBefore,
        folds: Folds | None = None,
    ):
        self.pool, self.source, self.run, self.bits, self.group = pool, checkpoint, run, bits, group
        self.before, self.folds = before, folds
        self.made = dataclasses.replace(checkpoint, tensors={}, value_head_order="grouped")
        self.windows = run.windows()
        self.hidden_source = embed(checkpoint, run.ids)
        self.hidden_made = float32_in_bfloat16(self.hidden_source)  # as they are written
        self._layer: _LayerRounding | None = None

    def fold(self, index: int | None) -> LayerFold:
        return LayerFold() if self.folds is None or index is None else self.folds.layer(index)

    def plain(self, tensor: Tensor) -> Tensor:
        return self.fold(layer_of(tensor.name)).plain(tensor)

    def pass_over(self, tensor: Tensor, expert: int | None) -> None:
        self.matrix(tensor, expert)  # a step of the forward pass

    def matrix(self, tensor: Tensor, expert: int | None) -> Rounded:
        index = layer_of(tensor.name)
        assert index is not None
        if self._layer is None or self._layer.index != index:
            if self._layer is not None:
                self.hidden_source, self.hidden_made = self._layer.outputs()
            self._layer = None  # its arrays go before others come
            self._layer = _LayerRounding(self, index)
        return self._layer.matrix(tensor, expert)


class _LayerRounding:
    """S and M below: the source, and what is made."""

    def __init__(self, whole: CompensatedRounding, index: int):
        self.pool, self.run, self.bits, self.group = whole.pool, whole.run, whole.bits, whole.group
        self.windows, self.index = whole.windows, index
        self.hidden_s, self.hidden_m = whole.hidden_source, whole.hidden_made
        self.before, self.fold = whole.before, whole.fold(index)
        whole.made.tensors.clear()
        whole.made.tensors.update(as_written(whole.source, index, self.fold))
        self.tensors = whole.made.tensors
        self.source, self.made = (
            Layer(self.pool, checkpoint, index) for checkpoint in (whole.source, whole.made)
        )
        self.inputs = self.source.inputs
        self._reads = ("input_layernorm", self.inputs.mixer[0])
        self._shared: Moments | None = None
        self.routed: tuple[Floats, Floats] | None = None
        self._downs: dict[int, Rounded] = {}
        self._ups: dict[int, Rounded] = {}
        self._done = False

    def outputs(self) -> tuple[Floats, Floats]:
        assert self._done
        return self.hidden_s, self.hidden_m

    def matrix(self, tensor: Tensor, expert: int | None) -> Rounded:
        name, inputs = tensor.name, self.inputs
        if name == inputs.experts_down:
            assert expert is not None
            return self._downs.pop(expert)
        if name in inputs.experts:
            assert expert is not None
            if name == inputs.experts[1]:
                return self._ups.pop(expert)
            return self._expert(expert)
        if name == inputs.mixer_output:
            return self._mixer_output(tensor)
        if name == inputs.down:
            return self._down(tensor)
        return self._round(tensor, None, self._of_hidden)

    # ---- steps ----

    def _mixer_output(self, tensor: Tensor) -> Rounded:
        source, made = self.source, self.made
        # Until it is rounded, the mixer has the source's in its place, and does not read it.
        self.tensors[tensor.name] = tensor
        order = tensor.col_order
        inner_s, inner_m = (np.empty((len(self.hidden_s), tensor.shape[-1]), np.float32) for _ in range(2))
        for rows in self.windows:
            inner_s[rows] = source.mixer_inner(source.norm("input_layernorm", self.hidden_s[rows]))
            inner_m[rows] = made.mixer_inner(made.norm("input_layernorm", self.hidden_m[rows]))
        source.forget_mixer()
        made.forget_mixer()

        def moments() -> Moments:
            found = self._moments(tensor, None, tensor.shape[-2])
            for rows in self.windows:
                in_order = inner_s[rows] if order is None else inner_s[rows][:, order]
                found.add(in_order, inner_m[rows], self.hidden_s[rows] - self.hidden_m[rows])
            return found.finish()

        rounded = self._round(tensor, None, moments)
        for hidden, layer, inner in ((self.hidden_s, source, inner_s), (self.hidden_m, made, inner_m)):
            for rows in self.windows:
                hidden[rows] = layer.add(hidden[rows], layer.linear(tensor.name, inner[rows]))
        self._reads, self._shared = ("post_attention_layernorm", self.inputs.mlp[0]), None
        return rounded

    def _of_hidden(self) -> Moments:
        """Of the norm that the linears at hand read."""
        if self._shared is None:
            norm, reader = self._reads
            found = self._moments(self.source.checkpoint.tensors[reader])
            for rows in self.windows:
                found.add(
                    self.source.norm(norm, self.hidden_s[rows]), self.made.norm(norm, self.hidden_m[rows])
                )
            self._shared = found.finish()
        return self._shared

    def _mlp_inputs(self, tokens) -> tuple[Floats, Floats]:
        norm = "post_attention_layernorm"
        return self.source.norm(norm, self.hidden_s[tokens]), self.made.norm(norm, self.hidden_m[tokens])

    def _down(self, tensor: Tensor) -> Rounded:
        def moments() -> Moments:
            found = self._moments(tensor)
            for rows in self.windows:
                x_s, x_m = self._mlp_inputs(rows)
                found.add(self.source.mlp_inner(x_s), self.made.mlp_inner(x_m))
            return found.finish()

        rounded = self._round(tensor, None, moments)
        for i, (hidden, layer) in enumerate(((self.hidden_s, self.source), (self.hidden_m, self.made))):
            for rows in self.windows:
                x = layer.norm("post_attention_layernorm", hidden[rows])
                y = layer.linear(tensor.name, layer.mlp_inner(x))
                if self.routed is not None:
                    y = layer.join(self.routed[i][rows], y, x)
                hidden[rows] = layer.add(hidden[rows], y)
        self._done = True
        return rounded

    # ---- routed experts ----

    def _route(self) -> None:
        """Which tokens each expert has, of both, and who stands by the layer."""
        self.routed = np.zeros_like(self.hidden_s), np.zeros_like(self.hidden_m)
        parts: list[list] = [[], []]
        for rows in self.windows:
            x_s, x_m = self._mlp_inputs(rows)
            parts[0].append(self.source.route(x_s))
            parts[1].append(self.made.route(x_m))
        self._ways = [tuple(map(np.concatenate, zip(*part))) for part in parts]
        experts = self.source.config.num_experts
        counts = np.bincount(self._ways[1][1].reshape(-1), minlength=experts)
        few = few_experts(counts)
        warn_of_few(self.index, [] if self.run.all_experts else few)
        self._by_layer = set(range(experts) if self.run.all_experts else few)

    def _expert(self, expert: int) -> Rounded:
        """Rounds gate, up and down of one expert -> gate's codes; the others are kept until they are asked
        for."""
        if self.routed is None:
            self._route()
        tokens_s, weights_s = tokens_of(self._ways[0][1], self._ways[0][0], expert)
        tokens_m, weights_m = tokens_of(self._ways[1][1], self._ways[1][0], expert)
        by_layer = expert in self._by_layer
        seen = np.arange(len(self.hidden_s)) if by_layer else tokens_m
        weights = np.ones((len(seen), 1), np.float32) if by_layer else weights_m
        gate, up = (self.source.checkpoint.tensors[name] for name in self.inputs.experts)
        assert self.inputs.experts_down is not None
        down = self.source.checkpoint.tensors[self.inputs.experts_down]

        def of_inputs() -> Moments:
            found = self._moments(gate, expert)
            for some in _pieces(len(seen)):
                x_s, x_m = self._mlp_inputs(seen[some])
                found.add(x_s * weights[some], x_m * weights[some])
            return found.finish()

        def of_inner() -> Moments:
            found = self._moments(down, expert)
            for some in _pieces(len(seen)):
                x_s, x_m = self._mlp_inputs(seen[some])
                inner_m = self._inner(matrices, x_m)
                found.add(self.source.expert_inner(expert, x_s) * weights[some], inner_m * weights[some])
            return found.finish()

        moments = self._of_hidden if by_layer else functools.cache(of_inputs)
        made_gate, made_up = (self._round(tensor, expert, moments) for tensor in (gate, up))
        del moments  # before those of down are made
        matrices = [self._made(t, r) for t, r in ((gate, made_gate), (up, made_up))]
        made_down = self._round(down, expert, of_inner)
        self._add_outputs(expert, (tokens_s, weights_s), (tokens_m, weights_m), matrices, down, made_down)
        self._ups[expert], self._downs[expert] = made_up, made_down
        return made_gate

    def _add_outputs(self, expert, way_s, way_m, matrices, down, made_down) -> None:
        assert self.routed is not None
        last = self._made(down, made_down)
        for some in _pieces(len(way_s[0])):
            tokens, weights = way_s[0][some], way_s[1][some]
            x_s = self.source.norm("post_attention_layernorm", self.hidden_s[tokens])
            y = self.source.linear(down.name, self.source.expert_inner(expert, x_s), expert)
            self.routed[0][tokens] += y * weights
        for some in _pieces(len(way_m[0])):
            tokens, weights = way_m[0][some], way_m[1][some]
            x_m = self.made.norm("post_attention_layernorm", self.hidden_m[tokens])
            y = _product(self.pool, last, self._inner(matrices, x_m))
            self.routed[1][tokens] += y * weights

    def _inner(self, matrices: list[Tensor], x: Floats) -> Floats:
        return ops.silu_mul(self.pool, *(_product(self.pool, tensor, x) for tensor in matrices))

    # ---- one matrix ----

    def _moments(self, tensor: Tensor, expert: int | None = None, rows: int | None = None) -> Moments:
        """Of a linear, without tokens as yet."""
        return Moments(self.pool, tensor.shape[-1], rows, self.fold.scale(tensor.name, expert))

    def _round(self, tensor: Tensor, expert: int | None, moments: Callable[[], Moments]) -> Rounded:
        """moments: called where the matrix was not rounded before."""
        rounded = self.before(tensor.name, expert)
        if rounded is None:
            rounded = self._round_by(moments(), tensor, expert)
        if expert is None:
            self.tensors[tensor.name] = self._made(tensor, rounded)
        return rounded

    def _round_by(self, moments: Moments, tensor: Tensor, expert: int | None) -> Rounded:
        largest = MAX_CODE[self.bits[tensor.name]]

        def some(rows: Floats, first: int) -> Rounded:
            rows = self.fold.rows(rows, tensor.name, expert, first)
            return moments.round(rows, first, largest, self.group)

        return by_rows(tensor, expert, self.group, some)

    def _made(self, tensor: Tensor, rounded: Rounded) -> Tensor:
        """The matrix as a reader of the output has it."""
        codes, scales = rounded
        bits = self.bits[tensor.name]
        data = ops.pack_int4(self.pool, codes) if bits == 4 else codes
        shape = tensor.shape[-2:]
        stored = scales.T.copy("C")
        return Tensor(tensor.name, f"INT{bits}", shape, data, stored, self.group, file_name=tensor.file_name)


def _pieces(count: int, step: int = 512):
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _product(pool: Pool, tensor: Tensor, x: Floats) -> Floats:
    return ops.matmul(pool, as_matrix(tensor), ops.Activations(pool, np.ascontiguousarray(x), tensor.name))
