"""Tokens as generation gives them: of an answer, and of a prompt."""

from __future__ import annotations

from typing import NamedTuple

from .tool_calls import CallPart


class Place(NamedTuple):
    """Where a token of a chat's answer is in the answer's characters, tags and stop string included.

    text      the characters that the token completes; None for a token that has no text of its own (an end
              token, a special token)
    begin     the number of characters before them
    thinking  whether the answer is inside the thinking tags before the token
    answer    the number of characters before the text behind the thinking; None: not known yet
    """

    text: str | None
    begin: int
    thinking: bool
    answer: int | None


class Token(NamedTuple):
    """One generated token.

    id        the token's
    logprob   natural logarithm of the model's own probability, before bias, penalties and filters; None where
              options.logprobs is None
    text      the characters of the answer that are certain with it; all tokens' together are the answer
    thinking  the same, of the text between the thinking tags of a chat's answer
    top       the `logprobs` likeliest pairs (id, logprob), likeliest first, ties by the lower id
    place     of a chat's answer: where the token's own characters are (`AnswerTokens` reads it)
    calls     pieces of tool calls that are certain with it
    """

    id: int
    logprob: float | None
    text: str
    thinking: str = ""
    top: tuple[tuple[int, float], ...] = ()
    place: Place | None = None
    calls: tuple[CallPart, ...] = ()


class PromptToken(NamedTuple):
    """A token of a prompt, as the model foretold it from those before it.

    logprob  natural logarithm of its probability; None of the first, which nothing comes before
    rank     1 + the number of ids that are likelier
    top      as of Token
    """

    id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()
