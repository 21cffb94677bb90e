"""Generation: what is yielded, why it ends, and that it computes what a whole pass computes."""

import codecs
import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chat_models import MODEL, assistant, user, with_template
from hypothesis import given
from hypothesis import strategies as st

import pyengine
from pyengine.core import ops
from pyengine.errors import FileFormatError, InputError, PyengineWarning
from pyengine.quantizer.quantize import quantize
from pyengine.text.answer import AnswerText, AnswerTokens
from pyengine.text.generate import Generation, generate
from pyengine.text.model import ContextError
from pyengine.text.options import SAMPLING, GenerationOptions
from pyengine.text.sampler import Sampler
from pyengine.text.session import Session
from pyengine.text.thinking import ThinkingText
from pyengine.text.tokens import Token

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
        return SimpleNamespace(
            push=lambda i: decoder.decode(self.words[i]), flush=lambda: decoder.decode(b"", True)
        )


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
    generation, tokens = run([b"a", b"b", b"<end>"], stop_ids=[2])
    assert [(t.id, t.text) for t in tokens] == [(1, "b"), (2, "")]
    assert generation.finish_reason == "stop" and generation.completion_tokens == 2


def test_end_id_as_the_last_that_fits_is_a_stop():
    assert texts([b"a", b"b", b"c"], stop_ids=[2], max_tokens=2) == (["b", ""], "stop")


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


@pytest.mark.parametrize(
    "stop, want",
    [
        ("c", ["ab", ""]),  # within a token
        ("bc", ["a", ""]),  # b is held back while it may be a beginning
        ("de", ["ab", "c", ""]),
        (["zz", "cde"], ["ab", "", ""]),
    ],
)
def test_stop_string(stop, want):
    assert texts([b"-", b"ab", b"cd", b"efg"], stop=stop, max_tokens=3) == (want, "stop")


def test_a_beginning_that_stays_one_is_given_back():
    words = [b"-", b"ab", b"ac", b"a", b"<end>"]
    assert texts(words, stop="aca!", stop_ids=[4]) == (["ab", "", "", "aca"], "stop")
    assert texts(words, stop="aca!", max_tokens=2) == (["ab", "ac"], "length")


def test_the_first_of_two_stop_strings_counts():
    assert texts([b"-", b"one two"], stop=["two", "one"]) == ([""], "stop")


def test_text_is_whole_characters():
    euro = "€".encode()
    assert texts([b"-", euro[:1], euro[1:2], euro[2:]], max_tokens=3) == (["", "", "€"], "length")
    assert texts([b"-", euro[:1], euro[1:2]], max_tokens=2) == (["", "\ufffd"], "length")


# ---- figures, errors -------------------------------------------------------------------------


def test_figures():
    generation, tokens = run([b"a"] * 8, max_tokens=5, logprobs=0)
    assert generation.prompt_seconds > 0 and generation.completion_seconds > 0
    assert generation.tokens_per_second == 4 / generation.completion_seconds
    assert generation.prompt_tokens_per_second == 1 / generation.prompt_seconds
    want = 5 - np.log(np.exp(5.0) + 7)
    assert all(token.logprob == pytest.approx(want) for token in tokens)


@pytest.mark.parametrize(
    "options, field",
    [
        (dict(ids=[]), "ids"),
        (dict(ids=[3]), "ids"),
        (dict(max_tokens=-1), "max_tokens"),
        (dict(max_tokens=1.5), "max_tokens"),
        (dict(stop="a"), "stop"),
        (dict(stop=[""], tokenizer=Words([])), "stop"),
    ],
)
def test_errors_come_at_once(options, field):
    with pytest.raises(InputError, match=f"^{field}: want"):
        generate(CountingModel(3), **{"ids": [0], "max_tokens": 1, **options})


# ---- the real model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return pyengine.load(MODEL, threads=1)


def test_greedy_is_the_argmax_of_one_pass(model):
    prompt = [5, 17, 100, 3]
    generation = generate(model, prompt, 6, logprobs=0)
    tokens = list(generation)
    ids = [token.id for token in tokens]
    logits = model.forward(prompt + ids)[len(prompt) - 1 : -1].astype(np.float64)
    assert ids == logits.argmax(axis=1).tolist()
    log_sums = logits.max(axis=1) + np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
    np.testing.assert_allclose([t.logprob for t in tokens], logits[np.arange(6), ids] - log_sums, rtol=1e-12)
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


