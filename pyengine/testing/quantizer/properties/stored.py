"""Properties of bytes and files, and of other implementations."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from ....files.ggml_blocks import Q8_0
from .. import strategies
from ..names import Name
from ..subject import Fault, pair
from .registry import matrix_and, register
from .words import compare


@register(
    Name.PACKING,
    "packing",
    needs=("pack", "unpack"),
    parts=(lambda format: st.fixed_dictionaries({"codes": strategies.code_matrices(format)}),),
)
def packing(subject, codes):
    """unpack(pack(q)) = q, for every pair of codes; columns beyond q's are padding, and codes of 0."""
    columns = max(2, subject.format.multiple)
    found = _round_trip(subject, codes)
    if found or columns % 2:
        return found
    every = np.arange(-subject.format.largest, subject.format.largest + 1, dtype=codes.dtype)
    pairs = np.stack(np.meshgrid(every, every), axis=-1).reshape(-1, 2)
    return _round_trip(subject, np.tile(pairs, columns // 2))


def _round_trip(subject, codes):
    packed = np.asarray(subject.pack(subject.turn(codes)))
    got = subject.turn(np.asarray(subject.unpack(packed)))
    if got.shape[0] != codes.shape[0] or got.shape[1] < codes.shape[1]:
        return f"want codes {codes.shape}, got {got.shape}"
    padded = np.zeros(got.shape, np.int64)
    padded[:, : codes.shape[1]] = codes
    wrong = np.argwhere(got != padded)
    if not len(wrong):
        return None
    row, column = (int(i) for i in wrong[0])
    start = column - column % 2
    return (
        f"row {row}, columns {start} and {start + 1}: want the codes "
        f"{padded[row, start : start + 2].tolist()}, got {got[row, start : start + 2].tolist()}"
    )


@register(
    Name.NOT_FINITE,
    "NaN and infinity",
    parts=matrix_and(where=strategies.seeds, value=st.sampled_from([math.nan, math.inf, -math.inf])),
)
def not_finite(subject, x, where, value):
    """A NaN or infinity is an error that names the group ("group 3", from 0 in each row), and the
    tensor where the format has a name for it."""
    x = x.copy()
    row, column = where % x.shape[0], where // x.shape[0] % x.shape[1]
    x[row, column] = value
    group = column // (subject.format.group_size or x.shape[1])
    try:
        q = subject(x)
    except Fault:
        raise
    except Exception as error:  # whatever a quantizer calls its error
        said = str(error)
        wanted = [rf"group {group}\b", re.escape(subject.format.tensor_name or "")]
        missing = [want for want in wanted if not re.search(want, said)]
        if not missing:
            return None
        return f"{value} in group {group}: the error does not say so: {type(error).__name__}: {said:.200}"
    return f"{value} in row {row}, group {group}: no error, but the code {q.codes[row, column]}"


@register(Name.SAME_BITS, "the same bits everywhere", needs=("native",))
def same_bits(subject, x):
    """Every implementation gives the same q and s."""
    expected = subject(x)
    for name, quantize in subject.native.items():
        found = compare(x, expected, subject.run(quantize, np.ascontiguousarray(subject.turn(x))))
        if found:
            return f"{name}: {found}"
    return None


@register(
    Name.FROM_Q8_0,
    "from Q8_0",
    needs=("from_q8_0",),
    parts=(lambda format: st.fixed_dictionaries({"blocks": strategies.q8_0_blocks(format)}),),
)
def from_q8_0(subject, blocks):
    """from_q8_0(blocks) = quantize(dequantised blocks)."""
    x = q8_0_values(blocks)
    return compare(x, subject(x), subject.read(x.shape, *pair(subject.from_q8_0(blocks))))


def q8_0_values(blocks: np.ndarray) -> np.ndarray:
    """Q8_0 blocks uint8 [rows, bytes] -> their exact values, float32 [rows, columns]."""
    parts = Q8_0.blocks_of(blocks)
    scales = np.ascontiguousarray(parts[..., :2]).view(np.float16).astype(np.float32)
    return (scales * parts[..., 2:].view(np.int8)).reshape(blocks.shape[0], -1)


@register(
    Name.FILES,
    "files",
    needs=("save", "load"),
    cost=8,
    parts=matrix_and(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7)),
)
def files(subject, x, place, bit):
    """load(save(q, s)) = q, s with their dtypes; any bit turned in any file written is an error."""
    q = subject(x)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        subject.save(directory, *q.raw)
        loaded = pair(subject.load(directory))
        found = compare(x, q, subject.read(x.shape, *loaded))
        dtypes = [[getattr(a, "dtype", None) for a in pair] for pair in (q.raw, loaded)]
        if found or dtypes[0] != dtypes[1]:
            return f"written and read: {found or f'want dtypes {dtypes[0]}, got {dtypes[1]}'}"
        written = sorted(path for path in directory.rglob("*") if path.is_file())
        for path in written:
            content = path.read_bytes()
            position = int(place * len(content))
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                subject.load(directory)
            except Exception:  # whatever a reader calls its error
                path.write_bytes(content)
                continue
            return (
                f"{path.relative_to(directory)}: bit {bit} of byte {position} of {len(content)} "
                "was turned: no error"
            )
    return None
