"""The losses of soft labels: against the full distribution, in float64."""

import itertools
import math

import numpy as np
import pytest

from pyengine.distill.labels import Labeller, LabelOptions
from pyengine.distill.loss import full_loss, sampled_loss, top_k_loss
from pyengine.errors import InputError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.golden

V = 12


@pytest.fixture
def rows():
    """The student's logits [3, 5, V], which want a gradient, and the teacher's log-probabilities."""
    generator = torch.Generator().manual_seed(1729)
    student, teacher = (torch.randn(3, 5, V, generator=generator, dtype=torch.float64) * 2 for _ in "ab")
    return student.requires_grad_(), teacher.log_softmax(-1)


def gradient(loss, logits):
    (found,) = torch.autograd.grad(loss, logits)
    return found


def top(p, k):
    values, ids = p.topk(k)
    return ids, values, 1 - values.exp().sum(-1)


def teacher_renormalized(logits, ids, logprobs):
    """A published trainer's mistake: the teacher's probabilities over the k, the student's over all ids."""
    p = logprobs.log_softmax(-1)
    return (p.exp() * (p - logits.log_softmax(-1).gather(-1, ids))).sum(-1).mean()


# ---- the full distribution ---------------------------------------------------------------------------


def test_full_is_the_kl_divergence(rows):
    logits, p = rows
    wanted = torch.nn.functional.kl_div(logits.log_softmax(-1), p, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(full_loss(logits, p, reduction="none"), wanted, rtol=0, atol=1e-14)
    entropy = -(p.exp() * p).sum(-1).mean()
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), p.exp().flatten(0, 1))
    assert abs(full_loss(logits, p) + entropy - cross_entropy) < 1e-13
    ours, theirs = gradient(full_loss(logits, p), logits), gradient(cross_entropy, logits)
    assert (ours - theirs).abs().max() < 1e-15