def test_cancel_ends_it_before_the_next_token(model):
    generation = generate(model, [5, 17], 8)
    first = next(generation)
    generation.cancel()
    assert list(generation) == [] and generation.tokens == [first]
    assert generation.finish_reason == "cancelled"


def test_cancel_ends_it_within_the_prompt(model, monkeypatch):
    monkeypatch.setattr(Generation, "piece", 4)
    generation = generate(model, list(range(20)), 8)
    forward, pieces = model.forward, []

    def counting(ids, *rest, **options):
        pieces.append(len(ids))
        if len(pieces) == 2:
            generation.cancel()
        return forward(ids, *rest, **options)

    monkeypatch.setattr(model, "forward", counting)
    assert list(generation) == [] and pieces == [4, 4] and generation.finish_reason == "cancelled"


def test_progress_of_a_prompt(model, monkeypatch):
    monkeypatch.setattr(Generation, "piece", 8)
    session, done = model.new_session(), []
    for ids, want in [(range(20), [0, 8, 8, 4]), (range(30), [20, 8, 2])]:
        done.clear()
        generation = model.generate(list(ids), 1, stream=True, session=session)
        generation.on_prompt = done.append
        generation.run()
        assert done == want


def test_pieces_of_a_prompt_change_no_bit(model, monkeypatch):
    whole = list(generate(model, list(range(20)), 4, logprobs=5))
    monkeypatch.setattr(Generation, "piece", 3)
    assert list(generate(model, list(range(20)), 4, logprobs=5)) == whole


# ---- model.generate --------------------------------------------------------------------------

TEXT = "the end and the beginning"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A model with text and a chat template."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    return pyengine.load(with_template(tmp_path_factory.mktemp("chat") / "m.gguf"), threads=1)


def outcome(generation):
    return (generation.tokens, generation.text, generation.finish_reason, generation.prompt_tokens)


def test_text_is_its_ids(chat):
    from_text = chat.generate(TEXT, 6)
    from_ids = chat.generate(chat.tokenizer.encode(TEXT), 6)
    assert outcome(from_text) == outcome(from_ids) and len(from_text.tokens) <= 6
    assert from_text.tokens == list(
        generate(
            chat, chat.tokenizer.encode(TEXT), 6, tokenizer=chat.tokenizer, stop_ids=chat.tokenizer.end_ids
        )
    )
    shown = [i for i in from_text.ids if i not in chat.tokenizer.end_ids]
    assert from_text.text == chat.tokenizer.decode(shown, special=False)


def test_special_tokens_only_where_asked(chat):
    text = "a<|im_end|>"
    assert chat.generate(text, 1, special=True).prompt_tokens == 2 < chat.generate(text, 1).prompt_tokens


def test_a_stream_computes_when_it_is_asked(chat):
    stream = chat.generate(TEXT, 4, stream=True, temperature=1.0)
    assert stream.tokens == [] and stream.finish_reason is None
    assert list(stream) == stream.tokens == chat.generate(TEXT, 4, temperature=1.0).tokens
    assert stream.prompt_tokens_per_second > 0


@pytest.mark.parametrize(
    "batch", [[TEXT, "on", TEXT], [[1, 2, 3], [4]], np.array([[1, 2], [3, 4]]), [TEXT, [1, 2], [user("in")]]]
)
def test_a_batch_is_each_alone(chat, batch):
    options = dict(max_tokens=5, temperature=1.0, seed=3)
    together = chat.generate(batch, **options)
    assert [outcome(g) for g in together] == [outcome(chat.generate(one, **options)) for one in batch]
    streams = chat.generate(batch, stream=True, **options)
    assert [list(s) for s in streams] == [g.tokens for g in together]


def test_arrays_and_their_shapes(chat):
    generation = chat.generate([1, 2, 3], 5, logprobs=4, ignore_end=True)
    assert generation.ids.shape == generation.logprobs.shape == (5,)
    assert generation.top_ids.shape == generation.top_logprobs.shape == (5, 4)
    logits = chat.forward([1, 2, 3, *generation.ids])[2:-1].astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :4]
    assert np.array_equal(generation.top_ids, order)
    assert np.array_equal(generation.top_ids[:, 0], generation.ids)  # greedy
    np.testing.assert_allclose(
        np.exp(generation.top_logprobs),
        np.take_along_axis(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), order, 1),
        rtol=1e-12,
    )
    none = chat.generate([1, 2, 3], 2)
    assert none.top_ids.shape == (len(none.tokens), 0)
    everything = chat.generate([1], 1, logprobs=10_000)
    assert sorted(everything.top_ids[0]) == list(range(chat.config.vocab_size))


