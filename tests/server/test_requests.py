"""What a request may say: every parameter does what its table says, and no body brings the server down."""

import json
import re
from pathlib import Path

import pytest
from chat_models import assistant, user, with_template
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import ask, serving, stream

import pyengine
from pyengine import server

pytest.importorskip("tokenizers", reason="needs the extra text")
pytest.importorskip("jinja2", reason="needs the extra text")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("pydantic", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

MESSAGES = [user("the end")]
README = Path(server.__file__).with_name("README.md")
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
BODIES = {COMPLETIONS: {"prompt": "the end"}, CHATS: {"messages": MESSAGES}}


def kinds():
    from pyengine.server.requests import ChatRequest, CompletionRequest

    return {COMPLETIONS: CompletionRequest, CHATS: ChatRequest}


def text(answer):
    choice = answer["choices"][0]
    return choice.get("text", choice.get("message"))


@pytest.fixture(scope="module")
def small(model):
    """A server with a context of 64 tokens."""
    with serving(server.create_app(model, "small", context=64, max_tokens=8)) as address:
        yield address


# ---- harmless --------------------------------------------------------------------------------

HARMLESS = [
    {"user": "me"},
    {"metadata": {"a": "b"}},
    {"metadata": {}},
    {"store": True},
    {"store": False},
    {"service_tier": "auto"},
    {"service_tier": "flex"},
    {"prompt_cache_key": "k"},
    {"prompt_cache_retention": "24h"},
    {"safety_identifier": "s"},
    {"verbosity": "low"},
    {"cache_prompt": True},
    {"cache_prompt": False},
    {"request_id": "r"},
    {"stream_options": {"include_usage": True}},
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
@pytest.mark.parametrize("harmless", HARMLESS, ids=json.dumps)
def test_harmless_parameters_change_nothing(address, path, harmless):
    plain, got = (ask(address, path, BODIES[path] | more) for more in ({}, harmless))
    assert got[0] == 200 and text(got[1]) == text(plain[1])


def test_the_harmless_ones_are_in_the_table():
    from pyengine.server.requests import Harmless

    assert {name for row in HARMLESS[:-1] for name in row} == set(Harmless.model_fields)


def test_no_tools_are_none(address):
    body = BODIES[CHATS] | {"tools": [], "tool_choice": "auto", "functions": []}
    assert ask(address, CHATS, body)[1]["usage"] == ask(address, CHATS, BODIES[CHATS])[1]["usage"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_parameters_with_one_value(address, path):
    """Each such value is accepted, alone; every other is refused, true in place of 1 too."""
    plain = ask(address, path, BODIES[path])[1]
    rows = 0
    for name, field in kinds()[path].model_fields.items():
        values = (field.json_schema_extra or {}).get("enum")
        if values is None:
            continue
        rows += 1
        for value in values:
            status, answer = ask(address, path, BODIES[path] | {name: value})
            assert status == 200 and text(answer) == text(plain), name
        for value in (True, False, 0, 1, 2, "x", [], {}, [1], {"type": "json_object"}):
            if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
                status, answer = ask(address, path, BODIES[path] | {name: value})
                assert status == 400 and answer["error"]["param"] == name
                assert "nothing else is done here" in answer["error"]["message"]
    assert rows >= 11


# ---- other names, and values that mean none --------------------------------------------------


@pytest.mark.parametrize(
    "body, same",
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"repetition_penalty": 1.4}, {"repeat_penalty": 1.4}),
        ({"n_predict": 3}, {"max_tokens": 3}),
        ({"n_predict": -1}, {"max_tokens": 61}),
        ({"max_tokens": -1}, {"max_tokens": 61}),
        ({"max_tokens": 4, "n_predict": 4}, {"max_tokens": 4}),
        ({"min_tokens": 0}, {}),
        ({"repeat_last_n": 64}, {}),
    ],
)
def test_the_same_in_other_words(small, body, same):
    plain = {"prompt": [5, 6, 7], "ignore_eos": True, "temperature": 1.2, "repeat_penalty": 1.0}
    if "repetition_penalty" in body:
        del plain["repeat_penalty"]
    got, want = (ask(small, COMPLETIONS, plain | more) for more in (body, same))
    assert got[0] == want[0] == 200 and text(got[1]) == text(want[1])
    assert got[1]["usage"]["total_tokens"] == want[1]["usage"]["total_tokens"]


