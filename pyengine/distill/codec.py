"""Labels to the values of one row's columns, and back: layout.py states the bytes.  NumPy alone.

    columns = encode(labels, layout)      # {column: bytes, or a list}
    labels = decode(columns, layout)      # within the bound of layout.py; "lists" exactly

layout is `labels.json`'s entry of that name: {"name": "packed", ...}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, quote
from . import distillkit
from .labels import LabelOptions, Labels
from .layout import DEFAULT_FRACTION_BITS, FRACTION_BITS, LAYOUTS

Layout = dict[str, Any]
Columns = Mapping[str, Any]

FLOAT16_FRACTION = 10
GREATEST_FLOAT16 = np.float32(65504)


def new_layout(
    name: str, options: LabelOptions, vocab_size: int, fraction_bits: int = DEFAULT_FRACTION_BITS
) -> Layout:
    """The description of a layout.  InputError: unknown, or it cannot hold these labels."""
    if name not in LAYOUTS:
        raise InputError(f"layout: want {', '.join(LAYOUTS)}, got {quote(name)}")
    sampled = options.draws is not None
    if name == "distillkit":
        if sampled:
            raise InputError(
                "layout: want top-k labels with distillkit, got sampled ones, which it has no weights for"
            )
        return {"name": name, "config": distillkit.config(options.top_k or 0, vocab_size)}
    if name == "lists":
        return {"name": name, "sampled": sampled}
    if fraction_bits not in FRACTION_BITS:
        raise InputError(
            f"fraction_bits: want {FRACTION_BITS[0]} to {FRACTION_BITS[-1]}, got {quote(fraction_bits)}"
        )
    width = {"k": options.top_k} if not sampled else {}
    id_bytes = max(1, ((vocab_size - 1).bit_length() + 7) // 8)
    return {"name": name, "sampled": sampled, **width, "fraction_bits": fraction_bits, "id_bytes": id_bytes}


def label_columns(layout: Layout) -> list[str]:
    """The names of the columns that hold the labels."""
    if layout["name"] == "distillkit":
        return list(distillkit.COLUMNS)
    if layout["name"] == "lists":
        return ["label_ids", "label_logprobs", *(["label_weights"] if layout["sampled"] else [])]
    return [f"{name}_{i}" for name, count in _planes(layout).items() for i in range(count)]


def encode(labels: Labels, layout: Layout) -> dict[str, Any]:
    if layout["name"] == "distillkit":
        return distillkit.encode(labels, layout["config"])
    there = labels.ids >= 0
    if layout["name"] == "lists":
        named: dict[str, Any] = {
            "label_ids": labels.ids,
            "label_logprobs": labels.logprobs,
            "label_weights": labels.weights,
        }
        return {name: [row[use] for row, use in zip(named[name], there)] for name in label_columns(layout)}
    arrays: dict[str, Any] = {"ids": labels.ids[there], "gaps": _gaps(labels, layout["fraction_bits"])[there]}
    if labels.weights is not None:
        arrays |= {"weights": labels.weights[there].view(np.uint32), "sizes": there.sum(axis=1)}
    columns = {}
    for name, count in _planes(layout).items():
        for i in range(count):
            columns[f"{name}_{i}"] = (arrays[name].astype(np.uint32) >> 8 * i).astype(np.uint8).tobytes()
    return columns


def decode(columns: Columns, layout: Layout) -> Labels:
    """columns: of one row, the common ones too: bytes, lists or arrays, as Parquet's readers give them."""
    common = {
        name: np.asarray(columns[name], np.float32) for name in ("true_logprob", "logsumexp", "outside")
    }
    rows = len(common["outside"])
    if layout["name"] == "distillkit":
        ids, logprobs = distillkit.decode(columns, layout["config"])
        return Labels(ids, logprobs, None, **common)
    if layout["name"] == "lists":
        sizes = np.array([len(row) for row in columns["label_ids"]], np.int64)
        dtypes = {"label_ids": np.int32, "label_logprobs": np.float32, "label_weights": np.float32}
        ids, logprobs, *weights = (
            np.concatenate(
                [np.asarray(row, dtypes[name]) for row in columns[name]] or [np.empty(0, dtypes[name])]
            )
            for name in label_columns(layout)
        )
        return Labels(
            _filled(ids, sizes, -1), _filled(logprobs, sizes, -np.inf), *_weights(weights, sizes), **common
        )
    arrays = {name: _joined(columns, name, count) for name, count in _planes(layout).items()}
    sizes = arrays["sizes"].astype(np.int64) if layout["sampled"] else np.full(rows, layout["k"])
    gaps = _filled(arrays["gaps"].astype(np.int64), sizes, 0)
    codes = np.cumsum(gaps, axis=1) << FLOAT16_FRACTION - layout["fraction_bits"]
    ids = _filled(arrays["ids"].astype(np.int32), sizes, -1)
    logprobs = np.where(ids < 0, -np.inf, -codes.astype(np.uint16).view(np.float16).astype(np.float32))
    weights = [arrays["weights"].view(np.float32)] if layout["sampled"] else []
    return Labels(ids, logprobs.astype(np.float32), *_weights(weights, sizes), **common)


