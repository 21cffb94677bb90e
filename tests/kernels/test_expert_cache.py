"""csrc/expert_cache.c: experts that are read when they are chosen."""

import os
import signal

import numpy as np
import pytest
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_policy import PlainPolicy
from pyengine._core import lib

from pyengine.core import ops
from pyengine.core.expert_cache import AHEAD, HALF_LIFE, HEAT, PAGE, ExpertCache, ExpertLayer
from pyengine.core.matrices import Experts, Matrix
from pyengine.core.threads import Pool
from pyengine.errors import InputError, NonFiniteError, PyengineError

HIDDEN, FF = 64, 32
POOLS = [Pool(1), Pool(2)]


class Model:
    """Layers of experts in a file, each layer's gate, up and down as stacks, or expert by expert."""

    def __init__(self, folder, layers, experts, apart=False, kind="Q8_0"):
        rng = np.random.default_rng([layers, experts, apart])
        self.layers, self.experts, self.kind = layers, experts, kind
        self.path = folder / "experts"
        rows = [(FF, HIDDEN), (FF, HIDDEN), (HIDDEN, FF)]
        self.stacks = [[self.blocks(rng, experts, *shape) for shape in rows] for _ in range(layers)]
        self.shared = [
            [Matrix("Q8_0", c, self.blocks(rng, 1, r, c)[0]) for r, c in rows] for _ in range(layers)
        ]
        pieces, self.table = [b"head of 13 b."], []
        position = len(pieces[0])
        for stack in self.stacks:
            order = [(e, i) for e in range(experts) for i in range(3)] if apart else None
            order = order or [(e, i) for i in range(3) for e in range(experts)]
            at = {}
            for e, i in order:
                at[e, i] = position
                pieces.append(stack[i][e].tobytes())
                position += len(pieces[-1])
            self.table.append(at)
        self.path.write_bytes(b"".join(pieces))
        self.expert_bytes = sum(stack[0].nbytes for stack in self.stacks[0])

    def blocks(self, rng, experts, rows, columns):
        blocks = rng.integers(0, 256, (experts, rows, columns // 32, 34), np.uint8)
        scales = (rng.random(blocks.shape[:-1]) / 256).astype(np.float16)
        blocks[..., :2] = scales[..., None].view(np.uint8)
        return blocks.reshape(experts, rows, -1)

    def layer(self, index, words=True):
        """gate, up, down each a read of its own."""
        reads, places = np.empty((self.experts, 3, 4), np.int64), np.full((self.experts, 6), -1, np.int64)
        for (e, i), offset in self.table[index].items():
            nbytes = self.stacks[index][i][e].nbytes
            reads[e, i] = 0, offset, nbytes, 2 * PAGE * i
            places[e, i] = 2 * PAGE * i + offset % PAGE
        rule = [(i, 0, self.stacks[index][i][0].nbytes // 34, 34, 2, 0x7C00) for i in range(3)]
        return ExpertLayer(reads, places, np.array(rule if words else [], np.int64).reshape(-1, 6))

    def weights(self, index):
        """In memory, all of them."""
        cols = HIDDEN, HIDDEN, FF
        return Experts(
            *(Matrix(self.kind, c, stack) for c, stack in zip(cols, self.stacks[index])), *self.shared[index]
        )

    def cache(self, slots, past_cache=True, words=True, threads=3):
        self.file = os.open(self.path, os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if past_cache else 0))
        layers = [self.layer(i, words) for i in range(self.layers)]
        cache = ExpertCache(layers, slots, [self.file], past_cache, threads)
        streamed = [self.weights(i) for i in range(self.layers)]
        for i, experts in enumerate(streamed):
            experts.read_from(cache, i)
        return cache, streamed


def call(pool, experts, selected, seed):
    rng = np.random.default_rng(seed)
    tokens, top_k = selected.shape
    x = ops.Activations(pool, rng.standard_normal((tokens, HIDDEN)).astype(np.float32), "x")
    weights, gate = rng.random((tokens, top_k)).astype(np.float32), rng.random((tokens, 1)).astype(np.float32)
    return ops.experts(pool, experts, x, selected, weights, gate)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(layers, experts, apart):
        key = layers, experts, apart
        if key not in made:
            made[key] = Model(tmp_path_factory.mktemp("experts"), *key)
        return made[key]

    return get


def run_calls(models, layers, experts, slots, calls, apart=False, past_cache=True):
    """calls: [(layer, tokens, top_k, seed, limit)]: bits, counts and what is in memory after each.

    limit: set before the call, unless it is None.
    """
    model = models(layers, experts, apart)
    cache, streamed = model.cache(slots, past_cache)
    plain = PlainPolicy(layers, experts, slots, AHEAD, HEAT, HALF_LIFE)
    in_memory = [model.weights(i) for i in range(layers)]
    try:
        for layer, tokens, top_k, seed, limit in calls:
            if limit is not None:
                cache.set_limit(limit)
                plain.set_limit(limit)
                assert cache.counts().resident == len(plain.memory) <= cache.limit == plain.limit
            layer, top_k, pool = layer % layers, min(top_k, experts), POOLS[seed % 2]
            rng = np.random.default_rng(seed)
            skewed = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
            selected = np.ascontiguousarray(skewed[:, :top_k], np.int32)
            got = call(pool, streamed[layer], selected, seed)
            assert_same_bits(got, call(pool, in_memory[layer], selected, seed), "y")
            plain.call(layer, selected.tolist())
            counts = cache.counts()
            assert {tuple(map(int, one)) for one in np.argwhere(cache.resident())} == plain.memory
            assert counts.resident == len(plain.memory) <= cache.limit
            assert (counts.hits, counts.misses) == (plain.hits, len(plain.missed))
            assert counts.asked_bytes == counts.misses * model.expert_bytes
            pages = sum(
                -(-(offset % PAGE + nbytes) // PAGE)
                for layer, expert in plain.missed
                for _, offset, nbytes, _ in model.layer(layer).reads[expert]
            )
            assert counts.read_bytes == pages * PAGE
    finally:
        del cache, streamed
        os.close(model.file)


CALLS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([1, 1, 2, 7, 40, 700, 2500]),
        st.integers(1, 4),
        st.integers(0, 999),
        st.none() | st.integers(0, 30),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 30), CALLS, st.booleans(), st.booleans())
def test_bits_counts_and_policy(models, layers, experts, slots, calls, apart, past_cache):
    run_calls(models, layers, experts, slots, calls, apart, past_cache)


@pytest.mark.parametrize(
    "slots", [5, AHEAD + 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, AHEAD, 2 * AHEAD + 9))]
)
def test_more_experts_than_are_asked_for_at_once(models, slots):
    calls = [(0, 40, 4, 0), (1, 40, 4, 1), (0, 40, 4, 2), (0, 1, 4, 9), (1, 1, 4, 9)]
    run_calls(models, 2, AHEAD + 20, slots, [(*one, None) for one in calls])


