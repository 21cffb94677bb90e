"""What mixes tokens: rotary positions, convolution, delta rule, attention."""

from __future__ import annotations

import numpy as np

from ..._core import ffi, lib
from ..call import as_input, as_output, check_status, run, want, want_out
from ..threads import Pool


def rope_table(start: int, tokens: int, inv_freq, out=None, *, scale: float = 1.0):
    """cos, sin [T, half] of positions start, start + 1, ...; out: such a pair to write to.

    scale: YaRN's attention factor; rounded to float32, it multiplies both in float32, as in Hugging Face.
    """
    half = inv_freq.size
    cos, sin = (np.empty((tokens, half), np.float32) for _ in range(2)) if out is None else out
    want_out(cos, (tokens, half))
    want_out(sin, (tokens, half))
    check_status(
        lib.pe_rope_table(start, tokens, as_input(inv_freq), half, as_output(cos), as_output(sin)),
        "rope_table",
    )
    if scale != 1:
        cos *= np.float32(scale)
        sin *= np.float32(scale)
    return cos, sin


def rope(pool: Pool, x, table) -> None:
    """Rotates x [T, heads, n] in place."""
    tokens, heads, n = x.shape
    cos, sin = table
    want(cos.shape[0] == tokens, "rope: want one row of the table per token")
    run(pool, lib.pe_rope, "rope", as_output(x), tokens, heads, n, cos.shape[1], as_input(cos), as_input(sin))


def causal_conv1d(pool: Pool, x, weight, conv_state, out=None):
    """x [T, channels], weight [taps, channels] -> [T, channels], silu included; updates
    conv_state [taps - 1, channels].  out: an array to write to."""
    tokens, channels = x.shape
    taps = weight.shape[0]
    want(
        weight.shape == (taps, channels) and conv_state.shape == (taps - 1, channels),
        "causal_conv1d: want as many channels everywhere",
    )
    out = np.empty_like(x) if out is None else out
    want_out(out, x.shape)
    run(
        pool,
        lib.pe_causal_conv1d,
        "causal_conv1d",
        as_input(x),
        tokens,
        channels,
        as_input(weight),
        taps,
        as_output(conv_state),
        as_output(out),
    )
    return out


def delta_rule(
    pool: Pool, query, key, qkv, value_start: int, beta, decay, key_head, recurrent_state, out=None
):
    """query, key [T, key heads, dk]; the values of a token are qkv [T, width] from value_start on;
    beta, decay [T, value heads] -> [T, value heads, dv]; updates recurrent_state.  out: an array to
    write to."""
    tokens, key_heads, dk = key.shape
    heads, _, dv = recurrent_state.shape
    want(
        recurrent_state.shape[1] == dk
        and beta.shape == decay.shape == (tokens, heads)
        and qkv.shape[1] == value_start + heads * dv
        and key_head.shape == (heads,),
        "delta_rule: want shapes that fit the state",
    )
    shape = (tokens, heads, dv)
    out = np.empty(shape, np.float32) if out is None else out
    want_out(out, shape)
    run(
        pool,
        lib.pe_delta_rule,
        "delta_rule",
        as_input(query),
        as_input(key),
        as_input(qkv.reshape(-1)[value_start:]),
        qkv.shape[1],
        as_input(beta),
        as_input(decay),
        tokens,
        key_heads,
        heads,
        dk,
        dv,
        as_input(key_head, np.int32, "int32_t[]"),
        as_output(recurrent_state),
        as_output(out),
    )
    return out


def attention(pool: Pool, query, keys, values, scale: float, out=None, name: str = "attention"):
    """query [T, heads, n] over keys, values [start + T, kv heads, n] -> [T, heads, n].

    keys and values are both float32 or both float16, and lie alike: heads and positions may be at any
    distance, the n elements are next to each other.  out: an array to write to.
    """
    tokens, heads, n = query.shape
    positions, kv_heads, _ = keys.shape
    want(
        values.shape == keys.shape == (positions, kv_heads, n) and positions >= tokens,
        "attention: want a cache that holds the queries' own positions",
    )
    half = keys.dtype == np.float16
    item = 2 if half else 4
    want(
        keys.dtype == values.dtype
        and (half or keys.dtype == np.float32)
        and keys.strides == values.strides
        and (n == 1 or keys.strides[2] == item)
        and min(keys.strides) >= 0,
        "attention: want keys and values of one type and layout, a head's elements next to each other",
    )
    function, kind = (lib.pe_attention_f16, "uint16_t *") if half else (lib.pe_attention, "float *")
    out = np.empty_like(query) if out is None else out
    want_out(out, query.shape)
    run(
        pool,
        function,
        f"{name}: scores",
        as_input(query),
        ffi.cast(kind, keys.ctypes.data),
        ffi.cast(kind, values.ctypes.data),
        keys.strides[0] // item,
        keys.strides[1] // item,
        positions - tokens,
        tokens,
        heads,
        kv_heads,
        n,
        scale,
        as_output(out),
        keep=(keys, values),
    )
    return out
