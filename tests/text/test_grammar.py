"""Answers of a given form."""

import json
import re

import numpy as np
import pytest
from chat_models import user, with_template

import pyengine
from pyengine.errors import InputError

pytest.importorskip("llguidance", reason="needs the extra grammar")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    return pyengine.load("default", threads=1)


def drawn(model, form, seed, **options):
    return model.generate("And", 60, guided=form, temperature=2.0, seed=seed, **options)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_is_of_the_form(model, seed):
    answer = drawn(model, {"json": SCHEMA}, seed)
    value = json.loads(answer.text)
    assert answer.finish_reason == "stop" and value["name"] in "ab" and 0 <= value["n"] <= 99
    assert re.fullmatch(r"[a-c]{3}/x?", drawn(model, {"regex": "[a-c]{3}/x?"}, seed).text)
    assert drawn(model, {"choice": ['say "yes"', "no"]}, seed).text in ('say "yes"', "no")
    assert re.fullmatch("(ab)+c", drawn(model, {"grammar": 'start: "ab" "ab"? "c"'}, seed).text)
    assert re.fullmatch("yes|no[0-9]", drawn(model, {"grammar": 'root ::= "yes" | "no" [0-9]'}, seed).text)


def test_the_choice_among_the_allowed_tokens_is_the_models(model):
    """Greedy: the likeliest allowed token each time, and its log-probability is the model's own."""
    answer = model.generate("And the LORD", 8, guided={"regex": " [a-z ]+"}, logprobs=0)
    free = model.generate("And the LORD", 1, logprobs=2048)
    likeliest = next(
        i for i, _ in free.tokens[0].top if re.fullmatch(b" [a-z ]*", model.tokenizer.token_bytes(i))
    )
    assert answer.ids[0] == likeliest
    assert answer.logprobs[0] == dict(free.tokens[0].top)[likeliest]


def test_the_bits_of_free_answers_are_untouched(model, monkeypatch):
    seen, sample = [], model.new_sampler().__class__.sample

    def watching(self, logits):
        seen.append(logits)
        return sample(self, logits)

    monkeypatch.setattr("pyengine.text.sampler.Sampler.sample", watching)
    state = model.new_state()
    model.generate([5, 6], 3)
    assert np.array_equal(seen[0], model.forward([5, 6], state, last_only=True)[0])


def test_thinking_is_free_and_the_answer_is_not(model):
    answer = model.generate(
        [user("Who?")], 200, guided={"json": SCHEMA}, reasoning="on", reasoning_budget=10, temperature=0.5
    )
    assert answer.thinking and json.loads(answer.text)["name"] in "ab"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(guided={"json": {"type": "strange"}}), "grammar: want one that llguidance compiles, got"),
        (dict(guided={"regex": "(("}), "grammar: want one that llguidance compiles, got"),
        (dict(guided={"grammar": "nothing"}), "grammar: want a rule start"),
        (dict(guided={"grammar": "root ::= (("}), "grammar: want GBNF, got"),
        (dict(guided={"xml": "a"}), "guided: want an object with one of json, regex, choice, grammar"),
        (dict(guided={"choice": []}), "guided: want choice to be a list of texts"),
        (dict(guided={"regex": "a"}, ignore_end=True), "ignore_end: want it without guided"),
        (dict(guided={"regex": "a"}, min_tokens=3), "min_tokens: want it without guided"),
        (dict(tool_calls="required"), "tool_calls: want tools with it"),
    ],
)
def test_bad_forms_are_one_line(model, options, message):
    with pytest.raises(InputError) as caught:
        model.generate("And", 3, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_calls_that_are_demanded(tmp_path):
    """By either way of writing calls, with whatever is drawn."""
    tools = [
        {"type": "function", "function": {"name": "look", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    ]
    for written in ("{{ tools | tojson }}", "<function=x> {{ tools | tojson }}"):
        source = written + "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
        model = pyengine.load(with_template(tmp_path / "m.gguf", source), threads=1)
        for seed in range(3):
            options = dict(tools=tools, temperature=1.5, seed=seed, most_tool_calls=1)
            for choice in ("required", "look"):
                answer = model.generate([user("a")], 400, tool_calls=choice, **options)
                (call,) = answer.tool_calls
                assert answer.text == "" and answer.finish_reason == "stop"
                assert call["name"] == "look" or choice == "required"
                value = json.loads(call["arguments"])
                assert value == {} if call["name"] == "now" else value["name"] in "ab"
        with pytest.raises(InputError, match="tool_calls: want one of the tools .look, now., got 'other'"):
            model.generate([user("a")], 3, tools=tools, tool_calls="other")