def _planes(layout: Layout) -> dict[str, int]:
    """The arrays of the layout "packed", and the bytes of an element."""
    more = {"weights": 4, "sizes": 2} if layout["sampled"] else {}
    return {"ids": layout["id_bytes"], "gaps": 2, **more}


def _gaps(labels: Labels, fraction_bits: int) -> NDArray[np.int64]:
    codes = float16_codes(-labels.logprobs, fraction_bits)
    codes[labels.ids < 0] = 0
    return np.diff(codes, axis=1, prepend=0)


def float16_codes(x: NDArray[np.float32], fraction_bits: int) -> NDArray[np.int64]:
    """x >= 0 to the nearest float16 with that many bits of fraction, as bits / 2^(10 - fraction_bits).

    Ties to even; subnormal numbers of float16 have steps of 2^-(14 + fraction_bits); from 65504 on, the
    greatest.
    """
    drop = FLOAT16_FRACTION - fraction_bits
    # In float64 a power of two makes every step an integer, and rint rounds once.
    x = np.clip(x, 0, GREATEST_FLOAT16).astype(np.float64)
    _, exponent = np.frexp(x)
    exponent = np.where(x == 0, -14, np.maximum(exponent - 1, -14))  # frexp gives 0 the exponent 0
    step = np.ldexp(1.0, exponent - fraction_bits)
    whole = np.rint(x / step).astype(np.int64)  # 2^fraction_bits and more, but for a subnormal x
    found: NDArray[np.int64] = whole + ((exponent + 14).astype(np.int64) << fraction_bits)
    return np.minimum(found, 0x7BFF >> drop)


def _joined(columns: Columns, name: str, count: int) -> NDArray[np.uint32]:
    planes = [
        np.frombuffer(columns[f"{name}_{i}"], np.uint8).astype(np.uint32) << 8 * i for i in range(count)
    ]
    found: NDArray[np.uint32] = np.bitwise_or.reduce(planes)
    return found


def _filled(flat: NDArray[Any], sizes: NDArray[np.int64], value: float) -> NDArray[Any]:
    """Rows of those sizes, one after another -> [rows, the greatest size]."""
    if len(flat) != sizes.sum():
        raise InputError(f"labels: want {sizes.sum()} in the row, got {len(flat)}")
    out = np.full((len(sizes), int(sizes.max(initial=0))), value, flat.dtype)
    out[np.arange(out.shape[1]) < sizes[:, None]] = flat
    return out


def _weights(flat: list[NDArray[Any]], sizes: NDArray[np.int64]) -> list[Any]:
    return [_filled(flat[0].astype(np.float32), sizes, 0) if flat else None]
