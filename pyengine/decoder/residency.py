"""Which weights stay in memory, of a model that is larger than the memory it may have.

Every token uses the dense weights: they are copied out of the page cache, which the system empties when
another program reads a file.  Of the routed experts a token uses a few: an expert's bytes are read when
a router chose it, past the page cache, into a slot of an `ExpertCache`, and stay there as long as the
policy keeps them (csrc/pyengine.h states it).  The bits of a result do not depend on what is in memory.

    plan = plan_memory(checkpoint, memory)      # None: all weights stay mapped
    model = LockedModel(checkpoint, plan=plan)
    model.experts_in_memory.counts()            # hits, misses, bytes read

A bound that the caller gave stays.  One that was taken from what is available follows the machine: slots
give their memory back when other programs need what was left to them, and there are more when there is more
(`ExpertCaches.follow`).  Mapped weights become a plan when the system takes them away (memory_watch.py).

Why reads past the page cache into slots: on a disk that gives 3.8 GB/s in this way (experts of 1.1 MB,
8 threads, 0.05 cores), reads through the page cache give 0.9 GB/s and take 0.4 cores, MADV_WILLNEED and
MADV_POPULATE_READ on exact ranges of a mapping 0.8 to 0.95, io_uring past the page cache 3.1; a mapping
with MADV_RANDOM alone reads page by page, 0.02 GB/s.

Why that policy: with 55 % of the experts in memory, on skewed traffic 92 % of those that a token chose are
there, and 41 % of those that a prompt of 512 chose; with the least recently used one 88 and 20 %.  On
uniform traffic 55 and 41 %, against 55 and 19 % (tools/bench/expert_policy.py --layers 4; a first prompt,
which finds nothing, is in each mean).
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import time
import weakref
from collections import defaultdict
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.names import is_routed_expert
from ..checkpoint.summary import stored_bytes
from ..checkpoint.tensor import JoinedTensor, Tensor
from ..core.expert_cache import PAGE, Counts, ExpertCache, ExpertLayer
from ..core.matrices import Experts
from ..core.memory import available_memory
from ..errors import InputError, PyengineError
from ..files.mapped import MappedFile
from ..progress import progress
from .expert_layout import expert_layers, places_in_files, spans_of, stacks_of
from .footprint import footprint

EMBEDDING = "model.embed_tokens.weight"  # a token reads one row
# Tokens whose state is set aside, unless the caller says how many.  The system may drop mapped weights when
# a state grows beyond that, but no slots of experts.
CONTEXT_MAPPED, CONTEXT_READ = 8192, 32768
SPARE = 256 << 20  # bytes for Python, NumPy, the vocabulary and the embedding's rows
# Of what is available, slots leave one part in so many to other programs.  When memory is short, the system
# drops mapped weights; it cannot drop slots, and ends the process (seen on 24 GiB, beside a type checker).
LEFT = 10
LOOK_EVERY = 0.25  # seconds between two looks at what is available, which take 0.2 ms


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the weights.

    always   what every token uses
    experts  all routed experts
    memory   for both together, at most
    others   of what was available, left to other programs; 0: memory is what the caller gave, and stays
    state    of what was available, set aside for the state
    """

    always: int
    experts: int
    memory: int
    others: int = 0
    state: int = 0

    @property
    def share(self) -> float:
        """Of the experts that are in memory, when as many are read as it holds."""
        return min(1.0, (self.memory - self.always) / self.experts)


def missed_bytes_per_token(checkpoint: Checkpoint, plan: MemoryPlan) -> int:
    """Bytes that a token reads, if all experts are chosen equally often."""
    config = checkpoint.config
    return round((1 - plan.share) * plan.experts * config.num_experts_per_tok / config.num_experts)


def least_for_experts(checkpoint: Checkpoint) -> int:
    """Bytes of the slots that a token must have: see `ExpertCaches`."""
    sizes = {layer.slot_bytes for layer in expert_layers(checkpoint, False).values()}
    return checkpoint.config.num_experts_per_tok * sum(sizes)


def weights_always_used(checkpoint: Checkpoint) -> int:
    """Bytes of the weights that every token uses: all but routed experts and the embedding's rows."""
    tensors = checkpoint.tensors.items()
    return sum(stored_bytes(t) for name, t in tensors if not is_routed_expert(name) and name != EMBEDDING)


def plan_memory(
    checkpoint: Checkpoint,
    memory: int | None = None,
    *,
    context: int | None = None,
    chunk: int = 512,
    arithmetic: str = "locked",
) -> MemoryPlan | None:
    """The plan for at most `memory` bytes of weights; None: all of them stay in memory.

    memory   None: what is available, less the state of `context` tokens.  All weights fit beside the state of
             8192, unless given; or a tenth is left to others, and the state is that of 32,768, unless given
    Errors: InputError, less memory than what every token uses and the experts of one token.
    """
    always = weights_always_used(checkpoint)
    stacks = [tensor for name, tensor in checkpoint.tensors.items() if is_routed_expert(name)]
    experts = sum(map(stored_bytes, stacks))
    if memory is None:
        return _plan_of_available(checkpoint, always, experts, context, chunk, arithmetic)
    if always + experts <= memory:
        return None
    if not stacks:
        least, of = always, "its weights, all of which every token uses"
    else:
        least = always + least_for_experts(checkpoint)
        of = f"{_size(always)} that every token uses and the experts of one token"
    if memory < least or not stacks:
        raise InputError(f"--memory: want at least {_size(least)} for {of}, got {_size(memory)}")
    return MemoryPlan(always, experts, memory)


