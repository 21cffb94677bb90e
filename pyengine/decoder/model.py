"""The locked model: fast, and the same bits on any threads, instruction set, chunk or split."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import LINEAR
from ..core import ops
from ..core.tape import Tape
from ..core.threads import Pool
from ..errors import InputError, PyengineError
from ..ids import as_chunk, as_ids
from . import LOCKED_ARITHMETICS as LOCKED_ARITHMETICS
from .attention import Attention
from .delta_net import DeltaNet
from .experts import SparseMoe
from .head import Screen, screen_of
from .linear import Linear
from .memory_watch import MemoryWatch
from .mlp import Mlp
from .norm import Norm
from .residency import ExpertCaches, MemoryPlan, read_in, with_dense_weights_kept
from .state import CACHE_DTYPES, State

DEFAULT_CHUNK = 512  # tokens: bounds the scratch of a long prompt


class DecoderLayer:
    """Hugging Face's `Qwen3_5DecoderLayer`, or where there are experts `Qwen3_5MoeDecoderLayer`, and
    `Qwen3NextDecoderLayer`."""

    def __init__(self, pool: Pool, checkpoint: Checkpoint, index: int):
        config, tensors = checkpoint.config, checkpoint.tensors
        self.pool = pool
        self.name = name = f"model.layers.{index}"
        self.linear = config.layer_types[index] == LINEAR
        eps = config.rms_norm_eps
        self.input_layernorm = Norm(pool, tensors[f"{name}.input_layernorm.weight"], eps)
        if self.linear:
            self.mixer = DeltaNet(pool, checkpoint, f"{name}.linear_attn")
        else:
            self.mixer = Attention(pool, checkpoint, f"{name}.self_attn")
        self.post_attention_layernorm = Norm(pool, tensors[f"{name}.post_attention_layernorm.weight"], eps)
        self.has_experts = config.has_experts(index)
        self.mlp = (SparseMoe if self.has_experts else Mlp)(pool, checkpoint, f"{name}.mlp")

    def forward(self, hidden: np.ndarray, sequences, rope_table, record) -> np.ndarray:
        """hidden [T, hidden] -> [T, hidden]; sequences: [(the rows of one, its state in this layer)]."""
        x = self.input_layernorm(hidden, record)
        if self.linear:
            mixed = self.mixer.forward(x, sequences, record)
        else:
            mixed = self.mixer.forward(x, sequences, rope_table, record)
        hidden = ops.add(self.pool, hidden, mixed)
        x = self.post_attention_layernorm(hidden, record)
        hidden = ops.add(self.pool, hidden, self.mlp.forward(x, record))
        if record:
            record(self.name, hidden)
        return hidden


class OneToken:
    """The pass of one token of each of n sequences through a model, on the arrays of their states' layers.

    Making the object computes the first tokens and records the calls; `replay` computes each next token
    by the same calls.  logits [n, vocab] are the last tokens' whose head was computed: the next overwrite
    them.
    """

    def __init__(self, model: LockedModel, layers: list[list], embedding: np.ndarray, positions: list[int]):
        """layers: of each state; embedding float32 [n, hidden] of the tokens at `positions`."""
        self.model, self.layers, self.weights = weakref.proxy(model), layers, model.layers
        self.embedding, self.tape, self.head = embedding, Tape(), Tape()
        rows = [slice(i, i + 1) for i in range(len(layers))]
        self.rope_table = model._rope_table(rows, positions)
        with self.tape.recording(model.pool):
            hidden = model._through_layers(embedding, list(zip(rows, layers)), self.rope_table, None)
            self.normed = model.norm(hidden)
        with self.head.recording(model.pool):
            self.logits = model.lm_head(self.normed)

    def is_of(self, states: list[State]) -> bool:
        """`restore` gives a state other layers; a model whose weights moved has other ones, too."""
        if self.weights is not self.model.layers:
            return False
        return len(states) == len(self.layers) and all(s.layers is own for s, own in zip(states, self.layers))

    def replay(self, embedding: np.ndarray, positions: list[int], largest: int | None) -> np.ndarray:
        """-> logits [n, vocab], to be copied; largest: see `LockedModel.forward`."""
        self.embedding[:] = embedding
        rows = [slice(i, i + 1) for i in range(len(positions))]
        self.model._rope_table(rows, positions, self.rope_table)
        self.tape.replay(self.model.pool)
        screen = self.model._screen() if largest is not None else None
        screened = None if screen is None else screen.largest(self.normed.x, largest)
        if screened is not None:
            return screened
        if screen is not None:
            screen.whole(self.complete)
            return self.logits
        return self.complete()

    def complete(self) -> np.ndarray:
        """All logits of the last tokens."""
        self.head.replay(self.model.pool)
        return self.logits


class LockedModel:
    """`forward` and `new_state`, as every model of this package; `config`, `arithmetic`, `pool`.

    plan: which weights stay in memory (residency.py); None: all of them.  check_experts: whether an expert's
    scales are checked when it is read for the first time.  plan_now: gives the plan for the memory that is
    available then; asked when the system takes mapped weights away (memory_watch.py); None: they stay mapped.
    replays: whether the calls of a single token are recorded and replayed, to the same bits; without
    it every operation goes through Python, where it can be timed or watched.
    screens: whether a forward pass that needs the largest logits alone may read less than the whole head,
    to the same bits (head.py); head_screen: what it reads instead, None before the first such pass.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        threads: int | None = None,
        pin: bool = False,
        chunk: int = DEFAULT_CHUNK,
        arithmetic: str = "locked",
        plan: MemoryPlan | None = None,
        check_experts: bool = True,
        plan_now: Callable[[], MemoryPlan | None] | None = None,
    ):
        self.arithmetic = arithmetic
        self.cache_dtype = CACHE_DTYPES[arithmetic]
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.chunk = chunk
        self.pool = Pool(threads, pin)
        self.inv_freq = self.config.inv_freq()
        self.experts_in_memory: ExpertCaches | None = None  # all of them
        self._place_weights(plan, check_experts)
        self._watch = None if plan_now is None else MemoryWatch(plan_now)
        self.replays = self.screens = True
        self.head_screen: Screen | None = None
        self._asked_for_screen = False
        # By the first sequence's state, and gone with it: a state is data and does not hold the model.
        self._one_token: WeakKeyDictionary[State, OneToken] = WeakKeyDictionary()

    def _place_weights(self, plan: MemoryPlan | None, check_experts: bool) -> None:
        """The modules, of mapped weights, or as the plan says: to the same bits."""
        checkpoint = self.checkpoint if plan is None else with_dense_weights_kept(self.checkpoint)
        tensors = checkpoint.tensors
        layers = [DecoderLayer(self.pool, checkpoint, i) for i in range(self.config.num_hidden_layers)]
        if plan is not None:
            experts = {i: layer.mlp.experts for i, layer in enumerate(layers) if layer.has_experts}
            self.experts_in_memory = ExpertCaches(self.checkpoint, plan, experts, check_experts)
        self.layers = layers
        self.embed_tokens = tensors["model.embed_tokens.weight"]
        self.norm = Norm(self.pool, tensors["model.norm.weight"], self.config.rms_norm_eps)
        self.lm_head = Linear(self.pool, tensors["lm_head.weight"])
        self.lm_head.name = "lm_head"  # a tied one is called model.embed_tokens in the file

    def new_state(self) -> State:
        return State(self.config, np.float32, self.cache_dtype)

    def forward(
        self,
        ids,
        state: State | None = None,
        *,
        chunk: int | None = None,
        last_only: bool = False,
        record=None,
        largest: int | None = None,
    ) -> np.ndarray:
        """ids [T] -> logits float32 [T, vocab], or [1, vocab] of the last token alone.

        state: continued and updated; None starts afresh.  chunk: tokens computed at a time; it
        bounds memory and changes no bit.  record: called with (name, float32 [tokens, features])
        for every module's output, in the order of execution, chunk by chunk.  Of a router's choice,
        `mlp.gate.2`, the experts int [tokens, top_k] that it returns are taken instead, unless that is None.
        largest: the caller needs so many of the largest logits alone: for one token after others, the rest
        may be -inf (but no logit that equals the least of these); `complete_logits` gives all of them.
        Errors: InputError for ids or a chunk out of range, NonFiniteError naming the tensor,
        FileFormatError when the model's file has changed since it was opened.
        """
        state = self.new_state() if state is None else state
        return self._forward([(ids, state)], chunk, [last_only], record, largest)[0]

    def complete_logits(self, state: State) -> np.ndarray:
        """All logits float32 [vocab] of the last token of a state whose last forward pass had `largest`."""
        self.checkpoint.file.check_unchanged()
        with self.pool.lock:
            return self._one_token[state].complete()[0].copy()

    def expert_output(self, layer: int, expert: int, x: np.ndarray) -> np.ndarray:
        """One routed expert's output float32 [T, hidden], before its weight.

        x: float32 [T, hidden], rows of the layer's recorded `post_attention_layernorm`.  `record` may call
        this during a `forward`.
        """
        mlp = self.layers[layer].mlp
        return mlp.expert_output(expert, ops.Activations(self.pool, x, f"{mlp.name}.experts.{expert} input"))

    def forward_batch(
        self,
        sequences: Sequence[tuple[Any, State]],
        *,
        chunk: int | None = None,
        last_only: bool | Sequence[bool] = False,
    ) -> list[np.ndarray]:
        """[(ids [T], state)] of several sequences -> the logits of each, as `forward` gives them.

        The sequences share every read of a weight.  Each sequence has the bits that it has alone, whatever
        the others are: prompts and single tokens may be mixed.  states: each is continued and updated.
        chunk: tokens of all sequences that are computed at a time.  last_only: of all sequences, or of each.
        Errors: as `forward`; InputError, two sequences with one state.  After an error every state of the
        batch must go back to a mark.
        """
        if len({id(state) for _, state in sequences}) < len(sequences):
            raise InputError("forward_batch: want a state of its own for each sequence, got one state twice")
        if isinstance(last_only, bool):
            last_only = [last_only] * len(sequences)
        return self._forward(sequences, chunk, last_only, None) if sequences else []

    def _forward(self, sequences, chunk, last_only, record, largest=None) -> list[np.ndarray]:
        self.checkpoint.file.check_unchanged()
        ids = [as_ids(ids, self.config.vocab_size) for ids, _ in sequences]
        states = [state for _, state in sequences]
        chunk = as_chunk(self.chunk if chunk is None else chunk)
        rows = [1 if last else len(one) for one, last in zip(ids, last_only)]
        logits = [np.empty((count, self.config.vocab_size), np.float32) for count in rows]
        with self.pool.lock, self._explaining_errors():
            if all(len(one) == 1 for one in ids) and len(ids) <= chunk and not record and self.replays:
                self._follow_memory(len(ids))
                for one, row in zip(logits, self._next_tokens(np.concatenate(ids), states, largest)):
                    one[:] = row
                return logits
            for parts in _passes([len(one) for one in ids], chunk):
                self._follow_memory(sum(end - first for _, first, end in parts))
                self._pass(parts, ids, states, logits, last_only, record)
        return logits

    def logits_in_pieces(self, sequences: Sequence[Any], *, rows: int = 128, chunk: int | None = None):
        """Sequences of ids, each from an empty state -> the logits of every token, as `forward` gives them.

        An iterator of (sequence, first token, logits float32 [n, vocab]), n <= rows: the tokens of each
        sequence in order, one sequence after the other.  Sequences share the passes of `chunk` tokens.
        Memory holds the states of one pass's sequences, its hidden states, and `rows` rows of logits.
        Errors as of `forward`.
        """
        self.checkpoint.file.check_unchanged()
        sequences = [as_ids(ids, self.config.vocab_size) for ids in sequences]
        chunk = as_chunk(self.chunk if chunk is None else chunk)
        states: dict[int, State] = {}
        for parts in _passes([len(ids) for ids in sequences], chunk):
            states = {i: states.get(i) or self.new_state() for i, *_ in parts}
            with self.pool.lock, self._explaining_errors():
                inputs, places = _joined(parts, sequences)
                self._follow_memory(len(inputs))
                hidden = self._hidden(inputs, places, list(states.values()), None)
            for start in range(0, len(hidden), rows):
                with self.pool.lock:
                    logits = self._logits(hidden[start : start + rows], None)
                for (i, first, _), place in zip(parts, places):
                    begin, end = max(place.start, start), min(place.stop, start + len(logits))
                    if begin < end:
                        yield i, first + begin - place.start, logits[begin - start : end - start]

    @contextlib.contextmanager
    def _explaining_errors(self):
        try:
            yield
        except PyengineError:
            if self.experts_in_memory is None:
                raise
            with self.experts_in_memory.explaining_errors():
                raise

    def _follow_memory(self, tokens: int) -> None:
        """Before a pass of so many tokens: what stays in memory follows what the machine has."""
        if self.experts_in_memory is not None:
            self.experts_in_memory.follow()
        elif self._watch is not None:
            plan = self._watch.plan(tokens)
            if plan is not None:
                self._read_experts(plan)

    def _read_experts(self, plan: MemoryPlan) -> None:
        """From now on, instead of mapping them; where that is not possible, they stay mapped."""
        try:
            read_in(self.checkpoint, experts=False, shown=False)
            self._place_weights(plan, False)
        except (PyengineError, OSError, MemoryError):
            self._watch = None
        else:
            self.head_screen = None  # every byte that is left is an expert's

    def _pass(self, parts, ids, states, logits, last_only, record) -> None:
        """One piece of work: parts [(sequence, first token, end)]; advances these sequences' states."""
        inputs, rows = _joined(parts, ids)
        hidden = self._hidden(inputs, rows, [states[i] for i, *_ in parts], record)
        wanted = []  # (sequence, its row of logits, the row of hidden)
        for (i, first, end), row in zip(parts, rows):
            if not last_only[i]:
                wanted += [(i, j, row.start + j - first) for j in range(first, end)]
            elif end == len(ids[i]):
                wanted.append((i, 0, row.stop - 1))
        if wanted:
            computed = self._logits(hidden[[row for *_, row in wanted]], record)
            for (i, j, _), one in zip(wanted, computed):
                logits[i][j] = one

    def _hidden(self, ids, rows, states, record):
        """The last layer's output [T, hidden]; advances the states."""
        hidden = self.embed_tokens.stored_float32(rows=ids)
        if record:
            record("model.embed_tokens", hidden)
        rope_table = self._rope_table(rows, [state.position for state in states])
        sequences = [(row, state.layers) for row, state in zip(rows, states)]
        hidden = self._through_layers(hidden, sequences, rope_table, record)
        for row, state in zip(rows, states):
            state.position += row.stop - row.start
        return hidden

    def _rope_table(self, rows, starts, out=None):
        """cos, sin [T, half]: each sequence's rows from its own first position on."""
        if out is None:
            out = tuple(np.empty((rows[-1].stop, self.inv_freq.size), np.float32) for _ in range(2))
        for row, start in zip(rows, starts):
            part = tuple(array[row] for array in out)
            ops.rope_table(start, row.stop - row.start, self.inv_freq, part, scale=self.config.rope_scale)
        return out

    def _through_layers(self, hidden, sequences, rope_table, record):
        """sequences: [(the rows of one, the layers of its state)]."""
        for i, layer in enumerate(self.layers):
            hidden = layer.forward(
                hidden, [(row, layers[i]) for row, layers in sequences], rope_table, record
            )
        return hidden

    def _next_tokens(self, ids, states, largest=None):
        """One id of each sequence -> logits [n, vocab], to be copied; advances the states.

        The first single tokens of these sequences are recorded, and the next ones are replayed: the same
        operations on the same arrays.
        """
        embedding = self.embed_tokens.stored_float32(rows=ids)
        positions = [state.position for state in states]
        one = self._one_token.get(states[0])
        if one is not None and one.is_of(states):
            logits = one.replay(embedding, positions, largest)
        else:
            one = OneToken(self, [state.layers for state in states], embedding, positions)
            self._one_token[states[0]] = one
            logits = one.logits
        for state in states:
            state.position += 1
        return logits

    def _screen(self) -> Screen | None:
        """What the largest logits are computed with, in place of the whole head."""
        if not self._asked_for_screen:
            self._asked_for_screen = True
            if self.experts_in_memory is None:  # else every byte that is left is an expert's
                self.head_screen = screen_of(self.pool, self.lm_head.tensor, self.checkpoint.file.size)
        return self.head_screen if self.screens else None

    def _logits(self, hidden, record):
        return self.lm_head(self.norm(hidden, record), record)


def _joined(parts, ids) -> tuple[np.ndarray, list[slice]]:
    """The ids of one pass, and the rows of each part in it."""
    rows, stop = [], 0
    for _, first, end in parts:
        rows.append(slice(stop, stop + end - first))
        stop += end - first
    return np.concatenate([ids[i][first:end] for i, first, end in parts]), rows


def _passes(lengths: list[int], chunk: int):
    """[(sequence, first token, end)] of each pass: in order, and at most `chunk` tokens."""
    parts, room = [], chunk
    for i, length in enumerate(lengths):
        first = 0
        while first < length:
            end = min(length, first + room)
            parts.append((i, first, end))
            first, room = end, room - (end - first)
            if not room:
                yield parts
                parts, room = [], chunk
    if parts:
        yield parts
