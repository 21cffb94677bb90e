"""Types of blocks of 256 columns: their layouts and products restated in NumPy from csrc/pyengine.h."""

from typing import NamedTuple

import numpy as np

F32 = np.float32
BLOCK256, GROUP, PART = 256, 128, 16
IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


class Layout(NamedTuple):
    """Where the fields of a block lie: {field: (first byte, bytes)}."""

    nbytes: int
    fields: dict
    minimums: bool


LAYOUTS = {
    "Q2_K": Layout(84, {"x": (0, 16), "q": (16, 64), "d": (80, 2), "dmin": (82, 2)}, True),
    "Q3_K": Layout(110, {"h": (0, 32), "q": (32, 64), "l": (96, 8), "u": (104, 4), "d": (108, 2)}, False),
    "Q4_K": Layout(144, {"d": (0, 2), "dmin": (2, 2), "k": (4, 12), "q": (16, 128)}, True),
    "Q5_K": Layout(176, {"d": (0, 2), "dmin": (2, 2), "k": (4, 12), "h": (16, 32), "q": (48, 128)}, True),
    "Q6_K": Layout(210, {"q": (0, 128), "h": (128, 64), "s": (192, 16), "d": (208, 2)}, False),
    "IQ4_XS": Layout(136, {"d": (0, 2), "h": (2, 2), "l": (4, 4), "q": (8, 128)}, False),
}

