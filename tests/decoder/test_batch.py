"""Several sequences in one pass: each has the bits that it has alone."""

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN

import pyengine
from pyengine.core import ops
from pyengine.errors import InputError, NonFiniteError

NAMES = ["pattern31", "fused", "bfloat16", "yarn", "dense"]
LONGEST = 24  # tokens of a sequence


def equal(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


class Sequence:
    """Some ids, how far they have come, and the logits that they have alone."""

    def __init__(self, model, ids, state=None, position=0):
        self.ids, self.state = ids, model.new_state() if state is None else state
        self.position, self.want = position, model.forward(ids)

    def fork(self, model, rng):
        """The same tokens so far, then others."""
        rest = rng.integers(0, model.config.vocab_size, LONGEST - self.position)
        ids = np.concatenate([self.ids[: self.position], rest])
        return Sequence(model, ids, self.state.copy(), self.position)


def run_schedule(model, rng, steps):
    """Arrivals, prompts in pieces, single tokens, forks and ends, as the generator says."""
    live: list[Sequence] = []
    for _ in range(steps):
        if not live or rng.random() < 0.3:
            live.append(Sequence(model, rng.integers(0, model.config.vocab_size, LONGEST)))
        if rng.random() < 0.15:
            live.append(live[rng.integers(len(live))].fork(model, rng))
        if len(live) > 1 and rng.random() < 0.15:
            del live[rng.integers(len(live))]
        live = [one for one in live if one.position < LONGEST]
        picked = [live[i] for i in rng.permutation(len(live))[: rng.integers(1, 7)]]
        single, last_only = rng.random() < 0.5, bool(rng.random() < 0.5)
        ends = [one.position + (1 if single else rng.integers(1, 9)) for one in picked]
        ends = [min(int(end), LONGEST) for end in ends]
        got = model.forward_batch(
            [(one.ids[one.position : end], one.state) for one, end in zip(picked, ends)],
            chunk=int(rng.integers(1, 20)),
            last_only=last_only,
        )
        assert len(got) == len(picked)
        for one, end, logits in zip(picked, ends, got):
            first = end - 1 if last_only else one.position
            assert equal(logits, one.want[first:end]), (one.position, end)
            one.position = end
            assert one.state.position == end


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return pyengine.load(GOLDEN / f"{request.param}.gguf", threads=2)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=2, deadline=None)
def test_a_sequence_does_not_know_its_neighbours(model, seed):
    run_schedule(model, np.random.default_rng(seed), 12)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["locked", "locked-kv16"])
def test_thousands_of_schedules(each_isa, arithmetic):
    """Each instruction set and arithmetic has 400 of its own."""
    models = [pyengine.load(GOLDEN / f"{name}.gguf", arithmetic, 2) for name in ("pattern31", "dense")]
    for seed in range(1729, 1729 + 400):
        run_schedule(models[seed % 2], np.random.default_rng(seed), 6)


def test_single_tokens_of_the_same_sequences_are_replayed(model):
    """Recorded once per set of sequences, whatever order; a sequence that leaves ends the recording."""
    rng = np.random.default_rng(1729)
    one, two, three = (Sequence(model, rng.integers(0, model.config.vocab_size, 12)) for _ in range(3))

    def step(*batch):
        got = model.forward_batch([(s.ids[s.position : s.position + 1], s.state) for s in batch])
        for sequence, logits in zip(batch, got):
            assert equal(logits, sequence.want[sequence.position : sequence.position + 1])
            sequence.position += 1
        return model._one_token[batch[0].state]

    first = step(one, two)
    assert step(one, two) is first and step(one, two) is first
    assert step(one, two, three) is not first
    assert step(two, one) is not step(two, three)
    assert equal(model.forward(one.ids[one.position : one.position + 1], one.state), one.want[[one.position]])
    del first
    kept = len(model._one_token)
    del one, two, three
    gc.collect()
    assert len(model._one_token) <= max(0, kept - 2)


def test_what_is_no_batch(model):
    state = model.new_state()
    assert model.forward_batch([]) == []
    with pytest.raises(InputError, match="got one state twice"):
        model.forward_batch([([1], state), ([2], state)])
    with pytest.raises(InputError):
        model.forward_batch([([1], state), ([model.config.vocab_size], model.new_state())])
    assert state.position == 0


def test_after_an_error_every_state_goes_back_to_its_mark(model, monkeypatch):
    rng = np.random.default_rng(1729)
    batch = [Sequence(model, rng.integers(0, model.config.vocab_size, 9)) for _ in range(3)]
    marks = [one.state.mark() for one in batch]

    def fail(*_):
        raise NonFiniteError("layer 1")

    with monkeypatch.context() as patch:
        patch.setattr(model.layers[1].post_attention_layernorm, "scale", None)
        patch.setattr(ops, "rms_norm", fail)
        with pytest.raises(NonFiniteError):
            model.forward_batch([(one.ids, one.state) for one in batch])
    for one, mark in zip(batch, marks):
        one.state.rewind(mark)
    for one, logits in zip(batch, model.forward_batch([(one.ids, one.state) for one in batch])):
        assert equal(logits, one.want)


def test_a_neighbour_that_leaks_is_noticed(model, monkeypatch):
    """The control: a convolution that reads over the border of two sequences fails the test above."""
    mixer = next(layer.mixer for layer in model.layers if layer.linear)
    kind, forward = type(mixer), type(mixer).forward

    def leaking(self, x, sequences, record):
        rows = slice(0, sequences[-1][0].stop)
        return forward(self, x, [(rows, sequences[0][1])], record)

    monkeypatch.setattr(kind, "forward", leaking)
    with pytest.raises(AssertionError):
        run_schedule(model, np.random.default_rng(1729), 12)
