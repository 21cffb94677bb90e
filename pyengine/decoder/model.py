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
        self.pool, self.name = pool, f"model.layers.{index}"
        name = self.name
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


class Step:
    """The pass of one token through a model on a state's layers, with the arrays it reads and writes."""

    def __init__(self, model: LockedModel, layers: list, embedding: np.ndarray):
        self.model, self.layers, self.embedding = model, layers, embedding
        self.rope_table = ops.rope_table(0, 1, model.inv_freq)
        self.logits = None
        self.tape = ops.Tape()


class LockedModel:
    """`forward` and `new_state`, as every model of this package; `config`, `arithmetic`, `pool`."""

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
        self.replays = True  # False: every token through Python, to time or watch the operations

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
        hidden = self._through_layers(hidden, state, rope_table, record)
        state.position += len(ids)
        return hidden

    def _through_layers(self, hidden, state, rope_table, record):
        for layer, layer_state in zip(self.layers, state.layers):
            hidden = layer.forward(hidden, layer_state, rope_table, record)
        return hidden

    def _next_token(self, ids, state):
        """One id -> logits [1, vocab], which the next call overwrites; advances the state.

        The same operations as ever: recorded with a state's first single token, then replayed.
        """
        embedding = self.embed_tokens.stored_float32(rows=ids)
        step = state.step
        if step is not None and step.model is self and step.layers is state.layers:
            step.embedding[:] = embedding
            ops.rope_table(state.position, 1, self.inv_freq, step.rope_table)
            step.tape.replay(self.pool)
        else:
            state.step = None  # its arrays may go before the new ones come
            step = Step(self, state.layers, embedding)
            with step.tape.recording(self.pool):
                ops.rope_table(state.position, 1, self.inv_freq, step.rope_table)
                hidden = self._through_layers(embedding, state, step.rope_table, None)
                step.logits = self._logits(hidden, None)
            state.step = step
        state.position += 1
        return step.logits

    def _logits(self, hidden, record):
        return self.lm_head(self.norm(hidden, record), record)
