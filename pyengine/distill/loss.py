"""The losses of a student that learns from stored soft labels, in PyTorch.

Each function takes the student's logits and the columns of a labels data set (`layout.py`), as tensors.  Row
j of the labels is about token j + 1, and so is row j of the logits: nothing is shifted.

    logits    [.., V]   the student's, of any floating dtype; computed in float32, or float64 if they are
    ids       [.., k]   int64: ids of the student's vocabulary, each once in a row; -1: no label
    logprobs  [.., k]   the teacher's log-probabilities of the ids, at the labels' temperature, over its whole
                        vocabulary; -inf where the id is -1
    temperature         the one of the labels (`labels.json` has it); the student's logits are divided by it.
                        No loss is multiplied by its square: who adds another loss weighs the two.
    mask      [..]      bool: the rows that count; None: all.  A row without a label must not count
    reduction           "mean" over the rows that count (0 where none does), "sum", or "none": one number per
                        row, [..], 0 in rows that do not count

p is the teacher's distribution, q the student's, S the ids of a row, m = 1 - p(S) the mass outside.

    full_loss     sum over V of p log(p / q)
    top_k_loss    mode="class"         sum over S of p log(p / q), + m log(m / (1 - q(S)))
                  mode="renormalized"  sum over S of p' log(p' / q'), p' = p / p(S), q' = q / q(S)
    sampled_loss  sum over the samples of w log(p / q)

"class" takes every id outside for one class.  It is the full loss for k = V, it is never more than the full
loss, and its gradient is zero where q equals p.  "renormalized" says nothing about the mass outside: a
student may put any share of its probability there.  Do not mix the two: where p' is compared with q, as in
a trainer that was published, a student that equals its teacher has the loss -log p(S), and is driven away.

The mean of sampled_loss over draws is the full loss, and that of its gradient the full gradient, where the
mean of w summed over the draws of an id is p of this id.

Sources: Hinton et al., "Distilling the knowledge in a neural network" (2015); "Sparse logit sampling"
(arXiv 2503.16870) for the bias of top-k labels and for sampled ones.

PyTorch is imported when a function is called; nothing else of this package needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..optional import require

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

MODES = ("class", "renormalized")
REDUCTIONS = ("mean", "sum", "none")


def full_loss(
    logits: Tensor,
    logprobs: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The KL divergence of the student from the teacher; logprobs [.., V], of every id.

    Errors: InputError for a shape, a temperature or a name that is not as above.
    """
    _check(logits, logprobs, logprobs, temperature, reduction)
    if logprobs.shape != logits.shape:
        raise InputError(f"logprobs: want the logits' shape {_shape(logits)}, got {_shape(logprobs)}")
    q = _scaled(logits, temperature).log_softmax(-1)
    p = logprobs.to(q.dtype)
    return _reduce(_terms(p.exp(), p, q).sum(-1), mask, reduction)


def top_k_loss(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    outside: Tensor | None = None,
    *,
    mode: str = "class",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of top-k labels, by the name `mode` (above).

    outside [..]: the data set's column; None: 1 less the probabilities of the row.
    Errors: InputError for a shape, a temperature or a name that is not as above.
    """
    _check(logits, ids, logprobs, temperature, reduction)
    if mode not in MODES:
        raise InputError(f"mode: want {' or '.join(MODES)}, got {mode!r}")
    if outside is not None and outside.shape != logits.shape[:-1]:
        raise InputError(f"outside: want {_shape(logits)[:-1]}, got {_shape(outside)}")
    scaled = _scaled(logits, temperature)
    empty, ids, log_p = ids < 0, _listed(ids), logprobs.to(scaled.dtype)
    if mode == "renormalized":
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
        # Of the listed ids alone: a place without a label has no share of the student's either.
        listed = scaled.gather(-1, ids).masked_fill(empty, -float("inf"))
        log_q = listed - listed.logsumexp(-1, keepdim=True)
        return _reduce(_terms(log_p.exp(), log_p, log_q).sum(-1), mask, reduction)
    p = log_p.exp()
    log_q = scaled.gather(-1, ids) - scaled.logsumexp(-1, keepdim=True)
    loss = _terms(p, log_p, log_q).sum(-1)
    if ids.shape[-1] < scaled.shape[-1]:
        m = (1 - p.sum(-1)).clamp(min=0) if outside is None else outside.to(scaled.dtype)
        rest = scaled.scatter(-1, ids, -float("inf")).logsumexp(-1) - scaled.logsumexp(-1)
        loss = loss + _terms(m, m.log(), rest)
    return _reduce(loss, mask, reduction)


def sampled_loss(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of sampled labels: unbiased for the full loss, over the draws (above).

    weights [.., k]: the data set's column; 0 where the id is -1.
    A row's number may be negative: its mean is not.
    Errors: InputError for a shape, a temperature or a name that is not as above.
    """
    _check(logits, ids, logprobs, temperature, reduction)
    if weights.shape != ids.shape:
        raise InputError(f"weights: want the ids' shape {_shape(ids)}, got {_shape(weights)}")
    scaled = _scaled(logits, temperature)
    w, log_p = weights.to(scaled.dtype), logprobs.to(scaled.dtype)
    log_q = scaled.gather(-1, _listed(ids)) - scaled.logsumexp(-1, keepdim=True)
    return _reduce(_terms(w, log_p, log_q).sum(-1), mask, reduction)


# ---- parts ---------------------------------------------------------------------------------------


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    torch = _torch()
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def _listed(ids: Tensor) -> Tensor:
    """ids, where -1 is replaced by the row's first id, which is listed anyway; 0 in a row without labels."""
    return ids.where(ids >= 0, ids[..., :1]).clamp(min=0)


def _terms(weights: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """weights * (log_p - log_q), and 0, with a gradient of 0, where the weight is 0."""
    zero = weights == 0
    difference = log_p.masked_fill(zero, 0) - log_q.masked_fill(zero, 0)
    return weights * difference


def _reduce(rows: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    if mask is not None:
        if mask.shape != rows.shape:
            raise InputError(f"mask: want {_shape(rows)}, got {_shape(mask)}")
        rows = rows.masked_fill(~mask.bool(), 0)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    count = rows.numel() if mask is None else mask.bool().sum().clamp(min=1)
    return total / max(count, 1) if isinstance(count, int) else total / count


def _check(logits: Tensor, ids: Tensor, logprobs: Tensor, temperature: float, reduction: str) -> None:
    if logits.ndim < 1 or ids.shape[:-1] != logits.shape[:-1] or not 1 <= ids.shape[-1] <= logits.shape[-1]:
        raise InputError(
            f"ids: want {[*_shape(logits)[:-1], 'k']}, k of 1 to {_shape(logits)[-1]}, got {_shape(ids)}"
        )
    if logprobs.shape != ids.shape:
        raise InputError(f"logprobs: want the ids' shape {_shape(ids)}, got {_shape(logprobs)}")
    if not temperature > 0:
        raise InputError(f"temperature: want a number above 0, got {temperature}")
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction: want {', '.join(REDUCTIONS[:-1])} or none, got {reduction!r}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _torch() -> Any:
    return require("torch", extra="train", what="the loss of soft labels")
