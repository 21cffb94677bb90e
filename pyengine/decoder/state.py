"""The state that continues a sequence: one entry per layer, copied and restored as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checkpoint.config import LINEAR, Config
from ..errors import InputError
from . import LOCKED_ARITHMETICS
from .reserved import Reserved, touched

MOST_RESERVED = 1 << 20  # positions; a file may claim any context

CACHE_DTYPES = dict(zip(LOCKED_ARITHMETICS, (np.float32, np.float16)))


class DeltaNetState:
    """A delta-net layer's memory, of constant size.

    conv_state       [taps - 1, conv_dim]  the convolution's last inputs, oldest first
    recurrent_state  [value heads, head_k_dim, head_v_dim]
    Value heads and their channels are in the checkpoint's order.  The arrays are overwritten, never
    replaced: recorded calls point to them.
    """

    def __init__(self, config: Config, dtype):
        self.conv_state = np.zeros((config.linear_conv_kernel_dim - 1, config.conv_dim), dtype)
        self.recurrent_state = np.zeros(
            (config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim), dtype
        )

    def copy_of(self, mark: DeltaNetState) -> DeltaNetState:
        """What this memory was at a mark."""
        return mark.copy()

    def copy(self):
        copy = object.__new__(DeltaNetState)
        copy.conv_state, copy.recurrent_state = self.conv_state.copy(), self.recurrent_state.copy()
        return copy

    mark = copy  # it is overwritten with every token

    def arrays(self) -> dict[str, np.ndarray]:
        return {"conv_state": self.conv_state, "recurrent_state": self.recurrent_state}

    def set_arrays(self, arrays: dict[str, np.ndarray], length: int):
        for name, array in self.arrays().items():
            array[:] = _of_shape(arrays[name], array.shape, array.dtype, name)

    def rewind(self, mark):
        self.conv_state[:], self.recurrent_state[:] = mark.conv_state, mark.recurrent_state

    @property
    def nbytes(self) -> int:
        return self.conv_state.nbytes + self.recurrent_state.nbytes


class KeyValueCache:
    """A full-attention layer's memory: keys (after norm and rotation) and values.

    keys, values  [length, kv heads, head_dim], views of arrays [kv heads, capacity, head_dim]: a head's rows
                  lie one behind the other, in the order in which they are read

    The arrays are addresses for twice the model's context; memory is taken by the rows that were written, so
    that a cache grows without being copied.  A longer sequence, or a system that refuses so many addresses,
    gets arrays that double.
    """

    def __init__(self, config: Config, dtype):
        self._row = (config.num_key_value_heads, config.head_dim)
        self._dtype, self._context = np.dtype(dtype), config.context
        self._begin(self._most())

    def _most(self) -> int:
        """Positions to have addresses for."""
        return min(2 * self._context, MOST_RESERVED)

    def _begin(self, capacity: int):
        self.length = self._used = 0
        self._map(capacity, 0)

    def _map(self, capacity: int, least: int):
        """Addresses for that many positions; where the system refuses, for fewer, but for `least`."""
        while True:
            heads, width = self._row
            try:
                self._memory = Reserved(2 * heads, (capacity, width), self._dtype)
                break
            except MemoryError:
                if capacity <= least:
                    raise
                capacity = max(capacity // 2, least)
        self._keys, self._values = self._memory.array.reshape(2, heads, capacity, width)

    @property
    def keys(self):
        return self._keys[:, : self.length].swapaxes(0, 1)

    @property
    def values(self):
        return self._values[:, : self.length].swapaxes(0, 1)

    def append(self, keys, values):
        """keys, values [tokens, kv heads, head_dim] -> the positions length .. length + tokens."""
        stop = self.length + len(keys)
        self._make_room(stop)
        self._keys[:, self.length : stop] = keys.swapaxes(0, 1)
        self._values[:, self.length : stop] = values.swapaxes(0, 1)
        self.length = stop

    def _make_room(self, positions: int):
        """For that many in all."""
        if positions > self._keys.shape[1]:
            keys, values = self.keys, self.values
            self._map(max(positions, 2 * self._keys.shape[1]), positions)
            self._memory.will_use(self._bytes(positions))
            self._keys[:, : self.length] = keys.swapaxes(0, 1)
            self._values[:, : self.length] = values.swapaxes(0, 1)
        self._memory.will_use(self._bytes(positions))
        self._used = max(self._used, positions)

    def _bytes(self, positions: int) -> int:
        """Of one head's keys, or values."""
        return positions * self._row[1] * self._dtype.itemsize

    def arrays(self) -> dict[str, np.ndarray]:
        return {"keys": self.keys, "values": self.values}

    def set_arrays(self, arrays: dict[str, np.ndarray], length: int):
        keys, values = (
            _of_shape(arrays[name], (length, *self._row), self._dtype, name) for name in ("keys", "values")
        )
        self._begin(max(self._most(), length))
        self.append(keys, values)

    def mark(self) -> int:
        return self.length  # earlier positions are never written again

    def rewind(self, mark: int):
        self.length = mark

    def copy_of(self, mark: int) -> KeyValueCache:
        """Only the rows before the mark are copied."""
        copy = object.__new__(KeyValueCache)
        copy._row, copy._dtype, copy._context = self._row, self._dtype, self._context
        copy._begin(self._keys.shape[1])
        copy.append(self.keys[:mark], self.values[:mark])
        return copy

    def copy(self):
        return self.copy_of(self.length)

    def __deepcopy__(self, memo):
        return self.copy()

    def __getstate__(self):
        rows = {name: np.ascontiguousarray(array) for name, array in self.arrays().items()}
        return self._row, self._dtype, self._context, rows

    def __setstate__(self, state):
        self._row, self._dtype, self._context, rows = state
        self.set_arrays(rows, len(rows["keys"]))

    @property
    def nbytes(self) -> int:
        """Of the pages that were written, now or before a rewind."""
        return self.bytes_of(self._row, self._dtype.itemsize, self._used)

    @staticmethod
    def bytes_of(row: tuple[int, int], item: int, positions: int) -> int:
        """Memory of so many positions at most; row: key-value heads, head_dim; item: bytes of an element."""
        heads, width = row
        return 2 * heads * touched(positions * width * item)