def test_stop_ids_and_end_ids(chat):
    free = chat.generate(TEXT, 6, ignore_end=True).ids.tolist()
    assert (
        chat.generate(TEXT, 6, ignore_end=True, stop_ids=[free[2]]).ids.tolist()
        == free[: free.index(free[2]) + 1]
    )
    end = chat.tokenizer.end_ids
    forced = dict(logit_bias={end[-1]: 1000.0})
    assert chat.generate(TEXT, 6, **forced).finish_reason == "stop"  # every end id, not only the first
    assert chat.generate(TEXT, 6, ignore_end=True, **forced).finish_reason == "length"


def test_context_bounds_prompt_and_answer(chat):
    ids = list(range(1, 9))
    generation = chat.generate(ids, context=10, ignore_end=True)
    assert len(generation.tokens) == 2 and generation.finish_reason == "length"
    assert len(chat.generate(ids, 1, context=10).tokens) == 1
    assert chat.generate(ids, 0, context=8).tokens == []
    for context in (7, 8):  # of 8, the prompt would leave nothing for an answer
        with pytest.raises(ContextError, match=f"prompt: want at most {context - 1} of the context") as e:
            chat.generate(ids, context=context)
        assert (e.value.context, e.value.tokens) == (context, 8)


def test_a_context_above_the_models_is_a_warning(chat):
    with pytest.warns(PyengineWarning, match=f"more than the {chat.context} that the model was made") as seen:
        chat.generate([[1], [2]], 1, context=chat.context + 1)
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ("", {}, "prompt: want at least one token"),
        ([], {}, "prompt: want at least one token"),
        ([user("a")], dict(reasoning="maybe"), "reasoning: want auto or on or off, got 'maybe'"),
        ([user("a")], dict(reasoning_budget=-2), "reasoning_budget: want an integer of at least 0"),
        ("a", dict(reasoning="on"), "reasoning: want it with messages, got it with text"),
        ([1], dict(reasoning_budget=0), "reasoning_budget: want it with messages, got it with ids"),
        ("a", dict(context=0), "context: want an integer of at least 1, got 0"),
        ("a", dict(logprobs=-1), "logprobs: want an integer of at least 0, got -1"),
        ("a", dict(max_tokens=-2), "max_tokens: want an integer of at least 0, got -2"),
        ("a", dict(temperature=-1), "temperature: want"),
        ("a", dict(heat=1), r"heat: want a keyword of generate \(max_tokens, .*logit_bias\), got another"),
        ("a", dict(stop=""), "stop: want texts of at least one character, got ''"),
        ("a", dict(stop=5), "stop: want a text or several, got 5"),
        ("a", dict(stop_ids=5), "stop_ids: want a list of ids, got 5"),
        ("a", dict(stop_ids=[288]), "stop_ids: want ids below 288, got 288"),
        ("a", dict(stop_ids=["x"]), "stop_ids: want an integer of at least 0, got 'x'"),
        ("a", dict(ignore_end="no"), "ignore_end: want True or False, got 'no'"),
        ("a", dict(sampling={"heat": 1}), "sampling: want keywords of Sampler"),
        ("a", dict(session="s"), "session: want one of new_session, got str"),
        ("a", dict(options={}), "options: want GenerationOptions, got dict"),
        ([user("a")], dict(tools="t"), "tools: want a list of objects, got 't'"),
        ([user("a")], dict(template_options=[1]), "template_options: want an object, got"),
        ([user("a")], dict(template_options={"messages": []}), "want no variable messages"),
        (
            [user("a")],
            dict(template_options={"enable_thinking": "false"}),
            "template_options: want enable_thinking true or false, got 'false'",
        ),
        ([user("a")], dict(template_options={"enable_thinking": 0}), "true or false, got 0"),
        (
            [user("a")],
            dict(template_options={"enable_thinkng": False}),
            "template_options: want enable_thinking, got 'enable_thinkng'",
        ),
        ([user("a")], dict(template_options={"enableThinking": False}), "want enable_thinking, got"),
        (
            [user("a")],
            dict(reasoning="on", template_options={"enable_thinking": False}),
            "template_options: want enable_thinking as reasoning 'on' has it, got False",
        ),
        (None, {}, "prompt: want text, a list of messages, token ids, or a list of these, got None"),
        (5, {}, "prompt: want text, .*got 5"),
        (user("a"), {}, "prompt: want text, .*got {"),
        (b"abc", {}, "prompt: want text, "),
        (iter([1]), {}, "prompt: want text, "),
        (["a", None], {}, r"prompt\[1\]: want text, .*got None"),
        ([1.5], {}, "prompt: want integers, got float64"),
        ([288], {}, "prompt: want 0 to 287, got 288 at index 0"),
        ([[1], [-1]], {}, r"prompt\[1\]: want 0 to 287, got -1"),
        ("a\ud800", {}, "prompt: want Unicode"),
        ([{"role": "user"}], {}, r"messages\[0\]: want a content"),
    ],
)
def test_faults_come_at_once(chat, prompt, options, message):
    with pytest.raises(InputError, match=message):
        chat.generate(prompt, stream=True, **options)


