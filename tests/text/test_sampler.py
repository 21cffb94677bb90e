"""Drawing: filters and draws against an independent definition, ties, ranges, reproducibility."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import InputError
from pyengine.text.sampler import Sampler

FINITE = st.floats(-30, 30, width=32)
# Few distinct values, so that equal logits are common.
LOGITS = st.lists(FINITE | st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=40)


# ---- the definition, in plain Python: lists of (id, logit), largest first ----------------------


def softmax(pairs, temperature=1.0):
    top = max(logit for _, logit in pairs)
    weights = [math.exp((logit - top) / temperature) for _, logit in pairs]
    return [w / math.fsum(weights) for w in weights]


def expected(logits, temperature, top_k, top_p, min_p):
    """{id: probability}, filter by filter in llama.cpp's order."""
    pairs = sorted(enumerate(map(float, logits)), key=lambda pair: (-pair[1], pair[0]))
    pairs = pairs[:top_k] if top_k else pairs
    if top_p < 1:
        sums = list(itertools.accumulate(softmax(pairs)))
        pairs = pairs[: sum(s < top_p for s in sums) + 1]
    if min_p:
        probabilities = softmax(pairs)
        pairs = [pair for pair, p in zip(pairs, probabilities) if p >= min_p * probabilities[0]]
    return dict(zip((i for i, _ in pairs), softmax(pairs, temperature)))


@settings(max_examples=400, derandomize=True, deadline=None)
@given(LOGITS, st.floats(0.05, 5), st.integers(0, 45), st.floats(0.013, 1), st.floats(0.0013, 0.97))
def test_distribution_is_the_definition(logits, temperature, top_k, top_p, min_p):
    # Bounds that no probability hits: at a bound the two summation orders may disagree.
    logits = np.array(logits, np.float32)
    want = expected(logits, temperature, top_k, top_p, min_p)
    got = Sampler(temperature, top_k, top_p, min_p).distribution(logits)
    assert got.shape == logits.shape and got.dtype == np.float64
    on_a_bound = _kept_differs_within_rounding(logits, top_k, top_p, min_p)
    if not on_a_bound:
        assert set(np.flatnonzero(got)) == {i for i, p in want.items() if p}
        for i, p in want.items():
            assert got[i] == pytest.approx(p, rel=1e-12, abs=1e-300)
    assert got.sum() == pytest.approx(1)


def _kept_differs_within_rounding(logits, top_k, top_p, min_p):
    kept = [
        set(expected(logits, 1.0, top_k, p, m))
        for p in (top_p * (1 - 1e-12), top_p * (1 + 1e-12))
        for m in (min_p * (1 - 1e-12), min_p * (1 + 1e-12))
    ]
    return any(k != kept[0] for k in kept)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=20, top_p=0.8),
        dict(temperature=1.5, min_p=0.05),
        dict(temperature=0.6, top_k=12, top_p=0.95, min_p=0.02),
    ],
)
def test_draws_follow_the_distribution(options):
    """Pearson's chi-square of 5000 draws lies less than 5 standard deviations above its mean."""
    logits = np.random.default_rng(1729).normal(0, 2, 50).astype(np.float32)
    want = expected(logits, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **options})
    sampler, draws = Sampler(**options), 5_000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=50)
    assert set(np.flatnonzero(counts)) <= set(want)
    often = [i for i, p in want.items() if p * draws >= 5]
    chi_square = sum((counts[i] - want[i] * draws) ** 2 / (want[i] * draws) for i in often)
    degrees = len(often) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_draw_is_the_inverse_of_the_cumulative_sum():
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    u = np.random.Generator(np.random.PCG64(5)).random(200)
    sampler = Sampler(1.0, seed=5)
    want = np.searchsorted([0.1, 0.3, 0.6], u, side="right")
    assert [sampler.sample(logits) for _ in u] == want.tolist()


def test_seed_repeats_and_differs():
    logits = np.random.default_rng(0).normal(size=100).astype(np.float32)

    def tokens(seed):
        sampler = Sampler(1.0, seed=seed)
        return [sampler.sample(logits) for _ in range(50)]

    assert tokens(1729) == tokens(1729) != tokens(1730)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(LOGITS)
def test_greedy_takes_the_lowest_of_the_largest(logits):
    logits = np.array(logits, np.float32)
    want = min(i for i, v in enumerate(logits) if v == max(logits))
    for sampler in (Sampler(), Sampler(1.0, top_k=1), Sampler(1.0, top_p=0.0), Sampler(1e-300, top_k=1)):
        assert sampler.sample(logits) == want


def test_top_k_takes_lower_ids_of_equal_logits():
    kept = np.flatnonzero(Sampler(1.0, top_k=3).distribution(np.array([1, 2, 1, 1, 2], np.float32)))
    assert kept.tolist() == [0, 1, 4]


@pytest.mark.parametrize("scale", [0.01, 5])  # flat: more than the 1024 that are sorted first
def test_top_p_of_many(scale):
    logits = np.random.default_rng(7).normal(0, scale, 3000).astype(np.float32).round(2)
    kept = np.flatnonzero(Sampler(1.0, top_p=0.9).distribution(logits))
    assert set(kept) == set(expected(logits, 1.0, 0, 0.9, 0))


