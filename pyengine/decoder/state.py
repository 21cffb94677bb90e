"""What continues a sequence: one entry a layer, copied and restored as a whole."""

from __future__ import annotations

import numpy as np

from ..config import LINEAR, Config
from ..errors import InputError


class DeltaNetState:
    """A delta-net layer's memory; its size does not grow with the sequence.

    conv_state       [taps - 1, conv_dim]  the convolution's last inputs, oldest first
    recurrent_state  [value heads, head_k_dim, head_v_dim]
    Value heads and their channels are in the checkpoint's order.  The arrays are overwritten, never
    replaced: recorded calls point to them.
    """

    def __init__(self, config: Config, dtype):
        self.conv_state = np.zeros((config.linear_conv_kernel_dim - 1, config.conv_dim), dtype)
        self.recurrent_state = np.zeros(
            (config.linear_num_value_heads, config.linear_key_head_dim,
             config.linear_value_head_dim), dtype)

    def copy(self):
        twin = object.__new__(DeltaNetState)
        twin.conv_state, twin.recurrent_state = self.conv_state.copy(), self.recurrent_state.copy()
        return twin

    mark = copy  # it is overwritten with every token

    def rewind(self, mark):
        self.conv_state[:], self.recurrent_state[:] = mark.conv_state, mark.recurrent_state

    @property
    def nbytes(self) -> int:
        return self.conv_state.nbytes + self.recurrent_state.nbytes


class KeyValueCache:
    """A full-attention layer's memory: keys (after norm and rotation) and values.

    keys, values  [length, kv heads, head_dim], views of arrays that grow by doubling
    """

    def __init__(self, config: Config, dtype):
        self.length = 0
        shape = (0, config.num_key_value_heads, config.head_dim)
        self._keys, self._values = np.empty(shape, dtype), np.empty(shape, dtype)

    @property
    def keys(self):
        return self._keys[: self.length]

    @property
    def values(self):
        return self._values[: self.length]

    def append(self, keys, values):
        """keys, values [tokens, kv heads, head_dim] -> the positions length .. length + tokens."""
        stop = self.length + len(keys)
        self.reserve(stop)
        self._keys[self.length:stop], self._values[self.length:stop] = keys, values
        self.length = stop

    def reserve(self, positions: int):
        """Room for that many positions in all."""
        if positions > len(self._keys):
            capacity = max(positions, 2 * len(self._keys), 256)
            self._keys = self._grown(self._keys, capacity)
            self._values = self._grown(self._values, capacity)

    def _grown(self, old, capacity):
        new = np.empty((capacity, *old.shape[1:]), old.dtype)
        new[: self.length] = old[: self.length]
        return new

    def mark(self) -> int:
        return self.length  # what lies before is never written again

    def rewind(self, mark: int):
        self.length = mark

    def copy(self):
        twin = object.__new__(KeyValueCache)
        twin.length = self.length
        twin._keys, twin._values = self.keys.copy(), self.values.copy()
        return twin

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes


class Mark:
    """A point of a sequence that a state can go back to.

    position  tokens before it
    note      whatever its maker wants to find there again
    """

    def __init__(self, state: State, note):
        self.position, self.note = state.position, note
        self.layers = [layer.mark() for layer in state.layers]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, DeltaNetState))


class State:
    """A sequence so far: `position` tokens of it, and each layer's memory.

    `copy()` is a snapshot: it shares nothing, and continuing from it gives the same bits as
    computing the sequence anew.  A state belongs to the model that made it, and once it has taken
    single tokens it keeps that model in memory.

    `mark()` is a snapshot inside the state, and costs what the delta nets hold: keys and values
    stay where they are.  `rewind(mark)` goes back to it, also out of a forward pass that was
    interrupted half way.  marks: those that can be gone back to, in order; later ones than the
    one gone back to are void, and any may be removed.
    """

    def __init__(self, config: Config, dtype, cache_dtype=None):
        self.position = 0
        self.one_token = None  # what the model keeps here to compute the next token faster
        self.marks: list[Mark] = []
        self.layers = [DeltaNetState(config, dtype) if kind == LINEAR
                       else KeyValueCache(config, cache_dtype or dtype)
                       for kind in config.layer_types]

    def copy(self) -> State:
        """Without the marks."""
        twin = object.__new__(State)
        twin.position, twin.marks, twin.one_token = self.position, [], None
        twin.layers = [layer.copy() for layer in self.layers]
        return twin

    def __getstate__(self):
        """For pickle and copy: all but what points into memory."""
        return vars(self) | {"one_token": None}

    def restore(self, snapshot: State) -> None:
        """Become a copy of the snapshot."""
        if len(snapshot.layers) != len(self.layers):
            raise InputError(f"state: want {len(self.layers)} layers, got {len(snapshot.layers)}")
        twin = snapshot.copy()
        self.position, self.layers, self.marks = twin.position, twin.layers, []

    def mark(self, note=None) -> Mark:
        """Remember this point."""
        self.marks.append(Mark(self, note))
        return self.marks[-1]

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark of this state.  InputError: it is none, or void."""
        if mark not in self.marks:
            raise InputError("mark: want one of this state that is not void")
        del self.marks[self.marks.index(mark) + 1:]
        for layer, kept in zip(self.layers, mark.layers):
            layer.rewind(kept)
        self.position = mark.position

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in (*self.layers, *self.marks))
