"""Answers that are computed together: the same, byte for byte, as one after the other."""

import json
import random
import threading
import time

import pytest
from serving import ask, send, serving, wait_until

from pyengine import server
from pyengine.errors import NonFiniteError
from pyengine.text.prefixes import Prefixes

for module in ("tokenizers", "jinja2"):
    pytest.importorskip(module, reason="needs the extra text")
for module in ("uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra serve")

NAME = "small"
WORDS = ["the end", "on", "a b c", "and then", "who", "the end of the day", "x" * 40]


def request_of(draw):
    """(path, body) as a client might send it: prompts that share beginnings, greedy and drawn."""
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
    body = {"max_tokens": draw.randint(1, 10), "ignore_eos": True, "seed": draw.randrange(100)}
    body |= {"temperature": draw.choice([0, 0.9]), "n": draw.choice([1, 1, 2])}
    if draw.random() < 0.5:
        return "/v1/completions", body | {"prompt": text, "logprobs": draw.choice([None, 2])}
    messages = [{"role": "system", "content": draw.choice(["be short", "be long"])}]
    messages += [{"role": "user", "content": text}]
    return "/v1/chat/completions", body | {"messages": messages}


def answer_to(address, path, body):
    status, answer = ask(address, path, body)
    assert status == 200, answer
    for volatile in ("id", "created", "usage"):
        answer.pop(volatile)
    return json.dumps(answer, sort_keys=True)


def run_clients(address, requests, leave=lambda i: False):
    """All at once -> their answers; None of a client that left."""
    answers = [None] * len(requests)

    def client(i):
        path, body = requests[i]
        if leave(i):
            connection = send(address, body | {"stream": True, "max_tokens": 200}, path)
            time.sleep(0.002 * (i % 20))
            connection.close()
        else:
            answers[i] = answer_to(address, path, body)

    threads = [threading.Thread(target=client, args=[i]) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def check_clients(model, clients, parallel, seed):
    draw = random.Random(seed)
    requests = [request_of(draw) for _ in range(clients)]
    leaving = {i for i in range(clients) if draw.random() < 0.3}
    with serving(server.create_app(model, NAME)) as address:
        want = [answer_to(address, *one) for one in requests]
    app = server.create_app(model, NAME, parallel=parallel, cache_memory=1 << 20)
    with serving(app) as address:
        got = run_clients(address, requests, leaving.__contains__)
        wait_until(lambda: not app.state.service.jobs.running and not app.state.service.jobs.waiting)
        assert ask(address, "/health")[1]["running"] == 0
    assert [one for i, one in enumerate(got) if i not in leaving] == [
        one for i, one in enumerate(want) if i not in leaving
    ]


def test_answers_are_those_of_a_server_that_takes_one_at_a_time(model):
    check_clients(model, 12, 4, 1729)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [2, 7, 32])
def test_a_hundred_clients_of_whom_some_leave(model, parallel):
    check_clients(model, 100, parallel, parallel)


def test_answers_are_computed_in_the_same_passes(model, monkeypatch):
    sizes, forward = [], model.forward_batch

    def counting(sequences, **options):
        sizes.append(len(sequences))
        time.sleep(0.01)  # so that all clients have come
        return forward(sequences, **options)

    monkeypatch.setattr(model, "forward_batch", counting)
    body = {"max_tokens": 30, "ignore_eos": True}
    with serving(server.create_app(model, NAME, parallel=3)) as address:
        run_clients(address, [("/v1/completions", body | {"prompt": [i + 1] * 3}) for i in range(5)])
    assert max(sizes) == 3 and sizes.count(3) >= 20


def test_a_long_prompt_does_not_hold_up_the_answers_of_others(model, monkeypatch):
    """While it is read, piece by piece, each pass gives the other answer a token."""
    passes, forward = [], model.forward_batch

    def watching(sequences, **options):
        passes.append([len(ids) for ids, _ in sequences])
        return forward(sequences, **options)

    monkeypatch.setattr(model, "forward_batch", watching)
    with serving(server.create_app(model, NAME, parallel=2)) as address:
        first = send(address, {"prompt": "on", "max_tokens": 200, "ignore_eos": True, "stream": True})
        first.recv(1 << 16)
        assert ask(address, "/v1/completions", {"prompt": [7] * 1000, "max_tokens": 2})[0] == 200
        first.close()
    mixed = [lengths for lengths in passes if max(lengths) > 1]
    assert len(mixed) >= 7 and all(len(lengths) == 2 and sorted(lengths)[0] == 1 for lengths in mixed)
    assert max(max(lengths) for lengths in mixed) <= 128