def test_tiny_temperature_is_no_nan():
    got = Sampler(5e-324).distribution(np.array([-30, 30, 29], np.float32))
    assert got.tolist() == [0, 1, 0]


def test_temperature_comes_after_top_p():
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    hot = Sampler(100.0, top_p=0.85).distribution(logits)
    assert np.flatnonzero(hot).tolist() == [0, 1]  # at temperature 100 first, all three would stay


# ---- bias and penalties ----------------------------------------------------------------------


def adjusted(logits, **options):
    """The logits behind a distribution, up to a constant."""
    sampler = Sampler(1.0, **options)
    sampler.accept([0, 1, 1, 2])
    return np.log(sampler.distribution(np.array(logits, np.float32)))


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(presence_penalty=0.5), [1.5, -1.5, -0.5, 3]),
        (dict(frequency_penalty=0.5), [1.5, -2, -0.5, 3]),
        (dict(repetition_penalty=2.0), [1, -2, 0, 3]),
        (dict(repetition_penalty=2.0, presence_penalty=1, frequency_penalty=1), [-1, -5, -2, 3]),
        (dict(presence_penalty=0.5, penalty_last_n=1), [2, -1, -0.5, 3]),
        (dict(presence_penalty=0.5, penalty_last_n=0), [2, -1, 0, 3]),
        (dict(presence_penalty=0.5, penalty_last_n=-1), [1.5, -1.5, -0.5, 3]),
        (dict(logit_bias={1: 4.0}), [2, 3, 0, 3]),
        (dict(logit_bias={0: 2.0}, repetition_penalty=2.0), [2, -2, 0, 3]),  # bias first
    ],
)
def test_bias_and_penalties(options, want):
    got = adjusted([2, -1, 0, 3], **options)
    np.testing.assert_allclose(got - got[3], np.array(want) - want[3], rtol=1e-12)


def test_drawn_tokens_are_remembered():
    sampler = Sampler(presence_penalty=10)
    logits = np.array([3, 2, 1], np.float32)
    assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 2, 0]
    sampler.history.clear()
    assert sampler.sample(logits) == 0


def test_minus_infinity_bans():
    logits = np.array([3, 2, -np.inf], np.float32)
    assert Sampler(logit_bias={0: -math.inf}).sample(logits) == 1
    sampler = Sampler(5.0, logit_bias={0: -math.inf})
    assert {sampler.sample(logits) for _ in range(50)} == {1}


def test_logits_are_left_alone():
    logits = np.array([3, 2, 1], np.float32)
    Sampler(0.5, top_k=2, logit_bias={0: -5}).sample(logits)
    assert logits.tolist() == [3, 2, 1]


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-0.1),
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(temperature="1"),
        dict(temperature=True),
        dict(top_k=-2),
        dict(top_k=True),
        dict(top_k=1.5),
        dict(top_p=1.01),
        dict(top_p=-0.1),
        dict(min_p=2),
        dict(seed=-2),
        dict(repetition_penalty=0),
        dict(repetition_penalty=-1),
        dict(presence_penalty=math.nan),
        dict(frequency_penalty=None),
        dict(penalty_last_n=-2),
        dict(logit_bias={-1: 1.0}),
        dict(logit_bias={0: math.inf}),
        dict(logit_bias={"a": 1.0}),
    ],
)
def test_ranges(options):
    with pytest.raises(InputError) as error:
        Sampler(**options)
    message = str(error.value)
    assert message.startswith(f"{next(iter(options))}: want") and "\n" not in message


@pytest.mark.parametrize("logits", [[], [[1.0]], [math.nan, 1], [math.inf, 1], [-math.inf] * 2])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_cannot_be_drawn_from(logits, temperature):
    with pytest.raises(InputError, match="logits: want"):
        Sampler(temperature).sample(np.array(logits, np.float32))


def test_bias_of_an_id_that_is_not_there():
    with pytest.raises(InputError, match="logit_bias: want an id below 2, got 7"):
        Sampler(logit_bias={7: 1.0}).sample(np.zeros(2, np.float32))


# ---- words for "off" and "any" ----------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_off(top_k):
    logits = np.random.default_rng(1).normal(size=100).astype(np.float32)
    assert np.array_equal(Sampler(1.0, top_k).distribution(logits), Sampler(1.0, 100).distribution(logits))
    assert Sampler(1.0, top_k).top_k == 0


def test_seed_minus_one_is_a_fresh_one_that_can_be_used_again():
    logits = np.zeros(1000, np.float32)
    samplers = [Sampler(1.0, seed=-1) for _ in range(8)]
    seeds = {sampler.seed for sampler in samplers}
    assert len(seeds) > 1 and all(0 <= seed < 2**32 for seed in seeds)
    for sampler in samplers:
        again = Sampler(1.0, seed=sampler.seed)
        assert [sampler.sample(logits) for _ in range(9)] == [again.sample(logits) for _ in range(9)]


def test_repr_makes_an_equal_one():
    sampler = Sampler(0.7, 20, seed=-1, repetition_penalty=1.1, penalty_last_n=-1, logit_bias={3: 0.5})
    again = eval(repr(sampler), {"Sampler": Sampler})
    assert repr(again) == repr(sampler) and f"seed={sampler.seed}" in repr(sampler)
    assert again.history.maxlen is None and "top_k=20" in repr(sampler)
