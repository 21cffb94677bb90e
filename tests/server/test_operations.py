"""Running a server: keys, names and origins; the log; the numbers."""

import logging
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import ask, serving

from pyengine import server
from pyengine.cli import main
from pyengine.text.prefixes import Reuse

for module in ("tokenizers", "jinja2"):
    pytest.importorskip(module, reason="needs the extra text")
for module in ("uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra serve")
guard, request_log = (pytest.importorskip(f"pyengine.server.{name}") for name in ("guard", "request_log"))
Guard, hosts_of, difference = guard.Guard, guard.hosts_of, request_log.difference

NAME = "small"
BODY = {"prompt": "on", "max_tokens": 1}


def status_of(address, path="/v1/completions", body=BODY, **headers):
    return ask(address, path, body, {name.replace("_", "-"): value for name, value in headers.items()})


def test_a_key_is_wanted_of_every_request_that_starts_work(model):
    with serving(server.create_app(model, NAME, api_keys=["one", "two"])) as address:
        status, answer = status_of(address)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        for wrong in (
            "one",
            "Bearer",
            "Bearer three",
            "Bearer on",
            "Bearer one two",
            "Basic one",
            "Bearer öne",
        ):
            assert status_of(address, Authorization=wrong.encode().decode("latin-1"))[0] == 401, wrong
        for key in ("one", "two"):
            assert status_of(address, Authorization=f"Bearer {key}")[0] == 200
        assert ask(address, "/v1/models")[0] == ask(address, "/metrics")[0] == 401
        assert ask(address, "/health")[0] == ask(address, "/version")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]", "x@y", ""]
)
def test_a_loopback_server_is_asked_by_its_own_names(model, host):
    with serving(server.create_app(model, NAME, hosts=hosts_of("127.0.0.1"))) as address:
        status, answer = status_of(address, Host=host)
        assert status == 403 and answer["error"]["code"] == "host_refused"
        for own in ("localhost", "LocalHost:8080", "127.0.0.1", "127.0.0.1:1", "[::1]:8080"):
            assert status_of(address, Host=own)[0] == 200, own


def test_a_server_for_other_machines_has_any_name():
    assert hosts_of("0.0.0.0") is None and hosts_of("192.0.2.1") is None and hosts_of("::1") == ["::1"]


def test_no_page_of_another_server_can_start_work(model):
    app = server.create_app(model, NAME, cors_origins=["https://mine.example"])
    with serving(app) as address:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "file://"):
            for kind in ("text/plain", "application/json"):
                status, answer = status_of(address, Origin=origin, Content_Type=kind)
                assert status == 403 and answer["error"]["code"] == "origin_refused"
        assert status_of(address, Origin="https://mine.example")[0] == 200
        assert status_of(address, Origin=address)[0] == 200  # the server's own page
    with serving(server.create_app(model, NAME, cors_origins=["*"])) as address:
        assert status_of(address, Origin="https://evil.example")[0] == 200


