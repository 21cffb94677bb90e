"""A base model's log-probabilities as `llama-perplexity --kl-divergence-base` keeps them.

Layout, little-endian: "_logits_" | n_ctx u32 | n_vocab i32 | n_chunk i32 | tokens i32 [n_chunk, n_ctx]
| one record per scored token, chunk by chunk: scale f32 | minimum f32 | codes u16 [n_vocab], and
one more code, zero, when n_vocab is odd.

A chunk's scored positions are n_ctx / 2, rounded down, to n_ctx - 2: each predicts the token after it.
A log-probability is scale * code + minimum in float32.  Log-probabilities more than 16 below
the likeliest token's all have code 0; readers take RESOLVED and less as probability 0.

Source: llama.cpp's tools/perplexity/perplexity.cpp, as a compiler without fused multiply-add reads it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FileFormatError, InputError
from .mapped import MappedFile, map_file
from .whole import WholeFile, sync

MAGIC = b"_logits_"
RESOLVED = -16.0
LARGEST_CODE = 65535
LOWEST = -64.0  # lower bound of a log-probability, with slack: 16 below the likeliest of LARGEST_VOCABULARY
ABOVE_ZERO = 1e-3  # tolerance for rounding
LARGEST_VOCABULARY = 1 << 28  # a thousand times a real vocabulary; NumPy's records end at 2 GB

_HEADER = struct.Struct("<8sIii")


def first_scored(n_ctx: int) -> int:
    return n_ctx // 2


def scored_tokens(n_ctx: int) -> int:
    """Of one chunk: the second half, without the last token, whose next token is not known."""
    return n_ctx - 1 - first_scored(n_ctx)


def _record(n_vocab: int) -> np.dtype[Any]:
    codes = "codes", "<u2", (n_vocab + n_vocab % 2,)
    return np.dtype([("scale", "<f4"), ("minimum", "<f4"), codes])


def _record_bytes(n_vocab: int) -> int:
    return 8 + 2 * (n_vocab + n_vocab % 2)


# ---- reading ---------------------------------------------------------------------------------


class LogProbs:
    """An open file.  n_ctx, n_vocab; tokens int32 [n_chunk, n_ctx], a view of the mapped file."""

    resolved = RESOLVED

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> LogProbs:
        """Map the file and check its header, its size and its tokens.  FileFormatError."""
        return cls(Path(path))

    def __init__(self, path: Path):
        self.path, buffer = path, map_file(path)
        self.n_ctx, self.n_vocab, n_chunk = self._read_header(buffer)
        shape = n_chunk, self.n_ctx
        self.tokens = np.ndarray(shape, "<i4", buffer, _HEADER.size)
        bad = (self.tokens < 0) | (self.tokens >= self.n_vocab)
        if bad.any():
            chunk, place = map(int, np.unravel_index(bad.argmax(), shape))
            raise FileFormatError(
                path,
                f"token {place} of chunk {chunk}",
                f"want 0 to {self.n_vocab - 1}, got {self.tokens[chunk, place]}",
            )
        self._records = np.ndarray(
            (n_chunk, scored_tokens(self.n_ctx)),
            _record(self.n_vocab),
            buffer,
            _HEADER.size + self.tokens.nbytes,
        )

    def log_probs(self, chunk: int, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Of a chunk's scored tokens, or some of them: float32 [rows, n_vocab].  FileFormatError."""
        records = self._records[chunk, rows]
        scale, minimum = records["scale"][:, None], records["minimum"][:, None]
        # A NaN fails every comparison.
        with np.errstate(over="ignore", invalid="ignore"):
            largest = scale * np.float32(LARGEST_CODE) + minimum
        good = (scale >= 0) & (minimum >= LOWEST) & (largest <= ABOVE_ZERO)
        if not good.all():
            row = int(good[:, 0].argmin())
            raise FileFormatError(
                self.path,
                f"scored token {(rows.start or 0) + row} of chunk {chunk}",
                f"want log-probabilities, got scale {scale[row, 0]:g}, minimum {minimum[row, 0]:g}",
            )
        found: NDArray[np.float32] = scale * records["codes"][:, : self.n_vocab].astype(np.float32) + minimum
        return found

    def _read_header(self, buffer: MappedFile) -> tuple[int, int, int]:
        """Every count bounded by the file's size before anything is made of it."""
        size = len(buffer)
        if size < _HEADER.size:
            raise FileFormatError(self.path, "header", f"want {_HEADER.size} bytes, got {size}")
        magic, n_ctx, n_vocab, n_chunk = _HEADER.unpack_from(buffer)
        if magic != MAGIC:
            raise FileFormatError(self.path, "magic", f"want {MAGIC!r}, got {magic!r}")
        for name, value, least in ("n_ctx", n_ctx, 3), ("n_vocab", n_vocab, 1), ("n_chunk", n_chunk, 1):
            if value < least:
                raise FileFormatError(self.path, name, f"want at least {least}, got {value}")
        if n_vocab > LARGEST_VOCABULARY:
            raise FileFormatError(self.path, "n_vocab", f"want at most {LARGEST_VOCABULARY}, got {n_vocab}")
        want = _HEADER.size + n_chunk * (4 * n_ctx + scored_tokens(n_ctx) * _record_bytes(n_vocab))
        if size != want:
            raise FileFormatError(
                self.path,
                "size",
                f"want {want} bytes for {n_chunk} chunks of "
                f"{n_ctx} tokens and a vocabulary of {n_vocab}, got {size}",
            )
        return n_ctx, n_vocab, n_chunk


