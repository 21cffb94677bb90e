"""OpenAI's Responses, by the openai client."""

import json

import pytest
from agent_cases import CALL, NAME, WEATHER, new_model
from scripted import scripted
from serving import ask, serving

from pyengine import server

for module in ("tokenizers", "jinja2"):
    pytest.importorskip(module, reason="needs the extra text")
for module in ("uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra serve")

TOOL = {"type": "function", **WEATHER["function"]}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    def answer(prompt):
        if "21 degrees" in prompt:
            return "<think>\nIt says 21.\n</think>\n\nIt is 21 degrees."
        return f"I shall look.\n\n{CALL}" if "<function=" in prompt else "I know not."

    model = scripted(new_model(tmp_path_factory.mktemp("responses") / "m.gguf"), answer)
    with serving(server.create_app(model, NAME, cache_memory=0)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    openai = pytest.importorskip("openai", reason="needs the extra client")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_text(client):
    response = client.responses.create(model=NAME, input="Who?", instructions="be short")
    assert response.output_text == "I know not." and response.status == "completed"
    assert response.usage.input_tokens > 0 and response.usage.output_tokens > 0
    cut = client.responses.create(model=NAME, input="Who?", max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_a_call_and_its_result(client):
    first = client.responses.create(model=NAME, input="How is it in Ur?", tools=[TOOL])
    said, call = first.output
    assert said.content[0].text == "I shall look." and (call.type, call.name) == ("function_call", "weather")
    assert json.loads(call.arguments) == {"city": "Ur", "days": 3}
    items = [{"role": "user", "content": "How is it in Ur?"}]
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
    last = client.responses.create(model=NAME, input=items, tools=[TOOL])
    assert [item.type for item in last.output] == ["reasoning", "message"]
    assert last.output_text == "It is 21 degrees." and last.output[0].content[0].text == "It says 21."


def test_a_stream_ends_in_the_response(client):
    with client.responses.stream(model=NAME, input="How is it in Ur?", tools=[TOOL]) as events:
        kinds, text, arguments, numbers = [], "", "", []
        for event in events:
            kinds.append(event.type)
            numbers.append(event.sequence_number)
            text += event.delta if event.type == "response.output_text.delta" else ""
            arguments += event.delta if event.type == "response.function_call_arguments.delta" else ""
        final = events.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert numbers == list(range(len(numbers)))
    assert text == final.output_text == "I shall look." and arguments == final.output[1].arguments
    whole = client.responses.create(model=NAME, input="How is it in Ur?", tools=[TOOL])
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output[0].content[0].text == whole.output[0].content[0].text
    assert final.output[1].arguments == whole.output[1].arguments and final.usage == whole.usage


@pytest.mark.parametrize(
    "body, param, message",
    [
        ({}, "input", "want a text or a list of items, got none"),
        ({"input": [{"type": "image"}]}, "input", "want a message, function_call"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
            "want texts as content",
        ),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools", "want type function, got 'web_search'"),
        ({"input": "a", "previous_response_id": "x"}, "previous_response_id", "nothing else is done here"),
        ({"input": "a", "max_tokens": 3}, "max_tokens", "not known here"),
    ],
)
def test_errors_name_the_parameter(address, body, param, message):
    status, answer = ask(address, "/v1/responses", body)
    assert (status, answer["error"]["param"]) == (400, param) and message in answer["error"]["message"]
