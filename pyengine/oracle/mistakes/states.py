"""Known mistakes in states that are carried on."""

from __future__ import annotations

import numpy as np

from .mistake import Mistake


def _once(token, length):
    return [0, token]


def _every_chunk(token, length):
    return range(0, length, token)


def _every_token(token, length):
    return [0, *range(token, length)]


def _pieces(starts, length):
    starts = list(starts)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length])]


def _lost_recurrent(starts):
    def change(model, token):
        rule = model.op.delta_rule

        def delta_rule(query, key, value, beta, log_decay, state):
            return np.concatenate(
                [
                    rule(query[p], key[p], value[p], beta[p], log_decay[p], np.zeros_like(state))
                    for p in _pieces(starts(token, len(query)), len(query))
                ]
            )

        model.op.delta_rule = delta_rule

    return change


def _decayed_at_chunks(times):
    """The state that a chunk begins with is decayed so often by its first token: 1 would be right."""

    def change(model, token):
        rule = model.op.delta_rule

        def delta_rule(query, key, value, beta, log_decay, state):
            log_decay = log_decay.copy()
            log_decay[token::token] *= times
            return rule(query, key, value, beta, log_decay, state)

        model.op.delta_rule = delta_rule

    return change


def _transposed(model, token):
    rule = model.op.delta_rule

    def delta_rule(query, key, value, beta, log_decay, state):
        pieces = []
        for p in _pieces([0, token], len(query)):
            if pieces:
                state[:] = np.swapaxes(state, 1, 2)
            pieces.append(rule(query[p], key[p], value[p], beta[p], log_decay[p], state))
        return np.concatenate(pieces)

    model.op.delta_rule = delta_rule


def _lost_conv(starts):
    def change(model, token):
        conv = model.op.causal_conv1d
        model.op.causal_conv1d = lambda x, weight, state: np.concatenate(
            [conv(x[p], weight, np.zeros_like(state)) for p in _pieces(starts(token, len(x)), len(x))]
        )

    return change


def _late_conv(starts):
    """The window is the one before, in every piece but the first."""

    def change(model, token):
        conv = model.op.causal_conv1d

        def causal_conv1d(x, weight, state):
            window = np.concatenate([state, x[:token]])[-len(state) - 1 : -1]
            first, *others = _pieces(starts(token, len(x)), len(x))
            return np.concatenate(
                [conv(x[first], weight, state), *(conv(x[p], weight, window.copy()) for p in others)]
            )

        model.op.causal_conv1d = causal_conv1d

    return change


def _both(*changes):
    def change(model, token):
        for one in changes:
            one(model, token)

    return change


def _lost_keys(model, token):
    scores = model.op.attention_scores

    def attention_scores(query, keys):
        score = scores(query, keys)
        score[token:, :token] = -np.inf
        return score

    model.op.attention_scores = attention_scores


STATES = [
    Mistake("the recurrent state is dropped", _lost_recurrent(_once), True),
    Mistake("the recurrent state is dropped at every chunk, the first", _lost_recurrent(_every_chunk), True),
    Mistake("the recurrent state is dropped at every token, the first", _lost_recurrent(_every_token), True),
    Mistake("the state is decayed twice at every chunk's boundary, the first", _decayed_at_chunks(2), True),
    Mistake("the state is not decayed at every chunk's boundary, the first", _decayed_at_chunks(0), True),
    Mistake("the recurrent state is transposed", _transposed, True),
    Mistake("the convolution's state is dropped", _lost_conv(_once), True),
    Mistake("the convolution's state is dropped at every token, the first", _lost_conv(_every_token), True),
    Mistake("the convolution's state is a token old", _late_conv(_once), True),
    Mistake("the convolution's state is a token old and stands still", _late_conv(_every_token), True),
    Mistake(
        "the convolution's and the recurrent state are dropped",
        _both(_lost_conv(_once), _lost_recurrent(_once)),
        True,
    ),
    Mistake(
        "the convolution's and the recurrent state are dropped at every token, the first",
        _both(_lost_conv(_every_token), _lost_recurrent(_every_token)),
        True,
    ),
    Mistake("earlier keys and values are dropped", _lost_keys, True),
    Mistake(
        "every state is dropped: keys and values, the convolution's and the recurrent state",
        _both(_lost_conv(_once), _lost_recurrent(_once), _lost_keys),
        True,
    ),
]