def test_a_session_of_another_model_is_refused(chat, model):
    with pytest.raises(InputError, match="session: want one of this model"):
        chat.generate([1], 1, session=model.new_session())


def test_options_are_the_keywords(chat):
    options = GenerationOptions(max_tokens=6, ignore_end=True, sampling={"temperature": 1.0, "seed": 5})
    want = chat.generate(TEXT, 6, ignore_end=True, temperature=1.0, seed=5)
    assert outcome(chat.generate(TEXT, options=options)) == outcome(want)
    other = chat.generate(TEXT, 4, options=options, seed=6)
    assert outcome(other) == outcome(chat.generate(TEXT, 4, ignore_end=True, temperature=1.0, seed=6))
    assert options.sampling == {"temperature": 1.0, "seed": 5}


def test_the_readme_names_every_keyword():
    text = (Path(pyengine.__file__).parent / "text" / "README.md").read_text()
    table = text.split("| keyword |")[1].split("\n\n")[0]
    named = {
        name
        for row in table.splitlines()
        for name in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")
    }
    assert named == {field.name for field in fields(GenerationOptions)} - {"sampling"} | set(SAMPLING)


def test_minus_one_is_no_limit(chat):
    free = chat.generate([1, 2], context=9, ignore_end=True)
    assert outcome(chat.generate([1, 2], -1, context=9, ignore_end=True)) == outcome(free)
    assert len(free.tokens) == 7


def test_min_tokens_holds_the_ends_back(chat):
    end = chat.tokenizer.end_ids[0]
    options = dict(logit_bias={end: 1000.0})
    assert len(chat.generate(TEXT, 8, **options).tokens) == 1
    held = chat.generate(TEXT, 8, min_tokens=5, logprobs=288, **options)
    assert len(held.tokens) == 6 and held.ids[-1] == end and end not in held.ids[:-1]
    free = chat.generate(
        TEXT, 5, logprobs=288, ignore_end=True, logit_bias=dict.fromkeys(chat.tokenizer.end_ids, -1000.0)
    )
    assert held.tokens[:5] == free.tokens  # the log-probabilities reported are the model's own
    other = free.ids.tolist()[0]
    assert other not in chat.generate(TEXT, 4, min_tokens=4, stop_ids=[other]).ids


def test_how_they_are_shown(chat):
    session = chat.new_session()
    generation = chat.generate(TEXT, 3, session=session, ignore_end=True)
    assert str(generation) == generation.text and repr(generation).startswith("<Generation: ")
    assert f"{generation.prompt_tokens} prompt tokens, 3 tokens, length: " in repr(generation)
    assert repr(session) == f"<Session: {generation.prompt_tokens + 2} tokens, 1 marks>"
    assert repr(chat) == f"<LockedTextModel {chat.checkpoint.path}: 4 layers, vocabulary 288>"
    assert "\n" not in repr(chat.generate(TEXT, 0)) and "length" in repr(chat.generate(TEXT, 0))


def test_ids_need_no_tokenizer(chat, monkeypatch):
    want = [t.id for t in chat.generate([1, 2], 3).tokens]
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    bare = pyengine.load(MODEL, threads=1)
    got = bare.generate([1, 2], 3)
    assert got.ids.tolist() == want and got.text == ""
    with pytest.raises(InputError, match="pyengine-lm"):
        bare.generate("text", 3)