def own_memory():
    """Bytes of this process's memory that are no file's, as its tables of pages say."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the system does not say")
def test_experts_above_the_limit_give_up_their_memory(models):
    """It goes back to the system, and is taken again when the limit allows it."""
    model = models(1, AHEAD + 20, False)
    cache, (experts,) = model.cache(model.experts)
    everything = np.arange(model.experts, dtype=np.int32)[None]
    want = call(POOLS[0], model.weights(0), everything, 1)
    for _ in range(2):
        cache.set_limit(model.experts)
        assert_same_bits(call(POOLS[0], experts, everything, 1), want, "y")
        assert cache.counts().resident == model.experts
        before = own_memory()
        cache.set_limit(3)
        assert cache.counts().resident == 3
        assert before - own_memory() > (model.experts - 4) * 3 * PAGE  # each read touches a page at least
    assert_same_bits(call(POOLS[0], experts, everything, 1), want, "with few")
    os.close(model.file)


def test_the_expert_in_use_stays(models):
    """A prompt that uses every expert does not drive out the one that every other token uses."""
    model = models(1, AHEAD + 20, False)
    cache, (experts,) = model.cache(AHEAD + 2)
    favourite = np.array([[7]], np.int32)
    for _ in range(40):
        call(POOLS[0], experts, favourite, 0)
    everything = np.tile(np.arange(model.experts, dtype=np.int32), (20, 1))
    call(POOLS[0], experts, everything, 1)
    assert cache.resident()[0, 7]
    assert (cache.counts().hits, cache.counts().misses) == (39 + 1, 1 + model.experts - 1)
    os.close(model.file)


class TestFaults:
    def test_a_scale_that_is_not_finite(self, tmp_path):
        """Refused when it is read, whether or not its code makes a difference; other experts work."""
        model = Model(tmp_path, 1, 4)
        at = model.table[0][2, 1] + 34 * 5
        with open(model.path, "r+b") as file:
            file.seek(at)
            file.write(np.array([np.inf], "<f2").tobytes())
        cache, (experts,) = model.cache(2)
        assert cache.refused() is None
        call(POOLS[1], experts, np.array([[0, 1]], np.int32), 1)
        with pytest.raises(NonFiniteError):
            call(POOLS[1], experts, np.array([[1, 2]], np.int32), 1)
        assert cache.refused() == (0, 2) and not cache.resident()[0, 2]
        got = call(POOLS[1], experts, np.array([[0, 3]], np.int32), 2)
        want = call(POOLS[1], model.weights(0), np.array([[0, 3]], np.int32), 2)
        assert_same_bits(got, want, "after the error")
        os.close(model.file)

    def test_without_words_nothing_is_checked(self, tmp_path):
        model = Model(tmp_path, 1, 2)
        with open(model.path, "r+b") as file:
            file.seek(model.table[0][1, 2])
            file.write(np.array([np.inf], "<f2").tobytes())
        cache, (experts,) = model.cache(2, words=False)
        call(POOLS[0], experts, np.array([[1]], np.int32), 1)
        assert cache.refused() is None
        os.close(model.file)

    def test_a_file_that_became_shorter(self, tmp_path):
        model = Model(tmp_path, 2, 3)
        cache, streamed = model.cache(2)
        os.truncate(model.path, model.table[1][0, 0])
        call(POOLS[1], streamed[0], np.array([[0, 2]], np.int32), 1)
        for _ in range(2):
            with pytest.raises(PyengineError, match="could not read"):
                call(POOLS[1], streamed[1], np.array([[0, 1, 2]], np.int32), 1)
        assert cache.counts().resident <= 2
        call(POOLS[1], streamed[0], np.array([[1, 2]], np.int32), 1)
        os.close(model.file)

    def test_arguments(self, tmp_path):
        model = Model(tmp_path, 1, 2)
        model.cache(1)
        with pytest.raises(InputError, match="expert layer"):
            ExpertCache([model.layer(0)], 1, [], True)
        for slots, threads in [(0, 1), (1, 0), (1, 65)]:
            with pytest.raises(PyengineError, match="could not be set aside"):
                ExpertCache([model.layer(0)], slots, [model.file], True, threads)
        assert lib.PE_PAGE == PAGE
        os.close(model.file)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_reads_by_itself(models):
    """Threads do not survive a fork."""
    model = models(1, 9, False)
    cache, (experts,) = model.cache(3)
    selected = np.array([[1, 4, 8], [0, 1, 2]], np.int32)
    want = call(POOLS[0], model.weights(0), selected, 5)
    call(POOLS[0], experts, selected, 5)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # instead of a test that waits for ever
        same = np.array_equal(call(POOLS[0], experts, selected, 5), want)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    os.close(model.file)


def test_experts_that_lie_apart_are_read_where_they_are(models):
    model = models(2, 9, True)
    for i in range(2):
        cols = HIDDEN, HIDDEN, FF
        apart = [Matrix("Q8_0", c, tuple(one.copy() for one in s)) for c, s in zip(cols, model.stacks[i])]
        selected = np.array([[1, 4, 8], [0, 1, 2]], np.int32)
        got = call(POOLS[1], Experts(*apart, *model.shared[i]), selected, 5)
        assert_same_bits(got, call(POOLS[1], model.weights(i), selected, 5), "apart")
