"""csrc/labels.c: pe_top_k, pe_exp_sums and pe_draw against their contracts."""

import locked_numpy as locked
import numpy as np
import pytest
from guard import Memory
from kernel_runs import (
    ARGUMENT,
    LEVELS,
    NONFINITE,
    POOLS,
    RUNS,
    check,
    ffi,
    level,
    lib,
    normal,
    one_run,
    pointer,
    rng_of,
    succeed,
)
from locked_numpy import F32

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")

SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 255, 256, 257, 600, 1030]
BELOW_ONE = np.nextafter(1.0, 0.0)


def top_k(logits, k):
    def run(pool, memory):
        ids = memory.output((len(logits), k), np.int32)
        place = pointer(memory.input(logits))
        succeed(lib.pe_top_k(pool, place, *logits.shape, k, pointer(ids, "int32_t *")))
        return ids

    return run


def exp_sums(logits, ids):
    def run(pool, memory):
        total, rest = (memory.output(len(logits), np.float64) for _ in range(2))
        succeed(
            lib.pe_exp_sums(
                pool,
                pointer(memory.input(logits)),
                *logits.shape,
                pointer(memory.input(ids), "int32_t *"),
                ids.shape[1],
                pointer(total, "double *"),
                pointer(rest, "double *"),
            )
        )
        return total, rest

    return run


def draw(logits, power, uniforms):
    def run(pool, memory):
        ids = memory.output(uniforms.shape, np.int32)
        total = memory.output(len(logits), np.float64)
        succeed(
            lib.pe_draw(
                pool,
                pointer(memory.input(logits)),
                *logits.shape,
                power,
                pointer(memory.input(uniforms), "double *"),
                uniforms.shape[1],
                pointer(ids, "int32_t *"),
                pointer(total, "double *"),
            )
        )
        return ids, total

    return run


def few_values(rng, tokens, vocab):
    """Most places are decided by the tie rule; +0 and -0 are equal."""
    return rng.choice(np.array([-1, -0.0, 0.0, 2], F32), (tokens, vocab))


class TestTopK:
    @pytest.mark.parametrize("vocab", SIZES)
    def test_sizes(self, vocab):
        for k in sorted({1, min(3, vocab), min(50, vocab), vocab}):
            logits = normal(rng_of(vocab, k), 3, vocab)
            check(top_k(logits, k), locked.top_k(logits, k), runs=RUNS[:4])

    def test_ties(self):
        for vocab in SIZES:
            logits, k = few_values(rng_of(vocab, 1), 4, vocab), min(20, vocab)
            check(top_k(logits, k), locked.top_k(logits, k), runs=RUNS[:1])

    def test_orders(self):
        """Each logit displaces one, or none does; equal ones never do."""
        rising = np.arange(1000, dtype=F32)[None]
        for logits in (rising, rising[:, ::-1].copy(), np.zeros_like(rising)):
            check(top_k(logits, 7), locked.top_k(logits, 7), runs=RUNS[:1])

    def test_control_tie_rule(self):
        """Taking the higher of two equal ones is seen."""
        with pytest.raises(AssertionError, match="differ"):
            check(top_k(np.array([[0, 1, 1]], F32), 1), np.array([[2]], np.int32))


class TestExpSums:
    @pytest.mark.parametrize("vocab", SIZES)
    def test_sizes(self, vocab):
        rng = rng_of(vocab, 3)
        logits = normal(rng, 3, vocab) * F32(4)
        n = min(5, vocab)
        ids = np.stack([rng.permutation(vocab)[:n] for _ in logits]).astype(np.int32)
        ids[0, -1] = -1  # a place without an id
        check(exp_sums(logits, ids), locked.exp_sums(logits, ids), runs=RUNS[:4])

    def test_no_ids(self):
        logits = normal(rng_of(4), 2, 40)
        total, rest = one_run(exp_sums(logits, np.zeros((2, 0), np.int32)), LEVELS[-1], "end", 1)
        assert total.tolist() == rest.tolist()

    def test_the_rest_is_not_a_difference(self):
        """What is left keeps its digits, however small it is beside the total."""
        logits = np.array([[0, -60, -61]], F32)
        _, rest = one_run(exp_sums(logits, np.zeros((1, 1), np.int32)), LEVELS[-1], "end", 1)
        assert rest[0] == pytest.approx(np.exp(-60) + np.exp(-61), rel=1e-6)

    def test_magnitudes(self):
        logits, ids = np.array([[3e38, -3e38, 0, 3e38]], F32), np.array([[3]], np.int32)
        check(exp_sums(logits, ids), locked.exp_sums(logits, ids))


