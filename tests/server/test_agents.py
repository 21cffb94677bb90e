"""What agents ask: tool calls and answers of a form, by the clients that they use."""

import json
import os

import pytest
from agent_cases import CALL, MESSAGES, NAME, WEATHER, new_model
from scripted import scripted
from serving import ask, serving, stream

from pyengine import server

for module in ("tokenizers", "jinja2"):
    pytest.importorskip(module, reason="needs the extra text")
for module in ("uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra serve")

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = (
    "True"  # else litellm asks a server elsewhere, and logs that it cannot
)

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """It calls its tool twice, and says what it knows once a tool has answered."""

    def answer(prompt):
        if "21 degrees" in prompt:
            return "It is 21 degrees."
        return (
            f"I shall look.\n\n{CALL}\n{CALL.replace('Ur', 'Uz')}"
            if "<function=" in prompt
            else "I know not."
        )

    model = scripted(new_model(tmp_path_factory.mktemp("agents") / "m.gguf"), answer)
    with serving(server.create_app(model, NAME, cache_memory=0)) as address:
        yield address


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """A model whose tokens are its own: what is demanded of it must come from the grammar."""
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    with serving(server.create_app(new_model(tmp_path_factory.mktemp("free") / "m.gguf"), NAME)) as address:
        yield address


def test_calls_are_taken_out_of_the_text(address):
    status, answer = ask(address, CHAT, {"messages": MESSAGES, "tools": [WEATHER]})
    assert status == 200
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I shall look."
    calls = choice["message"]["tool_calls"]
    assert [(call["type"], call["function"]["name"]) for call in calls] == [("function", "weather")] * 2
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [
        {"city": "Ur", "days": 3},
        {"city": "Uz", "days": 3},
    ]
    assert len({call["id"] for call in calls}) == 2
    _, alone = ask(address, CHAT, {"messages": MESSAGES, "tools": [WEATHER], "parallel_tool_calls": False})
    assert len(alone["choices"][0]["message"]["tool_calls"]) == 1
    _, none = ask(address, CHAT, {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": "none"})
    assert none["choices"][0]["message"]["content"] == "I know not."


def test_calls_of_a_stream_are_those_of_the_whole(address):
    body = {"messages": MESSAGES, "tools": [WEATHER], "logprobs": True}
    chunks, _ = stream(address, CHAT, body)
    calls, content, records = {}, "", []
    for choice in (chunk["choices"][0] for chunk in chunks):
        content += choice["delta"].get("content") or ""
        records += (choice["logprobs"] or {}).get("content", [])
        for part in choice["delta"].get("tool_calls", []):
            call = calls.setdefault(part["index"], {"function": {"name": "", "arguments": ""}})
            call |= {key: part[key] for key in ("id", "type") if key in part}
            for key, text in part["function"].items():
                call["function"][key] += text
    _, whole = ask(address, CHAT, body)
    choice = whole["choices"][0]
    assert (
        content == choice["message"]["content"] and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    )
    assert [call["function"] for call in calls.values()] == [
        c["function"] for c in choice["message"]["tool_calls"]
    ]
    assert bytes(b for record in records for b in record["bytes"]).decode() == content
    assert records == choice["logprobs"]["content"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_that_are_demanded_come(free, choice):
    body = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 2000}
    for seed in range(3):
        _, answer = ask(free, CHAT, body | {"temperature": 1, "seed": seed, "parallel_tool_calls": False})
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        value = json.loads(call["function"]["arguments"])
        assert set(value) == {"city", "days"} and 1 <= value["days"] <= 9


@pytest.mark.parametrize(
    "form",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"enum": ["a", 5]}},
            }
        },
        {"response_format": {"type": "json_object", "schema": {"enum": ["a", 5]}}},
        {"guided_json": {"enum": ["a", 5]}},
        {"guided_json": '{"enum": ["a", 5]}'},
        {"json_schema": {"enum": ["a", 5]}},
        {"structured_outputs": {"json": {"enum": ["a", 5]}}},
        {"guided_choice": ['"a"', "5"]},
        {"guided_regex": '"a"|5'},
        {"guided_grammar": 'start: "\\"a\\"" | "5"'},
        {"grammar": 'root ::= "\\"a\\"" | "5"'},
    ],
)
def test_every_name_of_a_form_gives_that_form(free, form):
    _, answer = ask(free, CHAT, {"messages": MESSAGES, "temperature": 1} | form)
    assert answer["choices"][0]["message"]["content"] in ('"a"', "5")
    if "response_format" not in form:
        _, answer = ask(free, "/v1/completions", {"prompt": "a"} | form)
        assert answer["choices"][0]["text"] in ('"a"', "5")


