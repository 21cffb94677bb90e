"""Real chat templates render what transformers' `apply_chat_template` renders (kept in prompts.json)."""

import json
import re

import pytest
from chat_models import assistant, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyengine.errors import InputError
from pyengine.text.chat import ChatTemplate

pytest.importorskip("jinja2", reason="needs the extra text")
pytest.importorskip("tokenizers", reason="needs the extra text")

from chat_cases import (
    CONVERSATIONS,
    NAMES,
    PROMPTS,
    TOKENS,
    TOOLS,
    arguments_of_transformers,
    call,
    result,
    source,
    system,
    tokenizer,
    undated,
)


@pytest.fixture(scope="module")
def templates():
    made = {name: ChatTemplate(source(name), name, TOKENS) for name in NAMES}
    yield made
    for template in made.values():
        template.close()


@pytest.fixture(scope="module")
def prompts():
    return json.loads(PROMPTS.read_text(encoding="utf-8"))


def test_there_are_enough_templates(prompts):
    assert len(NAMES) >= 15 and set(prompts) == set(NAMES)
    assert all(set(found) == set(CONVERSATIONS) for found in prompts.values())
    assert sum(text is None for found in prompts.values() for text in found.values()) < 30


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("title", CONVERSATIONS)
def test_the_prompt_is_transformers(templates, prompts, name, title):
    messages, more = CONVERSATIONS[title]
    want = prompts[name][title]
    if want is not None:
        assert undated(templates[name].render(messages, **more)) == want
    elif title in ("developer", "null content"):  # what clients need more
        other = {"developer": [system("be brief"), user("hi")]}.get(title) or [
            {"content": "", **{k: v for k, v in m.items() if v is not None}} for m in messages
        ]
        try:
            assert templates[name].render(messages, **more) == templates[name].render(other, **more)
        except InputError as error:
            assert "\n" not in str(error)
            with pytest.raises(InputError):
                templates[name].render(other, **more)
    else:
        with pytest.raises(InputError, match="messages: the chat template") as error:
            templates[name].render(messages, **more)
        assert "\n" not in str(error.value)


def prompted(template, name, messages, more):
    """`ChatTemplate.prompt` with the keywords of `render`."""
    more = dict(more)
    named = {
        k: more.pop(k, None)
        for k in ("tools", "documents", "add_generation_prompt", "continue_final_message")
    }
    if named["continue_final_message"] is None and named["add_generation_prompt"] is None:
        named["add_generation_prompt"] = True  # as transformers, also behind an assistant's message
    return template.prompt(tokenizer(name), messages, options=more, **named)


@pytest.mark.parametrize("name", NAMES)
def test_every_control_token_of_a_template_is_one(templates, prompts, name):
    """Of a request that spells none: the ids of the whole text with special tokens read as such."""
    for title, (messages, more) in CONVERSATIONS.items():
        if prompts[name][title] is None or title == "developer":
            continue
        try:
            prompt = prompted(templates[name], name, messages, more)
        except InputError as error:
            assert re.fullmatch(r"(tools|documents): the chat template shows no \1", str(error))
            continue
        assert undated(prompt.text) == prompts[name][title]
        assert prompt.ids.tolist() == tokenizer(name).encode(prompt.text, special=True), title


@pytest.mark.parametrize("name", NAMES)
def test_a_developers_instructions_are_in_the_prompt(templates, prompts, name):
    """As the template has them, where it knows the role; else as those of a system."""
    prompt = prompted(templates[name], name, *CONVERSATIONS["developer"])
    same = [system("be brief"), user("hi")]
    want = prompts[name]["developer"] if name == "gpt_oss" else undated(templates[name].render(same))
    assert undated(prompt.text) == want and "be brief" in prompt.text


# ---- transformers itself -----------------------------------------------------------------------


def theirs(name):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(name)._backend, chat_template=source(name), **TOKENS
    )


@pytest.mark.golden
def test_the_prompts_kept_are_transformers(prompts):
    pytest.importorskip("transformers")
    from make_chat_prompts import prompt

    for name in NAMES:
        for title, conversation in CONVERSATIONS.items():
            assert prompts[name][title] == prompt(name, *conversation), (name, title)


PIECES = ["a", " ", "\n", "\n\n", "né", "</think>", "<think>", "<tool_response>", "</tool_response>"]
TEXTS = st.lists(st.sampled_from([*PIECES, "<b>", "{", '"', "👩", "  "]), max_size=5).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2, width=16) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(TEXTS, VALUES, max_size=2)
CALLS = st.lists(
    st.builds(call, st.sampled_from(["f", "weather"]), ARGUMENTS, st.integers(0, 9)), min_size=1, max_size=2
)
ANSWERS = st.one_of(
    st.builds(assistant, TEXTS),
    st.builds(assistant, TEXTS, reasoning_content=TEXTS),
    st.builds(assistant, TEXTS, reasoning=TEXTS, name=st.none()),
    st.builds(assistant, TEXTS, thinking=TEXTS, tool_calls=st.none()),
    st.builds(assistant, TEXTS | st.none(), tool_calls=CALLS),
)
ASKS = st.builds(assistant, TEXTS, tool_calls=CALLS)
ROUNDS = st.one_of(
    st.tuples(st.builds(user, TEXTS), ANSWERS),
    st.tuples(st.builds(user, TEXTS), ASKS, st.builds(result, TEXTS), ANSWERS),
    st.tuples(st.builds(user, TEXTS)),
)


@st.composite
def conversations(draw):
    messages = draw(st.just([]) | st.builds(system, TEXTS).map(lambda m: [m]))
    for turn in draw(st.lists(ROUNDS, max_size=3)):
        messages = [*messages, *turn]
    more = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "tools": st.just(TOOLS) | st.just([]),
                "enable_thinking": st.booleans(),
                "preserve_thinking": st.booleans(),
                "documents": st.just([{"doc_id": "1", "title": "T", "text": "x"}]),
                "add_generation_prompt": st.booleans(),
                "continue_final_message": st.booleans(),
            },
        )
    )
    if more.get("continue_final_message"):
        more.pop("add_generation_prompt", None)
    return [*messages, draw(st.builds(user, TEXTS) | ANSWERS)], more


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_any_conversation_is_transformers(templates, name):
    """The same text and the same ids; what transformers refuses is refused, or a client needs it."""
    their = theirs(name)

    @settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversations())
    def compare(conversation):
        messages, more = conversation
        keywords = arguments_of_transformers(more)
        try:
            text = their.apply_chat_template(messages, tokenize=False, **keywords)
            ids = their.apply_chat_template(messages, return_dict=False, **keywords)
        except Exception:
            text = None
        try:
            ours = templates[name].render(messages, **more)
        except InputError:
            ours = None
        if text is None:
            clients = any(m["role"] == "developer" or m.get("content") is None for m in messages)
            assert ours is None or clients
            return
        assert ours == text
        try:
            prompt = prompted(templates[name], name, messages, more)
        except InputError as error:
            assert "the chat template shows no" in str(error)
            return
        assert prompt.text == text and prompt.ids.tolist() == ids

    compare()