class TestDraw:
    @pytest.mark.parametrize("vocab", SIZES)
    def test_sizes(self, vocab):
        rng = rng_of(vocab, 5)
        logits = normal(rng, 3, vocab) * F32(4)
        for power in (1.0, 0.7):
            uniforms = rng.random((3, 9))
            check(draw(logits, power, uniforms), locked.draw(logits, power, uniforms), runs=RUNS[:4])

    def test_ends_of_the_range(self):
        """The first and the last id with a probability; never one whose probability is 0."""
        logits = np.full((1, 700), -400, F32)
        logits[0, [3, 260, 300, 511]] = 0
        uniforms = np.array([[0.0, 0.25, np.nextafter(0.25, 0), 0.5, BELOW_ONE]])
        ids, total = one_run(draw(logits, 1.0, uniforms), LEVELS[-1], "end", 1)
        assert ids.tolist() == [[3, 260, 3, 300, 511]] and total[0] == 4
        check(draw(logits, 1.0, uniforms), locked.draw(logits, 1.0, uniforms))

    def test_a_sum_that_rounding_left_short(self):
        """The block's sum by sum8 exceeds the goal, and the sum one by one does not: the last id is drawn."""
        found = 0
        for key in range(200):
            logits = normal(rng_of(key, 8), 1, 256) * F32(6)
            uniforms = np.array([[BELOW_ONE]])
            ids, total = locked.draw(logits, 1.0, uniforms)
            one_by_one = np.cumsum(locked.exps(logits[0]).astype(np.float64))[-1]
            found += one_by_one <= BELOW_ONE * total[0]
            check(draw(logits, 1.0, uniforms), (ids, total), runs=RUNS[:1])
        assert found

    @pytest.mark.parametrize("bad", [-1e-300, 1.0, np.nan])
    def test_uniforms_out_of_range(self, bad):
        with pytest.raises(AssertionError, match=f"status {ARGUMENT}"):
            one_run(draw(np.zeros((1, 4), F32), 1.0, np.array([[bad]])), LEVELS[-1], "end", 1)


RUN = {
    "top_k": lambda logits: top_k(logits, 4),
    "exp_sums": lambda logits: exp_sums(logits, np.zeros((len(logits), 1), np.int32)),
    "draw": lambda logits: draw(logits, 1.0, np.zeros((len(logits), 1))),
}


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite(name, bad):
    for at in (0, 5, 32):
        logits = normal(rng_of(29), 5, 33)
        logits[-1, at] = bad
        with level(LEVELS[0]), pytest.raises(AssertionError, match=f"status {NONFINITE}"):
            RUN[name](logits)(POOLS[2], Memory("end"))


@pytest.mark.parametrize("name", RUN)
def test_no_tokens(name):
    for result in one_run(RUN[name](np.zeros((0, 8), F32)), LEVELS[-1], "end", 2):
        assert len(result) == 0


def test_argument_errors():
    null, pool = ffi.NULL, POOLS[1]
    for tokens, vocab, k in [(-1, 4, 1), (1, 0, 0), (1, 2**31, 1), (1, 4, 0), (1, 4, 5)]:
        assert lib.pe_top_k(pool, null, tokens, vocab, k, null) == ARGUMENT
    for tokens, vocab, n in [(-1, 4, 1), (1, 0, 1), (1, 2**31, 1), (1, 4, -1)]:
        assert lib.pe_exp_sums(pool, null, tokens, vocab, null, n, null, null) == ARGUMENT
    for tokens, vocab, power, draws in [
        (-1, 4, 1, 1),
        (1, 0, 1, 1),
        (1, 4, 0, 1),
        (1, 4, -1, 1),
        (1, 4, np.inf, 1),
        (1, 4, np.nan, 1),
        (1, 4, 1, -1),
    ]:
        assert lib.pe_draw(pool, null, tokens, vocab, power, null, draws, null, null) == ARGUMENT


def test_an_id_beyond_the_vocabulary():
    with pytest.raises(AssertionError, match=f"status {ARGUMENT}"):
        one_run(exp_sums(np.zeros((1, 4), F32), np.array([[4]], np.int32)), LEVELS[-1], "end", 1)


def test_scratch():
    assert lib.pe_labels_scratch_bytes(257) == 257 * 4 + 2 * 8


@pytest.mark.golden
@pytest.mark.parametrize("vocab", [1, 9, 256, 257, 1030])
def test_equals_the_pytorch_restatement(vocab):
    """tools/golden/locked_torch.py is written from the header alone."""
    torch = pytest.importorskip("torch")
    import locked_torch

    rng = rng_of(vocab, 11)
    for logits in normal(rng, 5, vocab) * F32(5), few_values(rng, 5, vocab):
        given, n = torch.from_numpy(logits), min(7, vocab)
        check(top_k(logits, n), locked_torch.top_k(given, n).numpy().astype(np.int32), runs=RUNS[:1])
        ids = np.stack([rng.permutation(vocab)[:n] for _ in logits]).astype(np.int32)
        ids[2:, -1] = -1
        sums = locked_torch.exp_sums(given, torch.from_numpy(ids).long())
        check(exp_sums(logits, ids), tuple(one.numpy() for one in sums), runs=RUNS[:1])
        uniforms = rng.random((5, 6))
        for power in (1.0, 0.7):
            drawn, total = locked_torch.draw(given, power, torch.from_numpy(uniforms))
            check(
                draw(logits, power, uniforms), (drawn.numpy().astype(np.int32), total.numpy()), runs=RUNS[:1]
            )