@pytest.mark.parametrize(
    "body, param, message",
    [
        ({"tool_choice": "required"}, "tool_choice", "want tools with it"),
        ({"tool_choice": "always", "tools": [WEATHER]}, "tool_choice", "want"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [WEATHER]},
            "tool_choice",
            "'x'",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "want an object with type"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "want json_schema with it"),
        ({"guided_json": {"type": "strange"}}, "response_format", "Invalid type: strange"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "want one form of the answer"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "want it without guided"),
        ({"guided_json": "{"}, "guided_json", "want a JSON schema"),
    ],
)
def test_their_errors_name_the_parameter(free, body, param, message):
    status, answer = ask(free, CHAT, {"messages": MESSAGES} | body)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert message in answer["error"]["message"]


# ---- clients --------------------------------------------------------------------------------------


def test_the_openai_client_parses(free, address):
    openai = pytest.importorskip("openai", reason="needs the extra client")
    pydantic = pytest.importorskip("pydantic")

    class Weather(pydantic.BaseModel):
        city: str = pydantic.Field(max_length=9)
        days: int

    with openai.OpenAI(base_url=f"{free}/v1", api_key="none", max_retries=0) as client:
        options = dict(model=NAME, messages=MESSAGES, max_tokens=3000, temperature=1)
        parsed = client.chat.completions.parse(response_format=Weather, **options).choices[0].message.parsed
        assert isinstance(parsed, Weather)
        tools = [openai.pydantic_function_tool(Weather)]
        answer = client.chat.completions.parse(
            tools=tools, tool_choice="required", parallel_tool_calls=False, **options
        )
        assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        with client.chat.completions.stream(model=NAME, messages=MESSAGES, tools=[WEATHER]) as events:
            kinds = [event.type for event in events]
            message = events.get_final_completion().choices[0].message
        assert "tool_calls.function.arguments.done" in kinds and len(message.tool_calls) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own code
def test_instructor(free):
    instructor, openai = pytest.importorskip("instructor"), pytest.importorskip("openai")
    import pydantic

    class Weather(pydantic.BaseModel):
        city: str = pydantic.Field(max_length=9)
        days: int

    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        client = instructor.from_openai(openai.OpenAI(base_url=f"{free}/v1", api_key="none"), mode=mode)
        found = client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            response_model=Weather,
            max_tokens=3000,
            temperature=1,
            max_retries=1,
        )
        assert isinstance(found, Weather)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own code
def test_langchain(address):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        model=NAME, base_url=f"{address}/v1", api_key="none"
    )
    messages = pytest.importorskip("langchain_core.messages")
    said = [messages.HumanMessage("How is it in Ur?")]
    answer = chat.bind_tools([WEATHER]).invoke(said)
    assert [call["args"] for call in answer.tool_calls] == [
        {"city": "Ur", "days": 3},
        {"city": "Uz", "days": 3},
    ]
    results = [messages.ToolMessage("21 degrees", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert chat.bind_tools([WEATHER]).invoke([*said, answer, *results]).content == "It is 21 degrees."
    pieces = list(chat.bind_tools([WEATHER]).stream(said))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert [call["args"]["city"] for call in whole.tool_calls] == ["Ur", "Uz"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own code
def test_litellm(address):
    """Tools, and the error of a prompt that is too long under its own kind."""
    litellm = pytest.importorskip("litellm")
    options = dict(model=f"openai/{NAME}", api_base=f"{address}/v1", api_key="none")
    answer = litellm.completion(messages=MESSAGES, tools=[WEATHER], **options)
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "a " * 100_000}], num_retries=0, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own code
def test_llm(address, monkeypatch, tmp_path):
    """Simon Willison's command: a model by a YAML file."""
    pytest.importorskip("llm")
    from click.testing import CliRunner
    from llm.cli import cli

    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    yaml = f"- model_id: {NAME}\n  model_name: {NAME}\n  api_base: {address}/v1\n  api_key_name: none\n"
    (tmp_path / "extra-openai-models.yaml").write_text(yaml)
    done = CliRunner().invoke(cli, ["-m", NAME, "--key", "none", "How is it?"])
    assert done.exit_code == 0 and "I know not." in done.stdout
