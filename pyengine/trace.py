"""Traces: every module's output of one run, by Hugging Face's module path, in execution order.

A trace file is a safetensors file that any language can write:

    input_ids       I64 or I32 [T]: the token ids of the run, one sequence, from an empty state
    NAME            F64, F32, F16 or BF16 [T, features], row t for token t; further axes are
                    flattened into features.  Routed experts' choices: I64, I32 or U32
    __metadata__    format      "pyengine-trace-1"
                    order       a JSON list of every NAME, in the order of execution
                    arithmetic  what computed it, in words of one's own; may be left out
                    names       "llama.cpp" if NAME is llama.cpp's (`attn_norm-0`) and the shapes and
                                head order are its own (see oracle/llama_cpp.py); else left out

Any part of the names may be there: what is there is compared.  With L for `model.layers.I`:

    model.embed_tokens                                     [T, hidden]
    L.input_layernorm                                      [T, hidden]
    L.linear_attn.in_proj_qkv                              [T, 2 * key heads * dk + value heads * dv]
    L.linear_attn.in_proj_z                                [T, value heads * dv]
    L.linear_attn.in_proj_b, L.linear_attn.in_proj_a       [T, value heads], before any function
    L.linear_attn.norm                                     [T, value heads * dv], gate included
    L.linear_attn.out_proj, L.linear_attn                  [T, hidden]
    L.self_attn.q_proj                                     [T, heads * 2n]: n of query, n of gate a head
    L.self_attn.k_proj, L.self_attn.v_proj                 [T, kv heads * n]
    L.self_attn.q_norm, L.self_attn.k_norm                 [T, heads * n], before the rotation
    L.self_attn.o_proj, L.self_attn                        [T, hidden]
    L.post_attention_layernorm                             [T, hidden]
    L.mlp.shared_expert.gate_proj, .up_proj                [T, shared width]
    L.mlp.shared_expert.down_proj, L.mlp.shared_expert     [T, hidden]
    L.mlp.gate                                             [T, experts]: logits
    L.mlp.gate.1                                           [T, top_k]: routing weights, sum 1
    L.mlp.gate.2                                           [T, top_k]: the experts they belong to
    L.mlp.experts                                          [T, hidden]: the routed ones' sum
    L.mlp.shared_expert_gate                               [T, 1], before the sigmoid
    L.mlp                                                  [T, hidden]
    L                                                      [T, hidden]: after both residuals
    model.norm                                             [T, hidden]
    lm_head                                                [T, vocab]

Value heads and their channels are in Hugging Face's order (head g uses key head g // ratio).  A module
whose output is a tuple has `NAME` for its first tensor and `NAME.1`, `NAME.2` for the others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import FileFormatError, quote
from .files.safetensors import SafetensorsFile, SafetensorsWriter

FORMAT = "pyengine-trace-1"
IDS = "input_ids"
LLAMA_CPP = "llama.cpp"

_DTYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64", "int32": "I32"}
_READABLE = (*_DTYPES.values(), "BF16", "U32")


@dataclass
class Trace:
    """tensors {name: array [T, features]} in the order of execution; ids int64 [T].

    names  "" for Hugging Face's module paths, LLAMA_CPP for llama.cpp's own
    """

    ids: np.ndarray
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    arithmetic: str = ""
    names: str = ""

    def save(self, path) -> None:
        """Written whole or not at all."""
        tensors = {IDS: np.asarray(self.ids, np.int64), **self.tensors}
        entries = [(name, _DTYPES[str(array.dtype)], array.shape)
                   for name, array in tensors.items()]
        metadata = {"format": FORMAT, "arithmetic": self.arithmetic,
                    "order": json.dumps(list(self.tensors))}
        if self.names:
            metadata["names"] = self.names
        with SafetensorsWriter(path, entries, metadata) as writer:
            for name, array in tensors.items():
                writer.write(name, array)

    @classmethod
    def load(cls, path) -> Trace:
        """Views of the mapped file, BF16 widened to float32.  Errors: FileFormatError."""
        file = SafetensorsFile.open(Path(path))
        ids = file.tensors.get(IDS)
        if ids is None or ids.dtype not in ("I64", "I32") or len(ids.shape) != 1:
            got = "none" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise FileFormatError(path, IDS, f"want I64 or I32 [T], got {got}")
        order = _order(file, path)
        names = file.metadata.get("names", "")
        if names not in ("", LLAMA_CPP):
            raise FileFormatError(path, "metadata names", f"want {LLAMA_CPP!r} or none, got {names!r}")
        tensors = {name: _values(path, file.tensors[name]) for name in order}
        if not names:
            tensors = {name: _rows(array, len(ids.data)) for name, array in tensors.items()}
        return cls(ids.data, tensors, file.metadata.get("arithmetic", ""), names)


def _values(path, view) -> np.ndarray:
    if view.dtype not in _READABLE:
        raise FileFormatError(path, f"tensor {view.name}",
                              f"want {', '.join(_READABLE)}, got {view.dtype}")
    if view.dtype == "BF16":
        return (view.data.astype(np.uint32) << 16).view(np.float32)
    return view.data


def _rows(array, tokens) -> np.ndarray:
    if array.ndim == 2 or array.shape[:1] != (tokens,):
        return array
    return array.reshape(tokens, -1)


def _order(file, path) -> list[str]:
    if file.metadata.get("format") != FORMAT:
        raise FileFormatError(path, "metadata format",
                              f"want {FORMAT!r}, got {quote(file.metadata.get('format'))}")
    try:
        order = json.loads(file.metadata.get("order", ""))
    except (ValueError, RecursionError):
        order = None
    names = set(file.tensors) - {IDS}
    if not isinstance(order, list) or not all(isinstance(n, str) for n in order):
        got = quote(file.metadata.get("order"))
        raise FileFormatError(path, "metadata order", f"want a JSON list of names, got {got}")
    if len(set(order)) != len(order) or set(order) != names:
        odd = sorted(set(order) ^ names) or ["a name twice"]
        raise FileFormatError(path, "metadata order", f"want every tensor once, got {quote(odd[0])}")
    unprintable = next((name for name in order if not name.isprintable()), None)
    if unprintable is not None:  # they are module paths, and reports print them
        raise FileFormatError(path, "metadata order", f"want module paths, got {quote(unprintable)}")
    return order


class Recorder:
    """What a model's `record` may be: joins the pieces of a chunked run along T."""

    def __init__(self):
        self.pieces: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, value: np.ndarray) -> None:
        self.pieces.setdefault(name, []).append(value.copy())

    def tensors(self) -> dict[str, np.ndarray]:
        """In the order of execution, but for a module's outputs, which stand in the module's: a router
        chooses the experts, NAME.2, before it weighs them, NAME.1."""
        place = {name: at for at, name in enumerate(self.pieces)}

        def key(name):
            module, _, output = name.rpartition(".")
            others = [f"{module}.{i}" for i in (1, 2)]
            if module in place and name in others:
                return min(place.get(other, len(place)) for other in others), int(output)
            return place[name], 0

        return {name: np.concatenate(self.pieces[name]) for name in sorted(place, key=key)}


def record_trace(model, ids, state=None, chunk=None) -> Trace:
    """Run the model over ids and keep every module's output, float32 (selected experts int64)."""
    recorder = Recorder()
    model.forward(ids, state, chunk=chunk, record=recorder)
    tensors = {name: array if array.dtype == np.int64 else array.astype(np.float32)
               for name, array in recorder.tensors().items()}
    return Trace(np.asarray(ids, np.int64), tensors, model.arithmetic)
