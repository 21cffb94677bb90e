"""Sums and draws of a whole vocabulary, for soft labels."""

from __future__ import annotations

import numpy as np

from ..._core import lib
from ..call import as_input, as_output, run
from ..threads import Pool


def exp_sums(pool: Pool, logits, ids):
    """Sums of exp(logit - the row's greatest): of all ids, and of all but `ids` int32 [T, n].

    -> total, rest: float64 [T].
    """
    tokens, vocab = logits.shape
    total, rest = np.empty(tokens), np.empty(tokens)
    run(
        pool,
        lib.pe_exp_sums,
        "logits",
        as_input(logits),
        tokens,
        vocab,
        as_input(ids, np.int32, "int32_t[]"),
        ids.shape[1],
        as_output(total, "double[]"),
        as_output(rest, "double[]"),
    )
    return total, rest


def draw(pool: Pool, logits, power: float, uniforms):
    """Ids drawn in proportion to exp(power * (logit - the row's greatest)); uniforms float64 [T, draws].

    -> ids int32 [T, draws], total float64 [T], the sum of what they are in proportion to.
    """
    tokens, vocab = logits.shape
    ids, total = np.empty(uniforms.shape, np.int32), np.empty(tokens)
    run(
        pool,
        lib.pe_draw,
        "logits",
        as_input(logits),
        tokens,
        vocab,
        power,
        as_input(uniforms, np.float64, "double[]"),
        uniforms.shape[1],
        as_output(ids, "int32_t[]"),
        as_output(total, "double[]"),
    )
    return ids, total