@pytest.mark.parametrize("mode", ["class", "renormalized"])
def test_all_ids_are_the_full_loss(rows, mode):
    logits, p = rows
    ids, logprobs, outside = top(p, V)
    for mass in (outside, None, torch.zeros_like(outside)):
        loss = top_k_loss(logits, ids, logprobs, mass, mode=mode)
        assert abs(loss - full_loss(logits, p)) < 1e-13
        wanted = gradient(full_loss(logits, p), logits)
        assert (gradient(loss, logits) - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_one_class_more_is_at_most_the_full_loss(rows, k):
    logits, p = rows
    loss = top_k_loss(logits, *top(p, k), reduction="none")
    assert (loss <= full_loss(logits, p, reduction="none") + 1e-14).all()
    merged_p, merged_q = (
        torch.cat([d.gather(-1, top(p, k)[0]), torch.zeros(3, 5, 1, dtype=d.dtype)], -1).detach()
        for d in (p.exp(), logits.softmax(-1))
    )
    for d in (merged_p, merged_q):
        d[..., -1] = 1 - d.sum(-1)
    assert torch.allclose(loss, (merged_p * (merged_p / merged_q).log()).sum(-1), rtol=0, atol=1e-13)
    again = top_k_loss(logits, *top(p, k)[:2], reduction="none")  # the mass outside from the probabilities
    assert torch.allclose(loss, again, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["class", "renormalized"])
def test_a_student_that_equals_its_teacher_stays(rows, mode):
    _, p = rows
    logits = p.clone().requires_grad_()
    ids, logprobs, outside = top(p, 4)

    def stays(loss):
        return abs(loss) < 1e-13 and gradient(loss, logits).abs().max() < 1e-14

    assert stays(top_k_loss(logits, ids, logprobs, outside, mode=mode))
    # The mistake: its loss there is -log p(S), and its gradient is not zero.
    wrong = teacher_renormalized(logits, ids, logprobs)
    assert abs(wrong + (1 - outside).log().mean()) < 1e-13
    assert (
        not stays(wrong) and gradient(teacher_renormalized(logits, ids, logprobs), logits).abs().max() > 1e-3
    )


def test_what_each_says_of_the_mass_outside(rows):
    _, p = rows
    ids, logprobs, outside = top(p, 4)
    listed = torch.zeros(3, 5, V, dtype=torch.bool).scatter(-1, ids, True)
    moved = torch.where(listed, p, p + 1.0)  # another share outside, the same among the listed
    assert top_k_loss(moved, ids, logprobs, outside, mode="renormalized") < 1e-13
    assert top_k_loss(moved, ids, logprobs, outside, mode="class") > 0.01
    swapped = p.clone()  # the same share outside, on other ids
    swapped[~listed] = p[~listed].view(3, 5, -1).flip(-1).flatten()
    assert top_k_loss(swapped, ids, logprobs, outside, mode="class") < 1e-13
    assert full_loss(swapped, p) > 0.01


# ---- sampled labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 2])
def test_the_mean_over_all_draws_is_the_full_loss(rows, draws):
    """Every sequence of draws from a proposal r, with its probability; weights are p / r / draws."""
    logits, p = rows
    logits, p = logits[0, :1], p[0, :1]
    proposal = (p / 2).softmax(-1)
    mean, slope = 0.0, torch.zeros_like(logits)
    for drawn in itertools.product(range(V), repeat=draws):
        ids = torch.tensor([drawn])
        chance = proposal[0, list(drawn)].prod()
        weights = (p.exp() / proposal).gather(-1, ids) / draws
        loss = sampled_loss(logits, ids, p.gather(-1, ids), weights)
        mean, slope = mean + chance * loss, slope + chance * gradient(loss, logits)
    assert abs(mean - full_loss(logits, p)) < 1e-13
    assert (slope - gradient(full_loss(logits, p), logits)).abs().max() < 1e-14


class Teacher:
    class config:
        vocab_size = V


@pytest.mark.parametrize("proposal_temperature", [1.0, 1.5])
def test_the_labellers_samples_converge(rows, proposal_temperature):
    """20,000 rows of one distribution, 4 draws each: within 5 standard errors, the loss and each weight."""
    logits, p = rows
    logits, teacher = logits[0, 0].detach(), p[0, 0].numpy().astype(np.float32)
    count = 20_000
    labeller = Labeller(Teacher, LabelOptions(None, 4, proposal_temperature=proposal_temperature))
    labels = labeller.of_logits(np.tile(teacher, (count, 1)), np.full(count, -1), "a document")
    ids, logprobs, weights = (torch.from_numpy(x) for x in (labels.ids, labels.logprobs, labels.weights))
    assert (ids < 0).any()  # rows of fewer than 4 different ids
    loss = sampled_loss(logits.expand(count, V), ids.long(), logprobs, weights, reduction="none")
    wanted = full_loss(logits[None], p[0, :1])
    assert abs(loss.mean() - wanted) < 5 * loss.std() / math.sqrt(count) < 0.1 * wanted
    dense = torch.zeros(count, V + 1, dtype=torch.float64)
    dense.scatter_(1, ids.long() % (V + 1), weights.double())
    error = 5 * dense[:, :V].std(0) / math.sqrt(count)
    assert ((dense[:, :V].mean(0) - p[0, 0].exp()).abs() < error + 1e-6).all()
    # Top-k labels of as many ids do not: the check can fail.
    best = torch.zeros(V, dtype=torch.float64).scatter(0, p[0, 0].topk(4)[1], p[0, 0].topk(4)[0].exp())
    assert not ((best - p[0, 0].exp()).abs() < error + 1e-6).all()


# ---- places without a label, masks, temperature, dtypes ----------------------------------------------


def test_places_without_a_label(rows):
    logits, p = rows
    ids, logprobs, outside = top(p, 3)
    more = torch.cat([ids, torch.full((3, 5, 2), -1)], -1)
    less = torch.cat([logprobs, torch.full((3, 5, 2), -math.inf, dtype=p.dtype)], -1)
    for mode in ("class", "renormalized"):
        wanted = top_k_loss(logits, ids, logprobs, outside, mode=mode)
        found = top_k_loss(logits, more, less, outside, mode=mode)
        assert abs(found - wanted) < 1e-14
        assert (gradient(found, logits) - gradient(wanted, logits)).abs().max() < 1e-15
    weights = logprobs.exp()
    padded = torch.cat([weights, torch.zeros(3, 5, 2, dtype=p.dtype)], -1)
    wanted, found = sampled_loss(logits, ids, logprobs, weights), sampled_loss(logits, more, less, padded)
    assert abs(found - wanted) < 1e-14 and torch.isfinite(gradient(found, logits)).all()


def test_rows_without_labels_are_masked(rows):
    logits, p = rows
    ids, logprobs, outside = top(p, 3)
    ids[0, 0], logprobs[0, 0], outside[0, 0] = -1, -math.inf, 1
    mask = ids[..., 0] >= 0
    for loss in (
        lambda **o: top_k_loss(logits, ids, logprobs, outside, **o),
        lambda **o: top_k_loss(logits, ids, logprobs, outside, mode="renormalized", **o),
        lambda **o: sampled_loss(logits, ids, logprobs, logprobs.exp(), **o),
    ):
        every = loss(mask=mask, reduction="none")
        assert every.shape == (3, 5) and every[0, 0] == 0
        assert abs(loss(mask=mask) - every.sum() / 14) < 1e-14
        assert abs(loss(mask=mask, reduction="sum") - every.sum()) < 1e-14
        assert loss(mask=torch.zeros_like(mask)) == 0
        slope = gradient(loss(mask=mask), logits)
        assert torch.isfinite(slope).all() and not slope[0, 0].any() and slope[0, 1].any()


def test_temperature_divides_the_students_logits(rows):
    logits, p = rows
    ids, logprobs, outside = top(p, 3)
    half = logits / 2
    assert full_loss(logits, p, temperature=2) == full_loss(half, p)
    assert top_k_loss(logits, ids, logprobs, outside, temperature=2) == top_k_loss(
        half, ids, logprobs, outside
    )
    weights = logprobs.exp()
    assert sampled_loss(logits, ids, logprobs, weights, temperature=2) == sampled_loss(
        half, ids, logprobs, weights
    )


def test_half_precision_is_computed_in_float32(rows):
    logits, p = rows
    half = logits.detach().bfloat16()
    found = top_k_loss(half, *top(p, 3))
    assert found.dtype == torch.float32 and found == top_k_loss(half.float(), *top(p, 3))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(ids=torch.zeros(3, 5, V + 1, dtype=torch.int64)),
            r"ids: want \[3, 5, 'k'\], k of 1 to 12, got",
        ),
        (dict(ids=torch.zeros(3, 4, 3, dtype=torch.int64)), r"ids: want \[3, 5, 'k'\]"),
        (dict(logprobs=torch.zeros(3, 5, 2)), r"logprobs: want the ids' shape \[3, 5, 3\], got \[3, 5, 2\]"),
        (dict(outside=torch.zeros(3)), r"outside: want \[3, 5\], got \[3\]"),
        (dict(mask=torch.zeros(3)), r"mask: want \[3, 5\], got \[3\]"),
        (dict(mode="ignored"), "mode: want class or renormalized, got 'ignored'"),
        (dict(temperature=0.0), "temperature: want a number above 0, got 0.0"),
        (dict(reduction="max"), "reduction: want mean, sum or none, got 'max'"),
    ],
)
def test_bad_arguments(rows, change, message):
    logits, p = rows
    ids, logprobs, outside = top(p, 3)
    with pytest.raises(InputError, match=message):
        top_k_loss(**{"logits": logits, "ids": ids, "logprobs": logprobs, "outside": outside} | change)


def test_bad_weights_and_widths(rows):
    logits, p = rows
    ids, logprobs, _ = top(p, 3)
    with pytest.raises(InputError, match=r"weights: want the ids' shape \[3, 5, 3\], got \[3, 5\]"):
        sampled_loss(logits, ids, logprobs, torch.zeros(3, 5))
    with pytest.raises(InputError, match=r"logprobs: want the logits' shape \[3, 5, 12\], got \[3, 5, 3\]"):
        full_loss(logits, logprobs)
