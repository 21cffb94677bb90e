"""Labels of a sequence against the full distribution, which float64 gives."""

import hashlib
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

import pyengine
from pyengine.distill.labels import Labeller, LabelOptions, natural_log, uniforms
from pyengine.errors import InputError, NonFiniteError
from pyengine.probabilities import log_softmax

IDS = [1, 5, 9, 200, 31, 7, 1024, 77]


class Given:
    """A model of given logits [T, vocab]."""

    pool = None

    def __init__(self, logits):
        self.logits = np.asarray(logits, np.float32)
        self.config = type("Config", (), {"vocab_size": self.logits.shape[1]})

    def logits_in_pieces(self, sequences, rows):
        for i, ids in enumerate(sequences):
            for start in range(0, len(ids), rows):
                yield i, start, self.logits[start : start + rows][: len(ids) - start]


def given_logits(tokens=6, vocab=97, scale=3.0, seed=1729):
    return np.random.default_rng(seed).normal(scale=scale, size=(tokens, vocab)).astype(np.float32)


def label(logits, following=None, ids=None, name="d", start=0, **options):
    ids = np.arange(len(logits)) % logits.shape[1] if ids is None else ids
    return Labeller(Given(logits), LabelOptions(**options)).label(ids, name, start, following)


# ---- top-k -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_top_k_is_the_beginning_of_the_full_distribution(temperature):
    logits = given_logits()
    labels = label(logits, following=3, top_k=7, temperature=temperature)
    full = log_softmax(logits / np.float32(temperature))
    order = np.argsort(-full, axis=1, kind="stable")
    assert labels.ids.tolist() == order[:, :7].tolist() and labels.ids.dtype == np.int32
    want = np.take_along_axis(full, order[:, :7], axis=1)
    assert np.abs(labels.logprobs - want).max() < 1e-6
    assert np.abs(labels.true_logprob - full[range(6), [1, 2, 3, 4, 5, 3]]).max() < 1e-6
    assert np.abs(labels.logsumexp - (logits[:, 0] / temperature - full[:, 0])).max() < 1e-5
    outside = np.exp(np.take_along_axis(full, order[:, 7:], axis=1)).sum(axis=1)
    assert np.abs(labels.outside / outside - 1).max() < 1e-5
    assert labels.weights is None and all(
        array.dtype == np.float32
        for array in (labels.logprobs, labels.true_logprob, labels.logsumexp, labels.outside)
    )


def test_the_mass_outside_keeps_its_digits():
    """One less the labels' mass would be 0, or noise."""
    logits = np.array([[0, -40, -41, -42]])
    assert label(logits, top_k=1).outside[0] == pytest.approx(sum(np.exp([-40.0, -41, -42])), rel=1e-5)
    assert label(logits, top_k=4).outside[0] == 0


def test_equal_logits():
    logits = np.array([[1, 2, 2, 0, 2]])
    assert label(logits, top_k=4).ids.tolist() == [[1, 2, 4, 0]]


def test_the_last_row_has_no_true_token():
    labels = label(given_logits(), top_k=2)
    assert np.isnan(labels.true_logprob).tolist() == [False] * 5 + [True]
    assert not np.isnan(label(given_logits(), top_k=2, following=0).true_logprob).any()


def test_the_model_itself(model):
    labels = Labeller(model, LabelOptions(top_k=5)).label(IDS)
    full = log_softmax(model.forward(IDS))
    want = np.take_along_axis(full, labels.ids.astype(np.int64), axis=1)
    assert np.abs(labels.logprobs - want).max() < 1e-6
    assert labels.true_logprob[:-1] == pytest.approx(full[range(7), IDS[1:]], abs=1e-6)


def same(a, b):
    for name in ("ids", "logprobs", "weights", "true_logprob", "logsumexp", "outside"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)


@pytest.mark.parametrize("options", [{}, {"top_k": None, "draws": 9, "proposal_temperature": 1.2}])
def test_pieces_change_nothing(model, options):
    labeller = Labeller(model, LabelOptions(**options))
    want = labeller.label(IDS, "name", 4, 3)
    labeller.rows = 3
    same(labeller.label(IDS, "name", 4, 3), want)


