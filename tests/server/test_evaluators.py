"""What evaluation harnesses ask: the log-probabilities of a prompt, ids of texts and texts of ids."""

import numpy as np
import pytest
from serving import ask, serving, stream

from pyengine import server
from pyengine.probabilities import log_softmax

for module in ("tokenizers", "jinja2"):
    pytest.importorskip(module, reason="needs the extra text")
for module in ("uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra serve")

NAME = "small"
TEXT = "the end of the day"


@pytest.fixture(scope="module")
def ids(model):
    return model.tokenizer.encode_prompt(TEXT)


@pytest.fixture(scope="module")
def want(model, ids):
    """Natural logarithms [T - 1, vocab] of the probabilities of what follows each token but the last."""
    return log_softmax(model.forward(ids)[:-1])


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_with_logprobs_scores_the_prompt(address, model, ids, want, tokens, as_ids):
    body = {"prompt": ids if as_ids else TEXT, "echo": True, "logprobs": 2, "max_tokens": tokens}
    status, answer = ask(address, "/v1/completions", body | {"ignore_eos": True})
    assert status == 200, answer
    choice, alone = answer["choices"][0], model.generate(ids, tokens, ignore_end=True, logprobs=0)
    assert choice["text"] == TEXT + alone.text and choice["finish_reason"] == "length"
    scores = choice["logprobs"]
    assert {len(column) for column in scores.values()} == {len(ids) + tokens}
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert scores["token_logprobs"][1 : len(ids)] == [row[i] for row, i in zip(want, ids[1:])]
    assert scores["token_logprobs"][len(ids) :] == alone.logprobs.tolist()
    for row, top in zip(want, scores["top_logprobs"][1:]):
        assert max(top.values()) == row.max() and len(top) == 2
    for text, offset in zip(scores["tokens"], scores["text_offset"]):
        assert text.startswith("bytes:") or choice["text"][offset:].startswith(text)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_echo_in_a_stream_begins_with_the_prompt(address):
    body = {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 4, "ignore_eos": True}
    chunks, _ = stream(address, "/v1/completions", body)
    _, whole = ask(address, "/v1/completions", body)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert pieces[0]["text"] == TEXT
    assert "".join(piece["text"] for piece in pieces) == whole["choices"][0]["text"]
    for key, column in whole["choices"][0]["logprobs"].items():
        assert [x for piece in pieces if piece["logprobs"] for x in piece["logprobs"][key]] == column
    chunks, _ = stream(address, "/v1/completions", body | {"max_tokens": 0})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT


def test_echo_without_logprobs_is_the_text_alone(address):
    body = {"prompt": [TEXT, "on"], "echo": True, "max_tokens": 1, "n": 2, "temperature": 1}
    _, answer = ask(address, "/v1/completions", body)
    assert [
        choice["text"].startswith(start) for choice, start in zip(answer["choices"], [TEXT] * 2 + ["on"] * 2)
    ]
    assert all(choice["logprobs"] is None for choice in answer["choices"])


def test_vllms_prompt_logprobs(address, model, ids, want):
    body = {"prompt": TEXT, "prompt_logprobs": 3, "max_tokens": 1}
    found = ask(address, "/v1/completions", body)[1]["choices"][0]["prompt_logprobs"]
    assert len(found) == len(ids) and found[0] is None
    for row, token, entry in zip(want, ids[1:], found[1:]):
        rank = 1 + int((row > row[token]).sum())
        assert entry[str(token)]["logprob"] == row[token] and entry[str(token)]["rank"] == rank
        assert len(entry) == 3 + (rank > 3)
        assert sorted(one["rank"] for one in entry.values())[:3] == [1, 2, 3]
    chat = {"messages": [{"role": "user", "content": "on"}], "prompt_logprobs": 0, "max_tokens": 1}
    answer = ask(address, "/v1/chat/completions", chat)[1]
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_scores_do_not_depend_on_what_else_is_computed(model):
    bodies = [
        {"prompt": [i + 1, *range(200)], "echo": True, "logprobs": 0, "max_tokens": 1} for i in range(4)
    ]
    with serving(server.create_app(model, NAME)) as address:
        alone = [ask(address, "/v1/completions", body)[1]["choices"] for body in bodies]
        many = {
            "prompt": [body["prompt"] for body in bodies],
            **{k: bodies[0][k] for k in bodies[0] if k != "prompt"},
        }
    with serving(server.create_app(model, NAME, parallel=3)) as address:
        together = ask(address, "/v1/completions", many)[1]["choices"]
    assert [one[0] | {"index": i} for i, one in enumerate(alone)] == together


def test_generate_scores_a_prompt_in_pieces(model, want, ids):
    generation = model.generate(ids, 2, stream=True, prompt_logprobs=1, ignore_end=True)
    generation.piece = 3
    generation.run()
    assert [token.id for token in generation.prompt] == list(ids)
    assert [token.logprob for token in generation.prompt[1:]] == [row[i] for row, i in zip(want, ids[1:])]
    assert np.array_equal(generation.ids, model.generate(ids, 2, ignore_end=True).ids)


# ---- ids and texts --------------------------------------------------------------------------------


def test_tokenize_and_detokenize(address, model, ids):
    status, answer = ask(address, "/tokenize", {"prompt": TEXT, "return_token_strs": True})
    assert status == 200 and answer["tokens"] == list(ids) and answer["count"] == len(ids)
    assert "".join(answer["token_strs"]) == TEXT and answer["max_model_len"] == model.context
    _, llama = ask(address, "/tokenize", {"content": TEXT, "with_pieces": True, "add_special": False})
    assert [one["id"] for one in llama["tokens"]] == model.tokenizer.encode(TEXT)
    assert "".join(one["piece"] for one in llama["tokens"]) == TEXT
    _, back = ask(address, "/detokenize", {"tokens": list(ids)})
    assert back == {"prompt": TEXT, "content": TEXT}


def test_tokenize_a_conversation(address, model):
    messages = [{"role": "user", "content": "on"}]
    _, answer = ask(address, "/tokenize", {"messages": messages})
    assert answer["tokens"] == model.chat_template.prompt(model.tokenizer, messages).ids.tolist()
    _, without = ask(address, "/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert without["count"] < answer["count"]


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("/tokenize", {}, "prompt: want either a text or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "want either"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "content: want a, as prompt has it, got b"),
        ("/tokenize", {"promt": "a"}, "did you mean prompt?"),
        ("/tokenize", {"messages": [{"content": "a"}]}, "messages"),
        ("/detokenize", {}, "tokens: want a list of token ids, got none"),
        ("/detokenize", {"tokens": [-1]}, "tokens: want a list of token ids"),
        ("/detokenize", {"tokens": [1 << 30]}, "tokens: want ids below"),
    ],
)
def test_their_errors_name_the_parameter(address, path, body, message):
    status, answer = ask(address, path, body)
    assert status == 400 and message in answer["error"]["message"]