def test_parameters_of_others_arrive(address, model):
    ids = model.generate("the end", 12, ignore_end=True).ids.tolist()
    for body, options in [
        ({"stop_token_ids": [ids[4]]}, dict(stop_ids=[ids[4]])),
        ({"stop_token_ids": [ids[0]], "min_tokens": 5}, dict(stop_ids=[ids[0]], min_tokens=5)),
        ({"repeat_last_n": 3, "repeat_penalty": 2}, dict(penalty_last_n=3, repetition_penalty=2.0)),
        ({"repeat_last_n": -1, "frequency_penalty": 1}, dict(penalty_last_n=-1, frequency_penalty=1.0)),
    ]:
        answer = ask(address, COMPLETIONS, {"prompt": "the end", "max_tokens": 12, "ignore_eos": True} | body)
        want = model.generate("the end", 12, ignore_end=True, **options)
        assert text(answer[1]) == want.text
        assert answer[1]["usage"]["completion_tokens"] == len(want.tokens)


def test_usage_in_every_chunk(address):
    asked = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for path, body in BODIES.items():
        chunks, _ = stream(address, path, body | asked)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == max(counts) > 1 and len(set(counts)) > 2
        whole = ask(address, path, body)[1]["usage"]
        assert counts[-1] == whole["completion_tokens"]
        assert chunks[-1]["usage"]["completion_tokens_details"] == whole["completion_tokens_details"]
        chunks, _ = stream(address, path, body | {"stream_options": {"continuous_usage_stats": True}})
        assert not any("usage" in chunk for chunk in chunks)  # as vLLM has it: include_usage is the switch


# ---- thinking --------------------------------------------------------------------------------


def test_a_switch_that_is_null_is_left_open(told):
    default, address = told
    want = ask(address, CHATS, BODIES[CHATS])[1]["usage"]["prompt_tokens"]
    for switch in ("enable_thinking", "reasoning_effort", "preserve_thinking", "continue_final_message"):
        body = BODIES[CHATS] | {"chat_template_kwargs": {switch: None}}
        status, answer = ask(address, CHATS, body)
        assert status == 200 and answer["usage"]["prompt_tokens"] == want, default


@pytest.mark.parametrize(
    "kwargs", [{"enable_thinking": "false"}, {"enable_thinking": 0}, {"enable_thinkin": False}]
)
def test_a_switch_that_would_switch_nothing(told, kwargs):
    status, answer = ask(told[1], CHATS, BODIES[CHATS] | {"chat_template_kwargs": kwargs})
    assert status == 400 and answer["error"]["param"] == "chat_template_kwargs"


@pytest.fixture(scope="module", params=["off", "on"])
def told(request, model):
    with serving(server.create_app(model, "small", max_tokens=8, reasoning=request.param)) as address:
        yield request.param, address


