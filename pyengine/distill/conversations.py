"""Conversations and prompts to ids and a mask of the tokens to learn: those that the assistant writes.

A conversation is rendered by the model's chat template (`ChatTemplate.prompt`, without a generation prompt).
The assistant writes what follows the generation prompt of its turn, up to and including the token that ends
the turn.  Where its turn begins and ends is found by rendering the messages before it, with and without the
generation prompt, and those up to it.  Some templates render an earlier turn differently when later messages
are there (they leave out its thinking).  There the turn is what changes when the texts of its message are
replaced.

A token belongs to the assistant if one of its bytes does.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..text.chat import ChatTemplate
from ..text.tokenizer import Tokenizer

Message = dict[str, Any]
Span = tuple[int, int]
STAND_IN = "\ue000\ue001\ue000"  # characters for private use: in no message


class Tokens(NamedTuple):
    """ids int32 [T]; mask int8 [T], 1 for a token to learn."""

    ids: NDArray[np.int32]
    mask: NDArray[np.int8]


def of_text(tokenizer: Tokenizer, text: str) -> Tokens:
    """Every token is learnt, but a BOS that the model's files put before it."""
    ids = np.array(tokenizer.encode_prompt(text), np.int32)
    mask = np.ones(len(ids), np.int8)
    if len(ids) and ids[0] == tokenizer.bos_id:
        mask[0] = 0
    return Tokens(ids, mask)


def of_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> Tokens:
    """One text; the tokens of the completion are learnt."""
    ids = np.array(tokenizer.encode_prompt(prompt + completion), np.int32)
    text = prompt + completion
    skip = int(len(ids) > 0 and ids[0] == tokenizer.bos_id)
    mask = np.zeros(len(ids), np.int8)
    mask[skip:] = _mask(tokenizer, ids[skip:], text, [(len(prompt), len(text))])
    return Tokens(ids, mask)


def of_messages(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    learn_from: int = 0,
) -> Tokens:
    """learn_from: the assistant's messages before this one are not learnt."""

    def render(some: Sequence[Message], ask: bool = False) -> Any:
        return template.prompt(
            tokenizer, some, tools=tools, add_generation_prompt=ask, continue_final_message=False
        )

    whole = render(messages)
    spans = [
        span
        for i, message in enumerate(messages)
        if i >= learn_from and isinstance(message, dict) and message.get("role") == "assistant"
        if (
            span := _turn(
                tokenizer, lambda some, ask=False: _text(render, some, ask), messages, i, whole.text
            )
        )
    ]
    ids = whole.ids.astype(np.int32)
    return Tokens(ids, _mask(tokenizer, ids, whole.text, spans))


def _text(render: Callable[..., Any], messages: Sequence[Message], ask: bool) -> str | None:
    """None: the template refuses these messages."""
    if not messages:
        return ""
    try:
        text: str = render(messages, ask).text
    except InputError:
        return None
    return text


def _turn(
    tokenizer: Tokenizer, text_of: Callable[..., str | None], messages: Sequence[Message], i: int, whole: str
) -> Span | None:
    """The characters of the whole text that the assistant writes in message i."""
    before, asked, up_to = text_of(messages[:i]), text_of(messages[:i], True), text_of(messages[: i + 1])
    start = stop = -1
    if before is not None and whole.startswith(before):
        start = len(before)
        if asked is not None and asked.startswith(before):
            start += len(os.path.commonprefix([asked[len(before) :], whole[len(before) :]]))
    if up_to is not None and whole.startswith(up_to):
        stop = len(up_to)
    if start < 0 or stop < 0:
        changed = _changed(text_of, messages, i, whole)
        if changed is None:
            return None
        start = changed[0] if start < 0 else start
        if stop < 0:
            stop = changed[1] + _ending(tokenizer, text_of, messages[: i + 1], whole[changed[1] :])
    return start, _without_space_behind(tokenizer, whole, start, stop)


def _changed(
    text_of: Callable[..., str | None], messages: Sequence[Message], i: int, whole: str
) -> Span | None:
    """The part of the whole text that changes with the texts of message i; None: nothing does."""
    replaced = {name: value if name == "role" else _stood_in(value) for name, value in messages[i].items()}
    other = text_of([*messages[:i], replaced, *messages[i + 1 :]])
    if other is None or other == whole:
        return None
    start = len(os.path.commonprefix([whole, other]))
    shortest = min(len(whole), len(other)) - start
    behind = len(os.path.commonprefix([whole[::-1][:shortest], other[::-1][:shortest]]))
    return start, len(whole) - behind


def _stood_in(value: Any) -> Any:
    if isinstance(value, str):
        return STAND_IN if value.strip() else value
    if isinstance(value, list):
        return [_stood_in(one) for one in value]
    if isinstance(value, dict):
        return {key: one if key == "type" else _stood_in(one) for key, one in value.items()}
    return value


def _ending(
    tokenizer: Tokenizer, text_of: Callable[..., str | None], messages: Sequence[Message], rest: str
) -> int:
    """The characters at the beginning of `rest` that the template writes behind the last message's texts.

    It may write more behind the last message of all: then they end with a special token.
    """
    last = text_of(messages)
    changed = last is not None and _changed(text_of, messages, len(messages) - 1, last)
    if last is None or not changed:
        return 0
    ending = last[changed[1] :]
    if rest.startswith(ending):
        return len(ending)
    common = os.path.commonprefix([ending, rest])
    return max((n for n in range(len(common) + 1) if common[:n].endswith(tokenizer.special_texts)), default=0)


def _without_space_behind(tokenizer: Tokenizer, text: str, start: int, stop: int) -> int:
    """A line end behind the token that ends the turn is the template's."""
    shorter = start + len(text[start:stop].rstrip())
    return shorter if text[start:shorter].endswith(tokenizer.special_texts) else stop


def _mask(tokenizer: Tokenizer, ids: NDArray[np.int32], text: str, spans: Sequence[Span]) -> NDArray[np.int8]:
    """1 for a token with a byte in one of the spans [start, stop) of characters."""
    pieces = [len(tokenizer.token_bytes(int(i))) for i in ids]
    ends = np.cumsum([0, *pieces])
    data = tokenizer.decode_bytes(ids)
    normal: Callable[[str], str] = lambda part: part  # noqa: E731
    if data != text.encode():
        normal = lambda part: unicodedata.normalize("NFC", part)  # noqa: E731
        if data != normal(text).encode():
            raise InputError(
                "messages: want a text that its tokens spell, to tell whose they are, got another"
            )
    mask = np.zeros(len(ids), np.int8)
    for start, stop in spans:
        first, last = (len(normal(text[:place]).encode()) for place in (start, stop))
        mask[(ends[:-1] < last) & (ends[1:] > first)] = 1
    return mask
