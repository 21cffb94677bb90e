"""The locked forward pass: one output, whatever the split, chunk, threads or instruction set."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
from paths import GOLDEN

import pyengine
from pyengine.core import ops
from pyengine.core.tape import Tape
from pyengine.core.threads import Pool, select_isa
from pyengine.decoder.model import OneToken
from pyengine.decoder.state import KeyValueCache
from pyengine.errors import InputError, NonFiniteError
from pyengine.quantizer.quantize import quantize

NAMES = ["pattern31", "nextn", "fused", "tied", "bfloat16", "yarn", "dense"]


def bits(array):
    return np.ascontiguousarray(array).view(np.uint32)


def equal(a, b):
    return a.shape == b.shape and np.array_equal(bits(a), bits(b))


def prompt(model, length, seed=1729):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, length)


@pytest.fixture(params=NAMES)
def model(request):
    return pyengine.load(GOLDEN / f"{request.param}.gguf", threads=1)


def test_every_split_of_a_prompt_equals_one_shot(model):
    ids = prompt(model, 12)
    whole = model.forward(ids)
    for cut in range(1, len(ids)):
        state = model.new_state()
        parts = [model.forward(ids[:cut], state), model.forward(ids[cut:], state)]
        assert equal(np.concatenate(parts), whole), cut
        assert state.position == len(ids)


def one_by_one(model, ids, state):
    return np.concatenate([model.forward(ids[i : i + 1], state) for i in range(len(ids))])


def test_token_by_token_equals_one_shot(model):
    ids = prompt(model, 20)
    state = model.new_state()
    assert equal(one_by_one(model, ids, state), model.forward(ids))


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arithmetic", ["locked", "locked-kv16"])
def test_replayed_tokens_equal_those_through_python(arithmetic, threads):
    model = pyengine.load(GOLDEN / "pattern31.gguf", threads=threads, arithmetic=arithmetic)
    ids = prompt(model, 300)  # more than the cache begins with
    state = model.new_state()
    replayed = one_by_one(model, ids, state)
    model.replays = False
    again = model.new_state()
    assert equal(replayed, one_by_one(model, ids, again))
    assert set(model._one_token) == {state}


def test_a_state_is_recorded_once_and_replayed_from_its_second_token(model, monkeypatch):
    """Two roads, whoever drives: a plain loop, states in turn, after a prompt, after a rewind."""
    roads, record, replay = [], OneToken.__init__, OneToken.replay
    monkeypatch.setattr(OneToken, "__init__", lambda *given: roads.append("record") or record(*given))
    monkeypatch.setattr(OneToken, "replay", lambda *given: roads.append("replay") or replay(*given))
    state, other = model.new_state(), model.new_state()
    mark = state.mark()
    model.forward([1, 2, 3], state)
    for i in range(4):
        model.forward([i], state)
        model.forward([i], other)
    assert roads == ["record"] * 2 + ["replay"] * 6
    state.rewind(mark)
    model.forward([1, 2], state)
    model.forward([3], state)
    assert roads[8:] == ["replay"]
    fork = state.copy()  # on arrays of its own
    for i in (5, 6):
        model.forward([i], fork)
    assert roads[9:] == ["record", "replay"]
    state.restore(fork)
    for i in (5, 6):
        model.forward([i], state)
    assert roads[11:] == ["record", "replay"]


def test_a_state_is_data(model):
    """It holds no model, and what a model keeps for it goes with it."""
    state, engine = model.new_state(), pyengine.load(model.checkpoint.path, threads=1)
    model.forward([1], state)
    model.forward([2], state)
    assert set(vars(state)) == {"position", "marks", "layers"}
    kept = weakref.ref(model._one_token[state])
    del state
    gc.collect()
    assert kept() is None and len(model._one_token) == 0
    state, alive = engine.new_state(), weakref.ref(engine)
    engine.forward([1], state)
    engine.forward([2], state)
    del engine
    gc.collect()
    assert alive() is None and state.position == 2


def test_a_first_token_that_fails_is_not_kept(model, monkeypatch):
    """Nor is what was recorded of it: the pass that follows a rewind is whole."""
    ids = prompt(model, 6)
    want = model.forward(ids)
    for layer in model.layers:
        state = model.new_state()
        mark = state.mark()
        with monkeypatch.context() as patch:
            patch.setattr(layer, "post_attention_layernorm", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.forward(ids[:1], state)
        assert state not in model._one_token and model.pool.tape is None
        state.rewind(mark)
        assert equal(one_by_one(model, ids, state), want)


def test_states_take_turns_go_back_and_are_given_away(model):
    """Whatever happens to a state between two tokens, the next is what computing anew gives."""
    ids = [prompt(model, 30, seed) for seed in (0, 1)]
    want = [model.forward(these) for these in ids]
    states = [model.new_state() for _ in ids]
    for i in range(10):
        for k in (0, 1):
            assert equal(model.forward(ids[k][i : i + 1], states[k]), want[k][i : i + 1])
    mark, snapshot = states[0].mark(), states[1].copy()
    one_by_one(model, ids[1][:5], states[0])
    states[0].rewind(mark)
    states[1].restore(states[0])  # and so continues the other sequence, on other arrays
    for state in states:
        assert equal(one_by_one(model, ids[0][10:14], state), want[0][10:14])
        assert equal(model.forward(ids[0][14:20], state), want[0][14:20])
        assert equal(one_by_one(model, ids[0][20:], state), want[0][20:])
    assert equal(one_by_one(model, ids[1][10:], snapshot), want[1][10:])
    twin = pyengine.load(model.checkpoint.path, threads=2)  # a state's step is its maker's alone
    state = model.new_state()
    parts = [
        one_by_one(m, ids[0][start : start + 5], state) for m, start in ((model, 0), (twin, 5), (model, 10))
    ]
    assert equal(np.concatenate(parts), want[0][:15])


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))], ids=["deepcopy", "pickle"]
)
def test_a_state_can_be_written_and_read_again(model, again):
    ids, state = prompt(model, 10), model.new_state()
    want = model.forward(ids)
    one_by_one(model, ids[:5], state)
    assert equal(one_by_one(model, ids[5:], again(state)), want[5:])
    assert equal(one_by_one(model, ids[5:], state), want[5:])


def test_logits_stay_when_the_next_token_comes(model):
    state = model.new_state()
    first = [model.forward([i], state) for i in (1, 2, 3)]
    kept = [logits.copy() for logits in first]
    model.forward([4], state)
    assert all(equal(a, b) for a, b in zip(first, kept))


def test_a_replay_that_fails_names_what_failed(model):
    state = model.new_state()
    for i in (1, 2):
        model.forward([i], state)
    cache = next(s for s in state.layers if isinstance(s, KeyValueCache))
    cache.values[:] = np.nan
    said = []
    for replays in (True, False):
        model.replays = replays
        with pytest.raises(NonFiniteError) as error:
            model.forward([3], state)
        said.append(str(error.value))
    assert said[0] == said[1] and said[0].startswith("model.layers."), said


def test_an_operation_that_cannot_be_replayed_is_refused(model):
    x, tape = np.ones((1, 1, 4), np.float32), Tape()
    for operation in (
        lambda: ops.exp(model.pool, x),
        lambda: ops.silu(model.pool, x),
        lambda: ops.attention(model.pool, x, x, x, 1.0),
    ):
        with pytest.raises(InputError, match="pe_[a-z_]+: cannot be replayed"), tape.recording(model.pool):
            operation()
        assert model.pool.tape is None


def test_a_tape_holds_what_its_calls_point_to(model):
    """Also what the caller made on the way and lets go of."""
    x, alive = np.ones((1, 256), np.float32), []
    linear = model.lm_head
    tape = Tape()
    with tape.recording(model.pool):
        y = ops.add(model.pool, x[:, : linear.matrix.cols].copy(), x[:, : linear.matrix.cols].copy())
        activations = ops.Activations(model.pool, y)
        alive += [weakref.ref(activations), weakref.ref(y.base if y.base is not None else y)]
        del y
        linear(activations)
        del activations
        gate = np.ones((1, 1, 8), np.float32)
        alive.append(weakref.ref(gate))
        ops.sigmoid_mul(model.pool, x[:, :4].reshape(1, 1, 4).copy(), gate)
        del gate
    gc.collect()
    assert all(ref() is not None for ref in alive)
    tape.replay(model.pool)
    del tape
    gc.collect()
    assert all(ref() is None for ref in alive)


@pytest.mark.parametrize("out", [np.empty((1, 1, 5), np.float32), np.empty((1, 1, 4), np.float64)])
def test_an_array_to_write_to_must_fit(model, out):
    x = np.ones((1, 1, 4), np.float32)
    with pytest.raises(InputError, match="out: want float32"):
        ops.attention(model.pool, x, x, x, 1.0, out)
    with pytest.raises(InputError, match="out: want float32"):
        ops.rope_table(0, 1, model.inv_freq, (out[0, :, :2], out[0, :, :2]))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_chunks(model, chunk):
    ids = prompt(model, 33)
    assert equal(model.forward(ids, chunk=chunk), model.forward(ids))


def test_last_only_is_the_last_row(model):
    ids = prompt(model, 9)
    assert equal(model.forward(ids, last_only=True, chunk=4), model.forward(ids)[-1:])


def test_snapshot_fork_and_restore_equal_recomputing(model):
    ids = prompt(model, 24)
    for cut in (1, 5, 23):
        state = model.new_state()
        model.forward(ids[:cut], state)
        snapshot = state.copy()
        model.forward(prompt(model, 7, seed=1), state)  # another continuation, which must not leak
        fork = snapshot.copy()
        after_fork = model.forward(ids[cut:], fork)
        state.restore(snapshot)
        assert equal(model.forward(ids[cut:], state), after_fork)
        assert equal(after_fork, model.forward(ids)[cut:])
        assert snapshot.position == cut


def test_marks_equal_recomputing(model):
    ids, other = prompt(model, 40), prompt(model, 40, seed=1)
    want = model.forward(ids)
    state, marks = model.new_state(), []
    for start, stop in [(0, 3), (3, 20), (20, 40)]:
        model.forward(ids[start:stop], state)
        marks.append(state.mark())
    model.forward(other, state)
    for mark in reversed(marks):
        state.rewind(mark)
        assert state.position == mark.position
        if mark.position < 40:
            assert equal(model.forward(ids[mark.position :], state), want[mark.position :])
        model.forward(other, state)
    assert state.marks == marks[:1]
    assert state.copy().marks == [] and state.copy().nbytes < state.nbytes


def test_a_void_mark_is_refused(model):
    state = model.new_state()
    first, second = state.mark(), state.mark()
    state.rewind(first)
    for mark in (second, model.new_state().mark()):
        with pytest.raises(InputError, match="mark: want one of this state"):
            state.rewind(mark)


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_rewind_out_of_a_pass_that_was_interrupted(model, monkeypatch):
    ids = prompt(model, 12)
    want = model.forward(ids)[6:]
    for layer in model.layers:
        state = model.new_state()
        model.forward(ids[:6], state)
        mark = state.mark()
        with monkeypatch.context() as patch:
            patch.setattr(layer, "post_attention_layernorm", interrupt)  # its mixer has run
            with pytest.raises(KeyboardInterrupt):
                model.forward(ids[6:], state)
        state.rewind(mark)
        assert equal(model.forward(ids[6:], state), want)


@pytest.mark.parametrize(
    "all_threads, chunks, cuts",
    [
        pytest.param((1, 3), (17,), (0, 16), id="some"),
        pytest.param((1, 2, 3), (1, 17, 512), (0, 1, 16, 39), id="all", marks=pytest.mark.slow),
    ],
)
def test_one_sweep_of_threads_levels_chunks_and_splits(model, each_isa, all_threads, chunks, cuts):
    """Every combination gives the output of one thread, the scalar level, one shot."""
    ids = prompt(model, 40)
    select_isa("scalar")
    expected = model.forward(ids)
    select_isa(each_isa)
    for threads in all_threads:
        other = pyengine.load(model.checkpoint.path, threads=threads)
        for chunk in chunks:
            for cut in cuts:
                state = other.new_state()
                parts = [
                    other.forward(part, state, chunk=chunk) for part in (ids[:cut], ids[cut:]) if len(part)
                ]
                assert equal(np.concatenate(parts), expected), (threads, each_isa, chunk, cut)


def test_int8_sweep(tmp_path, each_isa):
    quantize(GOLDEN / "fused.gguf", tmp_path / "int8")
    ids = np.random.default_rng(1729).integers(0, 128, 40)
    select_isa("scalar")
    expected = pyengine.load(tmp_path / "int8", threads=1).forward(ids)
    select_isa(each_isa)
    for threads in (1, 3):
        assert equal(pyengine.load(tmp_path / "int8", threads=threads).forward(ids, chunk=7), expected)


def test_float16_cache_is_the_float32_one_over_rounded_keys_and_values(each_isa):
    path = GOLDEN / "pattern31.gguf"
    half = pyengine.load(path, "locked-kv16", threads=2)
    ids = prompt(half, 150)  # more positions than are widened at a time
    state = half.new_state()
    logits = half.forward(ids, state)
    assert state.layers[3].keys.dtype == np.float16
    plain = pyengine.load(path, threads=2)
    wide = plain.new_state()
    cache = wide.layers[3]
    append = cache.append
    cache.append = lambda k, v: append(k.astype(np.float16), v.astype(np.float16))
    assert equal(plain.forward(ids, wide), logits)
    assert not equal(plain.forward(ids), logits)
    for cut in (1, 64, 149):
        state = half.new_state()
        parts = [half.forward(ids[:cut], state, chunk=50), half.forward(ids[cut:], state)]
        assert equal(np.concatenate(parts), logits)


def test_left_context_decides_and_nothing_later(model):
    """No token sees what follows it; a longer prompt has the shorter one's logits, in bits."""
    ids = prompt(model, 30)
    assert equal(model.forward(ids)[:11], model.forward(ids[:11]))


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "want at least one id"),
        ([[1]], "want at least one id in a flat sequence"),
        ([-1], "got -1 at index 0"),
        ([0, 10**6], "got 1000000 at index 1"),
        ([0.5], "want integers"),
    ],
)
def test_ids_out_of_range(ids, message):
    model = pyengine.load(GOLDEN / "tied.gguf", threads=1)
    state = model.new_state()
    with pytest.raises(InputError, match=message):
        model.forward(ids, state)
    assert state.position == 0


def test_options_out_of_range():
    path = GOLDEN / "tied.gguf"
    for options, message in [
        ({"threads": 0}, "threads: want 1 to 1024"),
        ({"arithmetic": "float16"}, "arithmetic: want locked or locked-kv16 or float64"),
    ]:
        with pytest.raises(InputError, match=message):
            pyengine.load(path, **options)
    with pytest.raises(InputError, match="chunk: want at least 1"):
        pyengine.load(path, threads=1).forward([1], chunk=0)


def test_nonfinite_activation_names_the_tensor(monkeypatch):
    model = pyengine.load(GOLDEN / "pattern31.gguf", threads=2)
    model.layers[1].input_layernorm.scale[3] = np.inf
    with pytest.raises(NonFiniteError, match="model.layers.1.input_layernorm"):
        model.forward([1, 2, 3])


def test_a_host_that_flushes_subnormals_changes_nothing():
    torch = pytest.importorskip("torch")
    x = np.full(64, 1e-40, np.float32)
    pool = Pool(1)
    expected = ops.silu(pool, x)
    assert expected.any()
    torch.set_flush_denormal(True)
    try:
        assert equal(ops.silu(pool, x), expected)
    finally:
        torch.set_flush_denormal(False)
