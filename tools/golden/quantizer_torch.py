"""The weight quantizer restated in PyTorch, to check the C core and codes.py bit for bit.

Written from the contract of pe_quantize_weights in csrc/pyengine.h alone: it imports nothing of
pyengine.  As in locked_torch.py, one torch operation on float64 tensors is one IEEE operation, and a
sum whose order matters is a loop over its terms.  torch rounds a float64 to float16 by way of float32,
that is twice: f16 below rounds once.

Shapes in comments: R rows, C columns, G groups, S columns of a group.
"""

import torch

F64 = torch.float64
LEAST = 2.0**-24  # the smallest positive float16


def f16(value):
    """The nearest float16 to value >= 0 (float64), ties to even, as float64; infinity beyond."""
    exponent = torch.frexp(value)[1].clamp(min=-13) - 1
    step = torch.ldexp(torch.ones_like(value), exponent - 10)
    nearest = torch.round(value / step) * step  # torch.round: ties to even
    return torch.where(nearest >= 65536, torch.inf, nearest)


def next_up(scale):
    """The next float16 above scale >= 0 (float64)."""
    bits = scale.to(torch.float16).view(torch.int16)
    return (bits + 1).view(torch.float16).to(F64)


def absmax_scale(amax, largest):
    """s = f16(amax / largest); 2^-24 where that is 0; the next float16 up where rint(amax / s) >
    largest."""
    scale = f16(amax / largest)
    scale = torch.where((scale == 0) & (amax > 0), LEAST, scale)
    clips = torch.round(amax / one_if_zero(scale)) > largest
    return torch.where(clips, next_up(scale), scale)


def one_if_zero(scale):
    return torch.where(scale == 0, 1.0, scale)


def codes_of(x, scale, largest):
    """x [R, G, S], scale [R, G]: rint(x / s), clipped."""
    return torch.round(x / one_if_zero(scale)[..., None]).clamp(-largest, largest)


def squared_error(x, scale, largest):
    """The sum over a group, ascending, of (x - code * s)^2."""
    error = x - codes_of(x, scale, largest) * scale[..., None]
    terms = error * error
    total = torch.zeros_like(scale)
    for i in range(terms.shape[-1]):
        total = total + terms[..., i]
    return total


def mse_scale(x, start, largest):
    """Of f16(start * (256 - i) / 256), i = 0 .. 64, the one of least squared error, the greatest
    among equals."""
    best, least = start, squared_error(x, start, largest)
    for i in range(1, 65):
        scale = f16(start * ((256 - i) / 256))
        error = squared_error(x, scale, largest)
        better = (error < least) & (scale > 0)
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def quantize_weights(x, largest, group_size, method):
    """x float32 [R, C] -> codes int8 [R, C], scales float16 [R, G].  method: "absmax" or "mse"."""
    rows, cols = x.shape
    groups = -(-cols // group_size)
    padded = torch.zeros(rows, groups * group_size, dtype=F64)  # zeros change no sum of squares
    padded[:, :cols] = x
    padded = padded.reshape(rows, groups, group_size)
    scales = absmax_scale(padded.abs().amax(-1), largest)
    if method == "mse":
        scales = mse_scale(padded, scales, largest)
    codes = codes_of(padded, scales, largest).reshape(rows, -1)[:, :cols]
    return codes.to(torch.int8), scales.to(torch.float16)


def pack_int4(codes):
    """int8 [R, C] -> uint8 [R, C / 2]: low nibble = even column, nibble = code + 8."""
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4
