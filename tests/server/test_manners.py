"""What clients rely on beside the answers: signs of life, open connections, codes, an orderly end."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from chat_models import user
from serving import ask, connect, send, serving, stream, wait_until

from pyengine import server
from pyengine.cli import main
from pyengine.errors import InputError

pytest.importorskip("tokenizers", reason="needs the extra text")
pytest.importorskip("jinja2", reason="needs the extra text")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("pydantic", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

MESSAGES = [user("the end")]
LONG = {"prompt": "the end", "max_tokens": 1000, "ignore_eos": True}


# ---- silence ---------------------------------------------------------------------------------


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr("pyengine.server.delivery.PING_SECONDS", 0.05)


def test_a_stream_is_not_silent_while_its_prompt_is_read(address, slow_model, often):
    chunks, comments = stream(address, "/v1/completions", {"prompt": "silence", "max_tokens": 3})
    assert len(comments) >= 2 and all(c["object"] == "text_completion" for c in chunks)


def test_a_stream_is_not_silent_while_it_waits(openai, client, address, app, slow_model, often):
    """Headers and comments come at once; the openai client reads over the comments."""
    jobs = app.state.service.jobs
    first = send(address, LONG)
    wait_until(lambda: jobs.running)
    second = send(address, {"prompt": "b", "stream": True})
    got = b""
    while b": " not in got.partition(b"\r\n\r\n")[2]:
        got += second.recv(4096)
    assert got.startswith(b"HTTP/1.1 200 OK") and jobs.waiting == 1  # nothing is computed for it yet
    second.close()
    chat = client.chat.completions.create(model="small", messages=MESSAGES, max_tokens=3, stream=True)
    wait_until(lambda: jobs.waiting >= 1)
    time.sleep(0.2)
    first.close()
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chat)
    assert text == slow_model.generate(MESSAGES, 3).text


# ---- connections -----------------------------------------------------------------------------


def test_connections_are_kept_longer_than_clients_keep_them(app, address):
    assert app.state.server.config.timeout_keep_alive > 75


@pytest.mark.slow
def test_a_connection_stays_open(address):
    """Beyond uvicorn's own limit of 5 s."""
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request("GET", "/health")
    connection.getresponse().read()
    opened = connection.sock
    time.sleep(6)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200 and connection.sock is opened
    connection.close()


# ---- the context -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(model):
    """A server with a context of 32 tokens."""
    with serving(server.create_app(model, "small", context=32, sampling={"seed": -1})) as address:
        yield address


