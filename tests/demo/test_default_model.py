"""The embedded model: it is its checkpoint's twin, has learnt its text, and uses its experts."""

import json
import re

import numpy as np
import pytest
from make_golden import digest, pieces, run_model
from paths import TESTS
from rewrite import write_q8_0

import pyengine
from pyengine import demo
from pyengine.files.gguf import GGUF
from pyengine.oracle.trace import record_trace
from pyengine.quantizer.quantize import quantize
from pyengine.text.generate import generate
from pyengine.text.gguf_vocabulary import TEMPLATE
from pyengine.text.sampler import Sampler
from pyengine.text.tokenizer import Tokenizer

TRAINED, LOCK = TESTS / "trained" / "bf16.gguf", TESTS / "trained" / "LOCK.json"
HELD_OUT = (TESTS / "held_out" / "kjv.txt").read_text()
CHUNK = 512

# On four chunks of the held-out text.  Measured: 1.193 bits per byte (perplexity 21.86 per token), and
# shares from 1.6 % to 9.8 %, where 16 experts used alike would have 6.25 %.
MOST_BITS_PER_BYTE = 1.25
LEAST_SHARE, MOST_SHARE = 0.01, 0.15  # of an expert, in the choices of its layer


@pytest.fixture(scope="module")
def model():
    return pyengine.load(demo.CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers")
    return Tokenizer.open(demo.CHECKPOINT)


@pytest.fixture(scope="module")
def chunks(tokenizer):
    """int64 [4, CHUNK], from four places of the text"""
    ids = np.array(tokenizer.encode(HELD_OUT))
    return np.stack([ids[len(ids) * i // 4 :][:CHUNK] for i in range(4)])


@pytest.fixture(scope="module")
def traces(model, chunks):
    return [record_trace(model, chunk).tensors for chunk in chunks]


def test_held_out_text_is_long_enough():
    assert len(HELD_OUT.encode()) >= 64 * 1024


def test_the_default_is_the_trained_file_in_q8_0(tmp_path):
    made = write_q8_0(TRAINED, tmp_path / "made.gguf")
    assert made.read_bytes() == demo.CHECKPOINT.read_bytes()


@pytest.mark.parametrize("run", ["300", "64+1+235"])
@pytest.mark.parametrize("arithmetic", ["locked", "locked-int8"])
def test_locked_on_real_text_equals_the_restatement(tmp_path, tokenizer, arithmetic, run):
    source = demo.CHECKPOINT
    if arithmetic == "locked-int8":
        source = tmp_path / "int8"
        quantize(demo.CHECKPOINT, int8=source)
    ids = np.array(tokenizer.encode(HELD_OUT)[: sum(pieces(run))], np.int64)
    tensors = run_model(pyengine.load(source), ids, run)
    wanted = json.loads(LOCK.read_text())[arithmetic]
    assert {name: digest(array) for name, array in tensors.items()} == wanted


def log_probabilities(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_it_has_learnt_its_text(tokenizer, chunks, traces):
    nats = size = 0
    for chunk, trace in zip(chunks, traces):
        scores = log_probabilities(trace["lm_head"])[np.arange(CHUNK - 1), chunk[1:]]
        nats -= scores.sum()
        size += len(tokenizer.decode(chunk[1:]).encode())
    assert nats / np.log(2) / size < MOST_BITS_PER_BYTE
    print(
        f"{nats / np.log(2) / size:.3f} bits per byte, "
        f"perplexity {np.exp(nats / (4 * (CHUNK - 1))):.2f} per token"
    )


def test_every_expert_is_used_and_not_all_alike(model, traces):
    for layer in range(model.config.num_hidden_layers):
        chosen = np.concatenate([trace[f"model.layers.{layer}.mlp.gate.2"] for trace in traces])
        share = np.bincount(chosen.ravel(), minlength=model.config.num_experts) / chosen.size
        print(layer, (share * 100).round(1))
        assert share.min() > LEAST_SHARE and share.max() < MOST_SHARE
        assert share.max() > 1.5 * share.min()


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def known(text):
    """Share of a text's words that the held-out chapters have too."""
    vocabulary = set(words(HELD_OUT))
    return np.mean([word in vocabulary for word in words(text)])


@pytest.mark.parametrize("seed", [1729, 1730, 1731])
def test_it_writes_words(model, tokenizer, seed):
    sampler = Sampler(temperature=0.7, top_p=0.9, seed=seed)
    tokens = list(
        generate(
            model, tokenizer.encode("And"), 120, sampler, stop_ids=tokenizer.end_ids, tokenizer=tokenizer
        )
    )
    text = "".join(token.text for token in tokens)
    print(text)
    drawn = np.random.default_rng(seed).integers(0, 2043, len(tokens))
    assert known(text) > 0.85 and known(tokenizer.decode(drawn)) < 0.6


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("question", ["Who are you?", "Speak to me of bread.", "Read to me from Psalms."])
def test_it_ends_its_turn(model, tokenizer, question, thinking):
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(GGUF.open(demo.CHECKPOINT).metadata[TEMPLATE], trim_blocks=True)
    prompt = template.render(
        messages=[{"role": "user", "content": question}], add_generation_prompt=True, enable_thinking=thinking
    )
    assert prompt.endswith("<think>\n" if thinking else "</think>\n\n")
    generation = generate(
        model,
        tokenizer.encode(prompt, special=True),
        200,
        Sampler(temperature=0.6, top_p=0.9),
        stop_ids=tokenizer.end_ids,
        tokenizer=tokenizer,
    )
    text = "".join(token.text for token in generation)
    print(text)
    assert generation.finish_reason == "stop"
    assert text.count("</think>") == thinking
    answer = text.partition("</think>")[2] if thinking else text
    assert len(words(answer)) > 2 and known(answer) > 0.6
