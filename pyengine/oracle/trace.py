"""Traces: every module's output of one run, by Hugging Face's module path, in execution order.

A trace file is a safetensors file that any language can write:

    input_ids       I64 or I32 [T]: the token ids of the run, one sequence, from an empty state
    NAME            F64, F32, F16 or BF16 [T, features], row t for token t; further axes are
                    flattened into features.  Routed experts' choices: I64, I32 or U32
    NAME@rows       I64 or I32 [R], rising: NAME has R rows, row r for token rows[r].  May be left out
    NAME@columns    I64 or I32 [C], rising: NAME has C features, these of all.  May be left out
    @rows           the same for every tensor that has R rows and no NAME@rows
    __metadata__    format      "pyengine-trace-1"
                    order       a JSON list of every NAME, in the order of execution
                    arithmetic  the arithmetic that computed it, in your own words; may be left out
                    names       whose names NAME are: "llama.cpp" (`attn_norm-0`; shapes and head order are
                                its own too), "vllm", "sglang", "mlx", "candle" (name_maps/); else left out
                    steps       a JSON list of the lengths that input_ids were run in: [20, 1, 1] for a
                                prompt and two decode steps, on the ids given; may be left out
                    resolution  the last digit's half, where values were printed: "0.00005"; else left out

A trace may lack any tensors: those in it are compared.  `model.norm` and `lm_head` may hold the
row of the last token alone, [1, features], without @rows.  With L for `model.layers.I`:

    model.embed_tokens                                     [T, hidden]
    L.input_layernorm                                      [T, hidden]
    L.linear_attn.in_proj_qkv                              [T, 2 * key heads * dk + value heads * dv]
    L.linear_attn.in_proj_z                                [T, value heads * dv]
    L.linear_attn.in_proj_b, L.linear_attn.in_proj_a       [T, value heads], before any function
    L.linear_attn.in_proj_qkvz                             of Qwen3-Next, in place of the four above:
    L.linear_attn.in_proj_ba                                 the same values, key head by key head
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
    L.mlp.gate_proj, L.mlp.up_proj                         [T, MLP's width]: of a dense model, in place
    L.mlp.down_proj                                        [T, hidden]       of the seven above
    L.mlp                                                  [T, hidden]
    L                                                      [T, hidden]: after both residuals
    L.linear_attn.conv_state                               [1, (taps - 1) * channels], after the last token:
                                                             the convolution's inputs, the oldest first
    L.linear_attn.recurrent_state                          [1, value heads * dk * dv], after the last token
    L.self_attn.key_cache, L.self_attn.value_cache         [T, kv heads * n], keys after the rotation
    model.norm                                             [T, hidden]
    lm_head                                                [T, vocab]

Value heads and their channels are in Hugging Face's order (head g uses key head g // ratio).  A module
whose output is a tuple has `NAME` for its first tensor and `NAME.1`, `NAME.2` for the others.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import FileFormatError, InputError, quote
from ..files.safetensors_writer import SafetensorsWriter
from .memories import memories, orders_of
from .trace_file import (
    COLUMNS,
    FORMAT,
    IDS,
    ROWS,
    indices_of,
    names_of,
    open_trace_file,
    order_of,
    resolution_of,
    steps_of,
    values_of,
)

LLAMA_CPP = "llama.cpp"
NAMES = ("", LLAMA_CPP, "vllm", "sglang", "mlx", "candle")  # whose names: "" is Hugging Face
LAST_ROW_ALONE = ("model.norm", "lm_head")  # an engine may compute these for the last token only
STATES = (".linear_attn.conv_state", ".linear_attn.recurrent_state")  # [1, n], after the last token
CACHES = (".self_attn.key_cache", ".self_attn.value_cache")

_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint32": "U32",
}


@dataclass
class Trace:
    """tensors {name: array [T, features]} in the order of execution; ids int64 [T].

    names  "" for Hugging Face's module paths, LLAMA_CPP for llama.cpp's own, or a map of `name_maps`
    path   of its file, for messages; "" where it was not read from one
    rows, columns  {name: rising indices}: the tokens, the features, of tensors that hold a part
    steps  lengths that the ids were run in; () if it is not known
    resolution  absolute error of every value, of values that were printed; else 0
    """

    ids: np.ndarray
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    arithmetic: str = ""
    names: str = ""
    path: str = ""
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    resolution: float = 0.0

    def save(self, path, more: dict[str, str] | None = None) -> None:
        """Written whole or not at all.  more: further texts of the metadata."""
        tensors = {IDS: np.asarray(self.ids, np.int64), **self.tensors}
        for suffix, parts in ((ROWS, self.rows), (COLUMNS, self.columns)):
            tensors |= {f"{n}{suffix}": np.asarray(at, np.int64) for n, at in parts.items() if n in tensors}
        entries = [(name, _stored_dtype(name, array), array.shape) for name, array in tensors.items()]
        metadata = {"format": FORMAT, "arithmetic": self.arithmetic, "order": json.dumps(list(self.tensors))}
        if self.names:
            metadata["names"] = self.names
        if self.steps:
            metadata["steps"] = json.dumps(list(self.steps))
        if self.resolution:
            metadata["resolution"] = repr(self.resolution)
        with SafetensorsWriter(path, entries, metadata | (more or {})) as writer:
            for name, array in tensors.items():
                writer.write(name, array)

    @classmethod
    def load(cls, path, names: str | None = None) -> Trace:
        """Views of the mapped file, BF16 widened to float32.  names: in place of what the file says.

        Errors: FileFormatError.
        """
        file = open_trace_file(path)
        ids = file.tensors.get(IDS)
        if ids is None or ids.dtype not in ("I64", "I32") or len(ids.shape) != 1:
            got = "none" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise FileFormatError(path, IDS, f"want I64 or I32 [T], got {got}")
        order = order_of(file, path)
        tensors = {name: values_of(path, file.tensors[name]) for name in order}
        trace = cls(
            ids.data,
            tensors,
            file.metadata.get("arithmetic", ""),
            names_of(file, path, NAMES) if names is None else names,
            str(path),
            indices_of(file, path, [name for name in order if not is_state(name)], ROWS),
            indices_of(file, path, order, COLUMNS),
            steps_of(file, path, len(ids.data)),
            resolution_of(file, path),
        )
        try:
            return trace.with_rows()
        except InputError as error:
            field, _, problem = str(error).partition(": ")
            raise FileFormatError(path, field, problem) from None

    def with_rows(self) -> Trace:
        """The same with every tensor [T, features], or [R, features] where `rows` says of which tokens.

        A batch axis of 1 is dropped, further axes are flattened.  Shapes under other names stay.  `logits` is
        another name of lm_head.
        Errors: InputError: another count of rows, or indices that cannot be.
        """
        if self.names:
            return self
        if "logits" in self.tensors and "lm_head" not in self.tensors:
            return self._with_head().with_rows()
        ids = np.asarray(self.ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
            raise InputError(f"{IDS}: want integers [T], got {ids.dtype} {list(ids.shape)}")
        tensors, rows = {}, {n: np.asarray(at) for n, at in self.rows.items() if n in self.tensors}
        for name, array in self.tensors.items():
            held = len(rows[name]) if name in rows else len(ids)
            tensors[name] = _rows(name, np.asarray(array), held, name in rows)
            if name in LAST_ROW_ALONE and len(tensors[name]) < held:
                rows[name] = np.array([len(ids) - 1])
        _check_indices(rows, ROWS, len(ids), {name: len(array) for name, array in tensors.items()})
        columns = {n: np.asarray(at) for n, at in self.columns.items() if n in tensors}
        _check_indices(columns, COLUMNS, None, {name: array.shape[1] for name, array in tensors.items()})
        return replace(self, ids=ids, tensors=tensors, rows=rows, columns=columns)

    def _with_head(self) -> Trace:
        tensors, rows, columns = (
            {"lm_head" if name == "logits" else name: value for name, value in of.items()}
            for of in (self.tensors, self.rows, self.columns)
        )
        return replace(self, tensors=tensors, rows=rows, columns=columns)

    # ---- traces of part of the tokens and features ----

    def last_row_alone(self) -> tuple[str, ...]:
        """The tensors that hold the last token's row and no other."""
        return tuple(name for name in LAST_ROW_ALONE if name in self.tensors and self._has_last_row(name))

    def _has_last_row(self, name) -> bool:
        rows, last = self.rows.get(name), len(self.ids) - 1
        return len(self.tensors[name]) == 1 and last > 0 and (rows is None or rows.tolist() == [last])

    def is_whole(self, name: str) -> bool:
        """Whether the trace has the tensor with every token and feature."""
        return name in self.tensors and self._held(name, "rows") is None and name not in self.columns

    def is_known(self, name: str) -> bool:
        """Whether operations can be run on it: every token and feature is there, or the last token where that
        is enough."""
        return self.is_whole(name) or (name in self.last_row_alone() and name not in self.columns)

    def known(self) -> set[str]:
        """The tensors that operations can be run on."""
        return {name for name in self.tensors if self.is_known(name)}

    def parts_key(self) -> str:
        """Tells traces apart that hold other parts of tensors; empty if it holds whole ones, or last rows."""
        parts = {
            f"{name}{suffix}": at.tolist()
            for suffix, parts in ((ROWS, self.rows), (COLUMNS, self.columns))
            for name, at in parts.items()
            if suffix == COLUMNS or name not in self.last_row_alone()
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest() if parts else ""

    def part(self, name: str, full: np.ndarray) -> np.ndarray:
        """Of an array [T, features], what this trace holds of that tensor."""
        rows, columns = self._held(name, "rows"), self.columns.get(name)
        full = full if rows is None else full[rows[rows < len(full)]]
        return full if columns is None else full[:, columns[columns < full.shape[1]]]

    def tokens_of(self, name: str) -> np.ndarray:
        """The token of each row of a tensor."""
        if name in self.rows:
            return self.rows[name]
        count = len(self.tensors[name])
        return np.arange(len(self.ids) - count, len(self.ids)) if count < len(self.ids) else np.arange(count)

    def _held(self, name: str, parts: str) -> np.ndarray | None:
        """The rows, or columns, that are there of a tensor; None: all."""
        found = getattr(self, parts).get(name)
        if found is None and parts == "rows" and name in self.last_row_alone():
            return np.array([len(self.ids) - 1])
        return found

    def kept(self, names) -> Trace:
        """With these tensors alone."""
        return replace(self, tensors={n: array for n, array in self.tensors.items() if n in names})


def _stored_dtype(name, array) -> str:
    if str(array.dtype) not in _DTYPES:
        raise InputError(f"{name}: want {', '.join(_DTYPES)}, got {array.dtype}")
    return _DTYPES[str(array.dtype)]


def aligned(reference: Trace, candidate: Trace) -> tuple[Trace, Trace]:
    """Both with the tokens and features alone that both have of each tensor.

    Errors: InputError: a tensor of which they have none in common.
    """
    ours, theirs = dict(reference.tensors), dict(candidate.tensors)
    rows, columns = dict(candidate.rows), dict(candidate.columns)
    for name in [name for name in ours if name in theirs]:
        for axis, parts, common in ((0, "rows", rows), (1, "columns", columns)):
            mine, other = (trace._held(name, parts) for trace in (reference, candidate))
            if mine is None and other is None:
                continue
            shared = _common(mine, other)
            if not len(shared):
                raise InputError(f"{name}: want {parts} that both traces have, got none")
            ours[name] = _taken(ours[name], mine, shared, axis)
            theirs[name] = _taken(theirs[name], other, shared, axis)
            common[name] = shared
    return (
        replace(
            reference, tensors=ours, rows={**reference.rows, **rows}, columns={**reference.columns, **columns}
        ),
        replace(candidate, tensors=theirs, rows=rows, columns=columns),
    )


def _common(mine, other) -> np.ndarray:
    if mine is None or other is None:
        return other if mine is None else mine
    return np.intersect1d(mine, other)


def _taken(array, held, wanted, axis) -> np.ndarray:
    """The wanted indices of an array that holds `held` (None: all) of an axis."""
    at = wanted if held is None else np.searchsorted(held, wanted)
    return np.take(array, at[at < array.shape[axis]], axis)


def is_state(name: str) -> bool:
    """Whether a tensor is a memory of a layer after the last token, [1, n]."""
    return name.endswith(STATES)


def _rows(name, array, tokens, stated=False) -> np.ndarray:
    """stated: the count comes from the trace's @rows."""
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name}: want numbers, got {array.dtype}")
    shape = array.shape
    if is_state(name):
        return array.reshape(1, -1)
    if array.ndim > 2 and shape[:2] == (1, tokens) and tokens > 1:
        array = array[0]
    elif array.ndim == 1 and name in LAST_ROW_ALONE and tokens != len(array):
        array = array[None]
    rows = len(array) if array.ndim else 0
    if rows != tokens and not (rows == 1 and name in LAST_ROW_ALONE) or not array.size:
        wanted = "rows" if stated else "rows for the"
        raise InputError(
            f"{name}: want row t for token t, {tokens} {wanted} {tokens} {'@rows' if stated else IDS}, "
            f"got shape {list(shape)}"
        )
    return array if array.ndim == 2 else array.reshape(rows, -1)