def test_the_reference_generates_too(chat):
    reference = pyengine.load(chat.checkpoint.path, "float64")
    messages = [user("the end")]
    assert reference.generate(messages, 3).ids.tolist() == chat.generate(messages, 3).ids.tolist()


# ---- the checkpoint's settings ---------------------------------------------------------------


def test_settings_of_a_gguf(tmp_path):
    path = with_template(tmp_path / "m.gguf", temp=0.7, top_k=5, top_p=0.95, penalty_repeat=1.1)
    model = pyengine.load(path, threads=1)
    assert model.generation_settings == dict(temperature=0.7, top_k=5, top_p=0.95, repetition_penalty=1.1)
    sampled = model.generate([1, 2, 3], 8, logprobs=0)
    named = pyengine.load(MODEL, threads=1).generate([1, 2, 3], 8, **model.generation_settings)
    assert sampled.tokens[0].logprob and sampled.ids.tolist() == named.ids.tolist()
    greedy = model.generate([1, 2, 3], 8, temperature=0, repetition_penalty=1.0)
    assert greedy.ids.tolist() == pyengine.load(MODEL, threads=1).generate([1, 2, 3], 8).ids.tolist()


def test_settings_with_a_fault(tmp_path):
    model = pyengine.load(with_template(tmp_path / "m.gguf", top_p=1.5))
    with pytest.raises(FileFormatError, match="top_p: want a number from 0 to 1, got 1.5"):
        model.generate([1, 2, 3], 8)


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    directory = tmp_path_factory.mktemp("directory") / "int8"
    quantize(MODEL, int8=directory)
    return directory


@pytest.mark.parametrize(
    "fields, want",
    [
        ({}, {"temperature": 0.0}),  # Hugging Face: greedy unless do_sample
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": None},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
        ),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),  # transformers' default
        (
            {"do_sample": False, "repetition_penalty": 1.2},
            {"temperature": 0.0, "repetition_penalty": 1.2, "penalty_last_n": -1},  # it looks at every token
        ),
    ],
)
def test_settings_of_a_directory(int8, fields, want):
    (int8 / "generation_config.json").write_text(json.dumps(fields))
    assert pyengine.load(int8, threads=1).generation_settings == want


def test_quantizing_keeps_the_settings(tmp_path):
    quantize(
        with_template(tmp_path / "m.gguf", temp=0.7, top_k=5, penalty_repeat=1.1), int8=tmp_path / "int8"
    )
    said = json.loads((tmp_path / "int8" / "generation_config.json").read_text())
    assert (said["do_sample"], said["temperature"], said["top_k"]) == (True, 0.7, 5)
    assert pyengine.load(tmp_path / "int8").generation_settings == dict(
        temperature=0.7, top_k=5, repetition_penalty=1.1, penalty_last_n=64
    )


# ---- sessions --------------------------------------------------------------------------------


def same(model, session, ids, max_tokens=4):
    """Generate with the session, and anew; the same in every bit.  -> the Generation."""
    options = dict(max_tokens=max_tokens, logprobs=5, ignore_end=True, temperature=0.8)
    kept, anew = model.generate(ids, session=session, **options), model.generate(ids, **options)
    assert kept.tokens == anew.tokens
    assert session.position == session.state.position == len(ids) + max(max_tokens - 1, 0)
    return kept


def test_a_session_computes_only_what_is_new(model):
    session, ids = model.new_session(), list(range(1, 20))
    first = same(model, session, ids)
    assert first.cached_tokens == 0
    later = [*ids, *first.ids, 7, 8]
    assert same(model, session, later).cached_tokens == len(ids) + 3  # the last was never computed
    assert same(model, session, later).cached_tokens == len(later)  # its logits are kept
    assert same(model, session, [*later, 9]).cached_tokens == len(later)
    assert same(model, session, [*ids, 100, 101]).cached_tokens == len(ids)
    assert same(model, session, [50, *ids]).cached_tokens == 0
    assert same(model, session, [50, *ids], 1).cached_tokens == len(ids) + 1


