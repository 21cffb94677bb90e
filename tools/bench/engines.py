"""The engines that bench_peers and bench_depth compare, each behind the same calls.

start(threads) begins an empty sequence; forward(ids [n]) -> float32 [vocab], the logits of the last token,
valid until the next call; close() frees what a library holds, in its order.  A process has one engine.

at_depth(threads, depth), where an engine has it: the sequence has that many tokens, as cheaply as the engine
can.  It is kept, so that the next call with these numbers goes back to it, and one with a greater depth goes
on from it.  llama.cpp computes the tokens; this engine computes 512 and repeats their keys and values.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import numpy as np

SEED = 1729
BATCH = 512  # tokens of a prompt that are computed at a time


class Pyengine:
    """One checkpoint, and a model for each number of threads that was asked for."""

    def __init__(self, path: str, context: int):
        from pyengine.checkpoint.open import open_checkpoint
        from pyengine.decoder.residency import plan_memory, read_in

        self.checkpoint = open_checkpoint(path)
        self.plan_now = functools.partial(plan_memory, self.checkpoint, context=context, chunk=BATCH)
        self.plan = self.plan_now()
        read_in(self.checkpoint, experts=self.plan is None)  # and what fits is in the page cache, for all
        self.checkpoint.check_finite(experts=self.plan is None)
        self.vocab_size = self.checkpoint.config.vocab_size
        self.models, self.kept = {}, None

    def version(self) -> str:
        from pyengine import __version__
        from pyengine.core.threads import active_isa

        return f"pyengine {__version__}, {active_isa()}"

    def start(self, threads: int) -> None:
        from pyengine.decoder.model import LockedModel

        if threads not in self.models:
            if self.plan is not None:
                self.models.clear()  # each has experts in memory of its own
            self.models[threads] = LockedModel(
                self.checkpoint, threads, chunk=BATCH, plan=self.plan, plan_now=self.plan_now
            )
        self.model = self.models[threads]
        self.state = self.model.new_state()

    def at_depth(self, threads: int, depth: int) -> None:
        from pyengine.evaluation.bench import state_at

        if (threads, depth) != self.kept:
            self.start(threads)
            self.state = None  # before the next one: the longest take half the memory
            self.state = state_at(self.model, depth)
            self.mark, self.kept = self.state.mark(), (threads, depth)
        self.state.rewind(self.mark)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        return self.model.forward(ids, self.state, last_only=True)[0]

    def experts_read(self) -> dict | None:
        """Counts since the model was made, if not all experts stay in memory."""
        caches = self.model.experts_in_memory
        if caches is None:
            return None
        counts = caches.counts()
        return {"hits": counts.hits, "misses": counts.misses, "missed_bytes": counts.asked_bytes}

    def close(self) -> None:
        pass


class LlamaCpp:
    """llama.cpp's own calls, below the package's Python layer."""

    def __init__(self, path: str, context: int):
        import llama_cpp

        self.lib = llama_cpp
        self.llama = llama_cpp.Llama(
            path,
            n_gpu_layers=0,
            n_ctx=context,
            n_batch=BATCH,
            n_ubatch=BATCH,
            use_mmap=True,
            logits_all=False,
            verbose=False,
        )
        self.context = self.llama.ctx
        self.vocab_size = self.llama.n_vocab()
        self.kept, self.depth = None, 0

    def version(self) -> str:
        return f"llama.cpp as in llama-cpp-python {self.lib.__version__}"

    def start(self, threads: int) -> None:
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def at_depth(self, threads: int, depth: int) -> None:
        self.start(threads)
        if self.kept is None or depth < self.depth:
            self.kept, self.depth = None, 0
        if self.kept is not None:
            self._state("set_data", self.kept)
        if depth > self.depth:
            ids = np.random.default_rng(SEED).integers(0, self.vocab_size, depth)
            self.forward(ids[self.depth :])
            self.kept = np.empty(self.lib.llama_state_seq_get_size(self.context, 0), np.uint8)
            self._state("get_data", self.kept)
        self.depth = depth

    def _state(self, call: str, data: np.ndarray) -> None:
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        done = getattr(self.lib, f"llama_state_seq_{call}")(self.context, pointer, data.size, 0)
        if done != data.size:
            raise RuntimeError(f"llama_state_seq_{call}: want {data.size} bytes, got {done}")

    def forward(self, ids: np.ndarray) -> np.ndarray:
        for first in range(0, len(ids), BATCH):
            piece = ids[first : first + BATCH]
            tokens = (self.lib.llama_token * len(piece))(*piece.tolist())
            status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(piece)))
            if status:
                raise RuntimeError(f"llama_decode: status {status}")
        logits = self.lib.llama_get_logits_ith(self.context, -1)  # waits for the computation
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,))

    def close(self) -> None:
        self.llama.close()


class IkLlamaCpp:
    """ik_llama.cpp's own calls, an older form of llama.cpp's: a batch has positions, and all of a context is
    one cache.  The model outlives its context."""

    def __init__(self, path: str, context: int):
        from ik_llama_cpp import _ctypes_api, _internals

        self.lib, self.make_batch = _ctypes_api, _internals.make_batch_range
        self.model = _internals.IkModel(path, use_mmap=True, n_gpu_layers=0)
        self.context = _internals.IkContext(self.model, n_ctx=context)
        self.vocab_size = self.model.n_vocab

    def version(self) -> str:
        import ik_llama_cpp

        return f"ik_llama.cpp as in ik-llama-cpp-python {ik_llama_cpp.__version__}"

    def start(self, threads: int) -> None:
        library = self.lib._lib  # the package binds no call for this
        library.llama_set_n_threads.argtypes = [self.lib.llama_context_p, *[self.lib.ctypes.c_uint32] * 2]
        library.llama_set_n_threads(self.context.ctx, threads, threads)
        self.context.kv_cache_clear()
        self.position = 0

    def forward(self, ids: np.ndarray) -> np.ndarray:
        for first in range(0, len(ids), BATCH):
            piece = ids[first : first + BATCH]
            batch = self.make_batch(piece.tolist(), pos_start=self.position)
            status = self.context.decode(batch)
            self.lib.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"llama_decode: status {status}")
            self.position += len(piece)
        logits = self.context.get_logits(-1)  # waits for the computation
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,))

    def close(self) -> None:
        self.context.close()
        self.model.close()


# {name: (class, module that it imports, package that has the module)}
PEERS = {
    "llama.cpp": (LlamaCpp, "llama_cpp", "llama-cpp-python"),
    "ik_llama.cpp": (IkLlamaCpp, "ik_llama_cpp", "ik-llama-cpp-python"),
}
ENGINES = {"pyengine": Pyengine} | {name: row[0] for name, row in PEERS.items()}


def installed_peers() -> list[str]:
    return [name for name, (_, module, _) in PEERS.items() if importlib.util.find_spec(module)]