def test_the_requests_word_on_thinking_counts(told, model):
    default, address = told
    prompts = {mode: model.generate(MESSAGES, 1, reasoning=mode).prompt_tokens for mode in ("on", "off")}
    assert prompts["on"] != prompts["off"]
    for mode, flag, effort in (("on", True, "low"), ("off", False, "none")):
        for more in (
            {"chat_template_kwargs": {"enable_thinking": flag}},
            {"enable_thinking": flag},
            {"reasoning_effort": effort},
            {"reasoning_effort": effort, "enable_thinking": flag},
            {"reasoning_effort": effort, "chat_template_kwargs": {"enable_thinking": flag}},
        ):
            status, answer = ask(address, CHATS, BODIES[CHATS] | more)
            assert status == 200 and answer["usage"]["prompt_tokens"] == prompts[mode], more
    answer = ask(address, CHATS, BODIES[CHATS] | {"chat_template_kwargs": {"other": 1}})[1]
    assert answer["usage"]["prompt_tokens"] == prompts[default]


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    "opening, refused", [("<think>\n", False), ("<think>\n\n</think>\n\n", True), ("", None)]
)
def test_a_template_without_a_switch(tmp_path, opening, refused):
    """What the template contradicts is refused; what the model may do by itself is not."""
    template = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}"
    model = pyengine.load(with_template(tmp_path / "m.gguf", template), threads=1)
    with serving(server.create_app(model, "small", max_tokens=4)) as address:
        for flag, effort in ((True, "high"), (False, "none")):
            for body, param in (
                ({"reasoning_effort": effort}, "reasoning_effort"),
                ({"chat_template_kwargs": {"enable_thinking": flag}}, "chat_template_kwargs"),
            ):
                status, answer = ask(address, CHATS, BODIES[CHATS] | body)
                assert status == (400 if flag is refused else 200)
                assert status == 200 or answer["error"]["param"] == param


@pytest.mark.parametrize(
    "body, param",
    [
        ({"reasoning_effort": "none", "enable_thinking": True}, "enable_thinking"),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs",
        ),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs",
        ),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": 3, "n_predict": 4}, "n_predict"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"min_tokens": 2, "stop": "x"}, "min_tokens"),
        ({"tools": [{"a": 1}], "chat_template_kwargs": {"tools": [{"b": 1}]}}, "chat_template_kwargs"),
        (
            {"continue_final_message": False, "chat_template_kwargs": {"continue_final_message": True}},
            "chat_template_kwargs",
        ),
    ],
)
def test_a_request_that_contradicts_itself(address, body, param):
    status, answer = ask(address, CHATS, BODIES[CHATS] | body)
    assert status == 400 and answer["error"]["param"] == param


# ---- faults ----------------------------------------------------------------------------------