def test_any_order_of_prompts_gives_the_same_bits(model):
    rng = np.random.default_rng(1729)
    session, prompts, reused = Session(model, marks=3), [[1, 2, 3]], 0
    for _ in range(40):
        old = prompts[-rng.integers(1, min(len(prompts), 3) + 1)]  # mostly what was there just now
        ids = [
            *old[: max(0, len(old) - rng.integers(0, 6))],
            *rng.integers(0, 288, rng.integers(1, 6)).tolist(),
        ]
        generation = same(model, session, ids, int(rng.integers(1, 4)))
        reused += generation.cached_tokens
        prompts.append(ids + generation.ids.tolist())
        assert len(session.state.marks) <= 3
    assert reused > 40


@pytest.mark.parametrize("where", [0, 1, 2, 3, "between replayed calls"])
@pytest.mark.parametrize("tokens_before", [0, 1, 3])
def test_an_interrupt_leaves_a_session_right(model, monkeypatch, where, tokens_before):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    session, ids = model.new_session(), list(range(1, 12))
    same(model, session, ids[:5])
    generation = model.generate(ids, 6, stream=True, session=session)
    for _ in range(tokens_before):
        next(generation)
    with monkeypatch.context() as patch:
        if isinstance(where, int):
            patch.setattr(model, "replays", False)
            patch.setattr(model.layers[where], "post_attention_layernorm", interrupt)
        else:
            patch.setattr(ops, "attention", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(generation)
    again = same(model, session, [*ids, *generation.ids.tolist(), 3])
    assert again.cached_tokens == (len(ids) if tokens_before else 5)


def test_a_session_serves_the_last_that_began(model):
    session = model.new_session()
    first = model.generate([1, 2], 5, stream=True, session=session)
    next(first)
    next(model.generate([1, 2, 3], 5, stream=True, session=session))
    with pytest.raises(InputError, match="session: want the generation that began last"):
        next(first)


def conversation(model, turns, reasoning):
    """A chat of several turns -> how many tokens of each prompt the session had."""
    session, messages, cached = model.new_session(), [], []
    for i, text in enumerate(turns):
        messages.append(user(text))
        options = dict(max_tokens=12, reasoning=reasoning[i % len(reasoning)], reasoning_budget=3)
        kept = model.generate(messages, session=session, **options)
        anew = model.generate(messages, **options)
        assert kept.tokens == anew.tokens and kept.thinking == anew.thinking
        cached.append((kept.cached_tokens, kept.prompt_tokens))
        messages.append(assistant(kept.text, reasoning_content=kept.thinking))
    return cached


@pytest.mark.parametrize("reasoning", [["off"], ["on"], ["on", "off", "auto"]])
def test_turns_of_a_chat_compute_only_what_is_new(chat, reasoning):
    cached = conversation(chat, ["the end", "and then", "more", "on"], reasoning)
    boundaries = [total for _, total in cached[:-1]]
    assert cached[0][0] == 0
    for (reused, _), before in zip(cached[1:], boundaries):
        assert reused >= before - len(chat.tokenizer.encode("assistant\n<think>\n\n</think>\n\n")) - 1


# ---- thinking --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_spent_budget_forces_the_closing_tag(chat, budget):
    closing = chat.tokenizer.encode("</think>", special=True)
    free = chat.generate([user("the end")], budget, ignore_end=True)
    generation = chat.generate([user("the end")], 30, reasoning_budget=budget, ignore_end=True, logprobs=0)
    ids = generation.ids.tolist()
    assert ids[:budget] == free.ids.tolist() and ids[budget : budget + len(closing)] == closing
    assert generation.thinking_tokens == budget + len(closing)
    assert "</think>" not in generation.text and "</think>" not in generation.thinking
    rest = chat.tokenizer.decode(ids[budget + len(closing) :], special=False)
    assert generation.text == rest.lstrip("\n")
    assert generation.thinking == chat.tokenizer.decode(ids[:budget], special=False).strip("\n")
    anew = chat.forward([*chat.chat_template.prompt(chat.tokenizer, [user("the end")]).ids, *ids])[-2]
    assert generation.logprobs[-1] <= 0 and ids[-1] == int(anew.argmax())


def test_thinking_off_has_no_thinking(chat):
    generation = chat.generate([user("the end")], 8, reasoning="off", reasoning_budget=0)
    assert generation.thinking == "" and generation.thinking_tokens == 0


def test_stop_strings_are_looked_for_in_the_answer_alone(chat):
    free = chat.generate([user("the end")], 24, reasoning_budget=6, ignore_end=True)
    assert free.thinking and free.text
    common = next((c for c in free.text if c in free.thinking), free.text[-1])
    stopped = chat.generate([user("the end")], 24, reasoning_budget=6, ignore_end=True, stop=common)
    assert stopped.thinking == free.thinking and stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(common)]