def test_instruction_sets_change_nothing(model, each_isa):
    """The bits are those of the scalar level: the first that runs here is the reference for the others."""
    options = LabelOptions(top_k=None, draws=9, proposal_temperature=1.2)
    found = (
        label(given_logits(9, 1000), top_k=None, draws=9, proposal_temperature=1.2),
        Labeller(model, options).label(IDS, "name"),
    )
    first = _BY_ISA.setdefault("first", found)
    for a, b in zip(found, first):
        same(a, b)


_BY_ISA = {}


SEQUENCES = [IDS, IDS[:1], IDS[2:], IDS[::-1], [7]]


@pytest.mark.parametrize("arithmetic", ["locked", "float64"])
def test_logits_in_pieces(model, gguf, arithmetic):
    model = model if arithmetic == "locked" else pyengine.load(gguf, arithmetic, check=False)
    want = [model.forward(ids) for ids in SEQUENCES]
    for rows, chunk in ((1, 2), (3, 4), (5, 11), (100, 100)) if arithmetic == "locked" else ((3, 4),):
        found = [[] for _ in SEQUENCES]
        places = []
        for i, first, logits in model.logits_in_pieces(SEQUENCES, rows=rows, chunk=chunk):
            assert 0 < len(logits) <= rows and first == sum(map(len, found[i]))
            places.append(i)
            found[i].append(logits.copy())
        assert places == sorted(places)
        for pieces, whole in zip(found, want):
            np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("options", [{}, {"top_k": None, "draws": 9}])
def test_sequences_that_share_a_pass(model, options):
    """Each has the labels that it has alone."""
    labeller = Labeller(model, LabelOptions(**options))
    given = [(ids, f"name {i}", 3 * i, 5 if i % 2 else None) for i, ids in enumerate(SEQUENCES)]
    want = [labeller.label(*one) for one in given]
    for rows in 2, 1000:
        labeller.rows = rows
        found = list(labeller.label_many(given))
        assert len(found) == len(want)
        for a, b in zip(found, want):
            same(a, b)
    assert list(labeller.label_many([])) == []


