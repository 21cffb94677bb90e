"""The screened head: the largest logits have the bits of the whole head, whatever weights and input are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_runs import examples, rng_of
from paths import GOLDEN, TESTS

import pyengine
from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.tensor import Tensor
from pyengine.core import ops
from pyengine.core.threads import Pool
from pyengine.decoder import head
from pyengine.decoder.footprint import footprint
from pyengine.decoder.head import Screen
from pyengine.files.ggml_blocks import BY_NAME

POOL = Pool(2)
KINDS = ["F32", "BF16", "F16", "Q8_0"]


def stored(kind, w):
    """float32 [rows, cols] -> the nearest weights of a type, as a tensor."""
    if kind == "BF16":
        data = (w.view(np.uint32) >> 16).astype(np.uint16)
    elif kind == "Q8_0":
        blocks = np.clip(w, -8e6, 8e6).reshape(len(w), -1, 32)  # which float16 scales can hold
        scales = (np.abs(blocks).max(2) / 127).astype(np.float16)
        codes = np.rint(blocks / np.maximum(scales, np.float16(6e-8))[..., None].astype(np.float32))
        parts = [scales[..., None].view(np.uint8), np.clip(codes, -127, 127).astype(np.int8).view(np.uint8)]
        data = np.concatenate(parts, 2).reshape(len(w), -1)
    else:
        data = np.clip(w, -6e4, 6e4).astype(np.float16) if kind == "F16" else w
    return Tensor("lm_head.weight", kind, w.shape, data, file_name="output.weight")


def values(tensor):
    return tensor.stored_float32()


class Head:
    """A head and its screen, made at once; `check` compares it with the whole head."""

    def __init__(self, kind, w):
        self.tensor = stored(kind, np.ascontiguousarray(w, np.float32))
        self.screen = Screen(POOL, self.tensor)
        self.screen.make()

    def whole(self, x):
        return ops.matmul(POOL, self.screen.matrix, ops.Activations(POOL, x, "x"))

    def check(self, x, k=1):
        """-> the logits, or None where the whole head is asked for."""
        x = np.asarray(x, np.float32)[None]
        found, want = self.screen.largest(x, k), self.whole(x)
        if found is None:
            return None
        assert found.shape == want.shape and found.argmax() == want.argmax()
        given = ~np.isneginf(found)
        assert np.array_equal(found[given].view(np.uint32), want[given].view(np.uint32))
        assert given[want >= np.sort(want[0])[-k]].all(), "a row that can win was left out"
        return found

    def differences(self, x):
        """|exact - screened| and its bound, of each row."""
        x = np.asarray(x, np.float32)[None]
        inputs = ops.Activations(POOL, x, "x")
        inputs.quantize()
        a, b, c = head.bound(x[0], inputs)
        nearly = ops.matmul(POOL, self.screen._form, inputs)[0].astype(np.float64)
        bounds = self.screen._error.astype(np.float64) * a + self.screen._norm.astype(np.float64) * b + c
        return np.abs(self.whole(x)[0].astype(np.float64) - nearly), bounds


@pytest.fixture(autouse=True)
def rows_may_be_many(monkeypatch):
    """A few rows, of which many may be left."""
    monkeypatch.setattr(head, "MOST_ROWS", 2.0)


# ---- cases that press on the bound ---------------------------------------------------------------


def lost_part(w):
    """What the form loses of rows [n, cols]."""
    n, cols = w.shape
    screen = Head("F32", w).screen
    blocks = screen._data.reshape(n, cols // 32, 22)
    return w - BY_NAME["Q5_0"].to_float32(blocks.reshape(n, -1))


def pressed(rng, rows, cols):
    """A head and an input for which the bound is nearly reached, and rows that win by less than it.

    The input is what the form has lost of row 0: row 0 is as much better than it looks as the bound allows.
    The others are multiples of 1/8 in [-15/8, 15/8], which the form keeps as they are, scaled to
    logits just below row 0's.
    """
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    x = lost_part(w[:1])[0]
    x /= np.abs(x).max()
    best = float(w[0].astype(np.float64) @ x)
    for row in range(1, rows):
        exact = np.abs(rng.integers(-15, 16, cols) / 8)
        exact[::32] = 15 / 8
        exact = np.copysign(exact, x * best)  # a logit with the sign of the best
        ratio = np.log2(best / (exact @ x))
        w[row] = exact * 2.0 ** (np.floor(ratio) if best > 0 else np.ceil(ratio))  # and just below it
    return w, x


INPUTS = ["plain", "one", "zero", "denormal", "tiny groups", "huge"]


def odd_input(kind, rng, cols):
    x = rng.standard_normal(cols) * np.exp2(rng.integers(-30, 31, cols) * rng.integers(2))
    if kind == "one":
        x = np.eye(1, cols, int(rng.integers(cols)))[0] * x
    elif kind in ("zero", "denormal"):
        x = x * (0 if kind == "zero" else 1e-41)
    elif kind == "tiny groups":
        x[: cols // 2] *= 2.0**-110
    elif kind == "huge":
        x = x * 2.0 ** float(rng.integers(40, 70))
    return np.clip(x, -3e38, 3e38).astype(np.float32)


_SOME = st.lists(st.sampled_from(INPUTS), min_size=1, max_size=3)


@st.composite
def heads(draw):
    """(type, weights, inputs): equal rows, near ties, zeros, denormals, every range."""
    rng = rng_of(draw(st.integers(0, 2**32 - 1)))
    rows, cols = draw(st.integers(1, 24)), 32 * draw(st.integers(1, 9))
    if draw(st.booleans()):
        w, x = pressed(rng, rows, cols)
        return draw(st.sampled_from(["F32", "BF16"])), w, [x, -x]
    w = rng.standard_normal((rows, cols)) * np.exp2(rng.integers(-20, 21, (rows, 1)) * rng.integers(2))
    w = w * np.exp2(rng.integers(-20, 21, (rows, cols)) * rng.integers(2))
    w = w.astype(np.float32)
    changes = draw(
        st.lists(st.sampled_from(["none", "equal", "near", "zero", "denormal"]), max_size=rows - 1)
    )
    for row, change in enumerate(changes, 1):
        if change in ("equal", "near"):
            w[row] = w[row - 1]
        if change == "near":
            w[row, rng.integers(cols)] *= np.float32(1 + 2.0**-20)
        if change in ("zero", "denormal"):
            w[row] = w[row] * np.float32(0 if change == "zero" else 1e-41)
    return draw(st.sampled_from(KINDS)), w, [odd_input(kind, rng, cols) for kind in draw(_SOME)]


@given(heads(), st.integers(1, 5))
@examples(25)
def test_the_largest_have_the_bits_of_the_whole_head(case, k):
    check_case(case, k)


@pytest.mark.slow
def test_the_same_many_times(each_isa):
    @given(heads(), st.integers(1, 5))
    @examples(400)
    def each(case, k):
        check_case(case, k)

    each()


def check_case(case, k):
    kind, w, inputs = case
    whole = Head(kind, w)
    for x in inputs:
        whole.check(x, min(k, len(w)))
        length = np.linalg.norm(x.astype(np.float64))
        if length * 1.01 < 2.0**60:
            differs, bounds = whole.differences(x)
            assert (differs <= bounds).all()


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_no_less_than_they_are(kind):
    rng = rng_of(5)
    w = rng.standard_normal((64, 256)) * np.exp2(rng.integers(-60, 61, (64, 1)))
    whole = Head(kind, np.where(rng.random((64, 256)) < 0.1, 0, np.clip(w, -6e4, 6e4)))
    exact = values(whole.tensor).astype(np.longdouble)
    kept = BY_NAME["Q5_0"].to_float32(whole.screen._data).astype(np.longdouble)
    for found, rows in ((whole.screen._norm, exact), (whole.screen._error, exact - kept)):
        want = np.sqrt((rows**2).sum(1))
        assert (found >= want).all() and (found <= want * 1.000001 + 2.0**-119).all()


def test_the_form_is_as_the_header_states():
    """Its restatement: the scale is float16(max / 15), codes are the nearest."""
    rng = rng_of(6)
    w = (rng.standard_normal((32, 96)) * np.exp2(rng.integers(-30, 12, (32, 1)))).astype(np.float32)
    w[3], w[4, :32] = 0, 1e-9
    blocks = Head("F32", w).screen._data.reshape(32, 3, 22)
    x = w.reshape(32, 3, 32).astype(np.float64)
    scales = np.minimum(np.abs(x).max(2) / 15, 65504).astype(np.float16)
    assert np.array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], scales)
    s = scales.astype(np.float64)[..., None]
    codes = np.divide(x, s, out=np.zeros_like(x), where=s != 0).round().clip(-15, 15)
    kept = BY_NAME["Q5_0"].to_float32(np.ascontiguousarray(blocks).reshape(32, -1)).reshape(x.shape)
    assert np.array_equal(kept, (codes * s).astype(np.float32))


# ---- planted bugs --------------------------------------------------------------------------------


def found_by(monkeypatch, plant):
    """Whether the cases above find a planted bug."""
    plant(monkeypatch)
    for seed in range(20):
        w, x = pressed(rng_of(seed), 12, 256)
        try:
            Head("F32", w).check(x)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("factor", [0.9, 0.5, 0.0])
def test_a_bound_that_is_too_small_is_found(monkeypatch, factor):
    true = head.bound

    def plant(patch):
        patch.setattr(head, "bound", lambda *given: (true(*given)[0] * factor, *true(*given)[1:]))

    assert not found_by(monkeypatch, lambda patch: None)
    assert found_by(monkeypatch, plant)


def test_a_low_that_is_not_exact_is_found(monkeypatch):
    exact = Screen._exact

    def plant(patch):
        patch.setattr(
            Screen, "_exact", lambda self, inputs, rows: exact(self, inputs, rows) * np.float32(1.05)
        )

    assert found_by(monkeypatch, plant)


# ---- when the whole head is asked for ------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_an_input_that_the_proof_leaves_out(bad):
    whole = Head("F32", rng_of(1).standard_normal((8, 64)))
    x = np.ones(64, np.float32)
    x[7] = bad
    assert whole.screen.largest(x[None], 1) is None and whole.screen.usable


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_weights_that_the_proof_leaves_out(bad):
    w = rng_of(1).standard_normal((8, 64)).astype(np.float32)
    w[3, 5] = bad
    screen = Head("F32", w).screen
    assert not screen.usable
    assert screen.largest(np.ones((1, 64), np.float32), 1) is None


def test_too_many_rows_are_the_whole_head_and_then_a_pause(monkeypatch):
    monkeypatch.setattr(head, "MOST_ROWS", 0.25)
    whole = Head("F32", np.tile(rng_of(2).standard_normal((1, 64)), (40, 1)))  # all equal
    x = np.ones((1, 64), np.float32)
    for _ in range(20):
        assert whole.screen.largest(x, 1) is None
    read = whole.screen.form_tokens
    assert read < 20  # it has given up for a while
    assert whole.screen.largest(x, 1) is None and whole.screen.form_tokens == read


def test_what_is_slower_is_not_used_for_a_while(monkeypatch):
    """A clock that stands, but for the form, or for the head."""
    now = [0.0]
    monkeypatch.setattr(head, "perf_counter", lambda: now[0])
    whole = Head("F32", rng_of(2).standard_normal((40, 64)))
    x = rng_of(3).standard_normal((1, 64)).astype(np.float32)

    def takes(form, all_rows):
        exact = Screen._exact
        monkeypatch.setattr(
            whole.screen,
            "_exact",
            lambda *given: (now.append(now.pop() + form), exact(whole.screen, *given))[1],
        )
        for _ in range(head.ENOUGH):
            whole.screen.whole(lambda: now.append(now.pop() + all_rows))
        return [whole.screen.largest(x, 1) is not None for _ in range(40)]

    assert all(takes(form=1.0, all_rows=3.0))  # _exact twice
    assert takes(form=2.0, all_rows=1.0).count(True) < 30
    assert not whole.screen.largest(x, 1)


def test_what_pays(monkeypatch):
    big = {kind: Tensor("lm_head.weight", kind, (1 << 16, 2048), _empty(kind)) for kind in KINDS}
    for kind, tensor in big.items():
        assert 0 < head.form_bytes(tensor) < 0.75 * tensor.data.nbytes, kind
    assert head.form_bytes(Tensor("lm_head.weight", "Q6_K", (1 << 16, 2048), _empty("Q6_K"))) == 0
    assert (
        head.form_bytes(Tensor("lm_head.weight", "BF16", (256, 2048), np.empty((256, 2048), np.uint16))) == 0
    )
    tensor = big["BF16"]
    form = head.form_bytes(tensor)
    for available, want in ((10**9 + 2 * form, True), (10**9 + 2 * form - 1, False)):
        monkeypatch.setattr(head, "available_memory", lambda available=available: available)
        assert (head.screen_of(POOL, tensor, 10**9) is not None) == want
    assert head.screen_of(POOL, tensor, 10**9) is None


def test_the_footprint_has_it(screening):
    screening.generate([1], 3, ignore_end=True)
    assert footprint(screening.checkpoint, 64, 16, 1)["head_screen"] == screening.head_screen.nbytes > 0


def _empty(kind):
    """Nothing of it is touched."""
    row = BY_NAME[kind]
    return np.empty((1 << 16, row.stored_columns(2048)), row.dtype)


# ---- whole models --------------------------------------------------------------------------------


def answers(model, prompts, **options):
    return [model.generate(ids, 16, ignore_end=True, **options).ids.tolist() for ids in prompts]


OPTIONS = [
    {},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {5: -3.0, 7: -100.0}, "min_tokens": 9},
    {"temperature": 1.1, "top_k": 5, "frequency_penalty": 0.3, "penalty_last_n": -1},
    {"logit_bias": {5: 2.0}},  # these take the whole head
    {"temperature": 0.7},
    {"repetition_penalty": 0.9},
]


def check_model(path, threads, monkeypatch, some_options=OPTIONS):
    monkeypatch.setattr(head, "LEAST_BYTES", 0)
    monkeypatch.setattr(head, "MOST_BYTES", 1.0)
    monkeypatch.setattr(head, "STEP", 100)
    monkeypatch.setattr(head, "ENOUGH", 10**9)  # it is slower for so small a head
    plain, screened = (pyengine.load(path, threads=threads) for _ in range(2))
    plain.screens = False
    rng = rng_of(3)
    prompts = [rng.integers(0, plain.config.vocab_size, n) for n in (1, 7)]
    for options in some_options:
        assert answers(screened, prompts, **options) == answers(plain, prompts, **options), options
    used = screened.head_screen
    assert plain.head_screen is None
    if screened.lm_head.tensor.type in head.TYPES:
        assert used.form_tokens > used.tokens / 2 and used.rows < used.tokens * screened.config.vocab_size
    else:
        assert used is None


@pytest.mark.parametrize("name", ["bfloat16", "tied"])
def test_a_model_gives_the_same_ids(name, monkeypatch):
    check_model(GOLDEN / f"{name}.gguf", 2, monkeypatch, OPTIONS[:3])


@pytest.mark.slow
def test_every_model_on_every_isa_gives_the_same_ids(each_isa, monkeypatch):
    paths = [*sorted(GOLDEN.glob("*.gguf")), TESTS / "trained" / "bf16.gguf"]
    for threads, path in enumerate(paths):
        check_model(path, 1 + threads % 2, monkeypatch, OPTIONS[:5])


@pytest.fixture
def screening(monkeypatch):
    """A model that screens from its first tokens on."""
    monkeypatch.setattr(head, "LEAST_BYTES", 0)
    return pyengine.load(GOLDEN / "bfloat16.gguf", threads=1)


def test_a_session_has_all_logits_after_a_screened_token(screening):
    session = screening.new_session()
    answer = screening.generate([1, 2, 3], 12, session=session, ignore_end=True)
    ids = [1, 2, 3, *answer.ids.tolist()[:-1]]
    assert screening.head_screen.form_tokens and session.ids == ids
    want = screening.forward(ids)[-1]
    assert np.array_equal(session.fork(len(ids)).logits.view(np.uint32), want.view(np.uint32))
    assert np.array_equal(session.logits.view(np.uint32), want.view(np.uint32))
    again = screening.generate(ids, 3, session=session, logprobs=4, ignore_end=True)
    anew = screening.generate(ids, 3, logprobs=4, ignore_end=True)
    assert again.cached_tokens == len(ids) and again.tokens == anew.tokens


def test_log_probabilities_take_the_whole_head(screening):
    answer = screening.generate([1, 2, 3], 12, logprobs=0, ignore_end=True)
    assert screening.head_screen is None and (answer.logprobs < 0).all()
    with pytest.raises(pyengine.InputError, match="logprobs: want an answer that was asked for them"):
        _ = screening.generate([1, 2, 3], 2).logprobs


def test_an_error_is_the_same(screening, monkeypatch):
    """An input that is not finite: the whole head computes what it always did."""
    screening.generate([1, 2, 3], 6, ignore_end=True)
    state, other = screening.new_state(), screening.new_state()
    for one in (state, other):
        screening.forward([1, 2], one)
        screening.forward([3], one)
    norm = screening.norm.scale
    norm *= np.float32(np.nan)
    found, want = screening.forward([4], state, largest=1), screening.forward([4], other)
    assert np.array_equal(found, want, equal_nan=True) and np.isnan(found).any()


def test_a_model_larger_than_its_memory_has_no_smaller_form(screening):
    path = GOLDEN / "bfloat16.gguf"
    checkpoint = open_checkpoint(path)
    bounded = pyengine.load(path, threads=1, memory=checkpoint.file.size * 9 // 10)
    assert bounded.experts_in_memory is not None
    want = screening.generate([1, 2, 3], 12, ignore_end=True).ids
    assert np.array_equal(bounded.generate([1, 2, 3], 12, ignore_end=True).ids, want)
    assert screening.head_screen is not None and bounded.head_screen is None