def test_tags_that_are_special_tokens(tmp_path):
    """They have no text of their own, but the thinking ends with them all the same."""
    pytest.importorskip("tokenizers")
    path = with_template(tmp_path / "m.gguf", special_tags=True)
    model = pyengine.load(path, threads=1)
    opening, closing = (model.tokenizer.encode(tag, special=True) for tag in ("<think>", "</think>"))
    assert len(opening) == len(closing) == 1 and model.tokenizer.is_special(closing[0])
    generation = model.generate([user("the end")], 12, reasoning_budget=2, ignore_end=True)
    ids = generation.ids.tolist()
    assert ids[2] == closing[0] and generation.thinking_tokens == 3
    assert generation.text == model.tokenizer.decode(ids[3:], special=False).lstrip("\n")


# ---- which tokens the text is made of --------------------------------------------------------


def shares(generation):
    """-> ids of the thinking's tokens, and the text's bytes as text."""
    tokens, thinking, text = AnswerTokens(generation.model.tokenizer), [], b""
    for token in [*generation.tokens, None]:
        thought, said = tokens.flush() if token is None else tokens.push(token)
        thinking += [t.id for t in thought]
        text += b"".join(raw for _, raw in said)
    return thinking, text.decode("utf-8", "replace")


@pytest.mark.parametrize("budget", [0, 2, 7, None])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_tokens_of_the_text_joined_are_the_text(chat, budget, temperature):
    for seed in range(4):
        options = dict(reasoning_budget=budget, temperature=temperature, seed=seed)
        generation = chat.generate([user("the end")], 40, **options)
        thinking, text = shares(generation)
        assert text == generation.text
        assert len(thinking) >= generation.thinking_tokens - 1  # an end token inside it has no text
        for first in range(min(8, len(generation.text))):  # a stop string takes tokens, and parts of one
            stop = generation.text[first : first + 1 + first % 3]
            if stop and "\ufffd" not in stop:
                stopped = chat.generate([user("the end")], 40, stop=stop, **options)
                # bytes that are no character, right before a stop string, may be one U+FFFD or two
                assert shares(stopped)[1].rstrip("\ufffd") == stopped.text.rstrip("\ufffd")


class Pieces(Words):
    def is_special(self, token):
        return self.words[token].startswith(b"<|")

    def encode(self, text, special):
        return [0, 0]

    def stream(self, special):
        plain = super().stream(special)
        push = plain.push
        plain.push = lambda i: "" if self.is_special(i) else push(i)
        return plain

    def token_bytes(self, token):
        return self.words[token]


@given(
    st.lists(
        st.sampled_from(
            [
                "a",
                "b ",
                "\n",
                "<think>",
                "</think>",
                "<th",
                "ink>",
                "</th",
                "k>\n\nc",
                "a</think>\nb",
                "<|x|>",
            ]
        ).map(str.encode)
        | st.sampled_from([b"\xe2", b"\x82", b"\xac", "é".encode(), b"\xff"]),
        max_size=12,
    ),
    st.lists(st.sampled_from(["a", "bc", "b a", "\n", "é"]), max_size=2),
    st.booleans(),
)
def test_any_tokens_joined_are_the_text(words, stop, inside):
    """Tags, characters and stop strings may be cut into tokens anywhere."""
    words = [b"?", *words]
    answer = AnswerText(Pieces(words), tuple(stop), ThinkingText(inside))
    tokens, said, text = AnswerTokens(answer._tokenizer), b"", ""
    for i in range(1, len(words)):
        piece, thinking = answer.push(i)
        last = answer.stopped or i == len(words) - 1
        if last:
            piece, thinking = (a + b for a, b in zip((piece, thinking), answer.flush()))
        text += piece
        said += b"".join(raw for _, raw in tokens.push(Token(i, 0.0, piece, thinking, (), answer.place))[1])
        assert text.startswith(said.decode("utf-8", "replace").rstrip("\ufffd"))  # never too early
        if last:
            break
    said += b"".join(raw for _, raw in tokens.flush()[1])
    joined = said.decode("utf-8", "replace")
    if answer.stopped:  # bytes that are no character, right before a stop string, may be one U+FFFD or two
        joined, text = joined.rstrip("\ufffd"), text.rstrip("\ufffd")
    assert joined == text
