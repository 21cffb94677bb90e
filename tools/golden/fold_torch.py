"""The scales that `awq` folds, restated in PyTorch, to check them bit for bit.

Written from the statement in pyengine/quantizer/folds.py: it imports nothing of pyengine.

Shapes in comments: R rows, N columns, C channels.
"""

import math

import compensate_torch
import torch

F64 = torch.float64
MOST = 4


def ordered_sum(values):
    total = torch.zeros((), dtype=F64)
    for value in values:
        total = total + value
    return total


def lg(mean):
    fraction, exponent = math.frexp(mean)
    return exponent + 2 * fraction - 2


def exponents(means, quarters):
    """means [C], alpha in quarters -> [C] float64, whole numbers."""
    logs = torch.tensor([lg(float(m)) for m in means], dtype=F64)
    centred = logs - ordered_sum(logs) / len(logs)
    return torch.round(quarters / 8 * centred).clamp(-MOST, MOST)  # ties to even


def error(total, w, means, e, largest, group):
    """total with the weighed errors of w [R, N] float32 on top; e [N]."""
    power = torch.pow(torch.tensor(2.0, dtype=F64), e)
    folded, weights = w.to(F64) * power, means / (power * power)
    codes, scales = compensate_torch.round_weights(folded.float(), weights, largest, group)
    made = codes.to(F64) * scales.to(F64).repeat_interleave(group, dim=1)[:, : w.shape[1]]
    terms = (folded - made) * (folded - made) * weights
    of_rows = torch.zeros(len(w), dtype=F64)
    for column in range(w.shape[1]):
        of_rows = of_rows + terms[:, column]
    for row in of_rows:
        total = total + row
    return total


def best(linears, largest, group=128, channel=None):
    """linears [(w [R, N] float32, means [N] float64)], quantized, in order; channel: of each column, or None
    -> exponents [C]."""
    means = linears[0][1]
    if channel is not None:
        count = max(channel) + 1
        sums = [ordered_sum(m for m, c in zip(means, channel) if c == of) for of in range(count)]
        means = torch.stack(sums) / (len(channel) // count)
    least, found = math.inf, None
    for quarters in range(5):
        e = exponents(means, quarters)
        of_columns = e if channel is None else e[channel]
        total = torch.zeros((), dtype=F64)
        for w, m in linears:
            total = error(total, w, m, of_columns, largest, group)
        if total < least:
            least, found = float(total), e
    return found


def norm(weight, e, added):
    """weight [C] float64 -> float32; added: 1 of a zero-centred norm, else 0."""
    return ((weight + added) * torch.pow(torch.tensor(2.0, dtype=F64), -e) - added).float()
