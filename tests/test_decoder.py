"""The locked forward pass: one output, whatever the split, chunk, threads or instruction set."""

import numpy as np
import pytest
from rewrite import GOLDEN

import pyengine
from pyengine import ops
from pyengine.decoder.state import KeyValueCache
from pyengine.errors import InputError
from pyengine.quantize import quantize

NAMES = ["pattern31", "nextn", "fused", "tied", "bfloat16"]


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


def test_token_by_token_equals_one_shot(model):
    ids = prompt(model, 20)
    state = model.new_state()
    one_by_one = np.concatenate([model.forward(ids[i:i + 1], state) for i in range(len(ids))])
    assert equal(one_by_one, model.forward(ids))


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
            assert equal(model.forward(ids[mark.position:], state), want[mark.position:])
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


def test_one_sweep_of_threads_levels_chunks_and_splits(model, each_isa):
    """Every combination gives the output of one thread, the scalar level, one shot."""
    ids = prompt(model, 40)
    ops.select_isa("scalar")
    expected = model.forward(ids)
    ops.select_isa(each_isa)
    for threads in (1, 2, 3):
        other = pyengine.load(model.checkpoint.path, threads=threads)
        for chunk in (1, 17, 512):
            for cut in (0, 1, 16, 39):
                state = other.new_state()
                parts = [other.forward(part, state, chunk=chunk)
                         for part in (ids[:cut], ids[cut:]) if len(part)]
                assert equal(np.concatenate(parts), expected), (threads, each_isa, chunk, cut)


def test_int8_sweep(tmp_path, each_isa):
    quantize(GOLDEN / "fused.gguf", tmp_path / "int8")
    ids = np.random.default_rng(1729).integers(0, 128, 40)
    ops.select_isa("scalar")
    expected = pyengine.load(tmp_path / "int8", threads=1).forward(ids)
    ops.select_isa(each_isa)
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


@pytest.mark.parametrize("ids, message", [
    ([], "want at least one id"), ([[1]], "want at least one id in a flat sequence"),
    ([-1], "got -1 at index 0"), ([0, 10**6], "got 1000000 at index 1"), ([0.5], "want integers"),
])
def test_ids_out_of_range(ids, message):
    model = pyengine.load(GOLDEN / "tied.gguf", threads=1)
    state = model.new_state()
    with pytest.raises(InputError, match=message):
        model.forward(ids, state)
    assert state.position == 0


def test_options_out_of_range():
    path = GOLDEN / "tied.gguf"
    for options, message in [({"threads": 0}, "threads: want 1 to 1024"),
                             ({"arithmetic": "float16"}, "arithmetic: want locked or locked-kv16 or float64")]:
        with pytest.raises(InputError, match=message):
            pyengine.load(path, **options)
    with pytest.raises(InputError, match="chunk: want at least 1"):
        pyengine.load(path, threads=1).forward([1], chunk=0)


def test_nonfinite_activation_names_the_tensor(monkeypatch):
    model = pyengine.load(GOLDEN / "pattern31.gguf", threads=2)
    model.layers[1].input_layernorm.scale[3] = np.inf
    with pytest.raises(ops.NonFiniteError, match="model.layers.1.input_layernorm"):
        model.forward([1, 2, 3])


def test_key_value_cache_grows_and_keeps_its_rows():
    config = pyengine.open_checkpoint(GOLDEN / "pattern31.gguf").config
    cache, rows = KeyValueCache(config, np.float32), []
    for i in range(600):
        row = np.full((1, config.num_key_value_heads, config.head_dim), i, np.float32)
        cache.append(row, -row)
        rows.append(row)
    assert np.array_equal(cache.keys, np.concatenate(rows))
    assert np.array_equal(cache.values, -np.concatenate(rows))


def test_a_host_that_flushes_subnormals_changes_nothing():
    torch = pytest.importorskip("torch")
    x = np.full(64, 1e-40, np.float32)
    pool = ops.Pool(1)
    expected = ops.silu(pool, x)
    assert expected.any()
    torch.set_flush_denormal(True)
    try:
        assert equal(ops.silu(pool, x), expected)
    finally:
        torch.set_flush_denormal(False)
