"""Generation: what is yielded, why it ends, and that it computes what a whole pass computes."""

import codecs
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pyengine
from pyengine.errors import InputError
from pyengine.generate import generate
from pyengine.sampling import Sampler

GOLDEN = Path(__file__).parent / "golden" / "pattern31.gguf"


# ---- a model of known words: after id i comes id i + 1, most likely ----------------------------


class CountingModel:
    def __init__(self, vocab_size):
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.calls = []

    def new_state(self):
        return []

    def forward(self, ids, state, last_only):
        assert last_only
        state.extend(int(i) for i in ids)
        self.calls.append(len(ids))
        logits = np.zeros((1, self.config.vocab_size), np.float32)
        logits[0, (state[-1] + 1) % self.config.vocab_size] = 5
        return logits


class Words:
    """A tokenizer of the given byte strings."""

    def __init__(self, words):
        self.words = words

    def stream(self, special):
        assert special is False
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return SimpleNamespace(push=lambda i: decoder.decode(self.words[i]),
                               flush=lambda: decoder.decode(b"", True))


def run(words, start=0, max_tokens=100, **options):
    generation = generate(CountingModel(len(words)), [start], max_tokens, tokenizer=Words(words), **options)
    return generation, list(generation)


def texts(words, **options):
    generation, tokens = run(words, **options)
    return [token.text for token in tokens], generation.finish_reason


# ---- why it ends -----------------------------------------------------------------------------


def test_length():
    generation, tokens = run([b"a", b"b", b"c"], max_tokens=4)
    assert [t.id for t in tokens] == [1, 2, 0, 1]
    assert [t.text for t in tokens] == list("bcab")
    assert generation.finish_reason == "length"
    assert (generation.prompt_tokens, generation.completion_tokens) == (1, 4)


def test_end_id_comes_last_and_without_text():
    generation, tokens = run([b"a", b"b", b"<end>"], end_ids=[2])
    assert [(t.id, t.text) for t in tokens] == [(1, "b"), (2, "")]
    assert generation.finish_reason == "stop" and generation.completion_tokens == 2


def test_end_id_as_the_last_that_fits_is_a_stop():
    assert texts([b"a", b"b", b"c"], end_ids=[2], max_tokens=2) == (["b", ""], "stop")


def test_no_tokens_wanted_none_computed():
    generation, tokens = run([b"a", b"b"], max_tokens=0)
    assert tokens == [] and generation.finish_reason == "length" and generation.model.calls == []


def test_finish_reason_is_none_while_running():
    generation = generate(CountingModel(3), [0], 2)
    assert generation.finish_reason is None
    assert next(generation).text == "" and generation.finish_reason is None
    next(generation)
    assert generation.finish_reason == "length"
    with pytest.raises(StopIteration):
        next(generation)


# ---- stop strings ----------------------------------------------------------------------------


@pytest.mark.parametrize("stop, want", [
    ("c", ["ab", ""]),  # within a token
    ("bc", ["a", ""]),  # b is held back while it may be a beginning
    ("de", ["ab", "c", ""]),
    (["zz", "cde"], ["ab", "", ""]),
])
def test_stop_string(stop, want):
    assert texts([b"-", b"ab", b"cd", b"efg"], stop_strings=stop, max_tokens=3) == (want, "stop")


def test_a_beginning_that_stays_one_is_given_back():
    words = [b"-", b"ab", b"ac", b"a", b"<end>"]
    assert texts(words, stop_strings="aca!", end_ids=[4]) == (["ab", "", "", "aca"], "stop")
    assert texts(words, stop_strings="aca!", max_tokens=2) == (["ab", "ac"], "length")


def test_the_first_of_two_stop_strings_counts():
    assert texts([b"-", b"one two"], stop_strings=["two", "one"]) == ([""], "stop")


def test_text_is_whole_characters():
    euro = "€".encode()
    assert texts([b"-", euro[:1], euro[1:2], euro[2:]], max_tokens=3) == (["", "", "€"], "length")
    assert texts([b"-", euro[:1], euro[1:2]], max_tokens=2) == (["", "\ufffd"], "length")


# ---- figures, errors -------------------------------------------------------------------------


def test_figures():
    generation, tokens = run([b"a"] * 8, max_tokens=5)
    assert generation.prompt_seconds > 0 and generation.completion_seconds > 0
    assert generation.tokens_per_second == 4 / generation.completion_seconds
    assert generation.prompt_tokens_per_second == 1 / generation.prompt_seconds
    want = 5 - np.log(np.exp(5.0) + 7)
    assert all(token.logprob == pytest.approx(want) for token in tokens)


@pytest.mark.parametrize("options, field", [
    (dict(ids=[]), "ids"), (dict(ids=[3]), "ids"), (dict(max_tokens=-1), "max_tokens"),
    (dict(max_tokens=1.5), "max_tokens"), (dict(stop_strings="a"), "stop_strings"),
    (dict(stop_strings=[""], tokenizer=Words([])), "stop_strings"),
])
def test_errors_come_at_once(options, field):
    with pytest.raises(InputError, match=f"^{field}: want"):
        generate(CountingModel(3), **{"ids": [0], "max_tokens": 1, **options})


# ---- the real model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return pyengine.load(GOLDEN)


def test_greedy_is_the_argmax_of_one_pass(model):
    prompt = [5, 17, 100, 3]
    generation = generate(model, prompt, 6)
    tokens = list(generation)
    ids = [token.id for token in tokens]
    logits = model.forward(prompt + ids)[len(prompt) - 1:-1].astype(np.float64)
    assert ids == logits.argmax(axis=1).tolist()
    log_sums = logits.max(axis=1) + np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
    np.testing.assert_allclose([t.logprob for t in tokens],
                               logits[np.arange(6), ids] - log_sums, rtol=1e-12)
    assert generation.state.position == len(prompt) + 5


def test_a_state_goes_on_where_it_stopped(model):
    whole = [t.id for t in generate(model, [5, 17], 8, Sampler(1.0, seed=3))]
    sampler, state = Sampler(1.0, seed=3), model.new_state()
    first = [t.id for t in generate(model, [5, 17], 3, sampler, state=state)]
    later = [t.id for t in generate(model, first[-1:], 5, sampler, state=state)]
    assert first + later == whole


def test_penalties_see_the_prompt(model):
    greedy = next(generate(model, [5, 17], 1)).id
    sampler = Sampler(presence_penalty=1000)
    assert next(generate(model, [greedy, 5, 17], 1, sampler)).id not in (greedy, 5, 17)