@given(st.text(max_size=30), st.text(min_size=1, max_size=10))
def test_no_text_is_a_key_but_the_key(sent, key):
    guard = Guard(None, [key])
    assert guard._has_key(f"Bearer {sent}") == (sent.strip() == key.strip() and sent.strip() == key)


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys):
    from argparse import Namespace

    from pyengine.cli.serve import _keys

    path = tmp_path / "keys"
    path.write_text("a\n\n b \n")
    monkeypatch.setenv("PYENGINE_API_KEY", "c")
    assert _keys(Namespace(api_key=["d"], api_key_file=path)) == ["d", "c", "a", "b"]
    monkeypatch.delenv("PYENGINE_API_KEY")
    for wrong in (tmp_path / "none", tmp_path):
        assert main(["serve", "-m", "default", "--api-key-file", str(wrong)]) == 2
    path.write_text("\n")
    assert main(["serve", "-m", "default", "--api-key-file", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("--api-key-file" in line for line in lines)


# ---- the log and the numbers ----------------------------------------------------------------------


@pytest.fixture
def records(monkeypatch):
    """What the server logs."""
    found = []
    handler = logging.Handler()
    handler.emit = found.append
    log = logging.getLogger("pyengine.server")
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "propagate", False)
    level = log.level
    log.setLevel(logging.DEBUG)
    yield found
    log.setLevel(level)


def test_each_request_is_one_line(model, records):
    with serving(server.create_app(model, NAME)) as address:
        ask(address, "/v1/completions", {"prompt": [1] * 20, "max_tokens": 4, "ignore_eos": True})
        ask(address, "/v1/completions", {"prompt": [1] * 20 + [2], "max_tokens": 4, "ignore_eos": True})
        ask(address, "/v1/completions", {"prompt": 7})
        ask(address, "/nowhere/%0a%1b")
        ask(address, "/health")
    lines = [record.getMessage() for record in records if not record.getMessage().startswith("prompt:")]
    answer = r"prompt \d+ tokens \(%d cached\)( at [\d.]+/s)?, answer 4 tokens at [\d.]+/s, length, [\d.]+ s"
    assert re.fullmatch("POST /v1/completions, 200, " + answer % 0, lines[0])
    assert re.fullmatch("POST /v1/completions, 200, " + answer % 20, lines[1])
    assert re.fullmatch(r"POST /v1/completions, 400, [\d.]+ s", lines[2])
    assert re.fullmatch(r"GET /nowhere/\?\?, 404, [\d.]+ s", lines[3])
    assert [record.levelno for record in records if "health" in record.getMessage()] == [logging.DEBUG]


def test_a_line_says_where_a_prompt_differs_and_why(model):
    tokenizer = model.tokenizer
    ids = {text: tokenizer.encode(text, special=True) for text in ("<think>\nI", "the end", "on")}
    assert difference(Reuse(0, 0, [], []), tokenizer) == ""
    assert difference(Reuse(9, 9, [], ids["on"]), tokenizer) == ""
    line = difference(Reuse(5, 9, ids["the end"], ids["on"]), tokenizer)
    assert line == (
        "prompt: it differs at token 9 from an earlier one, of which 5 tokens are used: "
        "it has 'on', and the earlier one 'the end'"
    )
    thinking = difference(Reuse(5, 9, ids["<think>\nI"], ids["on"]), tokenizer)
    assert thinking.endswith(": the chat template leaves out the thinking of an earlier turn")


def test_metrics_are_prometheuss_text(model):
    import urllib.request

    from prometheus_client.parser import text_string_to_metric_families

    with serving(server.create_app(model, NAME)) as address:
        for _ in range(2):
            ask(address, "/v1/completions", {"prompt": [1] * 20, "max_tokens": 4, "ignore_eos": True})
        ask(address, "/v1/completions", {"prompt": 7})
        ask(address, "/elsewhere/1")
        text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["pyengine_requests_total", "/v1/completions", "200"] == 2
    assert samples["pyengine_requests_total", "/v1/completions", "400"] == 1
    assert samples["pyengine_requests_total", "other", "404"] == 1
    assert samples["pyengine_prompt_tokens_total",] == 40 and samples["pyengine_cached_tokens_total",] == 20
    assert samples["pyengine_completion_tokens_total",] == 8
    assert samples["pyengine_requests_running",] == samples["pyengine_requests_waiting",] == 0
    assert samples["pyengine_prefix_bytes",] > 0 and samples["pyengine_request_seconds_count",] >= 4


def test_version_and_props(address, model):
    import pyengine

    assert ask(address, "/version")[1] == {"version": pyengine.__version__}
    props = ask(address, "/props")[1]
    assert props["default_generation_settings"]["n_ctx"] == model.context and props["total_slots"] == 1
    assert props["chat_template"] == model.chat_template.sources["default"]


def test_serve_without_its_extra_is_one_line(tmp_path):
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from pyengine.cli import main; sys.exit(main(['serve', '-m', 'default']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "prometheus-client" in done.stderr
