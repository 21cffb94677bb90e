"""Prompt to tokens: the prompt in one pass, then one token at a time.

    generation = generate(model, ids, 100, end_ids=tokenizer.end_ids, tokenizer=tokenizer)
    for token in generation:
        print(token.text, end="", flush=True)
    print(generation.finish_reason, generation.tokens_per_second)
"""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

import numpy as np

from .errors import InputError
from .ids import as_ids
from .sampling import Sampler


class Token(NamedTuple):
    """One generated token.

    id       the token's
    logprob  natural logarithm of the model's own probability, before bias, penalties and filters
    text     the characters that are certain with it; all tokens' together are the answer
    """

    id: int
    logprob: float
    text: str


def generate(model, ids, max_tokens: int, sampler: Sampler | None = None, end_ids=(),
             stop_strings=(), tokenizer=None, state=None) -> Generation:
    """Continue ids [T], T >= 1, by at most max_tokens tokens -> an iterator of `Token`.

    sampler       None: greedy.  It is told the prompt, for its penalties
    end_ids       ids that end the text; the one that does comes as the last Token, with no text of its own
    stop_strings  texts that end it; they, and what follows, are no part of the tokens' texts
    tokenizer     gives the tokens their text (special tokens have none); None: all texts are ""
    state         continued; None: a new one.  Afterwards it has seen every id but the last Token's
    Nothing is computed before the first token is asked for.  Errors: InputError.
    """
    return Generation(model, ids, max_tokens, sampler, end_ids, stop_strings, tokenizer, state)


class Generation:
    """Iterator of `Token`, with figures that are final when it ends.

    finish_reason      None while running; "stop" (an end id or a stop string) or "length"
    prompt_tokens, completion_tokens       counts; an end token counts
    prompt_seconds, completion_seconds     of computing: the prompt up to the first token, the rest
    state              the model's, see `generate`
    """

    def __init__(self, model, ids, max_tokens, sampler, end_ids, stop_strings, tokenizer, state):
        ids = as_ids(ids, model.config.vocab_size)
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
            raise InputError(f"max_tokens: want an integer of at least 0, got {max_tokens!r}")
        stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if stop_strings and tokenizer is None:
            raise InputError("stop_strings: want a tokenizer to find them with, got none")
        self.model, self.sampler = model, sampler or Sampler()
        self.state = model.new_state() if state is None else state
        self.finish_reason = None
        self.prompt_tokens, self.completion_tokens = len(ids), 0
        self.prompt_seconds = self.completion_seconds = 0.0
        self._end_ids = frozenset(int(i) for i in end_ids)
        self._text = _Text(tokenizer, stop_strings)
        self._tokens = self._run(ids, max_tokens)

    def __iter__(self):
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, which the prompt's pass gives; 0 when there are none."""
        later = self.completion_tokens - 1
        return later / self.completion_seconds if later > 0 and self.completion_seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    def _run(self, ids, max_tokens):
        self.sampler.accept(ids)
        while self.completion_tokens < max_tokens:
            token, logprob = self._step(ids)
            ended = token in self._end_ids
            text = "" if ended else self._text.push(token)
            if ended or self._text.stopped:
                self.finish_reason = "stop"
            elif self.completion_tokens == max_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                text += self._text.flush()
            yield Token(token, logprob, text)
            if self.finish_reason:
                return
            ids = [token]
        self.finish_reason = "length"  # max_tokens is 0

    def _step(self, ids) -> tuple[int, float]:
        """Compute ids -> the token after them and its log-probability."""
        start = perf_counter()
        logits = self.model.forward(ids, self.state, last_only=True)[0]
        token = self.sampler.sample(logits)
        logprob = log_probability(logits, token)
        seconds = perf_counter() - start
        if self.completion_tokens:
            self.completion_seconds += seconds
        else:
            self.prompt_seconds = seconds
        self.completion_tokens += 1
        return token, logprob


def log_probability(logits: np.ndarray, token: int) -> float:
    """log softmax(logits [vocab])[token], computed in float64."""
    shifted = np.asarray(logits, np.float64) - float(logits.max())
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


class _Text:
    """Tokens to text, up to the first stop string; holds back what may become one."""

    def __init__(self, tokenizer, stop_strings):
        for stop in stop_strings:
            if not isinstance(stop, str) or not stop:
                raise InputError(f"stop_strings: want texts of at least one character, got {stop!r}")
        self._stream = tokenizer.stream(special=False) if tokenizer else None
        self._stop_strings = stop_strings
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The characters that are certain now."""
        return self._release(self._stream.push(token)) if self._stream else ""

    def flush(self) -> str:
        """The rest, when no token follows."""
        if self.stopped or not self._stream:
            return ""
        text = self._release(self._stream.flush())
        text, self._held = text + self._held, ""
        return text

    def _release(self, text) -> str:
        text = self._held + text
        found = [i for i in (text.find(stop) for stop in self._stop_strings) if i >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
