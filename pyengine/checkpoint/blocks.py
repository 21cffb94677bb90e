"""The blocks of a GGUF: which are layers, and of which kind; what the metadata claims and what the
tensors show must agree."""

from __future__ import annotations

import re
from typing import Any

from ..errors import FileFormatError
from .families import FULL, LINEAR
from .fields import Metadata

MAX_LAYERS = 1024
DEFAULT_INTERVAL = 4  # llama.cpp's and transformers'

_BLOCK = re.compile(r"blk\.(\d{1,9})\.(.*)", re.DOTALL)
_RECURRENT, _INTERVAL, _KV = (
    "attention.recurrent_layers",
    "full_attention_interval",
    "attention.head_count_kv",
)


def interval_layer_types(layers: int, interval: int) -> tuple[str, ...]:
    return tuple(LINEAR if (i + 1) % interval else FULL for i in range(layers))


class Blocks:
    """layers, nextn: how many blocks of each; layer_types: one a layer.

    Errors: FileFormatError, naming a key or a tensor.
    """

    def __init__(self, meta: Metadata):
        self.meta, self.nextn = meta, meta.integer("nextn_predict_layers", 0)
        self.count = meta.integer("block_count")
        if not 0 <= self.nextn < self.count <= MAX_LAYERS:
            raise meta.error(
                "block_count",
                f"want more than the {self.nextn} next-token blocks and at most {MAX_LAYERS}, "
                f"got {self.count}",
            )
        self.layers = self.count - self.nextn
        self.tensors: dict[int, list[str]] = {}  # block: the rests of its tensors' names
        for name in meta.gguf.tensors:
            match = _BLOCK.fullmatch(name)
            if match:
                self.tensors.setdefault(int(match[1]), []).append(match[2])
        self._check_nextn()
        if self.tensors and min(self.tensors) >= self.layers:
            nextn = min(self.tensors)
            raise FileFormatError(
                meta.path,
                f"blk.{nextn}",
                f"want a model with its {self.layers} layers, got next-token-prediction blocks alone",
            )
        self.layer_types = self._layer_types()

    def head_count(self, key: str) -> int:
        """A number, or one a layer: 0 or the same number where the layer has no attention of its own."""
        meta = self.meta
        if not meta.is_array(key):
            return meta.integer(key)
        counts, first = self._per_layer(key, int), None
        for layer, kind in enumerate(self.layer_types):
            if kind != FULL and counts[layer] == 0:
                continue
            if counts[layer] < 1:
                wanted = "1 or more" if kind == FULL else "0 or more"
                raise meta.error(
                    key, f"want {wanted} for block {layer} of {kind.replace('_', ' ')}, got {counts[layer]}"
                )
            first = counts[layer] if first is None else first
            if counts[layer] != first:
                raise meta.error(key, f"want {first} for block {layer} as for others, got {counts[layer]}")
        return 0 if first is None else first

    def _per_layer(self, key: str, of: type) -> list[Any]:
        values: list[Any] = self.meta.array(key, of).tolist()
        if len(values) not in (self.count, self.layers):
            raise self.meta.error(key, f"want {self.count} entries as block_count, got {len(values)}")
        return values[: self.layers]

    # ---- next-token blocks: the last ones, no part of the forward pass ----

    def _check_nextn(self) -> None:
        """Blocks that are claimed have `nextn.*` tensors, or no tensors: people strip them, and leave the
        key.  Blocks that are not claimed have none."""
        meta, key = self.meta, "nextn_predict_layers"
        for block, names in sorted(self.tensors.items()):
            nextn = next((name for name in names if name.startswith(meta.family.nextn)), None)
            claimed = self.layers <= block < self.count
            if nextn and not claimed:
                got = self.nextn if meta.has(key) else "no such key"
                raise FileFormatError(
                    meta.path,
                    f"blk.{block}.{nextn}",
                    f"want {meta.label(key)} to count block {block} of {self.count}, got {got}",
                )
            if claimed and not nextn:
                raise meta.error(
                    key, f"want nextn.* tensors in block {block}, got {self.nextn} and none there"
                )

    # ---- kinds ----

    def _layer_types(self) -> tuple[str, ...]:
        meta = self.meta
        if meta.has(_RECURRENT):
            return tuple(LINEAR if recurrent else FULL for recurrent in self._per_layer(_RECURRENT, bool))
        if meta.has(_INTERVAL):
            interval = meta.integer(_INTERVAL)
            if interval < 1:
                raise meta.error(_INTERVAL, f"want at least 1, got {interval}")
            return interval_layer_types(self.layers, interval)
        if meta.is_array(_KV) and 0 in (counts := self._per_layer(_KV, int)):
            return tuple(FULL if count else LINEAR for count in counts)
        return self._default_layer_types()

    def _default_layer_types(self) -> tuple[str, ...]:
        """Of a file that does not say: llama.cpp's default, if no tensor contradicts it."""
        kinds = interval_layer_types(self.layers, DEFAULT_INTERVAL)
        for layer, kind in enumerate(kinds):
            for name in self.tensors.get(layer, ()):
                shown = LINEAR if name.startswith("ssm_") else FULL if name in _OF_FULL else kind
                if shown != kind:
                    raise self.meta.error(
                        _INTERVAL,
                        f"want this key, for blk.{layer}.{name} contradicts the default of "
                        f"{DEFAULT_INTERVAL}, got no such key",
                    )
        return kinds


_OF_FULL = ("attn_q_norm.weight", "attn_k_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight")