def test_choices_of_one_prompt_compute_it_once(model):
    body = {"prompt": [3, 1, 4, 1, 5] * 20, "n": 4, "max_tokens": 5, "temperature": 1, "ignore_eos": True}
    forward, lengths = model.forward_batch, []
    app = server.create_app(model, NAME, parallel=4)
    jobs = app.state.service.jobs

    def watching(sequences, **options):
        lengths.extend(len(ids) for ids, _ in sequences)
        return forward(sequences, **options)

    jobs.model = type("Watched", (), {"forward_batch": staticmethod(watching)})()
    with serving(app) as address:
        status, answer = ask(address, "/v1/completions", body)
    assert status == 200 and answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert lengths.count(100) <= 1 and len(answer["choices"]) == 4
    with serving(server.create_app(model, NAME)) as address:
        assert ask(address, "/v1/completions", body)[1]["choices"] == answer["choices"]


def test_an_error_ends_one_answer_alone(model, monkeypatch):
    """The others of the pass are computed again, to the same bytes."""
    body = {"max_tokens": 20, "ignore_eos": True}
    requests = [("/v1/completions", body | {"prompt": [i + 1]}) for i in range(4)]
    with serving(server.create_app(model, NAME)) as address:
        want = [answer_to(address, *one) for one in requests]
    poisoned, forward, forward_batch = 3, model.forward, model.forward_batch
    began = threading.Event()

    def poison(sequences):
        ends = [state.position + len(ids) for ids, state in sequences if state.first == poisoned]
        if any(end > 6 for end in ends):
            raise NonFiniteError("model.layers.1: want finite values, got NaN or infinity")

    def alone(ids, state, **options):
        began.wait(5)
        if not hasattr(state, "first"):
            state.first = int(ids[0])
        poison([(ids, state)])
        return forward(ids, state, **options)

    def together(sequences, **options):
        for ids, state in sequences:
            if not hasattr(state, "first"):
                state.first = int(ids[0])
        poison(sequences)
        return forward_batch(sequences, **options)

    monkeypatch.setattr(model, "forward", alone)
    monkeypatch.setattr(model, "forward_batch", together)
    got = [None] * len(requests)
    app = server.create_app(model, NAME, parallel=4)
    with serving(app) as address:

        def client(i):
            got[i] = ask(address, *requests[i])

        threads = [threading.Thread(target=client, args=[i]) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(app.state.service.jobs.running) + app.state.service.jobs.waiting == 4)
        began.set()
        for thread in threads:
            thread.join()
    assert got[2][0] == 500
    for i in (0, 1, 3):
        assert got[i][0] == 200 and got[i][1]["choices"] == json.loads(want[i])["choices"]


# ---- prefixes -------------------------------------------------------------------------------------


def test_a_shared_system_prompt_is_computed_once(model):
    """By conversations in turn, and a title between two turns does not lose a conversation."""
    system = {"role": "system", "content": "be short " * 30}

    def chat(address, *texts):
        roles = ["user", "assistant"] * len(texts)
        messages = [system, *({"role": r, "content": t} for r, t in zip(roles, texts))]
        status, answer = ask(address, "/v1/chat/completions", {"messages": messages, "max_tokens": 5})
        assert status == 200
        usage = answer["usage"]
        return answer["choices"][0]["message"]["content"], usage

    with serving(server.create_app(model, NAME)) as address:
        said, usage = chat(address, "who is there?")
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        _, title = chat(address, "a title, please")
        shared = title["prompt_tokens_details"]["cached_tokens"]
        assert shared > 200
        _, again = chat(address, "who is there?", said, "and then?")
        assert again["prompt_tokens_details"]["cached_tokens"] > shared


def test_the_memory_of_prefixes_is_bounded(model):
    prefixes = Prefixes(model, 3 * model.new_session().nbytes)
    for i in range(8):
        session, _ = prefixes.take([i])
        session.begin([i])
        session.advance([i])
        prefixes.give_back(session)
        assert prefixes.nbytes <= prefixes.memory
    assert 1 <= len(prefixes) <= 3
    assert not len(Prefixes(model, 0))