@pytest.mark.parametrize("tokens", [32, 33, 100])
def test_a_prompt_too_long(small, tokens, openai):
    status, answer = ask(small, "/v1/completions", {"prompt": [5] * tokens})
    assert status == 400
    assert answer["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "context_length_exceeded",
    }
    # The beginning that litellm and others look for.
    assert answer["error"]["message"].startswith(
        f"This model's maximum context length is 32 tokens. However, your prompt resulted in {tokens} tokens"
    )
    with (
        openai.OpenAI(base_url=f"{small}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as error,
    ):
        client.chat.completions.create(model="small", messages=[user("a" * tokens)])
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")


def test_a_prompt_that_fits(small):
    body = {"prompt": [5] * 31, "ignore_eos": True, "max_tokens": -1}
    status, answer = ask(small, "/v1/completions", body)
    assert status == 200 and answer["usage"]["total_tokens"] == 32
    assert ask(small, "/v1/completions", body | {"prompt": [5] * 32, "max_tokens": 0})[0] == 200


def test_the_card_tells_the_context(small, address, model):
    for at, context in ((small, 32), (address, model.context)):
        card = ask(at, "/v1/models")[1]["data"][0]
        assert card["max_model_len"] == card["context_length"] == card["meta"]["n_ctx"] == context
        assert card["meta"]["n_ctx_train"] == model.config.max_position_embeddings
        assert ask(at, "/v1/models/small")[1] == card


# ---- browsers --------------------------------------------------------------------------------

PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


def headers(address, method, path, sent):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request(method, path, headers=sent)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers


@pytest.mark.parametrize(
    "allowed", [["https://page.example"], ["https://other.example", "https://page.example"], ["*"]]
)
def test_pages_of_an_origin_may_ask(model, allowed):
    with serving(server.create_app(model, "small", cors_origins=allowed)) as address:
        status, got = headers(address, "OPTIONS", "/v1/chat/completions", PREFLIGHT)
        assert status == 200 and "POST" in got["Access-Control-Allow-Methods"]
        assert got["Access-Control-Allow-Origin"] in ("*", "https://page.example")
        assert "authorization" in got["Access-Control-Allow-Headers"].lower()
        for path in ("/v1/models", "/v1/nothing"):  # an error can be read too
            got = headers(address, "GET", path, {"Origin": "https://page.example"})[1]
            assert got["Access-Control-Allow-Origin"] in ("*", "https://page.example")
        if allowed != ["*"]:
            strange = {"Origin": "https://evil.example"}
            assert "Access-Control-Allow-Origin" not in headers(address, "GET", "/health", strange)[1]
            assert headers(address, "OPTIONS", "/v1/models", PREFLIGHT | strange)[0] == 400


def test_pages_may_not_ask_unless_allowed(address):
    status, got = headers(address, "OPTIONS", "/v1/chat/completions", PREFLIGHT)
    assert status == 405 and not [name for name in got if name.lower().startswith("access-control")]
    got = headers(address, "GET", "/health", PREFLIGHT)[1]
    assert not [name for name in got if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["page.example", "https://page.example/", "https://", "", "://a", "http://a b"]
)
def test_an_origin_that_no_browser_has(model, origin, capsys):
    with pytest.raises(
        InputError, match=r"cors_origins: want \* or an origin such as https://example.com, got"
    ):
        server.create_app(model, "small", cors_origins=[origin])
    path = str(model.checkpoint.path)
    assert main(["serve", "-m", path, "--port", "0", "--cors-origin", origin]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--cors-origin" in err


# ---- seeds -----------------------------------------------------------------------------------


def test_a_seed_that_nobody_gives_is_1729(address):
    body = {"prompt": "the end", "temperature": 1.5, "max_tokens": 12}
    answers = [ask(address, "/v1/completions", body | more)[1] for more in ({}, {}, {"seed": 1729})]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert [answer["seed"] for answer in answers] == [1729] * 3


def test_a_fresh_seed_is_told(address, small):
    body = {"prompt": "the end", "temperature": 1.5, "max_tokens": 12, "n": 2}
    for at, more in ((address, {"seed": -1}), (small, {})):  # of the request; of the server
        first, second = (ask(at, "/v1/completions", body | more)[1] for _ in range(2))
        assert first["seed"] != second["seed"] and first["choices"] != second["choices"]
        again = ask(at, "/v1/completions", body | {"seed": first["seed"]})[1]
        assert again["choices"] == first["choices"]


# ---- the end ---------------------------------------------------------------------------------


def test_an_end_in_the_middle_of_work(model, slow_model):
    """One is computed, one waits, one is being sent: all are told, at once, in the form of the API."""
    app = server.create_app(model, "small")
    with serving(app) as address:
        jobs = app.state.service.jobs
        running = send(address, LONG | {"stream": True})
        wait_until(lambda: jobs.running)
        waiting = send(address, LONG)
        wait_until(lambda: jobs.waiting == 1)
        unfinished = connect(address)
        unfinished.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wait_until(lambda: len(app.state.tasks) == 3)
        begin = time.monotonic()
        app.state.server.should_exit = True
        answers = []
        for connection in (running, waiting, unfinished):
            got = b""
            with connection:
                while piece := connection.recv(65536):
                    got += piece
            answers.append(got.decode())
        assert time.monotonic() - begin < 2
    events = [line for line in answers[0].splitlines() if line.startswith("data: ")]
    assert answers[0].startswith("HTTP/1.1 200")
    errors = [json.loads(events[-1].removeprefix("data: "))]
    for answer in answers[1:]:
        assert answer.startswith("HTTP/1.1 503")
        errors.append(json.loads(answer.partition("\r\n\r\n")[2]))
    for error in errors:
        assert error["error"]["code"] == "shutting_down" and error["error"]["type"] == "server_error"


@pytest.mark.parametrize("arithmetic", ["locked", pytest.param("float64", marks=pytest.mark.slow)])
def test_control_c_on_a_busy_server(model, tmp_path, arithmetic):
    command = [sys.executable, "-m", "pyengine", "serve", "-m", str(model.checkpoint.path), "-t", "1"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--arithmetic", arithmetic],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A shell's background job ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        with connect(address) as leaving:  # in the middle of its request
            leaving.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            time.sleep(0.2)
        # A prompt whose single pass takes a while, and one that waits.
        answers, threads = [], []
        for body in ({"prompt": [7] * 4000, "max_tokens": 90}, {"prompt": "a"}):
            thread = threading.Thread(
                target=lambda body=body: answers.append(ask(address, "/v1/completions", body))
            )
            thread.start()
            threads.append(thread)
            wait_until(lambda: sum_of_work(address) == len(threads))
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert time.monotonic() - begin < 3  # about one second on an idle machine
        for thread in threads:
            thread.join()
        assert [status for status, _ in answers] == [503, 503]
        assert {answer["error"]["code"] for _, answer in answers} == {"shutting_down"}
        for line in process.stderr.read().splitlines():  # the log, and no traceback
            assert re.fullmatch(r"\d\d:\d\d:\d\d (GET|POST) /[\w/]*, .*\d\.\d\d s", line), line
    finally:
        process.kill()
        process.communicate()


def sum_of_work(address):
    health = ask(address, "/health")[1]
    return health["waiting"] + health["running"]


def test_help_says_the_seed(capsys):
    assert main(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "starts from seed 1729" in text and "-1 is a fresh one" in text and "--cors-origin" in text
