"""The text that llama.cpp's eval-callback example prints, as a trace of some elements.

`llama-eval-callback -m model.gguf -p TEXT > log.txt 2>&1` prints each tensor of the graph: a line with its
name, type and size, and then its corners, the first and the last three of each axis, with four decimals:

    ggml_debug:    attn_norm-0 = (f32)    MUL(norm-0{..}, blk.0.attn_norm.weight{..}}) = {2048, 5, 1, 1}
    [ [ [ 0.1234, -0.5678, 0.9012, ..., 0.3456, -0.7890, 0.1234], ..., ] ]
    sum = 12.345678

The function that prints is called `ggml_debug` in older and `common_debug_cb_eval` in newer versions, with
a template's argument or without.  Indents and the beginnings of log lines differ; a build may print more
digits.  The sum is of the tensor in newer versions, of the printed elements in older ones: it is not read.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ...checkpoint.config import Config
from ...checkpoint.families import value_head_orders
from ...errors import FileFormatError, InputError
from ..rerun import is_choice
from ..trace import Trace
from ..widths import widths
from .llama_cpp import ORDERS, modules_of

_HEADER = re.compile(
    r"(?:ggml_debug|common_debug_cb_eval(?:<\w+>)?): *(?P<name>\S.*?) = \((?P<type>\w+)\) .* = "
    r"\{(?P<ne>\d+(?:, *\d+)*)\}\s*$"
)
_NUMBER = r"-?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf)"
_ROW = re.compile(rf"\[\s*((?:{_NUMBER}|\.\.\.)(?:\s*,\s*(?:{_NUMBER}|\.\.\.))*)\s*,?\s*\],?\s*$")
_COUNT = re.compile(r"number of input tokens = (\d+)\s*$")
_ID = re.compile(r"(?:^|\s)(\d+)\s*$")
_PRINTED = ("f32", "f16", "bf16", "i64", "i32", "i16", "i8")


def read_eval_callback(path, ids, config: Config) -> Trace:
    """The text, of a run over ids [T] -> a trace with Hugging Face's names: elements with their indices.

    Of tensors with one name, the first counts.  Choices of experts are left out unless all are printed.
    Errors: FileFormatError: no tensor of the model, other ids, a tensor of another size.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines()
    ids, path = np.asarray(ids, np.int64), Path(path)
    _check_ids(path, lines, ids)
    sizes, orders = widths(config), value_head_orders(config)
    trace, decimals = Trace(ids, {}, "llama.cpp, printed", path=str(path)), []
    for name, ne, rows in _tensors(lines):
        modules = [m for m in modules_of(name, config) if m not in trace.tensors]
        if not modules or not rows:
            continue
        found, shown = _values(path, name, ne, rows)
        decimals += shown
        for module in modules:
            _put(trace, module, ne, found, sizes[module], orders.get(ORDERS.get(module.split(".", 3)[-1])))
    if not trace.tensors:
        raise FileFormatError(
            path, "text", "want tensors that llama-eval-callback prints, got none of this model's"
        )
    for name in [name for name in trace.tensors if is_choice(name) and not trace.is_whole(name)]:
        for part in (name, f"{name[:-1]}1"):  # the weights are in the order of the choice
            trace.tensors.pop(part, None)
    trace.resolution = 0.5 * 10.0 ** -min(decimals, default=4)
    return _in_order(trace, sizes).with_rows()


def _in_order(trace, sizes):
    trace.tensors = {name: trace.tensors[name] for name in sizes if name in trace.tensors}
    trace.rows = {name: at for name, at in trace.rows.items() if name in trace.tensors}
    trace.columns = {name: at for name, at in trace.columns.items() if name in trace.tensors}
    return trace


def _tensors(lines):
    """(name, ne, rows of text), of each tensor."""
    header, rows = None, []
    for line in lines:
        found = _HEADER.search(line)
        if found:
            if header:
                yield *header, rows
            ne = [int(n) for n in found["ne"].split(",")]
            header, rows = ((found["name"].strip(), ne) if found["type"] in _PRINTED else None), []
        elif header:
            row = _ROW.search(line)
            if row:
                rows.append([text.strip() for text in row[1].split(",")])
    if header:
        yield *header, rows


def _values(path, name, ne, rows):
    """-> values in the order printed, [rows, columns] of their own; decimals of the printed numbers."""
    if len({len(row) for row in rows}) != 1:
        raise FileFormatError(path, name, "want rows of one length, got others: a line is cut off")
    kept = [[text for text in row if text != "..."] for row in rows]
    plain = (text for row in kept for text in row if "." in text and "e" not in text.lower())
    shown = [len(text.partition(".")[2]) for text in plain]
    return np.array([[float(text) for text in row] for row in kept], np.float32), shown


def _put(trace, module, ne, values, width, order):
    tokens = len(trace.ids)
    size, shape = int(np.prod(ne)), list(ne)[::-1]
    if size not in (tokens * width, width):
        problem = f"want {width} values for each of {tokens} tokens, got {size} in the shape {shape}"
        raise FileFormatError(trace.path, module, problem)
    at = _indices(trace.path, module, shape, values.shape)
    row, column = np.divmod(at, width)
    row += tokens - size // width  # the last token alone
    if order is not None:
        column = np.argsort(order)[column]
    rows, columns = np.unique(row), np.unique(column)
    if len(rows) * len(columns) != values.size:
        raise FileFormatError(trace.path, module, "want corners of tokens and features, got other elements")
    part = np.empty((len(rows), len(columns)), np.float32)
    part[np.searchsorted(rows, row), np.searchsorted(columns, column)] = values.reshape(-1)
    trace.tensors[module] = part.astype(np.int64) if is_choice(module) else part
    if len(rows) < tokens:
        trace.rows[module] = rows
    if len(columns) < width:
        trace.columns[module] = columns


def _indices(path, module, shape, printed) -> np.ndarray:
    """The index of each printed value in the tensor, as the corners are printed."""
    edges = [_edges(shape[-1], printed[1])]
    left = printed[0]
    for length in reversed(shape[:-1]):
        count = min(length, _shown(length, printed[1], shape[-1]))
        edges.insert(0, _edges(length, count))
        left //= count
    if left != 1 or np.prod([len(edge) for edge in edges]) != printed[0] * printed[1]:
        problem = f"want the corners of {shape}, got {printed[0]} rows of {printed[1]}"
        raise FileFormatError(path, module, problem)
    return np.ravel_multi_index(np.meshgrid(*edges, indexing="ij"), shape).reshape(-1)


def _shown(length, printed, of) -> int:
    """How many of an axis are printed: three at each end, or as many as of a row that is cut."""
    each = printed // 2 if printed < of else 3
    return length if length <= 2 * each else 2 * each


def _edges(length, count) -> np.ndarray:
    if count == length:
        return np.arange(length)
    return np.concatenate([np.arange(count // 2), np.arange(length - count // 2, length)])


def _check_ids(path, lines, ids):
    """Newer versions print the ids."""
    for at, line in enumerate(lines):
        count = _COUNT.search(line)
        if not count:
            continue
        found = [_ID.search(text) for text in lines[at + 1 : at + 1 + int(count[1])]]
        theirs = [int(match[1]) for match in found if match]
        if len(theirs) == int(count[1]) and theirs != ids.tolist():
            raise InputError(f"{path}: want the run of the {len(ids)} ids given, got one of {theirs[:8]} ..")