# Of each column or part of a block, the letters of the header.
C = np.arange(BLOCK256)
G, J, I, B = C // 128, C % 128 // 32, C % 32, C // 32  # noqa: E741
P = np.arange(BLOCK256 // PART)
SUB = P // 2  # b of the parts


def pair(x, n):
    """ "x:n is the n-th lowest pair of bits"."""
    return x >> 2 * n & 3


def nibble(x, high):
    return np.where(high, x >> 4, x & 15)


def scales_of_k(k):
    """s and m of Q4_K and Q5_K, [.., 16] each; k [.., 12]."""
    low, b = SUB < 4, SUB
    s = np.where(low, k[..., b] & 63, (k[..., b + 4] & 15) + 16 * pair(k[..., np.maximum(b - 4, 0)], 3))
    m = np.where(low, k[..., b + 4] & 63, (k[..., b + 4] >> 4) + 16 * pair(k[..., b], 3))
    return s, m


def bit(h, b):
    return h >> b & 1


def read_codes(kind, f):
    """f {field: int64 [.., bytes]} -> code [.., 256], s [.., 16], m [.., 16] or None."""
    q = f["q"]
    if kind == "Q2_K":
        return pair(q[..., 32 * G + I], J), f["x"] & 15, f["x"] >> 4
    if kind == "Q3_K":
        code = pair(q[..., 32 * G + I], J) + 4 * bit(f["h"][..., I], B) - 4
        low = nibble(f["l"][..., P % 8], P >= 8)
        return code, low + 16 * pair(f["u"][..., P % 4], P // 4) - 32, None
    if kind == "Q4_K":
        return nibble(q[..., 64 * G + 32 * (J // 2) + I], J % 2 == 1), *scales_of_k(f["k"])
    if kind == "Q5_K":
        code = nibble(q[..., 64 * G + 32 * (J // 2) + I], J % 2 == 1) + 16 * bit(f["h"][..., I], B)
        return code, *scales_of_k(f["k"])
    if kind == "Q6_K":
        low = nibble(q[..., 64 * G + 32 * (J % 2) + I], J >= 2)
        return low + 16 * pair(f["h"][..., 32 * G + I], J) - 32, f["s"].astype(np.int8).astype(np.int64), None
    code = IQ4_NL[nibble(q[..., 16 * B + I % 16], I >= 16)]
    h = f["h"][..., :1] + 256 * f["h"][..., 1:]
    return code, nibble(f["l"][..., SUB // 2], SUB % 2 == 1) + 16 * pair(h, SUB) - 32, None


class Blocks256:
    """A matrix of one of these types; stored uint8 [rows, bytes of a row]."""

    dense = False

    def __init__(self, kind, stored):
        self.type, self.stored = kind, stored
        layout = LAYOUTS[kind]
        blocks = stored.reshape(len(stored), -1, layout.nbytes)
        fields = {name: blocks[..., at : at + n] for name, (at, n) in layout.fields.items()}
        halves = {
            name: np.ascontiguousarray(fields.pop(name)).view(np.float16)[..., 0].astype(F32)
            for name in ("d", "dmin")
            if name in fields
        }
        wide = {name: field.astype(np.int64) for name, field in fields.items()}
        self.code, self.s, self.m = read_codes(kind, wide)  # [rows, blocks, 256], [rows, blocks, 16]
        self.d, self.dmin = halves["d"], halves.get("dmin")  # [rows, blocks]

    @property
    def shape(self):
        rows, blocks, _ = self.code.shape
        return rows, blocks * BLOCK256

    def values(self):
        """float32 [rows, cols] of an embedding: "((d (*) s) (*) code) (-) (dmin (*) m)"."""
        s = np.repeat(self.d[..., None] * self.s.astype(F32), PART, axis=-1)
        values = s * self.code.astype(F32)
        if self.m is not None:
            values = values - np.repeat(self.dmin[..., None] * self.m.astype(F32), PART, axis=-1)
        return values.reshape(self.shape)


def f32(sums):
    """The float32 nearest to each exact sum, which int32 must hold."""
    assert (np.abs(sums) < 2**31).all()
    return sums.astype(F32)


def matmul(w, q, s_x):
    """q int16 [tokens, cols], s_x float32 [tokens, groups] -> float32 [tokens, rows]."""
    tokens = len(q)
    y = np.zeros((tokens, w.shape[0]), F32)
    for g in range(w.shape[1] // GROUP):
        block, first = g // 2, g % 2 * 8
        columns = q[:, g * GROUP : (g + 1) * GROUP].reshape(tokens, 8, PART).astype(np.int64)
        code = w.code[:, block, first * PART :][:, :GROUP].reshape(-1, 8, PART)
        s = w.s[:, block, first : first + 8]
        part = np.einsum("tpi,rpi->ptr", columns, code) * s.T[:, None, :]  # P [8, tokens, rows]
        value = group_sum(w.type, part) * w.d[:, block]
        if w.m is not None:
            m = w.m[:, block, first : first + 8]
            value = value - f32(columns.sum(-1) @ m.T) * w.dmin[:, block]
        y = y + value * s_x[:, g, None]
    return y


def group_sum(kind, p):
    """D of P [8, ..]."""
    if kind in ("Q2_K", "Q3_K"):
        return f32(p.sum(0))
    if kind == "Q4_K":
        return f32(p[0] + p[1] + p[4] + p[5]) + f32(p[2] + p[3] + p[6] + p[7])
    a = f32(p[0::2] + p[1::2]) if kind == "Q5_K" else f32(p[:4]) + f32(p[4:])
    b = a[:2] + a[2:]
    return b[0] + b[1]


# ---- blocks for tests ----------------------------------------------------------------------------


def of_bytes(kind, stored, d, dmin):
    """A matrix of these bytes, but for the scales of its blocks; d, dmin float16 [rows, blocks]."""
    layout = LAYOUTS[kind]
    blocks = stored.reshape(len(stored), -1, layout.nbytes).copy()
    for name, halves in (("d", d), ("dmin", dmin)):
        if name in layout.fields:
            at, _ = layout.fields[name]
            halves = np.ascontiguousarray(np.broadcast_to(halves, blocks.shape[:2]), np.float16)
            blocks[..., at : at + 2] = halves.view(np.uint8).reshape(*blocks.shape[:2], 2)
    return Blocks256(kind, blocks.reshape(len(stored), -1))


def random_blocks(rng, kind, rows, cols, halves):
    """Any bytes; halves(shape) draws the float16 scales."""
    shape = rows, cols // BLOCK256
    stored = rng.integers(0, 256, (rows, shape[1] * LAYOUTS[kind].nbytes), np.uint8)
    return of_bytes(kind, stored, halves(shape), halves(shape))


def filled(kind, rows, cols, code, s, m=0, d=1.0, dmin=1.0):
    """Every code, scale and minimum as given: [rows, cols] and [rows, parts], or one for all."""
    shape = rows, cols // BLOCK256
    code = np.broadcast_to(code, (rows, cols)).reshape(*shape, BLOCK256).astype(np.int64)
    s, m = (np.broadcast_to(v, (rows, cols // PART)).reshape(*shape, 16).astype(np.int64) for v in (s, m))
    stored = np.zeros((*shape, LAYOUTS[kind].nbytes), np.uint8)
    field = {name: stored[..., at : at + n] for name, (at, n) in LAYOUTS[kind].fields.items()}
    write(kind, field, code, s, m)
    w = of_bytes(kind, stored.reshape(rows, -1), d, dmin)
    assert (w.code == code).all() and (w.s == s).all() and (w.m is None or (w.m == m).all())
    return w


def put(field, index, value):
    """field[.., index] |= value, index by index, where an index may come more than once."""
    for i, v in zip(np.broadcast_to(index, value.shape[-1:]), np.moveaxis(value, -1, 0)):
        field[..., i] |= v.astype(np.uint8)


def write(kind, f, code, s, m):
    if kind == "Q2_K":
        put(f["q"], 32 * G + I, code << 2 * J)
        f["x"][...] = s | m << 4
    elif kind == "Q3_K":
        put(f["q"], 32 * G + I, (code + 4 & 3) << 2 * J)
        put(f["h"], I, (code + 4 >> 2) << B)
        put(f["l"], P % 8, (s + 32 & 15) << 4 * (P // 8))
        put(f["u"], P % 4, (s + 32 >> 4) << 2 * (P // 4))
    elif kind in ("Q4_K", "Q5_K"):
        put(f["q"], 64 * G + 32 * (J // 2) + I, (code & 15) << 4 * (J % 2))
        if kind == "Q5_K":
            put(f["h"], I, (code >> 4) << B)
        s, m, b = s[..., ::2], m[..., ::2], np.arange(4)
        put(f["k"], b, s[..., :4] | s[..., 4:] >> 4 << 6)
        put(f["k"], b + 4, m[..., :4] | m[..., 4:] >> 4 << 6)
        put(f["k"], b + 8, s[..., 4:] & 15 | (m[..., 4:] & 15) << 4)
    elif kind == "Q6_K":
        put(f["q"], 64 * G + 32 * (J % 2) + I, (code + 32 & 15) << 4 * (J // 2))
        put(f["h"], 32 * G + I, (code + 32 >> 4) << 2 * J)
        f["s"][...] = s.astype(np.int8).view(np.uint8)
    else:
        number = np.searchsorted(IQ4_NL, code)
        put(f["q"], 16 * B + I % 16, number << 4 * (I // 16))
        s, b = s[..., ::2] + 32, np.arange(8)
        put(f["l"], b // 2, (s & 15) << 4 * (b % 2))
        put(f["h"], b // 4, (s >> 4) << 2 * (b % 4))
