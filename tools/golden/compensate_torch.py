"""Error-compensated rounding restated in PyTorch, to check the C core bit for bit.

Written from the contracts of pe_add_products, pe_factor and pe_round_weights in csrc/pyengine.h alone: it
imports nothing of pyengine.  One torch operation on float64 tensors is one IEEE operation, and a sum whose
order matters is a loop over its terms.

Shapes in comments: R rows, N columns, T tokens.
"""

import torch
from quantizer_torch import LEAST, f16, one_if_zero

F64 = torch.float64
CANDIDATES = 16


def products(a, b):
    """a [T, M], b [T, N] float64 -> [M, N], t ascending from zero."""
    out = torch.zeros(a.shape[1], b.shape[1], dtype=F64)
    for x, y in zip(a, b):
        out = out + x[:, None] * y[None, :]
    return out


def squares(x):
    """x [T, N] float32 -> [N], t ascending."""
    sums = torch.zeros(x.shape[1], dtype=F64)
    for row in x.to(F64):
        sums = sums + row * row
    return sums


def factors(h):
    """h [N, N] symmetric -> v [N, N] lower, u [N, N] strictly upper, d [N]."""
    v, u = torch.tril(h), torch.zeros_like(h)
    for k in range(len(h)):
        for j in range(k):
            v[k:, k] = v[k:, k] - v[k:, j] * u[j, k]
        u[k, k + 1 :] = v[k + 1 :, k] / v[k, k]
    return torch.tril(v, -1), u, torch.diagonal(v).clone()


def corrected(w, b, v, u, d):
    """w + b H^-1, [R, N]."""
    n = w.shape[1]
    p, z = torch.zeros_like(b), torch.zeros_like(b)
    for i in range(n):
        left, terms = b[:, i], v[i, :i] * p[:, :i]
        for j in range(i):
            left = left - terms[:, j]
        p[:, i] = left / d[i]
    for i in reversed(range(n)):
        left, terms = p[:, i], u[i, i + 1 :] * z[:, i + 1 :]
        for j in reversed(range(n - i - 1)):
            left = left - terms[:, j]
        z[:, i] = left
    return w + z


def goal(t, e, u, i, first, last):
    """t [.., R] with u[i, j] e[.., R, j] of columns first .. last - 1 on top, descending; u None: zeros."""
    if u is None:
        return t
    terms = u[i, first:last] * e[..., first:last]
    for j in reversed(range(last - first)):
        t = t + terms[..., j]
    return t


def round_weights(w, d, largest, group, u=None, v=None, b=None):
    """w float32 [R, N] -> codes int8 [R, N], scales float16 [R, G]; u, v, d: `factors`; b [R, N] or None."""
    w, (rows, n) = w.to(F64), w.shape
    if b is not None:
        w = corrected(w, b, v, u, d)
    groups = -(-n // group)
    codes, scales = torch.zeros(rows, n, dtype=F64), torch.zeros(rows, groups, dtype=F64)
    e = torch.zeros(rows, n, dtype=F64)
    for g in reversed(range(groups)):
        start, stop = g * group, min(n, g * group + group)
        behind = torch.stack([goal(w[:, i], e, u, i, stop, n) for i in range(start, stop)], dim=1)
        amax = behind.abs().amax(dim=1)
        whole = f16(amax / largest)
        whole = torch.where((whole == 0) & (amax > 0), LEAST, whole)
        tried = torch.stack([f16(whole * ((32 - c) / 32)) for c in range(CANDIDATES)])  # [C, R]
        made, left, loss = rounded(w, e, u, d, behind, start, stop, tried, largest)
        least = torch.full((rows,), torch.inf, dtype=F64)
        for c in range(CANDIDATES):
            better = (loss[c] < least) & ((tried[c] > 0) | (whole == 0))
            least = torch.where(better, loss[c], least)
            scales[:, g] = torch.where(better, tried[c], scales[:, g])
            codes[:, start:stop] = torch.where(better[:, None], made[c], codes[:, start:stop])
            e[:, start:stop] = torch.where(better[:, None], left[c], e[:, start:stop])
    return codes.to(torch.int8), scales.to(torch.float16)


def rounded(w, e, u, d, behind, start, stop, scale, largest):
    """One group with scales [C, R]: codes and e [C, R, columns of the group], loss [C, R]."""
    e, loss = e.expand(len(scale), -1, -1).clone(), torch.zeros_like(scale)
    made = torch.zeros(*scale.shape, stop - start, dtype=F64)
    for i in reversed(range(start, stop)):
        t = goal(behind[:, i - start].expand(len(scale), -1), e, u, i, i + 1, stop)
        code = torch.round(t / one_if_zero(scale)).clamp(-largest, largest)
        code = torch.where(scale == 0, 0.0, code)
        value = code * scale
        e[..., i] = w[:, i] - value
        left = t - value
        loss = loss + d[i] * (left * left)
        made[..., i - start] = code
    return made, e[..., start:stop], loss
