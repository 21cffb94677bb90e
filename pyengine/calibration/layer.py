"""One decoder layer, step by step: what goes into each of its linears.

The steps give the bits of the locked model (decoder/): the same operations in the same order.  A layer reads
its parameters from its checkpoint when a step needs them, so that a caller may replace them between two
steps, as a quantization of one layer after another does.

T tokens of one window, which starts from an empty state; H hidden size; n columns of the linear.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import Config
from ..checkpoint.families import LINEAR, family_of
from ..checkpoint.names import layer_name
from ..core import ops
from ..core.matrices import as_matrix
from ..core.threads import Pool
from ..decoder.attention import Attention
from ..decoder.delta_net import DeltaNet
from ..decoder.norm import Norm
from ..decoder.state import DeltaNetState, KeyValueCache
from ..ids import Ids

Floats = NDArray[np.float32]


class Inputs(NamedTuple):
    """The parameters of a layer by what they read; Hugging Face's names.

    mixer   the mixer's input projections; mixer_output: its output projection
    mlp     the MLP's, or the router's and the shared expert's
    experts gate and up of the routed experts; experts_down.  None of a dense layer
    down    of the MLP, or of the shared expert
    """

    mixer: tuple[str, ...]
    mixer_output: str
    mlp: tuple[str, ...]
    experts: tuple[str, ...]
    experts_down: str | None
    down: str


def inputs_of(config: Config, index: int) -> Inputs:
    name = layer_name(index)
    if config.layer_types[index] == LINEAR:
        mixer, parts, output = f"{name}.linear_attn", family_of(config).in_proj, "out_proj"
    else:
        mixer, parts, output = f"{name}.self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"
    ways = tuple(f"{mixer}.{part}.weight" for part in parts), f"{mixer}.{output}.weight"
    mlp = f"{name}.mlp"
    if not config.has_experts(index):
        both = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        return Inputs(*ways, both, (), None, f"{mlp}.down_proj.weight")
    shared = [f"{mlp}.shared_expert.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
    experts = [f"{mlp}.experts.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    read_mlp = (f"{mlp}.gate.weight", *shared[:2], f"{mlp}.shared_expert_gate.weight")
    return Inputs(*ways, read_mlp, tuple(experts[:2]), experts[2], shared[2])


class Layer:
    def __init__(self, pool: Pool, checkpoint: Checkpoint, index: int):
        self.pool, self.checkpoint, self.config, self.index = pool, checkpoint, checkpoint.config, index
        self.name = layer_name(index)
        self.inputs = inputs_of(self.config, index)
        self.is_linear = self.config.layer_types[index] == LINEAR
        self.has_experts = self.config.has_experts(index)
        self._mixer: DeltaNet | Attention | None = None

    # ---- steps of the mixer ----

    def norm(self, which: str, hidden: Floats) -> Floats:
        """which: input_layernorm or post_attention_layernorm; hidden [T, H] -> [T, H]."""
        tensor = self.checkpoint.tensors[f"{self.name}.{which}.weight"]
        return Norm(self.pool, tensor, self.config.rms_norm_eps)(hidden).x

    def mixer_inner(self, x: Floats) -> Floats:
        """The normed hidden states [T, H] of a window -> what the output projection reads [T, n], columns in
        the checkpoint's order."""
        activations, window = self._activations(x, "mixer"), slice(0, len(x))
        if isinstance(self.mixer, DeltaNet):
            return self.mixer.inner(activations, [(window, DeltaNetState(self.config, np.float32))])
        table = ops.rope_table(0, len(x), self.config.inv_freq(), scale=self.config.rope_scale)
        return self.mixer.inner(activations, [(window, KeyValueCache(self.config, np.float32))], table)

    @property
    def mixer(self) -> DeltaNet | Attention:
        """Made when it is first needed, of the parameters that there are then; see `forget_mixer`."""
        if self._mixer is None:
            kind, part = (DeltaNet, "linear_attn") if self.is_linear else (Attention, "self_attn")
            self._mixer = kind(self.pool, self.checkpoint, f"{self.name}.{part}")
        return self._mixer

    def forget_mixer(self) -> None:
        self._mixer = None

    def linear(self, parameter: str, x: Floats, expert: int | None = None) -> Floats:
        """x [T, n] -> [T, rows], rows in the file's order."""
        matrix = as_matrix(self.checkpoint.tensors[parameter], expert)
        y: Floats = ops.matmul(self.pool, matrix, self._activations(x, parameter))
        return y

    def add(self, hidden: Floats, y: Floats) -> Floats:
        total: Floats = ops.add(self.pool, hidden, y)
        return total

    # ---- steps of the MLP ----

    def route(self, x: Floats) -> tuple[Floats, NDArray[np.int32]]:
        """-> routing weights, selected experts [T, k]."""
        logits = self.linear(self.inputs.mlp[0], x)
        weights, selected = ops.router(
            self.pool, logits, self.config.num_experts_per_tok, f"{self.name}.mlp.gate"
        )
        return weights, selected

    def mlp_inner(self, x: Floats) -> Floats:
        """Of the MLP, or of the shared expert: what `down` reads [T, n]."""
        gate, up = self.inputs.mlp[-3:-1] if self.has_experts else self.inputs.mlp
        inner: Floats = ops.silu_mul(self.pool, self.linear(gate, x), self.linear(up, x))
        return inner

    def expert_inner(self, expert: int, x: Floats) -> Floats:
        """Of a routed expert: what `experts_down` reads [T, n]."""
        gate, up = self.inputs.experts
        inner: Floats = ops.silu_mul(self.pool, self.linear(gate, x, expert), self.linear(up, x, expert))
        return inner

    def join(self, routed: Floats, shared: Floats, x: Floats) -> Floats:
        """The routed experts' sum and the shared expert's output [T, H] -> the block's output."""
        gate = ops.sigmoid(self.pool, self.linear(self.inputs.mlp[-1], x))  # [T, 1]
        return self.add(routed, shared * gate)

    def _activations(self, x: Floats, what: str) -> ops.Activations:
        return ops.Activations(self.pool, np.ascontiguousarray(x), f"{what} input")


def tokens_of(selected: NDArray[np.int32], weights: Floats, expert: int) -> tuple[NDArray[np.int64], Floats]:
    """The tokens that chose an expert, ascending, and their weights [n, 1]."""
    token, place = np.nonzero(selected == expert)
    return token, weights[token, place][:, None]


def embed(checkpoint: Checkpoint, ids: Ids) -> Floats:
    """[T] -> [T, H]"""
    return checkpoint.tensors["model.embed_tokens.weight"].stored_float32(rows=ids)
