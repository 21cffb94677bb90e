"""Prompt to tokens: the prompt in one pass, then one token at a time.

    model = pyengine.load("model.gguf")
    for token in model.generate("Once upon a time", max_tokens=100, stream=True):
        print(token.text, end="", flush=True)

    answer = model.generate([{"role": "user", "content": "Why is the sky blue?"}])
    print(answer.text, answer.finish_reason, answer.tokens_per_second)

`TextModel.generate` is what a model that `load` returns has; `generate`, below it, takes ids and
knows no checkpoint.  Both take the keywords of `GenerationOptions`.  `Session` keeps a sequence between
calls.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import InputError, quote
from ..ids import as_ids
from ..probabilities import log_softmax
from .answer import AnswerText, ThinkingBudget
from .chat import ChatPrompt
from .grammar import Constraint
from .options import GenerationOptions, check_count
from .sampler import Sampler, largest
from .session import LanguageModel, Session
from .thinking import ThinkingText
from .tokenizer import Tokenizer
from .tokens import PromptToken, Token
from .tool_calls import ToolCallText

MARK_EVERY = 4096  # prompt tokens: a session can go back to there in the middle of a long message

Step = Token | np.ndarray


def generate(
    model: LanguageModel,
    ids: Any,
    max_tokens: int,
    sampler: Sampler | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    state: Any = None,
    session: Session | None = None,
    **keywords: Any,
) -> Generation:
    """Continue ids [T], T >= 1, by at most max_tokens tokens -> an iterator of `Token`.

    model         has `forward`, `new_state` and `config`
    sampler       None: greedy.  The sampler gets the prompt too, for its penalties
    tokenizer     gives the tokens their text (special tokens have none); None: all texts are ""
    state         a model's state, which is continued; None: a new one.  Afterwards the state has every id
                  but the last Token's.  After an interrupt the state is useless: keep a copy, or use a
                  `Session`, which needs none
    session       instead of a state: a `Session`; the ids' beginning that it holds is not computed again
    keywords      stop, stop_ids, min_tokens, logprobs: as of `GenerationOptions`.  The last Token of an
                  answer that an id of stop_ids ends is that id, with no text of its own
    Nothing is computed before the first token is taken.  Errors: InputError.
    """
    for name in keywords:
        if name not in ("stop", "stop_ids", "min_tokens", "logprobs"):
            raise InputError(f"{name}: want stop, stop_ids, min_tokens or logprobs, got another keyword")
    options = GenerationOptions(max_tokens=check_count("max_tokens", max_tokens), **keywords)
    if session is None:
        session = Session(model, state, marks=0)
    return Generation(model, as_ids(ids, model.config.vocab_size), options, session, sampler, tokenizer)


class Generation:
    """Iterator of `Token`; also holds the results, which are final when the iteration ends.

    finish_reason      None while running; "stop" (an end id, a stop string, the last tool call), "length" or
                       "cancelled"
    tokens             list of the Tokens so far
    text, thinking     of all tokens so far; `str` gives the text
    tool_calls         list of {"name": str, "arguments": JSON text}, where options.tool_calls asks for them
    ids                int64 [n], n tokens so far
    logprobs           float64 [n], where options.logprobs is a number
    prompt             list of PromptTokens, where options.prompt_logprobs asked for them
    top_ids            int64 [n, k], top_logprobs float64 [n, k], likeliest first; k is `logprobs`
    prompt_tokens, completion_tokens       counts; an end token counts
    cached_tokens      tokens of the prompt that the session had;  thinking_tokens  of the completion
    prompt_seconds, completion_seconds     of computing: the prompt up to the first token, the rest
    prompt_tokens_per_second               without the cached tokens
    tokens_per_second                      of the tokens after the first
    state              the model's, see `generate`
    wants_every        see `next_step`;  wants_largest  the same
    on_prompt          may be set: called with the number of prompt tokens computed since its last call
    piece              may be set: the prompt tokens that are computed at a time
    """

    piece = 512  # tokens between two looks at whether it was cancelled
    on_prompt: Callable[[int], Any] = staticmethod(lambda tokens: None)

    def __init__(
        self,
        model: LanguageModel,
        ids: np.ndarray,
        options: GenerationOptions,
        session: Session,
        sampler: Sampler | None = None,
        tokenizer: Tokenizer | None = None,
        chat: ChatPrompt | None = None,
        end_ids: tuple[int, ...] = (),
        constraint: Constraint | None = None,
    ):
        """ids: int64 [T], checked.  end_ids: end the answer, beside options.stop_ids.

        constraint: of the tokens behind the thinking.
        """
        if options.max_tokens is None:
            raise InputError("max_tokens: want an integer of at least 0, got None")
        if options.stop and tokenizer is None:
            raise InputError("stop: want a tokenizer to find texts with, got none")
        beyond = max(options.stop_ids, default=-1)
        if beyond >= model.config.vocab_size:
            raise InputError(f"stop_ids: want ids below {model.config.vocab_size}, got {beyond}")
        self.model, self.sampler, self.options = model, sampler or Sampler(), options
        self.finish_reason: str | None = None
        self.tokens: list[Token] = []
        self.prompt: list[PromptToken] = []
        self.prompt_tokens = len(ids)
        self.cached_tokens = self.thinking_tokens = 0
        self.prompt_seconds = self.completion_seconds = 0.0
        self._session, self._ids, self._max_tokens = session, ids, options.max_tokens
        self.wants_every = options.prompt_logprobs is not None
        self._boundaries = chat.boundaries if chat else ()
        self._end_ids = frozenset((*map(int, end_ids), *options.stop_ids))
        self._budget: ThinkingBudget | None = None
        if chat and tokenizer and options.reasoning_budget is not None:
            self._budget = ThinkingBudget(options.reasoning_budget, tokenizer)
        self._chat = chat is not None
        self._constraint = constraint
        self._text = AnswerText(
            tokenizer,
            options.stop,
            ThinkingText(chat.thinking) if chat else None,
            ToolCallText(options.tools or []) if chat and options.tool_calls else None,
        )
        self._cancelled = False
        self._run = self._steps()

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Token:
        step = next(self._run)
        while not isinstance(step, Token):
            step = self._run.send(self._computed(step))
        return step

    def _computed(self, ids: np.ndarray) -> np.ndarray:
        try:
            return self._session.advance(ids, self, self.wants_every, self.wants_largest)
        except BaseException:
            self._run.close()
            raise

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        counts = f"{self.prompt_tokens} prompt tokens, {self.completion_tokens} tokens"
        state = self.finish_reason or "running"
        return f"<{type(self).__name__}: {counts}, {state}: {quote(self.text)}>"

    def run(self) -> Generation:
        """To the end."""
        for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """End it before the next token, or the next piece of the prompt; from any thread."""
        self._cancelled = True

    # ---- results ----

    @property
    def state(self) -> Any:
        return self._session.state

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def thinking(self) -> str:
        return "".join(token.thinking for token in self.tokens)

    @property
    def tool_calls(self) -> list[dict[str, str]]:
        calls: list[dict[str, str]] = []
        for part in (part for token in self.tokens for part in token.calls):
            if part.name is not None:
                calls.append({"name": part.name, "arguments": ""})
            calls[part.number]["arguments"] += part.arguments
        return calls

    @property
    def ids(self) -> np.ndarray:
        return np.array([token.id for token in self.tokens], np.int64)

    @property
    def logprobs(self) -> np.ndarray:
        """Errors: InputError where they were not asked for."""
        if self.options.logprobs is None:
            raise InputError(
                "logprobs: want an answer that was asked for them (logprobs=0 or more), got another"
            )
        return np.array([token.logprob for token in self.tokens], np.float64)

    @property
    def top_ids(self) -> np.ndarray:
        return self._top(0, np.int64)

    @property
    def top_logprobs(self) -> np.ndarray:
        return self._top(1, np.float64)

    def _top(self, column: int, dtype: type) -> np.ndarray:
        k = min(self.options.logprobs or 0, self.model.config.vocab_size)
        rows = [[pair[column] for pair in token.top] for token in self.tokens]
        return np.array(rows, dtype).reshape(len(rows), k)

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, which the prompt's pass gives; 0 when there are none."""
        later = self.completion_tokens - 1
        return later / self.completion_seconds if later > 0 and self.completion_seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prompt_seconds if self.prompt_seconds else 0.0

    # ---- steps ----

    @property
    def prompt_ids(self) -> np.ndarray:
        """int64 [T]."""
        return self._ids

    def compute_in(self, session: Session) -> None:
        """Instead of the session that it was made with; before its first step."""
        self._session = session

    def next_step(self, logits: np.ndarray | None = None) -> Step | None:
        """Instead of iterating, for who computes several generations in one pass: what comes next.

        A Token; or ids [T] to be computed: the next call gets the logits after them, float32 [vocab], or
        after each, [T, vocab], where `wants_every`; or None at the end.  Where `wants_largest` is a number,
        so many of the largest logits are needed, and the others may be -inf.
        """
        try:
            return next(self._run) if logits is None else self._run.send(logits)
        except StopIteration:
            return None

    @property
    def wants_largest(self) -> int | None:
        """Of the next logits: how many of the largest the next token depends on; None: on all."""
        if self.options.logprobs is not None or self._constraint or not self.tokens:
            return None
        needed = self.sampler.needs_largest
        banned = len(self._end_ids) if len(self.tokens) < self.options.min_tokens else 0
        return None if needed is None else needed + banned

    def _steps(self) -> Generator[Step, np.ndarray, None]:
        """Yields ids to be computed, for which it is sent the logits after them, and the Tokens.

        `finish_reason` is set before the last Token is out.
        """
        if self._max_tokens == 0:
            if self.wants_every:
                yield from self._prompt_steps()
            self.finish_reason = "cancelled" if self._cancelled else "length"
            return
        start = perf_counter()
        self.sampler.accept(self._ids)
        logits = yield from self._prompt_steps()
        while logits is not None:
            token = self._choose(logits)
            seconds = perf_counter() - start
            if self.tokens:
                self.completion_seconds += seconds
            else:
                self.prompt_seconds = seconds
            yield self._as_token(token, logits)
            if self.finish_reason or self._cancelled:
                break
            start = perf_counter()
            logits = yield np.array([token], np.int64)
        self.finish_reason = self.finish_reason or "cancelled"

    def _prompt_steps(self) -> Generator[Step, np.ndarray, np.ndarray | None]:
        """-> the logits after the prompt; None when it was cancelled."""
        session = self._session
        done = self.cached_tokens = session.begin(self._ids[:0] if self.wants_every else self._ids, self)
        self.on_prompt(done)
        logits = session.logits
        for stop in (*self._boundaries, len(self._ids)):
            while done < stop:
                if self._cancelled:
                    return None
                piece = self._ids[done : min(done + self.piece, stop)]
                logits = yield piece
                done += len(piece)
                if self.wants_every:
                    self._score(logits)
                    logits = logits[-1]
                self.on_prompt(len(piece))
                if done // MARK_EVERY > (done - len(piece)) // MARK_EVERY:
                    session.mark()
            if stop and session.position == stop:
                session.mark()
        self.wants_every = False
        return logits

    def _score(self, logits: np.ndarray) -> None:
        """Note the next tokens of the prompt; logits [T, vocab] after the tokens that were computed last."""
        if not self.prompt:
            self.prompt.append(PromptToken(int(self._ids[0])))
        for row, token in zip(logits, self._ids[len(self.prompt) :]):
            logs = log_softmax(row)
            top = tuple((int(i), float(logs[i])) for i in largest(logs, self.options.prompt_logprobs or 0))
            rank = 1 + int((row > row[token]).sum())
            self.prompt.append(PromptToken(int(token), float(logs[token]), rank, top))

    def _choose(self, logits: np.ndarray) -> int:
        forced = self._budget.forced(self._text.inside) if self._budget else None
        if forced is not None:
            self.sampler.accept([forced])
            return forced
        logits = self._without_ends(logits)
        if not self._constraint or self._text.inside:
            return self.sampler.sample(logits)
        token = self.sampler.sample(self._constraint.masked(logits))
        if token not in self._end_ids:
            self._constraint.accept(token)
        return token

    def _without_ends(self, logits: np.ndarray) -> np.ndarray:
        """The logits that are drawn from: no end id before `min_tokens`."""
        if len(self.tokens) >= self.options.min_tokens:
            return logits
        logits = logits.copy()
        logits[list(self._end_ids)] = -np.inf
        return logits

    def _as_token(self, token: int, logits: np.ndarray) -> Token:
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if self.options.logprobs is not None:
            logs = log_softmax(logits)
            logprob = float(logs[token])
            top = tuple((int(i), float(logs[i])) for i in largest(logs, self.options.logprobs))
        self.thinking_tokens += self._text.inside
        ended = token in self._end_ids
        if ended:
            self._text.end()
        text, thinking = ("", "") if ended else self._text.push(token)
        if ended or self._text.stopped or self._has_called_enough():
            self.finish_reason = "stop"
        elif len(self.tokens) + 1 == self._max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            rest = self._text.flush()
            text, thinking = text + rest[0], thinking + rest[1]
        place = self._text.place if self._chat else None
        calls = self._text.take_calls()
        self.tokens.append(Token(token, logprob, text, thinking, top, place, calls))
        return self.tokens[-1]

    def _has_called_enough(self) -> bool:
        most, calls = self.options.most_tool_calls, self._text.calls
        return most is not None and calls is not None and calls.complete >= most