def _check_indices(parts, suffix, limit, lengths) -> None:
    for name, at in parts.items():
        rising = at.ndim == 1 and at.dtype.kind in "iu" and (np.diff(at) > 0).all()
        if not rising or not len(at) or at[0] < 0 or (limit is not None and at[-1] >= limit):
            below = "" if limit is None else f" below {limit}"
            raise InputError(f"{name}{suffix}: want rising indices{below}, got {quote(at.tolist())}")
        if len(at) != lengths[name]:
            raise InputError(f"{name}{suffix}: want {lengths[name]} indices as the tensor has, got {len(at)}")


class Recorder:
    """A `record` for a model's `forward`: it joins the pieces of a chunked run along T."""

    def __init__(self):
        self.pieces: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, value: np.ndarray) -> None:
        self.pieces.setdefault(name, []).append(value.copy())

    def tensors(self) -> dict[str, np.ndarray]:
        """In the order of execution.  The outputs of one module are in the module's own order: a router
        chooses the experts, NAME.2, before it weighs them, NAME.1."""
        place = {name: at for at, name in enumerate(self.pieces)}

        def key(name):
            module, _, output = name.rpartition(".")
            others = [f"{module}.{i}" for i in (1, 2)]
            if module in place and name in others:
                return min(place.get(other, len(place)) for other in others), int(output)
            return place[name], 0

        return {name: np.concatenate(self.pieces[name]) for name in sorted(place, key=key)}


def record_trace(model, ids, state=None, chunk=None, states=()) -> Trace:
    """Run the model over ids and keep every module's output, float32 (selected experts int64).

    states: names of memories of layers to keep as well, or True: all of them.
    """
    recorder = Recorder()
    state = model.new_state() if state is None else state
    start = state.position
    model.forward(ids, state, chunk=chunk, record=recorder)
    found = recorder.tensors()
    if states:
        kept = memories(state, start, orders_of(model))
        found |= {name: np.array(value) for name, value in kept.items() if states is True or name in states}
    tensors = {
        name: array if array.dtype == np.int64 else array.astype(np.float32) for name, array in found.items()
    }
    return Trace(np.asarray(ids, np.int64), tensors, model.arithmetic)