# ---- writing ---------------------------------------------------------------------------------


class LogProbsWriter:
    """Writes a file front to back; it is `path`.partial until `close` renames it.

    tokens: int [n_chunk, n_ctx].  As a context manager, an exception removes the partial file.
    """

    def __init__(self, path: str | os.PathLike[str], tokens: NDArray[np.integer[Any]], n_vocab: int):
        self.path, self._whole = Path(path), WholeFile(path)
        n_chunk, n_ctx = tokens.shape
        self.n_vocab, self.left = n_vocab, n_chunk * scored_tokens(n_ctx)
        self._file = open(self._whole.partial, "wb")  # noqa: SIM115 (__exit__ closes it)
        with self._removed_on_error():
            self._file.write(_HEADER.pack(MAGIC, n_ctx, n_vocab, n_chunk))
            self._file.write(np.ascontiguousarray(tokens, "<i4").data)

    def write(self, logits: NDArray[np.float32]) -> None:
        """logits float32 [rows, n_vocab] of the next scored tokens.  InputError: other shapes."""
        rows, n_vocab = logits.shape
        if n_vocab != self.n_vocab or rows > self.left:
            raise InputError(
                f"{self.path}: want at most {self.left} rows of {self.n_vocab} logits, "
                f"got {rows} of {n_vocab}"
            )
        self._file.write(encode(logits).data)
        self.left -= rows

    def close(self) -> None:
        """Check that every token is there, rename into place."""
        if self.left:
            self.abort()
            raise InputError(f"{self.path}: want logits of {self.left} more tokens, got none")
        with self._removed_on_error():
            self._file.flush()
            sync(self._file.fileno())
            self._file.close()
            self._whole.publish()

    def abort(self) -> None:
        try:
            self._file.close()
        finally:  # closing flushes, and fails where a write did
            self._whole.discard()

    @contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                self.abort()
            raise

    def __enter__(self) -> LogProbsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def encode(logits: NDArray[np.float32]) -> NDArray[Any]:
    """Logits float32 [rows, n_vocab] -> records [rows]; every step rounded as llama.cpp's is."""
    n_vocab = logits.shape[1]
    top = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), top - np.float32(16))
    # cumsum adds in order, where sum would pair.
    total = np.cumsum(_expf(logits - top), axis=1, dtype=np.float64)[:, -1:]
    scale = (top - low) / np.float32(LARGEST_CODE)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)

    records = np.zeros(len(logits), _record(n_vocab))
    records["scale"] = scale[:, 0]
    records["minimum"] = (low - top - np.log(total).astype(np.float32))[:, 0]
    records["codes"][:, :n_vocab] = np.rint(inverse * np.maximum(logits - low, 0))
    return records


# The polynomial of 2^(r / 32) for |r| <= 1/2, and 2^(i / 32).
_EXP_CUBE, _EXP_SQUARE, _EXP_LINE = (
    float.fromhex(h) / 32**n
    for h, n in (("0x1.c6af84b912394p-5", 3), ("0x1.ebfce50fac4f3p-3", 2), ("0x1.62e42ff0c52d6p-1", 1))
)
# As bits, less what adding i << 47 puts into the exponent.
_EXP_STEPS = (2.0 ** (np.arange(32) / 32)).view(np.int64) - (np.arange(32) << 47)
_EXP_SCALE = float.fromhex("0x1.71547652b82fep+0") * 32


def _expf(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """exp of float32 x <= 0 in the bits of glibc's and musl's expf, which is not correctly rounded.

    Source: Arm's optimized-routines, math/expf.c: accurate to 0.502 ulp.
    """
    z = np.maximum(x, -150).astype(np.float64) * _EXP_SCALE  # exp(-150) is 0 in float32
    whole = np.rint(z)
    r = z - whole
    step = whole.astype(np.int64)
    power = (_EXP_STEPS[step & 31] + (step << 47)).view(np.float64)  # 2^(step / 32)
    values = ((_EXP_CUBE * r + _EXP_SQUARE) * (r * r) + (_EXP_LINE * r + 1)) * power
    rounded: NDArray[np.float32] = values.astype(np.float32)
    return rounded