def _of_shape(array: np.ndarray, shape: tuple, dtype, name: str) -> np.ndarray:
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"{name}: want {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}")
    return array


class Mark:
    """A point of a sequence that a state can go back to.

    position  tokens before it
    note      opaque value for the caller
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
    computing the sequence again.  A state belongs to the model that made it.  It is data and no more:
    it can be pickled and copied.

    `mark()` is a snapshot inside the state.  It copies the arrays of the delta nets; keys and values stay
    where they are.  `rewind(mark)` goes back to the mark, also out of a forward pass that was interrupted
    half way.  marks: the marks that `rewind` takes, in order; a rewind makes the later marks void, and
    the caller may remove any of them.
    """

    def __init__(self, config: Config, dtype, cache_dtype=None):
        self.position = 0
        self.marks: list[Mark] = []
        self.layers = [
            DeltaNetState(config, dtype) if kind == LINEAR else KeyValueCache(config, cache_dtype or dtype)
            for kind in config.layer_types
        ]

    def copy(self) -> State:
        """Without the marks."""
        return self._of(self.position, [layer.copy() for layer in self.layers])

    def copy_of_mark(self, mark: Mark) -> State:
        """What `copy` gave at a mark of this state.  InputError as `rewind`."""
        self._check_mark(mark)
        return self._of(mark.position, [layer.copy_of(kept) for layer, kept in zip(self.layers, mark.layers)])

    def _of(self, position: int, layers: list) -> State:
        state = object.__new__(State)
        state.position, state.marks, state.layers = position, [], layers
        return state

    def restore(self, snapshot: State) -> None:
        """Become a copy of the snapshot."""
        if len(snapshot.layers) != len(self.layers):
            raise InputError(f"state: want {len(self.layers)} layers, got {len(snapshot.layers)}")
        copy = snapshot.copy()
        self.position, self.layers, self.marks = copy.position, copy.layers, []

    def mark(self, note=None) -> Mark:
        """Remember this point."""
        self.marks.append(Mark(self, note))
        return self.marks[-1]

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark of this state.  InputError: it is not a mark of this state, or it is void."""
        self._check_mark(mark)
        del self.marks[self.marks.index(mark) + 1 :]
        for layer, kept in zip(self.layers, mark.layers):
            layer.rewind(kept)
        self.position = mark.position

    def arrays(self) -> dict[str, np.ndarray]:
        """The memory of every layer, and of the delta nets at every mark, by name: all but position, the
        marks' positions and their notes.  Views, not copies."""
        arrays = {
            f"layers.{i}.{name}": array
            for i, layer in enumerate(self.layers)
            for name, array in layer.arrays().items()
        }
        for j, mark in enumerate(self.marks):
            arrays |= {
                f"marks.{j}.layers.{i}.{name}": array
                for i, kept in enumerate(mark.layers)
                if isinstance(kept, DeltaNetState)
                for name, array in kept.arrays().items()
            }
        return arrays

    def set_arrays(self, arrays: dict[str, np.ndarray], position: int, marks: list[tuple[int, Any]]) -> None:
        """Become what `arrays` gave of another state; marks: (position, note) of each.

        Errors: KeyError, InputError: another model's arrays.
        """
        self.marks = []
        for j, (at, note) in enumerate(marks):
            if not 0 <= at <= position:
                raise InputError(f"marks.{j}: want a position up to {position}, got {at}")
            self._set(arrays, f"marks.{j}.layers", 0)
            self.mark(note)
            self.marks[-1].position = at
            self.marks[-1].layers = [at if isinstance(kept, int) else kept for kept in self.marks[-1].layers]
        self._set(arrays, "layers", position)
        self.position = position

    def _set(self, arrays, prefix: str, length: int) -> None:
        """length: of the key-value caches; 0: they are left as they are."""
        for i, layer in enumerate(self.layers):
            if length or isinstance(layer, DeltaNetState):
                names = layer.arrays()
                layer.set_arrays({name: arrays[f"{prefix}.{i}.{name}"] for name in names}, length)

    def _check_mark(self, mark: Mark) -> None:
        if mark not in self.marks:
            raise InputError("mark: want one of this state that is not void")

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in (*self.layers, *self.marks))