def test_a_nan_names_the_document():
    logits = given_logits()
    logits[3, 3] = np.nan
    for options in {"top_k": 3}, {"top_k": None, "draws": 3}:
        with pytest.raises(NonFiniteError, match="^folder/a.txt: logits: "):
            label(logits, name="folder/a.txt", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 98}, "top_k: want at most 97"),
        ({"top_k": 0}, "top_k: want an integer of at least 1"),
        ({"draws": 3}, "want either top_k or draws, got both"),
        ({"top_k": None}, "want either top_k or draws, got neither"),
        ({"top_k": None, "draws": 0}, "draws: want an integer of at least 1"),
        ({"top_k": None, "draws": 65536}, "draws: want at most 65535"),
        ({"temperature": 0.0}, "temperature: want a number from 1e-06"),
        ({"temperature": math.nan}, "temperature: want a number from 1e-06"),
        ({"proposal_temperature": -1.0}, "proposal_temperature: want a number from 1e-06"),
        ({"seed": -1}, "seed: want an integer of at least 0"),
        ({"seed": 2**64}, "seed: want at most"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        label(given_logits(), **options)


# ---- sampled labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("proposal_temperature", [1.0, 1.5])
def test_the_mean_of_sampled_labels_is_the_distribution(proposal_temperature):
    """Over n rows of one distribution the mean weight of an id is normal around its probability p, with the
    standard deviation sqrt(p (p / q - p) / (draws n)) of an importance-weighted mean.  5 of them: a correct
    program of 40 ids fails for one seed in 40,000, and the seed is fixed."""
    vocab, n, draws = 40, 2000, 12
    row = given_logits(1, vocab, 2.0)
    labels = label(
        np.repeat(row, n, axis=0), top_k=None, draws=draws, proposal_temperature=proposal_temperature
    )
    p = np.exp(log_softmax(row))[0]
    q = np.exp(log_softmax(row / proposal_temperature))[0]
    mean = np.zeros(vocab)
    there = labels.ids >= 0
    np.add.at(mean, labels.ids[there], labels.weights[there].astype(np.float64))
    error = np.abs(mean / n - p) / np.sqrt(p * (p / q - p) / (draws * n) + 1e-12)
    assert error.max() < 5
    # And top-k is not: its estimate of the ids that it leaves out is 0.
    top = label(row, top_k=12)
    assert 1 - np.exp(top.logprobs.astype(np.float64)).sum() > 0.01


def test_sampled_rows():
    labels = label(given_logits(30, 50, 2.0), top_k=None, draws=12)
    full = log_softmax(given_logits(30, 50, 2.0))
    for ids, logprobs, weights, outside, want in zip(
        labels.ids, labels.logprobs, labels.weights, labels.outside, full
    ):
        n = (ids >= 0).sum()
        assert (
            n >= 1 and (ids[n:] == -1).all() and (weights[n:] == 0).all() and (logprobs[n:] == -np.inf).all()
        )
        assert len(set(ids[:n])) == n and (np.diff(logprobs[:n]) <= 0).all()
        assert np.abs(logprobs[:n] - want[ids[:n]]).max() < 1e-6
        counts = weights[:n].astype(np.float64) * 12
        assert np.abs(counts - np.rint(counts)).max() < 1e-5 and np.rint(counts).sum() == 12
        assert outside == pytest.approx(1 - np.exp(want[ids[:n]]).sum(), abs=1e-6)


def test_draws_are_keyed_by_seed_document_and_position():
    logits, options = np.repeat(given_logits(1), 6, axis=0), {"top_k": None, "draws": 9}
    labels = label(logits, **options)
    assert len({row.tobytes() for row in labels.ids}) == 6  # equal rows, and other draws
    later = label(logits[2:], start=2, **options)
    width = later.ids.shape[1]
    assert later.ids.tolist() == labels.ids[2:, :width].tolist()
    for other in {"name": "e"}, {"seed": 1}, {"start": 1}:
        assert label(logits, **options, **other).ids.tolist() != labels.ids.tolist()


def test_uniforms():
    u = uniforms(1729, "a", 0, 200, 50)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and len(np.unique(u)) == u.size
    np.testing.assert_array_equal(uniforms(1729, "a", 150, 50, 50), u[150:])
    # Fewer draws are the beginning of more.
    np.testing.assert_array_equal(uniforms(1729, "a", 0, 200, 7), u[:, :7])


def philox(counter, key):
    """One block of Philox4x64-10 (Salmon et al., 2011), in Python's integers."""
    full = 2**64 - 1
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        low, high = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = (high >> 64) ^ b ^ k, high & full, (low >> 64) ^ d ^ m, low & full
        k, m = (k + 0x9E3779B97F4A7C15) & full, (m + 0xBB67AE8584CAA73B) & full
    return [a, b, c, d]


def test_uniforms_are_those_of_philox():
    """NumPy counts before its first block."""
    key = 1729, int.from_bytes(hashlib.sha256(b"a.txt").digest()[:8], "little")
    raw = [value for block in (1, 2) for value in philox((block, 5, 0, 0), key)]
    assert uniforms(1729, "a.txt", 5, 1, 7)[0].tolist() == [(value >> 11) / 2**53 for value in raw[:7]]


# ---- the logarithm -----------------------------------------------------------------------------


def test_natural_log():
    rng = np.random.default_rng(1729)
    x = np.concatenate(
        [rng.uniform(0.5, 2, 300), 2.0 ** rng.uniform(-900, 900, 300), [1.0, 0.5, math.sqrt(0.5), 1 + 2**-52]]
    )
    with localcontext() as context:
        context.prec = 40
        want = [Decimal(float(v)).ln() for v in x]
        for found, exact in zip(natural_log(x).tolist(), want):
            assert abs(Decimal(found) - exact) <= 2 * Decimal(math.ulp(float(exact)))
