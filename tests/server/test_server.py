"""The server, asked by the real `openai` client: what it answers is what `generate` gives."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from chat_models import assistant, user
from serving import ask, send, wait_until

from pyengine import server
from pyengine.cli import main
from pyengine.errors import InputError

pytest.importorskip("tokenizers", reason="needs the extra text")
pytest.importorskip("jinja2", reason="needs the extra text")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("pydantic", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

NAME = "small"
MESSAGES = [user("the end")]


# ---- completions -----------------------------------------------------------------------------


def test_completion(client, model):
    want = model.generate("the end", 9)
    answer = client.completions.create(model=NAME, prompt="the end", max_tokens=9)
    assert answer.object == "text_completion" and answer.model == NAME
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (want.text, want.finish_reason)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        want.prompt_tokens,
        want.completion_tokens,
        want.prompt_tokens + want.completion_tokens,
    )


def test_completion_is_16_tokens_unless_asked(client):
    answer = client.completions.create(model=NAME, prompt="on", extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"


def test_completion_in_a_stream(client, model):
    want = model.generate("the end", 9, temperature=0.9)
    chunks = list(
        client.completions.create(
            model=NAME,
            prompt="the end",
            max_tokens=9,
            temperature=0.9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == want.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert "".join(c.choices[0].text for c in chunks[:-1]) == want.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == want.finish_reason
    assert len({c.id for c in chunks}) == 1


@pytest.mark.parametrize(
    "asked, keywords",
    [
        (dict(temperature=0.8, seed=4), {}),
        (
            dict(temperature=1.5, top_p=0.7, extra_body={"top_k": 20, "min_p": 0.01}),
            dict(top_k=20, min_p=0.01),
        ),
        (
            dict(presence_penalty=1.5, frequency_penalty=0.5, extra_body={"repeat_penalty": 1.3}),
            dict(repetition_penalty=1.3),
        ),
        (dict(logit_bias={"101": 50, "102": 51}), dict(logit_bias={101: 50.0, 102: 51.0})),
    ],
)
def test_sampling_parameters_arrive(client, model, asked, keywords):
    keywords = {**{k: v for k, v in asked.items() if k != "extra_body"}, **keywords}
    want = model.generate("the end", 12, **keywords)
    answer = client.completions.create(model=NAME, prompt="the end", max_tokens=12, **asked)
    assert answer.choices[0].text == want.text


def test_stop_strings(client, model):
    text = model.generate("the end", 12, ignore_end=True).text
    stop = text[len(text) // 2]
    answer = client.completions.create(
        model=NAME, prompt="the end", max_tokens=12, stop=["\0\0", stop], extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"


def test_choices_and_batches(client, model):
    options = dict(temperature=1.0, max_tokens=5)
    answer = client.completions.create(model=NAME, prompt="the end", n=3, seed=7, **options)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.text for c in answer.choices] == [
        model.generate("the end", seed=7 + i, **options).text for i in range(3)
    ]
    assert answer.usage.prompt_tokens == len(model.tokenizer.encode("the end"))
    for prompt in (["the end", "on"], [[1, 2, 3], [4]]):
        answer = client.completions.create(model=NAME, prompt=prompt, n=2, **options)
        want = [model.generate(one, seed=1729 + i, **options).text for one in prompt for i in range(2)]
        assert [c.text for c in answer.choices] == want
        chunks = client.completions.create(model=NAME, prompt=prompt, n=2, stream=True, **options)
        texts = [""] * 4
        for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == want


def test_logprobs_of_a_completion(client, model):
    want = model.generate("the end", 6, logprobs=3, ignore_end=True)
    logprobs = (
        client.completions.create(
            model=NAME, prompt="the end", max_tokens=6, logprobs=3, extra_body={"ignore_eos": True}
        )
        .choices[0]
        .logprobs
    )
    assert logprobs.token_logprobs == want.logprobs.tolist()
    assert [sorted(top.values(), reverse=True) for top in logprobs.top_logprobs] == want.top_logprobs.tolist()
    spelled = [
        token.encode().decode("unicode_escape").encode("latin-1")
        if token.startswith("bytes:")
        else token.encode()
        for token in logprobs.tokens
    ]
    assert [raw.removeprefix(b"bytes:") for raw in spelled] == [
        model.tokenizer.token_bytes(i) for i in want.ids
    ]
    assert (
        client.completions.create(model=NAME, prompt="a", max_tokens=2, logprobs=0)
        .choices[0]
        .logprobs.top_logprobs[0]
        == {}
    )


# ---- chat ------------------------------------------------------------------------------------


def test_chat(client, model):
    want = model.generate(MESSAGES, 20, reasoning_budget=4)
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=20, extra_body={"reasoning_budget": 4}
    )
    message = answer.choices[0].message
    assert answer.object == "chat.completion" and message.role == "assistant"
    assert (message.content, message.reasoning_content) == (want.text, want.thinking)
    assert answer.choices[0].finish_reason == want.finish_reason
    assert answer.usage.completion_tokens_details.reasoning_tokens == want.thinking_tokens > 4


def test_chat_in_a_stream(client, model):
    want = model.generate(MESSAGES, 20, reasoning_budget=4)
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_completion_tokens=20,
            stream=True,
            extra_body={"reasoning_budget": 4},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == want.text
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == want.thinking
    assert chunks[-1].choices[0].finish_reason == want.finish_reason
    assert chunks[0].usage is None


def test_chat_defaults_are_the_servers(client, model):
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES)
    assert answer.usage.completion_tokens == len(model.generate(MESSAGES, 12).tokens) <= 12


@pytest.mark.parametrize(
    "asked",
    [
        dict(extra_body={"reasoning_effort": "none"}),
        dict(extra_body={"chat_template_kwargs": {"enable_thinking": False}}),
    ],
)
def test_no_thinking(client, model, asked):
    want = model.generate(MESSAGES, 8, reasoning="off")
    message = (
        client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=8, **asked)
        .choices[0]
        .message
    )
    assert message.content == want.text and not hasattr(message, "reasoning_content")


@pytest.mark.parametrize("stop", [None, "text", "part"])
@pytest.mark.parametrize("budget", [0, 4, None])
def test_chat_logprobs(client, model, budget, stop):
    """The content's tokens, joined, are the content; the thinking's stand apart; nothing is lost."""
    options = dict(reasoning_budget=budget, max_tokens=20)
    free = model.generate(MESSAGES, logprobs=2, **options)
    text = free.text
    stop = {None: None, "text": text[3:5] or None, "part": text[4:5] or None}[stop]
    want = model.generate(MESSAGES, logprobs=2, stop=stop or (), **options)
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_tokens=20,
            logprobs=True,
            top_logprobs=2,
            stream=stream,
            stop=stop,
            extra_body={"reasoning_budget": -1 if budget is None else budget},
        )
        parts = [c for part in (answer if stream else [answer]) for c in part.choices if c.logprobs]
        content = [entry for part in parts for entry in part.logprobs.content]
        thinking = [e for p in parts for e in getattr(p.logprobs, "reasoning_content", None) or []]
        assert b"".join(bytes(entry.bytes) for entry in content).decode("utf-8", "replace") == want.text
        entries = [*(e["logprob"] for e in thinking), *(entry.logprob for entry in content)]
        assert entries == want.logprobs.tolist()[: len(entries)]
        if stop is None:  # all but an end token
            assert len(entries) == len(want.tokens) - (want.finish_reason == "stop")
        assert bool(thinking) == bool(want.thinking_tokens)
        tops = [*(e["top_logprobs"] for e in thinking), *(entry.top_logprobs for entry in content)]
        tops = [[t["logprob"] if isinstance(t, dict) else t.logprob for t in top] for top in tops]
        assert tops == want.top_logprobs.tolist()[: len(tops)]


def test_messages_of_every_kind(client, model):
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        user([{"type": "text", "text": "the "}, {"type": "text", "text": "time?"}]),
        assistant(None, tool_calls=[call]),
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    answer = client.chat.completions.create(
        model=NAME, messages=messages, tools=tools, max_tokens=3, tool_choice="auto"
    )
    plain = [
        {"role": "system", "content": "be brief"},
        user("the time?"),
        assistant(None, tool_calls=[{**call, "function": {"name": "now", "arguments": {"zone": "UTC"}}}]),
        messages[3],
    ]
    want = model.generate(plain, 3, tools=tools)
    assert answer.choices[0].message.content == want.text
    assert answer.usage.prompt_tokens == want.prompt_tokens
    untooled = client.chat.completions.create(
        model=NAME, messages=messages, tools=tools, max_tokens=3, tool_choice="none"
    )
    assert untooled.usage.prompt_tokens == model.generate(plain, 3).prompt_tokens < want.prompt_tokens


def test_the_next_turn_computes_only_what_is_new(client):
    messages, before = [user("the end and the beginning")], -1
    for _ in range(3):
        answer = client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=6, extra_body={"reasoning_effort": "none"}
        )
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached > before
        before = answer.usage.prompt_tokens - 40  # the generation prompt of this template, as bytes
        messages += [assistant(answer.choices[0].message.content), user("and")]


# ---- what else is asked ----------------------------------------------------------------------


def test_models_and_health(client, address, openai):
    assert [m.id for m in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    status, health = ask(address, "/health")
    assert status == 200 and health["status"] == "ok" and health["waiting"] == 0
    with pytest.raises(openai.NotFoundError, match="want 'small', got 'gpt-4'") as error:
        client.completions.create(model="gpt-4", prompt="a")
    assert error.value.code == "model_not_found" and error.value.param == "model"


@pytest.mark.parametrize(
    "path, body, status, param, message",
    [
        ("completions", {}, 400, "prompt", "prompt: want text or token ids, got none"),
        ("completions", {"prompt": ""}, 400, "prompt", "prompt: want at least one token"),
        ("completions", {"prompt": [1, "a"]}, 400, "prompt", "prompt: want text, token ids, or a list"),
        ("completions", {"prompt": [999]}, 400, "prompt", "prompt: want 0 to 287, got 999"),
        ("completions", {"prompt": "a" * 5000}, 400, "prompt", "maximum context length is 4096 tokens"),
        ("completions", {"prompt": "a", "frob": 1}, 400, "frob", "frob: this parameter is not known here"),
        (
            "completions",
            {"prompt": "a", "best_of": 2},
            400,
            "best_of",
            "best_of: want 1: nothing else is done",
        ),
        (
            "completions",
            {"prompt": "a", "prompt_logprobs": 1, "stream": True},
            400,
            "prompt_logprobs",
            "prompt_logprobs: want it without stream",
        ),
        ("completions", {"prompt": "a", "best_of": 2}, 400, "best_of", "best_of: want 1"),
        ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature", "want a number from 0"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "got -1"),
        (
            "completions",
            {"prompt": "a", "max_tokens": 1.5},
            400,
            "max_tokens",
            "want an integer of at least 0",
        ),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "stop", "want texts of at least one character"),
        ("completions", {"prompt": "a", "n": 0}, 400, "n", "want an integer from 1"),
        ("completions", {"prompt": ["a"] * 100, "n": 2}, 400, "n", "want at most 128 choices"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
        (
            "completions",
            {"prompt": "a", "logit_bias": {"9999": 1}},
            400,
            "logit_bias",
            "want an id below 288",
        ),
        ("completions", {"prompt": "a", "stream": "yes"}, 400, "stream", "want true or false"),
        ("completions", {"prompt": "a", "stream_options": {"x": 1}}, 400, "stream_options", "include_usage"),
        ("completions", b"{", 400, None, "body: want a JSON object, got"),
        ("completions", b"[]", 400, None, "body: want a JSON object, got a list"),
        ("completions", b"[" * 100_000, 400, None, "nested too deeply"),
        ("chat/completions", {}, 400, "messages", "messages: want a list of messages, got none"),
        (
            "chat/completions",
            {"messages": [{"role": "user"}]},
            400,
            "messages",
            "messages[0]: want a content",
        ),
        (
            "chat/completions",
            {"messages": [user([{"type": "image_url"}])]},
            400,
            "messages",
            "got 'image_url'",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "king", "content": ""}]},
            400,
            "messages",
            "no such role: king",
        ),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs", "want logprobs"),
        (
            "chat/completions",
            {"messages": MESSAGES, "response_format": {"type": "xml"}},
            400,
            "response_format",
            'want an object with type "text", "json_object" or "json_schema"',
        ),
        ("chat/completions", {"messages": MESSAGES, "tool_choice": "required"}, 400, "tool_choice", "want"),
        ("chat/completions", {"messages": MESSAGES, "prompt": "a"}, 400, "prompt", "not known here"),
        ("nothing", {}, 404, None, "/v1/nothing: Not Found"),
        ("models", {}, 405, None, "Method Not Allowed"),
    ],
)
def test_errors_are_openais(address, path, body, status, param, message):
    got, answer = ask(address, f"/v1/{path}", body)
    error = answer["error"]
    assert got == status and error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


def test_a_body_too_long(address, monkeypatch):
    monkeypatch.setattr("pyengine.server.body.LARGEST_BODY", 1000)
    assert ask(address, "/v1/completions", {"prompt": "a" * 2000})[0] == 413


def test_a_fault_in_the_engine_is_a_server_error(address, model, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError("no memory for scratch")

    monkeypatch.setattr(model, "forward", fail)
    for stream in (False, True):
        body = {"prompt": "a fresh prompt", "stream": stream}
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
        if stream:
            text = urllib.request.urlopen(request, timeout=30).read().decode()
            error = json.loads(text.removeprefix("data: "))["error"]
        else:
            status, answer = ask(address, "/v1/completions", body)
            error = answer["error"]
            assert status == 500
        assert error["type"] == "server_error" and "no memory for scratch" in error["message"]
    monkeypatch.undo()
    assert ask(address, "/v1/completions", {"prompt": "a fresh prompt"})[0] == 200


# ---- the queue -------------------------------------------------------------------------------


def test_a_client_that_leaves_stops_its_answer(client, app, address, slow_model):
    jobs = app.state.service.jobs
    stream = client.completions.create(
        model=NAME,
        prompt="the end",
        max_tokens=1000,
        stream=True,
        logprobs=0,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    (job,) = jobs.running
    stream.close()
    wait_until(lambda: job not in jobs.running)
    assert job.generations[0].finish_reason == "cancelled" and len(job.generations[0].tokens) < 500


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_turn_is_never_computed(address, app, slow_model, stream):
    jobs = app.state.service.jobs
    body = {"prompt": "the end", "max_tokens": 1000, "ignore_eos": True}
    first = send(address, body | {"stream": stream})
    wait_until(lambda: jobs.running)  # two connections at once arrive in either order
    (running,) = jobs.running
    second = send(address, body | {"stream": stream})
    wait_until(lambda: jobs.waiting == 1)
    second.close()
    time.sleep(0.3)
    assert jobs.running == [running]  # one that waited does not stop another
    first.close()
    wait_until(lambda: not jobs.running and jobs.waiting == 0)
    wait_until(lambda: not app.state.tasks)
    assert running.generations[0].finish_reason == "cancelled"
    assert ask(address, "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_first_come_first_served(address, app, slow_model):
    done, threads = [], []

    def client(i):
        ask(address, "/v1/completions", {"prompt": [i + 1], "max_tokens": 2})
        done.append(i)

    jobs = app.state.service.jobs
    for i in range(6):
        threads.append(threading.Thread(target=client, args=[i]))
        threads[-1].start()
        wait_until(lambda i=i: jobs.waiting + len(jobs.running) + len(done) > i)
    for thread in threads:
        thread.join()
    assert done == sorted(done)


def test_a_queue_that_is_too_long(address, app, slow_model, monkeypatch):
    monkeypatch.setattr("pyengine.server.jobs.MOST_WAITING", 1)
    jobs = app.state.service.jobs
    held = []
    for waiting in (0, 1):
        held.append(send(address, {"prompt": "a", "max_tokens": 1000, "ignore_eos": True}))
        wait_until(lambda waiting=waiting: jobs.running and jobs.waiting == waiting)
    status, answer = ask(address, "/v1/completions", {"prompt": "a"})
    assert status == 503 and answer["error"]["code"] == "overloaded"
    for connection in held:
        connection.close()
    wait_until(lambda: not jobs.running and jobs.waiting == 0)


@pytest.mark.slow
def test_a_hundred_clients_and_some_that_leave(openai, address, app, model):
    """Every third leaves somewhere on the way; nothing of the others is lost or mixed up."""

    async def one(client, i):
        options = dict(model=NAME, prompt=[i + 1, 7, 9], max_tokens=20, temperature=0.9, seed=i)
        if i % 2:
            answer = await client.completions.create(**options)
            return answer.choices[0].text
        stream = await client.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def leaving(client, i):
        task = asyncio.create_task(one(client, i))
        await asyncio.sleep(i * 0.02)
        task.cancel()
        return await asyncio.gather(task, return_exceptions=True)

    async def everybody():
        async with openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            return await asyncio.gather(
                *(leaving(client, i) if i % 3 == 0 else one(client, i) for i in range(100))
            )

    texts = asyncio.run(everybody())
    for i, text in enumerate(texts):
        if i % 3:
            want = model.generate([i + 1, 7, 9], 20, temperature=0.9, seed=i).text
            assert text == want, i
    jobs = app.state.service.jobs
    wait_until(lambda: not jobs.running and jobs.waiting == 0)
    wait_until(lambda: not app.state.tasks)


# ---- the command -----------------------------------------------------------------------------


def test_the_command(model, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pyengine",
            "serve",
            "-m",
            str(model.checkpoint.path),
            "--port",
            "0",
            "-a",
            "other",
            "-t",
            "1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        said = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        assert said.startswith("other: ")
        assert ask(address, "/v1/models")[1]["data"][0]["id"] == "other"
        assert ask(address, "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130) and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken(model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "-m", str(model.checkpoint.path), "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"pyengine: --host 127.0.0.1 --port {port}: Address already in use")
    assert err.count("\n") == 1


def test_without_the_extra(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(
        InputError, match=r"^serve: want the package starlette: pip install 'pyengine-lm\[serve\]'$"
    ):
        server.create_app(model, NAME)