def nested(depth):
    return b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    "path, body, param",
    [
        (COMPLETIONS, b'{"prompt": "a\\ud800"}', None),
        (COMPLETIONS, b'{"prompt": "a", "\\udfff": 1}', None),
        (COMPLETIONS, b'{"prompt": "a", "stop": ["\\ud800"]}', None),
        (COMPLETIONS, b'{"prompt": "a", "model": "\\ud800"}', None),
        (CHATS, b'{"messages": [{"role": "\\ud800", "content": "a"}]}', None),
        (CHATS, b'{"messages": [{"role": "user", "content": "a", "\\ud800": 1}]}', None),
        (
            CHATS,
            b'{"messages": [{"role": "user", "content": "a"}], "metadata": {"\\ud800": "\\ud800"}}',
            None,
        ),
        (CHATS, nested(600), None),
        (CHATS, nested(60), "messages"),
        (
            CHATS,
            b'{"messages": [{"role": "user", "content": ' + b'{"a":' * 600 + b"1" + b"}" * 600 + b"}]}",
            None,
        ),
        (COMPLETIONS, json.dumps({"prompt": "a", "logit_bias": {"1" * 5000: 1}}).encode(), "logit_bias"),
        (COMPLETIONS, json.dumps({"prompt": "a", "logit_bias": {"\u0661": 1}}).encode(), "logit_bias"),
        (COMPLETIONS, json.dumps({"prompt": "a", "logit_bias": {"1\n": 1}}).encode(), "logit_bias"),
        (COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", None),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', None),
        (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (COMPLETIONS, b'{"prompt": "a", "prompt": "b"}', None),
        (COMPLETIONS, b'\xff\xfe{"prompt": "a"}', None),
        (COMPLETIONS, b'{"prompt": "a", "' + b"x" * 100_000 + b'": 1}', "x" * 100),
        (COMPLETIONS, b'{"prompt": "a", "\\u0000\\u001b[31m": 1}', "\\x00\\x1b[31m"),
        (COMPLETIONS, b'{"prompt": [18446744073709551615]}', "prompt"),
        (COMPLETIONS, b'{"prompt": [-1]}', "prompt"),
        (COMPLETIONS, b'{"prompt": []}', "prompt"),
        (COMPLETIONS, b'{"prompt": [[]]}', "prompt"),
        (COMPLETIONS, b'{"prompt": ["a", ""]}', "prompt"),
        (COMPLETIONS, b'{"prompt": "a", "max_tokens": true}', "max_tokens"),
        (COMPLETIONS, b'{"prompt": "a", "max_tokens": -2}', "max_tokens"),
        (COMPLETIONS, b'{"prompt": "a", "top_k": -2}', "top_k"),
        (COMPLETIONS, b'{"prompt": "a", "seed": -2}', "seed"),
        (COMPLETIONS, b'{"prompt": "a", "stop_token_ids": [288]}', "stop_token_ids"),
        (COMPLETIONS, b'{"prompt": "a", "stop": [""]}', "stop"),
        (COMPLETIONS, b'{"prompt": "a", "stop": ""}', "stop"),
        (COMPLETIONS, b'{"prompt": "a", "stop": ["b", ""]}', "stop"),
        (COMPLETIONS, b'{"prompt": "a", "logit_bias": {"5": 1, "05": 2}}', "logit_bias"),
        (COMPLETIONS, b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
        (COMPLETIONS, b'{"prompt": "a", "max_tokens": 1e300}', "max_tokens"),
        (COMPLETIONS, b'{"prompt": [5, 6.5]}', "prompt"),
        (
            CHATS,
            b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": []}}',
            "chat_template_kwargs",
        ),
        (CHATS, b'{"messages": [{"role": "user", "content": "a"}], "store": "yes"}', "store"),
        (CHATS, b'{"messages": "a"}', "messages"),
        (CHATS, b'{"messages": [null]}', "messages"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_body_with_a_fault_is_400(address, path, body, param):
    status, answer = ask(address, path, body)
    assert status == 400 and answer["error"]["param"] == param, answer
    assert answer["error"]["message"].isprintable() and len(answer["error"]["message"]) < 5000
    assert ask(address, "/health")[0] == 200


@pytest.mark.parametrize(
    "path, name, meant",
    [
        (COMPLETIONS, "max_token", "max_tokens"),
        (COMPLETIONS, "maxTokens", "max_tokens"),
        (COMPLETIONS, "top-k", "top_k"),
        (COMPLETIONS, "temprature", "temperature"),
        (COMPLETIONS, "prompts", "prompt"),
        (CHATS, "message", "messages"),
        (CHATS, "chat_template_kwarg", "chat_template_kwargs"),
        (CHATS, "stream_option", "stream_options"),
        (CHATS, "frequence_penalty", "frequency_penalty"),
        (CHATS, "tool_choise", "tool_choice"),
        (COMPLETIONS, "messages", None),
        (CHATS, "prompt", None),
        (CHATS, "zzz", None),
        (CHATS, "", None),
        (CHATS, "東京", None),
    ],
)
def test_a_name_that_nearly_is_a_parameter(address, path, name, meant):
    status, answer = ask(address, path, BODIES[path] | {name: 1})
    message = f"{name}: this parameter is not known here" + (f": did you mean {meant}?" if meant else "")
    assert status == 400 and answer["error"]["code"] == "unknown_parameter"
    assert (answer["error"]["param"], answer["error"]["message"]) == (name, message)


def test_every_slip_of_the_hand_is_near():
    """One letter left out, doubled, or two exchanged."""
    from pyengine.server.body import checked
    from pyengine.server.errors import ApiError

    for kind in kinds().values():
        for name in (n for n in kind.model_fields if len(n) > 5):
            for i in range(len(name) - 1):
                swapped = name[:i] + name[i + 1] + name[i] + name[i + 2 :]
                for slip in (name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:], swapped):
                    if slip in kind.model_fields:
                        continue
                    with pytest.raises(ApiError, match=rf"did you mean {name}\?") as error:
                        checked({slip: 1}, kind)
                    assert error.value.body["error"]["param"] == slip


@pytest.mark.parametrize(
    "body, same",
    [
        ({"max_tokens": 3.0, "seed": 5.0, "top_k": 7.0}, {"max_tokens": 3, "seed": 5, "top_k": 7}),
        ({"prompt": [5.0, 6, 7.0]}, {}),
        ({"prompt": [[5.0, 6.0, 7.0]], "n": 1.0, "stop_token_ids": [9.0]}, {"stop_token_ids": [9]}),
        ({"logprobs": 2.0, "min_tokens": 0.0, "repeat_last_n": -1.0}, {"logprobs": 2, "repeat_last_n": -1}),
    ],
)
def test_a_whole_number_may_have_a_point(address, body, same):
    """JSON has one kind of numbers; clients in JavaScript and Lua do not choose how they are written."""
    plain = {"prompt": [5, 6, 7], "temperature": 1.2, "max_tokens": 4, "ignore_eos": True}
    (status, got), (_, want) = (ask(address, COMPLETIONS, plain | one) for one in (body, same))
    assert status == 200 and got["choices"] == want["choices"]


def test_logprobs_that_nobody_asks_for(address):
    asked = {"logprobs": False, "top_logprobs": 0}
    status, answer = ask(address, CHATS, BODIES[CHATS] | asked)
    assert status == 200 and answer["choices"][0]["logprobs"] is None
    assert ask(address, CHATS, BODIES[CHATS] | asked | {"top_logprobs": 1})[0] == 400


def json_values():
    texts = st.text(st.characters(), max_size=8) | st.sampled_from(["<|im_end|>", "none", "auto", "system"])
    atoms = (
        st.none()
        | st.booleans()
        | st.integers(-3, 300)
        | st.integers(-(10**19), 10**19)
        | st.floats(allow_nan=False, allow_infinity=False)
        | texts
        | st.sampled_from(["\ud800", "a\udc00b"])
    )
    return st.recursive(
        atoms,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=6,
    )


def bodies(path):
    names = sorted(kinds()[path].model_fields)
    messages = st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | json_values()},
            optional={
                "content": json_values(),
                "tool_calls": json_values(),
                "reasoning_content": json_values(),
                "tool_call_id": json_values(),
            },
        ),
        max_size=3,
    )
    values = {
        "messages": messages | json_values(),
        "stream": st.sampled_from([False, None]) | json_values(),
        "n": st.integers(1, 3) | json_values().filter(lambda value: not isinstance(value, int)),
        "tools": st.lists(st.dictionaries(st.text(max_size=3), json_values(), max_size=2), max_size=2)
        | json_values(),
    }
    fields = st.lists(st.sampled_from(names), max_size=4, unique=True)
    one = fields.flatmap(
        lambda f: st.fixed_dictionaries({name: values.get(name, json_values()) for name in f})
    )
    return st.builds(
        lambda body, more, strange: {**BODIES[path], **body, **(strange or {})}, one, one, st.none()
    )


def answered(address, path, body):
    """-> the status; what streams is read to its end."""
    if isinstance(body, dict) and body.get("stream") is True:
        import urllib.error

        try:
            chunks, _ = stream(address, path, body)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        assert not [chunk for chunk in chunks if "error" in chunk], chunks[-1]
        return 200
    return ask(address, path, body)[0]


@pytest.mark.parametrize("examples", [40, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_no_body_brings_the_server_down(small, path, examples):
    """Any JSON value at any field: an answer, or an error of the client's."""

    @settings(max_examples=examples, deadline=None)
    @given(bodies(path))
    def each(body):
        status = answered(small, path, body)
        assert status == 200 or 400 <= status < 500, (status, body)

    each()


# ---- tools and roles -------------------------------------------------------------------------


def test_null_content_is_empty(address):
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    usage = []
    for content in (None, ""):
        messages = [user("a"), assistant(content, tool_calls=[call]), user("b")]
        usage.append(ask(address, CHATS, {"messages": messages})[1]["usage"]["prompt_tokens"])
        messages = [user("a"), assistant(content), user(content)]
        usage.append(ask(address, CHATS, {"messages": messages})[1]["usage"]["prompt_tokens"])
    assert usage[:2] == usage[2:]


@pytest.fixture(scope="module")
def plain():
    """The embedded model: its template knows no tools."""
    demo = pyengine.load(Path(pyengine.__file__).parent / "demo" / "default.gguf", threads=1)
    with serving(server.create_app(demo, "small", max_tokens=4)) as address:
        yield address


TOOLS = [
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
]


def test_tools_that_the_template_cannot_show(plain, address):
    for body in ({"tools": TOOLS}, {"chat_template_kwargs": {"tools": TOOLS}}):
        status, answer = ask(plain, CHATS, BODIES[CHATS] | body)
        assert status == 400 and answer["error"]["param"] == "tools", answer
        assert ask(address, CHATS, BODIES[CHATS] | body)[0] == 200
    for harmless in ({"tools": []}, {"tools": TOOLS, "tool_choice": "none"}, {"parallel_tool_calls": False}):
        assert ask(plain, CHATS, BODIES[CHATS] | harmless)[0] == 200
    silent = {"chat_template_kwargs": {"tools": TOOLS}, "tool_choice": "none"}
    assert (
        ask(address, CHATS, BODIES[CHATS] | silent)[1]["usage"]["prompt_tokens"]
        == (ask(address, CHATS, BODIES[CHATS])[1]["usage"]["prompt_tokens"])
    )


def test_a_role_that_the_template_refuses(plain):
    messages = [*MESSAGES, assistant("a"), {"role": "tool", "tool_call_id": "1", "content": "noon"}]
    status, answer = ask(plain, CHATS, {"messages": messages})
    assert status == 400 and answer["error"]["param"] == "messages"


def test_the_last_message_is_continued(address, model):
    """As vLLM names it; an assistant's message is continued without being asked."""
    messages = [*MESSAGES, assistant("and")]
    want = model.generate(messages, 5, continue_final_message=True, ignore_end=True)
    open_turn = model.generate(messages, 5, add_generation_prompt=True, ignore_end=True)
    assert want.prompt_tokens < open_turn.prompt_tokens
    for body, same in (
        ({}, want),
        ({"continue_final_message": True}, want),
        ({"continue_final_message": True, "add_generation_prompt": False}, want),
        ({"add_generation_prompt": True}, open_turn),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, open_turn),
    ):
        answer = ask(address, CHATS, {"messages": messages, "max_tokens": 5, "ignore_eos": True} | body)[1]
        assert text(answer)["content"] == same.text
        assert answer["usage"]["prompt_tokens"] == same.prompt_tokens
    both = {"continue_final_message": True, "add_generation_prompt": True}
    status, answer = ask(address, CHATS, {"messages": messages} | both)
    assert status == 400 and answer["error"]["param"] == "continue_final_message"


# ---- the page --------------------------------------------------------------------------------


def references(value):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_the_openapi_page(address, app):
    status, page = ask(address, "/openapi.json")
    assert status == 200 and page["openapi"].startswith("3.1")
    routes = {re.sub(r":path", "", route.path) for route in app.routes}
    assert set(page["paths"]) == routes
    for path, kind in kinds().items():
        schema = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        properties = page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
        assert set(properties) == set(kind.model_fields)
        assert all(one.get("description") for one in properties.values())
    for reference in references(page):
        assert reference.startswith("#/components/schemas/")
        assert reference.rpartition("/")[2] in page["components"]["schemas"]


def test_the_readme_has_the_tables():
    from pyengine.server.requests import ChatRequest, CompletionRequest
    from pyengine.server.tables import tables

    text = README.read_text()
    for table in tables():
        assert table in text, table.splitlines()[2]
    named = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    assert named == {*ChatRequest.model_fields, *CompletionRequest.model_fields}
