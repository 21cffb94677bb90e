"""csrc/compensate.c against its contracts, restated in PyTorch: every bit, any level, threads, split."""

import numpy as np
import pytest
from bits import assert_same_bits
from kernel_runs import LEVELS, level
from moments import factored, moments, normal

from pyengine.core import rounding
from pyengine.core.threads import Pool

torch = pytest.importorskip("torch")

import compensate_torch  # noqa: E402

pytestmark = pytest.mark.golden

SIZES = [1, 2, 7, 8, 9, 31, 33, 65]


@pytest.fixture(params=LEVELS, autouse=True)
def on_level(request):
    with level(request.param):
        yield


def restated_factors(made_of):
    v, u, d = compensate_torch.factors(torch.from_numpy(made_of))
    return (v + u + torch.diag(d)).numpy(), v, u, d


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_products(tokens, n):
    a, b = normal(n, tokens, 2 * n + 1), normal(n + 1, tokens, n)
    wanted = compensate_torch.products(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    for threads, split in ((1, tokens), (3, tokens // 3)):
        out, pool = np.zeros((2 * n + 1, n)), Pool(threads)
        for part in (slice(split), slice(split, None)):
            rounding.add_products(pool, a[part], b[part], out)
        assert_same_bits(out, wanted)
    square = np.zeros((n, n))
    rounding.add_products(Pool(2), b, b, square, lower=True)
    whole = compensate_torch.products(torch.from_numpy(b), torch.from_numpy(b)).numpy()
    assert_same_bits(np.tril(square), np.tril(whole))


@pytest.mark.parametrize("n", [1, 100, 300])
def test_squares(n):
    x, sums = normal(n, 37, n).astype(np.float32), np.zeros(n)
    rounding.add_squares(Pool(2), x[:5], sums)
    rounding.add_squares(Pool(1), x[5:], sums)
    assert_same_bits(sums, compensate_torch.squares(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("n", [*SIZES, 131])
def test_factors(n):
    h = moments(n)
    wanted, v, u, d = restated_factors(h)
    for threads in 1, 3:
        made = h + np.triu(np.full((n, n), np.nan), 1)  # the upper triangle is not read
        rounding.factor(Pool(threads), made)
        assert_same_bits(made, wanted)
    lower = np.tril(made, -1) / np.diag(made) + np.eye(n)
    assert np.allclose(lower * np.diag(made) @ lower.T, h, rtol=1e-9, atol=1e-12 * h.max())  # L d L^T is h


@pytest.mark.parametrize("largest", [127, 7])
@pytest.mark.parametrize("rows, n, group", [(1, 1, 128), (17, 20, 8), (33, 50, 16), (5, 9, 4), (64, 70, 32)])
def test_rounding(rows, n, group, largest):
    w = normal(rows, rows, n).astype(np.float32)
    w[0] = 0
    w[rows // 2, : n // 2] *= 1e-8  # scales that are subnormal, or 2^-24
    h, b = moments(n, rows), normal(7, rows, n)
    f = factored(h)
    _, v, u, d = restated_factors(h)
    for correction in None, b:
        wanted = compensate_torch.round_weights(
            torch.from_numpy(w),
            d,
            largest,
            group,
            u,
            v,
            None if correction is None else torch.from_numpy(correction),
        )
        for threads in 1, 3:
            made = rounding.round_weights(Pool(threads), w, f, largest, group, correction)
            for one, other in zip(made, wanted):
                assert_same_bits(one, other.numpy())
    weights = np.exp(normal(3, n))
    made = rounding.round_weights(Pool(2), w, weights, largest, group)
    for one, other in zip(
        made, compensate_torch.round_weights(torch.from_numpy(w), torch.from_numpy(weights), largest, group)
    ):
        assert_same_bits(one, other.numpy())
