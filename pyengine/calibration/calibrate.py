"""Activation statistics of a model on texts.

    run = describe_run(model, texts, context=512)
    take_statistics(model, run, "stats.gguf")

The model runs in the locked arithmetic.  Sums are float64, one addition after another: token by token in the
order of the texts.  So neither threads nor processors change a bit of them.  A run that was killed continues
after its last SAVED windows when it is repeated, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..census.texts import Text
from ..core import rounding
from ..errors import InputError
from ..files.whole import PathLike, open_whole
from ..ids import Ids
from . import imatrix
from .layer import Floats, Layer, embed, tokens_of
from .statistics import Array, Run

CONTEXT = 512
SAVED = 8  # windows between two notes of how far a run has come


def describe_run(model: Any, texts: list[Text], context: int = CONTEXT, all_experts: bool = False) -> Run:
    """InputError: no text."""
    if not texts:
        raise InputError("texts: want at least one, got none")
    ids = np.concatenate([text.ids for text in texts])
    said = [text.describe() for text in texts]
    return Run(model.checkpoint.fingerprint, ids, said, context, all_experts)


def take_statistics(
    model: Any, run: Run, output: PathLike, advance: Callable[[int], object] = lambda tokens: None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Run the model over the text and write `output` -> sums, counts.

    advance: called with numbers of tokens, those of an earlier run too.
    Errors: NonFiniteError naming the tensor; FileFormatError, the model's file has changed.
    """
    sums = _Sums(model)
    note = _Note(output, model, run)
    done = note.read(sums)
    for number, window in enumerate(run.windows()):
        if number >= done:
            model.checkpoint.file.check_unchanged()
            sums.add_window(run.ids[window], run.all_experts)
            if (number + 1) % SAVED == 0:
                note.write(sums, number + 1)
        advance(window.stop - window.start)
    imatrix.write(output, model.checkpoint, sums.sums, sums.counts, run)
    note.remove()
    return sums.sums, sums.counts


class _Sums:
    def __init__(self, model: Any):
        self.pool, self.checkpoint, config = model.pool, model.checkpoint, model.config
        self.layers = [Layer(self.pool, self.checkpoint, i) for i in range(config.num_hidden_layers)]
        specs = imatrix.calibrated_specs(config)
        self.sums = {spec.name: np.zeros((*spec.shape[:-2], spec.shape[-1])) for spec in specs}
        self.counts = {spec.name: np.zeros(spec.shape[:-2] or (1,)) for spec in specs}

    def add_window(self, ids: Ids, all_experts: bool) -> None:
        hidden = embed(self.checkpoint, ids)
        for layer in self.layers:
            hidden = self._through(layer, hidden, all_experts)

    def _through(self, layer: Layer, hidden: Floats, all_experts: bool) -> Floats:
        """The layer's output [T, H], in the locked model's bits."""
        inputs = layer.inputs
        x = layer.norm("input_layernorm", hidden)
        self._see(inputs.mixer, x)
        inner = layer.mixer_inner(x)
        self._see((inputs.mixer_output,), self._in_hf_order(inputs.mixer_output, inner))
        hidden = layer.add(hidden, layer.linear(inputs.mixer_output, inner))
        x = layer.norm("post_attention_layernorm", hidden)
        self._see(inputs.mlp, x)
        inner = layer.mlp_inner(x)
        self._see((inputs.down,), inner)
        y = layer.linear(inputs.down, inner)
        if inputs.experts_down is None:
            return layer.add(hidden, y)
        return layer.add(hidden, layer.join(self._experts(layer, x, all_experts), y, x))

    def _experts(self, layer: Layer, x: Floats, all_experts: bool) -> Floats:
        down = layer.inputs.experts_down
        assert down is not None
        weights, selected = layer.route(x)
        routed = np.zeros_like(x)
        for expert in range(layer.config.num_experts):
            token, weight = tokens_of(selected, weights, expert)
            if not all_experts and not len(token):
                continue
            seen = x if all_experts else x[token]
            inner = layer.expert_inner(expert, seen)
            self._see(layer.inputs.experts, seen, expert)
            self._see((down,), inner, expert)
            if len(token):
                y = layer.linear(down, inner[token] if all_experts else inner, expert)
                routed[token] += y * weight
        return routed

    def _see(self, names: tuple[str, ...], x: Floats, expert: int | None = None) -> None:
        """Names that read one input have one sum."""
        first = self.sums[names[0]] if expert is None else self.sums[names[0]][expert]
        rounding.add_squares(self.pool, x, first)
        for name in names:
            own = self.sums[name] if expert is None else self.sums[name][expert]
            own[:] = first
            self.counts[name][0 if expert is None else expert] += len(x)

    def _in_hf_order(self, name: str, x: Floats) -> Floats:
        order = self.checkpoint.tensors[name].col_order
        return x if order is None else x[:, order]


class _Note:
    """How far a run has come: OUTPUT.notes, removed at its end."""

    def __init__(self, output: PathLike, model: Any, run: Run):
        self.path = Path(f"{output}.notes")
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in model.checkpoint.source_files]
        facts = [__version__, run.model, files, run.texts, run.context, run.all_experts]
        said = json.dumps(facts).encode() + run.ids.tobytes()
        self.identity = hashlib.sha256(said).hexdigest()

    def write(self, sums: _Sums, windows: int) -> None:
        arrays: dict[str, Any] = {f"sums {name}": array for name, array in sums.sums.items()}
        arrays |= {f"counts {name}": array for name, array in sums.counts.items()}
        with open_whole(self.path) as file:
            np.savez(file, identity=self.identity, windows=windows, **arrays)

    def read(self, sums: _Sums) -> int:
        """Windows that an earlier run added up; 0: there was none, or it was another."""
        try:
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as found:
                if str(found["identity"]) != self.identity:
                    return 0
                windows = int(found["windows"])
                read = {name: found[name] for name in found.files if " " in name}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return 0
        for kind, own in (("sums", sums.sums), ("counts", sums.counts)):
            for name, array in own.items():
                array[:] = read[f"{kind} {name}"]
        return windows

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
