"""A file of llama.cpp's own converter, and what Hugging Face's code computes from it in float64."""

import hashlib
import json

import numpy as np
import pytest
from paths import CONVERTER

import pyengine
from pyengine import reference
from pyengine.oracle.trace import record_trace

EXPECTED = json.loads((CONVERTER / "expected.json").read_text())


@pytest.fixture(scope="module")
def float64():
    return record_trace(pyengine.load(CONVERTER / "A-Q8_0.gguf", "float64"), EXPECTED["ids"])


@pytest.mark.parametrize("name", EXPECTED["sha256_of_float32"])
def test_float64_equals_hugging_face(float64, name):
    value = np.ascontiguousarray(float64.tensors[name], "<f4")
    assert hashlib.sha256(value.tobytes()).hexdigest() == EXPECTED["sha256_of_float32"][name]


def test_locked_is_within_1e_8_of_it(each_isa):
    truth = np.load(CONVERTER / "logits.npy").astype(np.float64)
    logits = pyengine.load(CONVERTER / "A-Q8_0.gguf").forward(EXPECTED["ids"]).astype(np.float64)
    log_p, log_q = (np.log(reference.softmax(x)) for x in (truth, logits))
    assert (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean() <= 1e-8
    assert (truth.argmax(axis=-1) == logits.argmax(axis=-1)).all()
