"""Tool calls in the text of an answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.text.tool_calls import ToolCallText

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "where": {"type": "object"},
            },
        },
    },
}


def read(text, tools=(WEATHER,), cuts=None):
    """-> (text, [(name, arguments)]), of an answer that comes in pieces."""
    split, said, parts = ToolCallText(list(tools)), "", []
    bounds = [0, *sorted(cuts or ()), len(text)]
    for begin, end in zip(bounds, bounds[1:]):
        more, pieces = split.push(text[begin:end])
        said, parts = said + more, parts + pieces
    more, pieces = split.flush()
    said, parts = said + more, parts + pieces
    calls = []
    for part in parts:
        if part.name is not None:
            assert part.number == len(calls)
            calls.append([part.name, ""])
        calls[part.number][1] += part.arguments
    return said, [tuple(call) for call in calls]


def as_json(name, arguments):
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def as_xml(name, arguments):
    written = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in written.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


words = st.text(st.characters(exclude_characters="<>\r", exclude_categories=["Cs"]), max_size=20)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "city": words.map(lambda text: text.strip("\n")),
        "days": st.integers(),
        "where": st.dictionaries(words, st.integers() | words, max_size=2),
    },
)


@given(
    st.sampled_from([as_json, as_xml]),
    words.map(str.rstrip),
    st.lists(arguments, min_size=1, max_size=3),
    st.sets(st.integers(1, 300), max_size=30),
)
def test_calls_come_back_whatever_the_pieces(write, before, calls, cuts):
    text = before + "\n\n" + "\n".join(write("weather", one) for one in calls) + "\n"
    said, got = read(text, cuts=[cut for cut in cuts if cut < len(text)])
    assert said == before
    assert [(name, json.loads(found)) for name, found in got] == [("weather", one) for one in calls]


@given(st.text(st.sampled_from('<>/tool_calfunin=pmer{}"\n x'), max_size=80), st.sets(st.integers(1, 79)))
def test_the_pieces_make_no_difference(text, cuts):
    """Of text that is nearly a call too."""
    assert read(text, cuts=[cut for cut in cuts if cut < len(text)]) == read(text)


@given(st.text(max_size=60))
def test_a_text_without_calls_is_itself(text):
    assert read(text) == (text, [])


@pytest.mark.parametrize(
    "text, said, calls",
    [
        ("<tool_call>\n{}\n</tool_call>", "<tool_call>\n{}\n</tool_call>", []),  # cut: what is no call stays
        ("<tool_call>nonsense</tool_call> on", "<tool_call>nonsense</tool_call> on", []),
        ('a <tool_call>\n{"name": ', 'a<tool_call>\n{"name": ', []),
        (as_json("f", {"x": "</tool_call>"}), "", [("f", '{"x": "</tool_call>"}')]),
        (as_json("f", '{"x": 1}'), "", [("f", '{"x": 1}')]),
        (as_xml("weather", {"city": "007"}), "", [("weather", '{"city": "007"}')]),
        (as_xml("weather", {"maybe": "12"}), "", [("weather", '{"maybe": "12"}')]),
        (as_xml("weather", {"maybe": "null"}), "", [("weather", '{"maybe": null}')]),
        (as_xml("other", {"n": 12, "t": "a b"}), "", [("other", '{"n": 12, "t": "a b"}')]),
        (as_xml("weather", {"city": "a\nb"}), "", [("weather", '{"city": "a\\nb"}')]),
        ("<tool_call><function=now></function></tool_call>", "", [("now", "{}")]),
        (as_xml("now", {}) + "and more", "", [("now", "{}")]),
        (
            "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n",
            "",
            [("weather", '{"days": 3')],
        ),
    ],
)
def test_what_is_a_call_and_what_is_none(text, said, calls):
    assert read(text) == (said, calls)
