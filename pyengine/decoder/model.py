"""The locked model: fast, and the same bits on any threads, instruction set, chunk or split."""

from __future__ import annotations

import numpy as np

from .. import ops
from ..checkpoint import Checkpoint
from ..config import LINEAR
from ..ids import as_chunk, as_ids
from .attention import Attention
from .delta_net import DeltaNet
from .experts import SparseMoe
from .linear import Linear
from .norm import Norm
from .state import State

DEFAULT_CHUNK = 512  # tokens: bounds the scratch of a long prompt

# "locked-kv16" differs from "locked" in one rounding: keys and values are kept as float16.
CACHE_DTYPES = {"locked": np.float32, "locked-kv16": np.float16}


class DecoderLayer:
    """Hugging Face's `Qwen3_5MoeDecoderLayer`."""

    def __init__(self, pool: ops.Pool, checkpoint: Checkpoint, index: int):
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
        self.post_attention_layernorm = Norm(
            pool, tensors[f"{name}.post_attention_layernorm.weight"], eps)
        self.mlp = SparseMoe(pool, checkpoint, f"{name}.mlp")

    def forward(self, hidden: np.ndarray, state, rope_table, record) -> np.ndarray:
        """hidden [T, hidden] -> [T, hidden]; updates the layer's state."""
        x = self.input_layernorm(hidden, record)
        if self.linear:
            mixed = self.mixer.forward(x, state, record)
        else:
            mixed = self.mixer.forward(x, state, rope_table, record)
        hidden = ops.add(self.pool, hidden, mixed)
        x = self.post_attention_layernorm(hidden, record)
        hidden = ops.add(self.pool, hidden, self.mlp.forward(x, record))
        if record:
            record(self.name, hidden)
        return hidden


class OneToken:
    """The pass of one token through a model on a state's layers: recorded once, then replayed."""

    def __init__(self, model: LockedModel, layers: list):
        self.model, self.layers = model, layers
        self.tape = self.embedding = self.rope_table = self.logits = None

    def belongs_to(self, model, layers) -> bool:
        return self.model is model and self.layers is layers

    def forward(self, embedding, position: int):
        """embedding [1, hidden] -> logits [1, vocab], which the next call overwrites."""
        model = self.model
        self.rope_table = ops.rope_table(position, 1, model.inv_freq, self.rope_table)
        if self.tape is None:
            self.embedding, tape = embedding, ops.Tape()
            with tape.recording(model.pool):
                hidden = model._through_layers(embedding, self.layers, self.rope_table, None)
                self.logits = model._logits(hidden, None)
            self.tape = tape
        else:
            self.embedding[:] = embedding
            self.tape.replay(model.pool)
        return self.logits


class LockedModel:
    """`forward` and `new_state`, as every model of this package; `config`, `arithmetic`, `pool`.

    replays: whether the calls of a single token are recorded and replayed, to the same bits; without
    it every operation goes through Python, where it can be timed or watched.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None, pin: bool = False,
                 chunk: int = DEFAULT_CHUNK, arithmetic: str = "locked"):
        self.arithmetic = arithmetic
        self.cache_dtype = CACHE_DTYPES[arithmetic]
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.chunk = chunk
        self.pool = ops.Pool(threads, pin)
        tensors = checkpoint.tensors
        self.embed_tokens = tensors["model.embed_tokens.weight"]
        self.layers = [DecoderLayer(self.pool, checkpoint, i)
                       for i in range(self.config.num_hidden_layers)]
        self.norm = Norm(self.pool, tensors["model.norm.weight"], self.config.rms_norm_eps)
        self.lm_head = Linear(self.pool, tensors["lm_head.weight"])
        self.lm_head.name = "lm_head"  # a tied one is called model.embed_tokens in the file
        self.inv_freq = self.config.inv_freq()
        self.replays = True

    def new_state(self) -> State:
        return State(self.config, np.float32, self.cache_dtype)

    def forward(self, ids, state: State | None = None, *, chunk: int | None = None,
                last_only: bool = False, record=None) -> np.ndarray:
        """ids [T] -> logits float32 [T, vocab], or [1, vocab] of the last token alone.

        state: continued and updated; None starts afresh.  chunk: tokens computed at a time; it
        bounds memory and changes no bit.  record: called with (name, float32 [tokens, features])
        for every module's output, in the order of execution, chunk by chunk.
        Errors: InputError for ids or a chunk out of range, NonFiniteError naming the tensor,
        FileFormatError when the model's file has changed since it was opened.
        """
        self.checkpoint.file.check_unchanged()
        ids = as_ids(ids, self.config.vocab_size)
        state = self.new_state() if state is None else state
        chunk = as_chunk(self.chunk if chunk is None else chunk)
        logits = np.empty((1 if last_only else len(ids), self.config.vocab_size), np.float32)
        with self.pool.lock:
            if len(ids) == 1 and not record and self.replays:
                logits[:] = self._next_token(ids, state)
                return logits
            for start in range(0, len(ids), chunk):
                hidden = self._hidden(ids[start:start + chunk], state, record)
                if not last_only:
                    logits[start:start + chunk] = self._logits(hidden, record)
            if last_only:
                logits[:] = self._logits(hidden[-1:], record)
        return logits

    def _hidden(self, ids, state, record):
        """The last layer's output [T, hidden]; advances the state."""
        hidden = self.embed_tokens.stored_float32(rows=ids)
        if record:
            record("model.embed_tokens", hidden)
        rope_table = ops.rope_table(state.position, len(ids), self.inv_freq)
        hidden = self._through_layers(hidden, state.layers, rope_table, record)
        state.position += len(ids)
        return hidden

    def _through_layers(self, hidden, states, rope_table, record):
        for layer, layer_state in zip(self.layers, states):
            hidden = layer.forward(hidden, layer_state, rope_table, record)
        return hidden

    def _next_token(self, ids, state):
        """One id -> logits [1, vocab], to be copied; advances the state.

        A state's first single token goes through Python, since many a fork has no other; the second is
        recorded and the next ones replayed: the same operations on the same arrays.
        """
        one = state.one_token
        if one is None or not one.belongs_to(self, state.layers):
            state.one_token = OneToken(self, state.layers)
            return self._logits(self._hidden(ids, state, None), None)
        logits = one.forward(self.embed_tokens.stored_float32(rows=ids), state.position)
        state.position += 1
        return logits

    def _logits(self, hidden, record):
        return self.lm_head(self.norm(hidden, record), record)