def _plan_of_available(checkpoint, always, experts, context, chunk, arithmetic) -> MemoryPlan | None:
    """None also where a plan is not possible: the system does what it can."""

    def beside_state(tokens: int) -> int:
        sizes = footprint(checkpoint, min(tokens, checkpoint.config.context), chunk, 1, arithmetic)
        return available - sizes["total"]

    available = available_memory() - SPARE
    if not experts or always + experts <= beside_state(context or CONTEXT_MAPPED):
        return None
    others = available // LEFT
    memory = beside_state(context or CONTEXT_READ) - others
    try:
        enough = always + least_for_experts(checkpoint) <= memory
    except InputError:  # weights that are not in the file as the engine reads them
        enough = False
    return MemoryPlan(always, experts, memory, others, available - memory - others) if enough else None


def _size(nbytes: int) -> str:
    """In the units of --memory, rounded up, so that the size that is asked for is enough."""
    unit, name = (1 << 20, "M") if nbytes >= 16 << 20 else (1 << 10, "K")
    return f"{-(-nbytes // unit)}{name}"


# ---- dense weights -------------------------------------------------------------------------------


def with_dense_weights_kept(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what every token uses in this process's own memory, in pages of 2 MB."""
    tensors = checkpoint.tensors
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not is_routed_expert(name) and (name != EMBEDDING or tensor is tensors["lm_head.weight"])
    }
    parts = {id(part): part for tensor in kept.values() for part in (tensor, *tensor.stored)}.values()
    arrays = {id(array): array for part in parts for array in (part.data, part.scales) if array is not None}
    # Private: memory that could be shared has no large pages on most systems.
    size = sum(_aligned(array.nbytes) for array in arrays.values())
    room = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        room.madvise(mmap.MADV_HUGEPAGE)
    copies, at = {}, 0
    for key, array in arrays.items():
        copies[key] = np.ndarray(array.shape, array.dtype, room, at)
        copies[key][...] = array
        at += _aligned(array.nbytes)

    def own(tensor: Tensor) -> Tensor:
        changes: dict[str, Any] = {"data": copies[id(tensor.data)]}
        if tensor.scales is not None:
            changes["scales"] = copies[id(tensor.scales)]
        if isinstance(tensor, JoinedTensor):
            changes["parts"] = tuple(map(own, tensor.parts))
        return dataclasses.replace(tensor, **changes)

    return dataclasses.replace(checkpoint, tensors=tensors | {name: own(t) for name, t in kept.items()})


