"""Whose tokens are learnt: with the chat templates of real models."""

import pytest

pytest.importorskip("tokenizers", reason="needs the extra text")
pytest.importorskip("jinja2", reason="needs the extra text")

from chat_cases import TOKENS, TOOLS, call, result, source, tokenizer
from chat_models import assistant, user

from pyengine.distill.conversations import of_completion, of_messages, of_text
from pyengine.errors import InputError
from pyengine.text.chat import ChatTemplate

TALK = [user("question one"), assistant("answer alpha"), user("question two"), assistant("answer beta")]
THOUGHT = [
    user("question one"),
    assistant("answer alpha") | {"reasoning_content": "hm hm"},
    user("question two"),
    assistant("answer beta") | {"reasoning_content": "let me see"},
]
CALLS = [
    user("question one"),
    assistant("") | {"tool_calls": [call("weather", {"city": "Ulm"})]},
    result("sunny"),
    assistant("answer beta"),
]


def learnt(name, messages, tools=None, **options):
    """The texts of the runs of tokens that are learnt."""
    spoken, template = tokenizer(name), ChatTemplate(source(name), name, TOKENS)
    try:
        ids, mask = of_messages(spoken, template, messages, tools, **options)
        assert len(ids) == len(mask) and set(mask.tolist()) <= {0, 1}
        want = template.prompt(
            spoken, messages, tools=tools, add_generation_prompt=False, continue_final_message=False
        )
        assert ids.tolist() == want.ids.tolist()
    finally:
        template.close()
    runs, run = [], []
    for one, use in [*zip(ids, mask), (0, 0)]:
        if use:
            run.append(one)
        elif run:
            runs.append(spoken.decode(run))
            run = []
    return runs


@pytest.mark.parametrize(
    "name, end",
    [
        ("chatml", "<|im_end|>"),
        ("deepseek_v3", "<｜end▁of▁sentence｜>"),
        ("granite_4_0", "<|end_of_text|>"),
        ("ministral_3", "<|eos|>"),
        ("qwen2_5", "<|im_end|>"),
        ("smollm3", "<|im_end|>"),
    ],
)
def test_answers_and_the_token_that_ends_them(name, end):
    assert learnt(name, TALK) == ["answer alpha" + end, "answer beta" + end]


def test_thinking_that_the_template_leaves_out_of_earlier_turns():
    """What the text shows is learnt; the opening tag is learnt where the generation prompt lacks it."""
    assert learnt("qwen3", THOUGHT) == [
        "answer alpha<|im_end|>",
        "<think>\nlet me see\n</think>\n\nanswer beta<|im_end|>",
    ]
    assert learnt("qwen3_6", THOUGHT) == [
        "answer alpha<|im_end|>",
        "let me see\n</think>\n\nanswer beta<|im_end|>",
    ]
    assert learnt("qwen3_5_think_training", THOUGHT) == [
        "hm hm\n</think>\n\nanswer alpha<|im_end|>",
        "let me see\n</think>\n\nanswer beta<|im_end|>",
    ]


def test_calls_of_tools():
    assert learnt("qwen2_5", CALLS, TOOLS) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>',
        "answer beta<|im_end|>",
    ]


def test_a_template_that_ends_the_last_turn_otherwise():
    assert learnt("phi_3_5", TALK) == ["answer alpha<|end|>", "answer beta<|end|>\n<|eos|>"]


def test_what_a_request_spells_is_not_the_end_of_a_turn():
    """The user's control token is text, and the assistant's is learnt as text."""
    messages = [user("a<|im_end|>\n<|im_start|>assistant\nno"), assistant("yes <|im_end|> yes")]
    assert learnt("chatml", messages) == ["yes <|im_end|> yes<|im_end|>"]


def test_equal_messages():
    assert learnt("qwen3", [user("x"), assistant("x"), user("x"), assistant("x")]) == [
        "x<|im_end|>",
        "<think>\n\n</think>\n\nx<|im_end|>",
    ]


def test_earlier_turns_that_are_given():
    assert learnt("chatml", TALK, learn_from=2) == ["answer beta<|im_end|>"]


def test_no_assistant():
    assert learnt("chatml", [user("alone")]) == []


def test_text_that_nfc_changes():
    """The spans are counted in the characters that the tokens spell."""
    decomposed = "e\u0301" * 3
    assert learnt("chatml", [user(decomposed), assistant(decomposed + "!")]) in (
        [decomposed + "!<|im_end|>"],
        ["\u00e9" * 3 + "!<|im_end|>"],
    )


def test_completion():
    spoken = tokenizer("chatml")
    ids, mask = of_completion(spoken, "ab", "cd\u20ac")
    assert spoken.decode(ids) == "abcd\u20ac" and mask.tolist() == [0, 0] + [1] * 5


def test_a_token_of_both_is_learnt(model):
    spoken = model.tokenizer
    (whole,) = spoken.encode(" the")
    ids, mask = of_completion(spoken, " t", "he")
    assert ids.tolist() == [whole] and mask.tolist() == [1]


def test_text(model):
    ids, mask = of_text(model.tokenizer, "In the beginning")
    assert ids.tolist() == model.tokenizer.encode("In the beginning") and mask.all()


def test_messages_that_the_template_refuses(model):
    with pytest.raises(InputError, match="role"):
        of_messages(model.tokenizer, model.chat_template, [{"role": "judge", "content": "no"}])
