"""A merge restated in PyTorch, to check pyengine/merge bit for bit.

Written from the docstrings of pyengine/merge/arithmetic.py and pyengine/merge/masks.py alone: it imports
nothing of pyengine.  One torch operation on float32 tensors is one IEEE operation.

Philox is computed in int64, whose additions and multiplications wrap around: a 64-bit word is its bits.
"""

import hashlib
import math

import torch

F32, F64 = torch.float32, torch.float64
LOW32 = 0xFFFFFFFF


def signed(word):
    """A 64-bit word as the int64 of the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


# ---- masks ---------------------------------------------------------------------------------------

PHILOX_M = 0xD2E7470EE14C6C93, 0xCA5A826395121157
PHILOX_W = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def shifted(x):
    """The upper 32 bits of each word."""
    return (x >> 32) & LOW32


def times(x, factor):
    """-> the upper and the lower 64 bits of the product of unsigned words, by 32-bit halves."""
    x0, x1, f0, f1 = x & LOW32, shifted(x), factor & LOW32, factor >> 32
    low, middle, other = x0 * f0, x1 * f0, x0 * f1
    carry = shifted(low) + (middle & LOW32) + (other & LOW32)
    high = x1 * f1 + shifted(middle) + shifted(other) + shifted(carry)
    return high, x * signed(factor)


def philox4x64(blocks, key):
    """Ten rounds of the counters (block + 1, 0, 0, 0) -> int64 [blocks, 4]."""
    zero = torch.zeros_like(blocks)
    x = [blocks + 1, zero, zero, zero]
    k = list(key)
    for _ in range(10):
        high0, low0 = times(x[0], PHILOX_M[0])
        high1, low1 = times(x[2], PHILOX_M[1])
        x = [high1 ^ x[1] ^ signed(k[0]), low1, high0 ^ x[3] ^ signed(k[1]), low0]
        k = [(word + step) % (1 << 64) for word, step in zip(k, PHILOX_W)]
    return torch.stack(x, dim=1)


def mask_key(seed, position, name):
    digest = hashlib.sha256(f"pyengine-merge-1\n{seed}\n{position}\n{name}".encode()).digest()
    return int.from_bytes(digest[0:8], "little"), int.from_bytes(digest[8:16], "little")


def draws(key, size):
    """u[0 .. size), int64."""
    words = philox4x64(torch.arange(-(-size // 8)), key).reshape(-1)
    return torch.stack([words & LOW32, shifted(words)], dim=1).reshape(-1)[:size]


def drawn_mask(seed, position, name, density, size):
    """float32 [size] of 0 and 1."""
    return (draws(mask_key(seed, position, name), size) < math.ceil(density * 2.0**32)).to(F32)


# ---- sparse --------------------------------------------------------------------------------------


def magnitude_mask(d, density):
    """Of d [n]: the k greatest magnitudes; of equal ones the first."""
    keep = torch.zeros_like(d)
    if density > 0:
        k = max(1, int(density * d.numel()))
        keep[torch.sort(d.abs(), descending=True, stable=True).indices[:k]] = 1
    return keep


def norm(d):
    """The exact sum of magnitudes to float64, then to float32."""
    return torch.tensor(math.fsum(d.abs().tolist()), dtype=F64).to(F32)


def sparse(d, keep, density, rescale):
    """keep: of 0 and 1."""
    masked = d * keep
    if rescale == "density" and density > 0:
        return masked / torch.tensor(density, dtype=F32)
    if rescale == "l1":
        before, after, least = norm(d), norm(masked), torch.tensor(1e-7, dtype=F32)
        if before >= least and after >= least:
            return masked * (before / after)
    return masked


# ---- methods -------------------------------------------------------------------------------------


def fma(x, weight, total):
    """x * weight + total, rounded once: by way of float64, rounded to odd."""
    product = x.to(F64) * weight.to(F64)  # exact
    other = total.to(F64)
    wide = product + other
    part = wide - product
    error = (product - (wide - part)) + (other - part)
    bits = wide.view(torch.int64)
    # Where the sum is not exact and its last bit is 0, take the odd neighbour on the side of the error.
    step = torch.where((error > 0) == (wide > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0) & (wide != 0), bits + step, bits)
    return odd.view(F64).to(F32)


def in_order(terms):
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def linear(models, weights, normalize):
    weights = torch.tensor(weights, dtype=F32)
    total = torch.zeros_like(models[0])
    for x, weight in zip(models, weights):
        total = fma(x, weight, total)
    return total / in_order(weights) if normalize else total


def task_vectors(base, deltas, weights, consensus, normalize, scale):
    """deltas: after `sparse`."""
    weights = torch.tensor(weights, dtype=F32)
    d = [delta * weight for delta, weight in zip(deltas, weights)]
    if consensus:
        s = in_order(d)
        a = [(((one > 0) & (s >= 0)) | ((one < 0) & (s < 0))).to(F32) for one in d]
        n = in_order([one * agrees for one, agrees in zip(d, a)])
        divisor = in_order([weight * agrees for weight, agrees in zip(weights, a)])
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    else:
        n, divisor = in_order(d), in_order(weights)
    if normalize:
        n = n / divisor
    if scale != 1:
        n = n * torch.tensor(scale, dtype=F32)
    return base + n


SPARSIFY = {"ties": "magnitude", "dare_linear": "random", "dare_ties": "random", "task_arithmetic": None}
CONSENSUS = ("ties", "dare_ties")


def merge_tensor(
    method,
    name,
    models,
    weights,
    *,
    base=None,
    densities=None,
    normalize=False,
    rescale=None,
    scale=1.0,
    seed=0,
    positions=(),
):
    """One tensor.  models, base: float32 [n]; positions: of the models in the configuration's list."""
    if method == "linear":
        return linear(models, weights, normalize)
    deltas = []
    for i, x in enumerate(models):
        d = x - base
        density = densities[i] if densities else 1.0
        if SPARSIFY[method] and density < 1:
            if SPARSIFY[method] == "magnitude":
                keep = magnitude_mask(d, density)
            else:
                keep = drawn_mask(seed, positions[i], name, density, d.numel())
            d = sparse(d, keep, density, rescale)
        deltas.append(d)
    return task_vectors(base, deltas, weights, method in CONSENSUS, normalize, scale)
