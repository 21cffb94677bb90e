"""Tokens of an answer to text: stop strings, thinking tags and the thinking budget."""

from __future__ import annotations

from collections import deque

from . import tool_calls
from .thinking import CLOSE, OPEN, ThinkingText, overlap
from .tokenizer import Tokenizer
from .tokens import Place, Token
from .tool_calls import CallPart, ToolCallText


class ThinkingBudget:
    """Forces the closing tag's ids, one after the other, once the budget is spent."""

    def __init__(self, budget: int, tokenizer: Tokenizer):
        self._left = budget
        self._closing = tokenizer.encode(CLOSE, special=True)

    def forced(self, thinking: bool) -> int | None:
        """The id that must come next; None while the model chooses."""
        if not thinking:
            return None
        self._left -= 1
        return None if self._left >= 0 else self._closing[(-1 - self._left) % len(self._closing)]


class AnswerText:
    """Tokens to (text, thinking), up to the first stop string in the text.

    Characters that may be the beginning of a stop string are held back.
    inside  whether the answer is inside the thinking tags
    place   the last token's `Place`
    calls   splits the text further; None: calls of tools stay text
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: tuple[str, ...] = (),
        thinking: ThinkingText | None = None,
        calls: ToolCallText | None = None,
    ):
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(special=False) if tokenizer else None
        self._stop = stop
        self._thinking, self.calls = thinking, calls
        tags = [OPEN, CLOSE] if thinking else []
        tags += [tool_calls.OPEN, tool_calls.CLOSE] if calls else []
        self._tags = _special_tags(tokenizer, tags) if tokenizer else {}
        self._parts: list[CallPart] = []
        self._held = ""
        self._seen = 0  # characters that the tokens have completed
        self._answer: int | None = None
        self._own: str | None = None  # the last token's characters
        self._begin = 0
        self._was_inside = self.inside
        self.stopped = False

    @property
    def inside(self) -> bool:
        return self._thinking is not None and self._thinking.thinking

    @property
    def place(self) -> Place:
        return Place(self._own, self._begin, self._was_inside, self._answer)

    def push(self, token: int) -> tuple[str, str]:
        """The characters that are certain with this token."""
        self._was_inside, self._own = self.inside, None
        if not self._stream or not self._tokenizer:
            return "", ""
        text, thinking = self._stream.push(token) + self._tags.get(token, ""), ""
        self._begin, self._seen = self._seen, self._seen + len(text)
        if self._thinking:
            if token in self._tags or not self._tokenizer.is_special(token):
                self._own = text
            thinking, text = self._thinking.push(text)
            self._find_answer(text)
        return self._release(self._without_calls(text)), thinking

    def end(self) -> None:
        """Note a token that has no text, because it ends the answer."""
        self._was_inside, self._own = self.inside, None

    def flush(self) -> tuple[str, str]:
        """The rest, when no token follows."""
        if self.stopped or not self._stream:
            return "", ""
        text, thinking = self._stream.flush(), ""
        self._seen += len(text)
        if self._thinking:
            thought, text = self._thinking.push(text)
            more, rest = self._thinking.flush()
            thinking, text = thought + more, text + rest
            self._find_answer(text)
        text = self._without_calls(text)
        if self.calls:
            text += self.calls.flush()[0]
        text = self._release(text)
        text, self._held = text + self._held, ""
        return text, thinking

    def take_calls(self) -> tuple[CallPart, ...]:
        """The pieces of calls since the last time."""
        parts, self._parts = tuple(self._parts), []
        return parts

    def _without_calls(self, text: str) -> str:
        if not self.calls:
            return text
        text, parts = self.calls.push(text)
        self._parts += parts
        return text

    def _find_answer(self, text: str) -> None:
        if text and self._answer is None:
            self._answer = self._seen - len(text)

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [i for i in (text.find(stop) for stop in self._stop) if i >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]


class AnswerTokens:
    """Gives each token of a chat's answer to the thinking, or to the text that its characters are in.

    The bytes given to the text, joined, are the text: a token of which the text holds a part only (the rest
    is a tag, or belongs to a stop string) comes with the bytes of that part.  A token with no text of its
    own, and a token of which a stop string has taken everything, is given to neither.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._pending: deque[tuple[Token, Place, str]] = deque()
        self._length = 0  # characters of the text so far
        self._answer: int | None = None

    def push(self, token: Token) -> tuple[list[Token], list[tuple[Token, bytes]]]:
        """-> tokens of the thinking, and tokens of the text with their bytes, as far as they are certain."""
        thinking: list[Token] = []
        if token.place is None:
            return [], []
        if token.place.thinking:  # so were those before it
            thinking = self._take_all()
        if token.place.text is not None:
            self._pending.append((token, token.place, token.place.text))
        self._length += len(token.text)
        self._answer = token.place.answer
        more, text = self._sorted(last=False)
        return thinking + more, text

    def flush(self) -> tuple[list[Token], list[tuple[Token, bytes]]]:
        """The rest, when no token follows."""
        return self._sorted(last=True)

    def _sorted(self, last: bool) -> tuple[list[Token], list[tuple[Token, bytes]]]:
        if self._answer is None:
            return (self._take_all() if last else []), []
        thinking: list[Token] = []
        text: list[tuple[Token, bytes]] = []
        begin, end = self._answer, self._answer + self._length
        while self._pending:
            token, place, own = self._pending[0]
            first, stop = place.begin, place.begin + len(own)
            if first < begin and stop <= begin:
                thinking.append(token)
            elif first < end and (last or stop <= end):
                raw = self._tokenizer.token_bytes(token.id)
                text.append((token, _part(raw, own[: max(begin - first, 0)], own[end - first :])))
            elif not last:
                break
            self._pending.popleft()
        return thinking, text

    def _take_all(self) -> list[Token]:
        tokens = [token for token, _, _ in self._pending]
        self._pending.clear()
        return tokens


def _part(raw: bytes, before: str, after: str) -> bytes:
    """A token's bytes without the characters at its beginning and end that are not in the text.

    The first of the token's characters may have begun, as bytes, in a token before it.
    """
    raw = raw[len(before.lstrip("\ufffd").encode()) :]
    cut = raw.rfind(after.encode()) if after else len(raw)
    return raw[:cut] if cut >= 0 else b""


def _special_tags(tokenizer: Tokenizer, tags: list[str]) -> dict[int, str]:
    """Those tags that a vocabulary has as special tokens, which have no text of their own."""
    ids = {tag: tokenizer.encode(tag, special=True) for tag in tags}
    return {i[0]: tag for tag, i in ids.items() if len(i) == 1 and tokenizer.is_special(i[0])}
