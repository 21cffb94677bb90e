"""Experts that are read when they are chosen: see that part of csrc/pyengine.h, which states the policy."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .._core import ffi, lib
from ..errors import PyengineError
from .call import want

PAGE = lib.PE_PAGE
AHEAD, HEAT, HALF_LIFE = lib.PE_AHEAD, lib.PE_HEAT, lib.PE_HALF_LIFE
READS_AT_A_TIME = 8  # a disk's full speed: 4 give 3.8 GB/s, 8 the same, 16 give 3.5 (1.1 MB each)


@dataclass(frozen=True)
class ExpertLayer:
    """Where the experts of one layer are in their files, and in a slot.

    reads   int64 [experts, reads, 4]: file, offset, bytes, place in the slot
    places  int64 [experts, 6]: gate, up, down and their scales in the slot; -1: none
    words   int64 [words, 6]: the scales that must be finite, as pe_scale_words
    """

    reads: np.ndarray
    places: np.ndarray
    words: np.ndarray

    @property
    def slot_bytes(self) -> int:
        """Whole pages that hold any of the experts."""
        _, offset, nbytes, at = np.moveaxis(self.reads, 2, 0)
        end = at + offset % PAGE + nbytes
        return int(-(-end.max() // PAGE) * PAGE)


@dataclass(frozen=True)
class Counts:
    """Of what `pe_expert_counts` says; hits, misses: experts chosen, one per call; resident: experts."""

    hits: int = 0
    misses: int = 0
    asked_bytes: int = 0
    read_bytes: int = 0
    wait_ns: int = 0
    resident: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)))

    def __sub__(self, other: Counts) -> Counts:
        """What came since `other`; resident: the difference."""
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Counts)))

    @property
    def hit_rate(self) -> float | None:
        """Share of the chosen experts that were in memory; None: none was chosen."""
        chosen = self.hits + self.misses
        return self.hits / chosen if chosen else None


class ExpertCache:
    """At most `slots` experts of some layers in memory; freed with the object.

    limit       experts that may be in memory now: `slots`, until `set_limit` says otherwise
    files       descriptors that outlive the cache
    past_cache  whether they were opened to be read past the page cache
    A cache serves one caller at a time, as a `Pool` does.
    """

    def __init__(
        self,
        layers: list[ExpertLayer],
        slots: int,
        files: list[int],
        past_cache: bool,
        threads: int = READS_AT_A_TIME,
    ):
        self.experts = len(layers[0].places)
        self.slot_bytes = max(layer.slot_bytes for layer in layers)
        self.slots = self.limit = min(slots, len(layers) * self.experts)
        self.shape = len(layers), self.experts
        self._keep: list = []
        table = ffi.new("pe_expert_layer[]", len(layers))
        for row, layer in zip(table, layers):
            self._fill(row, layer, len(files))
        descriptors = ffi.new("int32_t[]", files)
        self._keep += [table, descriptors]
        pointer = lib.pe_expert_cache_new(
            *self.shape, table, self.slots, self.slot_bytes, descriptors, int(past_cache), threads
        )
        if pointer == ffi.NULL:
            raise PyengineError(f"experts: {self.slots * self.slot_bytes:,} bytes could not be set aside")
        self.pointer = ffi.gc(pointer, lib.pe_expert_cache_free)

    def _fill(self, row, layer: ExpertLayer, files: int) -> None:
        arrays = [np.ascontiguousarray(a, np.int64) for a in (layer.reads, layer.places, layer.words)]
        reads, places, words = arrays
        file, offset, nbytes, at = np.moveaxis(reads, 2, 0)
        want(
            places.shape == (self.experts, 6)
            and reads.shape[::2] == (self.experts, 4)
            and words.shape[1:] == (6,)
            and ((file >= 0) & (file < files) & (offset >= 0) & (nbytes > 0) & (at >= 0)).all()
            and (at % PAGE == 0).all()
            and places.max() < self.slot_bytes,
            "expert layer: want reads of the files to pages of the slot",
        )
        pointers = [ffi.from_buffer("int64_t[]", array) for array in arrays]
        self._keep += [arrays, pointers]
        row.n_reads = reads.shape[1]
        row.reads = ffi.cast("pe_expert_read *", pointers[0])
        row.places = pointers[1]
        row.n_words = len(words)
        row.words = ffi.cast("pe_scale_words *", pointers[2])

    def set_limit(self, slots: int) -> None:
        """From now on at most so many experts, at least 1; others give up their memory at once."""
        self.limit = max(1, min(slots, self.slots))
        lib.pe_expert_cache_limit(self.pointer, self.limit)

    def counts(self) -> Counts:
        """Since the cache was made."""
        found = ffi.new("pe_expert_counts *")
        lib.pe_expert_cache_counts(self.pointer, found)
        return Counts(*(getattr(found, f.name) for f in fields(Counts)))

    def resident(self) -> np.ndarray:
        """bool [layers, experts]: those in memory."""
        found = np.empty(self.shape, np.uint8)
        lib.pe_expert_cache_resident(self.pointer, ffi.from_buffer("uint8_t[]", found))
        return found.astype(bool)

    def refused(self) -> tuple[int, int] | None:
        """(layer, expert) whose scales were not finite when they were read."""
        found = lib.pe_expert_cache_refused(self.pointer)
        return None if found < 0 else divmod(found, self.experts)