def _aligned(nbytes: int) -> int:
    return max(64, -(-nbytes // 64) * 64)


# ---- the model's experts -------------------------------------------------------------------------


class ExpertCaches:
    """The experts of all layers in one `ExpertCache`, or where their sizes differ in one for each size.

    Each size gets the experts of one token, and of the other memory its share.  Making the object
    lets each layer's `Experts` read from its cache.  memory: of the plan, or where that leaves memory to
    others, what `follow` made of it.
    """

    def __init__(self, checkpoint: Checkpoint, plan: MemoryPlan, experts: dict[int, Experts], check: bool):
        self.plan, self._checkpoint = plan, weakref.proxy(checkpoint)
        maps = checkpoint.file.maps
        self._files, past_cache = _open_files(maps)
        self._close = weakref.finalize(self, _close_files, self._files)
        if past_cache:  # what the page cache has of these weights would be there twice
            for mapped, descriptor in zip(maps, self._files):
                mapped.drop()
                _drop_from_page_cache(descriptor)
        by_size = defaultdict(list)
        for index, layer in expert_layers(checkpoint, check).items():
            by_size[layer.slot_bytes].append((index, layer))
        self.memory, self._look_at = plan.memory, 0.0
        self._layers = {size: len(layers) for size, layers in by_size.items()}
        self.caches, self._indices = [], []
        for layers in by_size.values():
            cache = self._new_cache([layer for _, layer in layers], past_cache)
            for place, (index, _) in enumerate(layers):
                experts[index].read_from(cache, place)
            self.caches.append(cache)
            self._indices.append([index for index, _ in layers])

    def _new_cache(self, layers: list[ExpertLayer], past_cache: bool) -> ExpertCache:
        slots = self._slots(len(layers))
        if self.plan.others:  # the bound may grow
            with contextlib.suppress(PyengineError):  # the system has no addresses for all of them
                cache = ExpertCache(layers, len(layers) * len(layers[0].places), self._files, past_cache)
                cache.set_limit(slots)
                return cache
        return ExpertCache(layers, slots, self._files, past_cache)

    def _slots(self, layers: int) -> int:
        """For so many layers whose experts have one size."""
        return self._top_k + max(0, self.memory - self._least) * layers // self._layer_bytes

    @property
    def _layer_bytes(self) -> int:
        """Of one expert of every layer."""
        return sum(size * count for size, count in self._layers.items())

    @property
    def _top_k(self) -> int:
        return self._checkpoint.config.num_experts_per_tok

    @property
    def _least(self) -> int:
        return self.plan.always + self._top_k * sum(self._layers)

    @property
    def nbytes(self) -> int:
        """Of the slots, filled or not."""
        return sum(cache.limit * cache.slot_bytes for cache in self.caches)

    def follow(self) -> None:
        """Let the bound follow the memory that the machine has, unless the caller gave it.

        It falls, by what is lacking, when half of what was left to other programs is gone.  It rises again
        when more is available than was left to them and to the state.
        """
        if not self.plan.others or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_EVERY
        filled = sum(cache.counts().resident * cache.slot_bytes for cache in self.caches)
        free = available_memory() - (self.nbytes - filled)
        left = self.plan.others + self.plan.state
        if free < self.plan.others // 2:
            change = free - self.plan.others
        elif free > left + 2 * SPARE:
            change = free - left - SPARE
        else:
            return
        every = self._least + self._layer_bytes * self._checkpoint.config.num_experts
        self.memory = max(self._least, min(self.memory + change, every))
        for cache, layers in zip(self.caches, self._layers.values()):
            cache.set_limit(self._slots(layers))

    def counts(self) -> Counts:
        """Since the model was loaded."""
        return reduce(add, (cache.counts() for cache in self.caches))

    @contextlib.contextmanager
    def explaining_errors(self):
        """CheckpointError for an expert whose scales were refused, FileFormatError for a changed file."""
        try:
            yield
        except PyengineError:
            self._checkpoint.file.check_unchanged()
            for cache, indices in zip(self.caches, self._indices):
                found = cache.refused()
                for tensor in stacks_of(self._checkpoint, indices[found[0]]) if found else []:
                    self._checkpoint.check_tensor_finite(tensor)
            raise


def _open_files(maps: tuple[MappedFile, ...]) -> tuple[list[int], bool]:
    """-> descriptors, whether they are read past the page cache: all, or none."""
    for past_cache in (True, False):
        files: list[int] = []
        try:
            for mapped in maps:
                files.append(mapped.open_again(past_cache))
            return files, past_cache
        except BaseException as error:
            _close_files(files)
            if not (past_cache and isinstance(error, OSError)):
                raise
    raise AssertionError


def _drop_from_page_cache(descriptor: int) -> None:
    """Pages that no process has mapped."""
    with contextlib.suppress(AttributeError, OSError):  # AttributeError: macOS
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _close_files(files: list[int]) -> None:
    for descriptor in files:
        os.close(descriptor)


# ---- reading in ----------------------------------------------------------------------------------


def read_in(checkpoint: Checkpoint, experts: bool, shown: bool = True) -> None:
    """Read what tokens will use and the page cache lacks: once, in the order of the files.

    experts: the routed ones too.  Without them nothing around a row of the embedding will be read.
    shown: with a bar.
    """
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for name, tensor in checkpoint.tensors.items():
        if name == EMBEDDING or (is_routed_expert(name) and not experts):
            continue
        for part in tensor.stored:
            for array in (*(part.data if isinstance(part.data, tuple) else (part.data,)), part.scales):
                _add_range(array, checkpoint.file.maps, wanted)
    missing = [
        (checkpoint.file.maps[i], *piece)
        for i in sorted(wanted)
        for first, last in _joined(sorted(wanted[i]))
        for piece in checkpoint.file.maps[i].missing(first, last)
    ]
    if not experts and checkpoint.tensors[EMBEDDING] is not checkpoint.tensors["lm_head.weight"]:
        rows: dict[int, list[tuple[int, int]]] = defaultdict(list)
        _add_range(checkpoint.tensors[EMBEDDING].data, checkpoint.file.maps, rows)
        for i, ranges in rows.items():
            checkpoint.file.maps[i].expect_single_pages(*ranges[0])
    if not missing:
        return  # without a bar, whose locks take longer to import than a small model to load
    with progress(sum(stop - start for _, start, stop in missing), "reading", shown=shown) as bar:
        for mapped, start, stop in missing:
            mapped.read_in(start, stop)
            bar.update(stop - start)


def _add_range(array, maps, wanted) -> None:
    """Where the array is mapped; nowhere, if it is a copy."""
    if array is None or not array.size:
        return
    first, nbytes = spans_of(array[None])
    with contextlib.suppress(InputError):
        file, offset = places_in_files(first, nbytes, maps)
        wanted[int(file[0])].append((int(offset[0]), int(offset[0] + nbytes[0])))


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and start <= joined[-1][1] + PAGE:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined
