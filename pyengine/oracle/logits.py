"""What logits alone tell: how far off they are, from which token on, and what kind of mistake that is.

Three questions are asked in turn.

1. Are they lm_head's of any hidden state?  The logits of a token are W h, with lm_head's weight W
   [vocab, hidden].  What lies outside of W's columns, no mistake before the head can have made.
2. Does that h have the size that the last norm gives?  h / (1 + weight) has a root mean square of 1.
3. How does the error lie over the tokens?  The first token has no history: no state, one key, no rotation.
   What needs a history leaves it right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..probabilities import log_softmax
from .budget import Error
from .dataflow import HEAD, LAST_NORM, listed

# The kinds: what is wrong lies ...
IN_HEAD = "head"  # in lm_head, or behind it
IN_LAST_NORM = "last norm"  # in the last norm at least
FIRST_TOKEN = "first token"  # in what needs no history, or before the first token
HISTORY = "history"  # in what a token takes from those before it
SPLIT = "split"  # at one token, from which on it is wrong
SOME_TOKENS = "some tokens"  # at some tokens and not at others after them
UNKNOWN = "unknown"  # not to be told: one row, or no row alone beyond the budget

OUTSIDE = 0.3  # of the error: more than that outside of lm_head's columns is the head's
JUMP = 20.0  # times the largest error before: where an error begins in one step
CONTRAST = 8.0  # times the largest error before: what tells wrong tokens from right ones
GROWS = 3.0  # times, from the first third of the wrong tokens to the last: an error that grows
NORM_SLACK = 8.0  # budgets, by which the size of the last norm's output may be off
ROWS = 16  # tokens that the first two questions are asked of


@dataclass(frozen=True)
class LogitsVerdict:
    """The logits of R tokens.

    kld_mean, kld_largest   KL divergence of the candidate from the reference, in nats; at kld_token
    same_top                tokens at which both have the same likeliest id, of `tokens`
    other_top               the first token with another one, or None
    worst_token             the one with the largest error
    begins                  the first token beyond the budget, or None
    rows, by_token          [R] the tokens, and the largest error of each, in units of the budget
    kind                    one of those above; sentence: the same in words
    advice                  what to dump next, in words; "" where nothing is wrong
    """

    tokens: int
    rows: list[int]
    kld_mean: float
    kld_largest: float
    kld_token: int
    same_top: int
    other_top: int | None
    worst_token: int
    begins: int | None
    by_token: list[float]
    kind: str
    sentence: str
    advice: str


def judge_logits(truth, value, allowed: Error, tokens, model=None) -> LogitsVerdict:
    """truth, value [R, vocab]; tokens [R]: of each row; allowed: lm_head's budget, end to end.

    model: with it, the head and the last norm are looked at, which takes lm_head's weight in float64.
    """
    truth, value = truth.astype(np.float64), value.astype(np.float64)
    with np.errstate(all="ignore"):
        error = np.abs(value - truth).max(axis=-1)
        error = np.where(np.isnan(error), np.inf, error)
        shares = np.where(error == 0, 0.0, error / allowed.largest)
    beyond = np.flatnonzero(shares > 1)
    kind, sentence = _kind(truth, value, shares, allowed, tokens, model)
    layers = "" if model is None else _layers(model.config.num_hidden_layers)
    begins = int(tokens[beyond[0]]) if beyond.size else None
    return LogitsVerdict(
        len(value),
        tokens.tolist(),
        *_divergence(truth, value, tokens),
        *_top(truth, value, tokens),
        int(tokens[shares.argmax()]),
        begins,
        shares.tolist(),
        kind,
        sentence,
        _advice(kind, begins, layers) if Error.between(value, truth).share_of(allowed) > 1 else "",
    )


def _divergence(truth, value, tokens):
    """KL(reference || candidate) of each token -> mean, largest, its token."""
    with np.errstate(all="ignore"):
        p, q = log_softmax(truth), log_softmax(value)
        kld = np.sum(np.exp(p) * (p - q), axis=-1)
    kld = np.where(np.isfinite(kld), np.maximum(kld, 0.0), np.inf)
    return float(kld.mean()), float(kld.max()), int(tokens[kld.argmax()])


def _top(truth, value, tokens):
    same = truth.argmax(axis=-1) == value.argmax(axis=-1)
    return int(same.sum()), None if same.all() else int(tokens[same.argmin()])


# ---- the kind of mistake ---------------------------------------------------------------------


def _kind(truth, value, shares, allowed, tokens, model) -> tuple[str, str]:
    wrong = np.flatnonzero(shares > 1)
    if not wrong.size:
        return UNKNOWN, "no token alone is beyond the budget"
    if model is not None and np.isfinite(shares).all():
        found = _behind_the_layers(truth[wrong[:ROWS]], value[wrong[:ROWS]], allowed, model)
        if found:
            return found
    if len(value) == 1 and tokens[0]:
        return UNKNOWN, "one token's logits do not say where the error begins"
    if tokens[wrong[0]] == 0:
        return FIRST_TOKEN, (
            f"wrong from the first token on{_growth(shares[wrong])}: what needs no history (weights, norms, "
            "projections, experts), or something before the first token (padding, a state that was not empty)"
        )
    return _with_history(shares, wrong, tokens)


def _with_history(shares, wrong, tokens):
    begins, before = int(wrong[0]), shares[: wrong[0]]
    at = int(tokens[begins])
    if tokens[0]:
        return UNKNOWN, f"wrong from token {at} on, of those that are there; the first token is not"
    if np.median(shares[wrong]) < CONTRAST * before.max(initial=0.0):
        return UNKNOWN, (
            f"beyond the budget from token {at} on, but the tokens before it use up to {before.max():.2g} of "
            "it: they may be wrong as well"
        )
    if len(wrong) < (len(shares) - begins) / 2:
        return SOME_TOKENS, (
            f"{len(wrong)} of {len(shares)} tokens are wrong, the first is token {at}, and those between are "
            "right: another choice of experts, or ids that are treated in another way"
        )
    if at > 1 and shares[begins] > JUMP * max(before.max(initial=0.0), 1 / JUMP):
        multiple = next((n for n in (64, 32, 16, 8) if at % n == 0), None)
        chunk = f" (a multiple of {multiple}: a chunk's boundary?)" if multiple else ""
        return SPLIT, (
            f"right up to token {at - 1}, wrong from token {at} on at once{chunk}: a state, a position or a "
            "window at a split of the prompt, at a chunk's boundary, or where decoding begins"
        )
    return HISTORY, (
        f"the first token is right, wrong from token {at} on{_growth(shares[wrong])}: what a token takes "
        "from those before it (RoPE, mask, keys and values, convolution, decay, recurrent state)"
    )


def _growth(shares) -> str:
    third = max(1, len(shares) // 3)
    with np.errstate(all="ignore"):
        growth = np.median(shares[-third:]) / np.median(shares[:third])
    if len(shares) < 3 or not np.isfinite(growth):
        return ""
    return f", growing with the position ({growth:.1f} times)" if growth > GROWS else ""


def _behind_the_layers(truth, value, allowed, model) -> tuple[str, str] | None:
    """Whether the head or the last norm is wrong, of rows that are wrong."""
    weight, scale = model.weight("lm_head.weight"), 1.0 + model.weight("model.norm.weight")
    if len(weight) < 2 * weight.shape[1]:
        return None
    hidden = np.linalg.lstsq(weight.T @ weight, weight.T @ value.T, rcond=None)[0].T
    outside = Error.between(value, hidden @ weight.T)
    error = Error.between(value, truth)
    if outside.share_of(allowed) > 1 and outside.rms > OUTSIDE * error.rms:
        return IN_HEAD, (
            f"no hidden state gives these logits: {outside.rms / error.rms:.0%} of the error cannot come "
            f"from before {HEAD}: its weights, or what is done to the logits"
            + _some_ids(truth, value, allowed)
        )
    if np.abs(scale).min() < 1e-3 * np.abs(scale).max():
        return None
    size = np.sqrt(np.mean(np.square(hidden / scale), axis=-1))
    slack = NORM_SLACK * allowed.rms / np.sqrt(np.mean(np.square(truth)))
    if np.abs(size - 1).max() > max(1e-3, slack):
        return IN_LAST_NORM, (
            f"the hidden states behind these logits are {size[0]:.6g} times as large as {LAST_NORM} makes "
            f"them: {LAST_NORM} or the scale of the logits, whatever else"
        )
    return None


def _some_ids(truth, value, allowed) -> str:
    wrong = (np.abs(value - truth) > allowed.largest).any(axis=0)
    if wrong.mean() > 0.5:
        return ""
    return f"; {wrong.sum()} of {wrong.size} ids alone are wrong, the first is {int(wrong.argmax())}"


# ---- what to do ------------------------------------------------------------------------------


def _layers(count) -> str:
    return listed([f"model.layers.{i}" for i in range(count)])


def _advice(kind, begins, layers) -> str:
    layers = layers or "the layers"
    return {
        IN_HEAD: f"dump {LAST_NORM}",
        IN_LAST_NORM: f"dump {LAST_NORM} and the last layer",
        FIRST_TOKEN: f"the first id alone is enough: dump {layers} of a run with 1 token",
        HISTORY: f"{(begins or 0) + 1} tokens are enough: dump {layers}",
        SPLIT: "run the same ids in one piece: if they are right then, the state is wrong that token "
        f"{begins} begins with; dump {layers} of tokens 0 to {begins}",
        SOME_TOKENS: f"dump the routers' choices (mlp.gate.2) and {layers}",
        UNKNOWN: f"dump {layers}; logits of every token say where the error begins",
    }[kind]
