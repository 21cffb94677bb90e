"""Prompt to tokens: the prompt in one pass, then one token at a time.

    model = pyengine.load("model.gguf")
    for token in model.generate("Once upon a time", max_tokens=100, stream=True):
        print(token.text, end="", flush=True)

    answer = model.generate([{"role": "user", "content": "Why is the sky blue?"}])
    print(answer.text, answer.finish_reason, answer.tokens_per_second)

`TextModel.generate` is what a model that `load` returns has; `generate`, below it, takes ids and
knows no checkpoint.  `Session` keeps a sequence between calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from time import perf_counter
from typing import NamedTuple

import numpy as np

from .chat import CLOSE, OPEN, ChatPrompt, ChatTemplate, ThinkingText, overlap
from .errors import InputError, PyengineError
from .ids import as_ids
from .sampling import Sampler, checkpoint_settings, largest, log_probabilities
from .tokenizer import Tokenizer, has_tokenizer

PIECE = 512  # tokens of a prompt between two looks at whether it is still wanted


class Token(NamedTuple):
    """One generated token.

    id        the token's
    logprob   natural logarithm of the model's own probability, before bias, penalties and filters
    text      the characters of the answer that are certain with it; all tokens' together are the answer
    thinking  the same of what stands between the thinking tags of a chat's answer
    top       the likeliest ids, likeliest first, of equal ones the lower ids first: as many pairs
              (id, logprob) as `logprobs` asked for
    """

    id: int
    logprob: float
    text: str
    thinking: str = ""
    top: tuple[tuple[int, float], ...] = ()


# ---- text in, text out -------------------------------------------------------------------------


class TextModel:
    """What every model that `load` returns can do with text.

    tokenizer      the checkpoint's; reading it the first time takes up to 2 s, and the extra `text`
    chat_template  the checkpoint's
    generation_settings  keywords of `Sampler` that the checkpoint asks for
    """

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.open(self.checkpoint)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate.open(self.checkpoint)

    @cached_property
    def generation_settings(self) -> dict:
        return checkpoint_settings(self.checkpoint)

    def new_session(self) -> Session:
        """A sequence to keep between calls of `generate`."""
        return Session(self)

    def generate(self, prompt, max_tokens: int | None = None, *, stream: bool = False,
                 logprobs: int = 0, stop=(), stop_ids=(), ignore_end: bool = False,
                 context: int | None = None, session: Session | None = None, special: bool = False,
                 tools: list | None = None, reasoning: str = "auto",
                 reasoning_budget: int | None = None, template_options: dict | None = None,
                 **sampling):
        """Continue a prompt -> a `Generation`; of a batch, a list of them.

        prompt       text; or messages, a list of {"role": str, "content": str}, which the model's
                     chat template makes a prompt of; or ids [T], integers; or a list of any of
                     these, a batch.  A batch is computed one after the other, and each of it gets
                     the bits, and the draws, that it would get alone
        max_tokens   at most so many, thinking included; None: until the context is full
        stream       True: nothing is computed yet, and iterating over the Generation computes and
                     yields each `Token`.  False: it has run to its end
        logprobs     so many of the likeliest ids with each token
        stop         a text, or several, that end the answer; they, and what follows, are no part of it
        stop_ids     ids that end it, beside the model's own end ids
        ignore_end   go on after the model's end ids
        context      tokens of prompt and answer at most; None: what the model was made for
        session      the prompt's beginning is not computed again where the session has it
        special      text of a prompt that spells a special token (`<|im_start|>`) is that token;
                     messages never are
        tools        for messages: JSON schemas of functions, given to the template
        reasoning    for messages: thinking "on", "off" or, "auto", as the template has it
        reasoning_budget  for messages: after so many tokens of thinking the closing tag's are forced
        template_options  for messages: further variables of the template
        sampling     keywords of `sampling.Sampler`: temperature, top_k, top_p, min_p, seed (1729),
                     repetition_penalty, presence_penalty, frequency_penalty, penalty_last_n,
                     logit_bias {id: bias}; those absent or None are as `generation_settings` has
                     them, or greedy and unfiltered

        Errors: InputError, at once and before anything is computed; FileFormatError for a
        tokenizer, template or settings with a fault.
        """
        options = dict(max_tokens=max_tokens, logprobs=logprobs, stop=stop, stop_ids=stop_ids,
                       ignore_end=ignore_end, context=context, session=session, special=special,
                       tools=tools, reasoning=reasoning, reasoning_budget=reasoning_budget,
                       template_options=template_options, sampling=sampling)
        batch = is_batch(prompt)
        generations = [self._generation(one, **options) for one in (prompt if batch else [prompt])]
        if not stream:
            for generation in generations:
                generation.run()
        return generations if batch else generations[0]

    def _generation(self, prompt, max_tokens, logprobs, stop, stop_ids, ignore_end, context, session,
                    special, tools, reasoning, reasoning_budget, template_options, sampling):
        chat = self._chat_prompt(prompt, tools, reasoning, reasoning_budget, template_options)
        ids = chat.ids if chat else self._prompt_ids(prompt, special)
        tokenizer = self._tokenizer_if_any(stop)
        end_ids = () if ignore_end else tokenizer.end_ids if tokenizer else self.config.eos_token_ids
        return Generation(
            self, ids, self._room(ids, max_tokens, context), self.new_sampler(**sampling),
            (*end_ids, *stop_ids), stop, tokenizer, session=session, logprobs=logprobs, chat=chat,
            reasoning_budget=reasoning_budget)

    def new_sampler(self, **sampling) -> Sampler:
        """With the checkpoint's settings where the keywords leave it open; None counts as absent."""
        given = {name: value for name, value in sampling.items() if value is not None}
        try:
            sampler = Sampler(**{**self.generation_settings, **given})
        except TypeError:
            raise InputError(f"generate: want the keywords of sampling.Sampler, got "
                             f"{', '.join(sorted(given))}") from None
        sampler.check_vocabulary(self.config.vocab_size)
        return sampler

    def _chat_prompt(self, prompt, tools, reasoning, budget, options) -> ChatPrompt | None:
        if is_messages(prompt):
            return self.chat_template.prompt(self.tokenizer, prompt, tools, reasoning, options)
        given = dict(tools=tools, reasoning=reasoning != "auto", reasoning_budget=budget is not None,
                     template_options=options)
        for name in (name for name, value in given.items() if value):
            raise InputError(f"{name}: want it with messages, got it with "
                             f"{'text' if isinstance(prompt, str) else 'ids'}")
        return None

    def _prompt_ids(self, prompt, special) -> np.ndarray:
        ids = self.tokenizer.encode(prompt, special) if isinstance(prompt, str) else prompt
        return as_ids(ids, self.config.vocab_size) if len(ids) else _no_prompt()

    def _tokenizer_if_any(self, stop) -> Tokenizer | None:
        """Ids can go in and come out without one."""
        try:
            return self.tokenizer if has_tokenizer(self.checkpoint) else None
        except PyengineError:
            if stop:
                raise
            return None

    def _room(self, ids, max_tokens, context) -> int:
        context = self.config.max_position_embeddings if context is None else context
        if isinstance(context, bool) or not isinstance(context, int) or context < 1:
            raise InputError(f"context: want an integer of at least 1, got {context!r}")
        if len(ids) > context:
            raise InputError(f"prompt: want at most {context} tokens, the context, got {len(ids)}")
        _check_count("max_tokens", 0 if max_tokens is None else max_tokens)
        room = context - len(ids)
        return room if max_tokens is None else min(max_tokens, room)


def is_messages(prompt) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def is_batch(prompt) -> bool:
    """Whether it is a list of prompts, and not one."""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 1
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and (
        isinstance(prompt[0], (str, list, tuple, np.ndarray)))


def _no_prompt():
    raise InputError("prompt: want at least one token, got none")


def generate(model, ids, max_tokens: int, sampler: Sampler | None = None, end_ids=(),
             stop_strings=(), tokenizer=None, state=None, session=None,
             logprobs: int = 0) -> Generation:
    """Continue ids [T], T >= 1, by at most max_tokens tokens -> an iterator of `Token`.

    model         has `forward`, `new_state` and `config`
    sampler       None: greedy.  It is told the prompt, for its penalties
    end_ids       ids that end the text; the one that does comes as the last Token, with no text of its own
    stop_strings  texts that end it; they, and what follows, are no part of the tokens' texts
    tokenizer     gives the tokens their text (special tokens have none); None: all texts are ""
    state         a model's state, continued; None: a new one.  Afterwards it has seen every id but the
                  last Token's, unless it was interrupted: then throw it away, or keep a copy to go
                  back to.  A `Session` sees to that by itself
    session       instead of a state: a `Session`, of which the ids' beginning is taken over
    logprobs      so many of the likeliest ids with each Token
    Nothing is computed before the first token is asked for.  Errors: InputError.
    """
    return Generation(model, ids, max_tokens, sampler, end_ids, stop_strings, tokenizer, state,
                      session, logprobs)


class Generation:
    """Iterator of `Token`, and what it came to; figures are final when it ends.

    finish_reason      None while running; "stop" (an end id or a stop string), "length" or "cancelled"
    tokens             list of the Tokens so far
    text, thinking     of all tokens so far
    ids                int64 [n], n tokens so far;  logprobs  float64 [n]
    top_ids            int64 [n, k], top_logprobs float64 [n, k], likeliest first; k as asked for
    prompt_tokens, completion_tokens       counts; an end token counts
    cached_tokens      of the prompt's, those that a session had; thinking_tokens: of the completion's
    prompt_seconds, completion_seconds     of computing: the prompt up to the first token, the rest
    prompt_tokens_per_second               of what was computed, without the cached ones
    tokens_per_second                      of the tokens after the first
    state              the model's, see `generate`
    on_prompt          called with a number of prompt tokens whenever so many more are done; may be set
    """

    on_prompt = staticmethod(lambda tokens: None)

    def __init__(self, model, ids, max_tokens, sampler=None, end_ids=(), stop_strings=(),
                 tokenizer=None, state=None, session=None, logprobs=0, chat=None,
                 reasoning_budget=None):
        ids = as_ids(ids, model.config.vocab_size)
        _check_count("max_tokens", max_tokens)
        _check_count("logprobs", logprobs)
        stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if stop_strings and tokenizer is None:
            raise InputError("stop_strings: want a tokenizer to find them with, got none")
        self.model, self.sampler = model, sampler or Sampler()
        self.finish_reason = None
        self.tokens: list[Token] = []
        self.prompt_tokens = len(ids)
        self.cached_tokens = self.thinking_tokens = 0
        self.prompt_seconds = self.completion_seconds = 0.0
        self._session = Session(model, state, marks=0) if session is None else session
        self._ids, self._max_tokens, self._logprobs = ids, max_tokens, logprobs
        self._boundary = chat.boundary if chat else 0
        self._end_ids = frozenset(int(i) for i in end_ids)
        self._budget = _ThinkingBudget(reasoning_budget, tokenizer) if chat else None
        self._text = _Text(tokenizer, stop_strings, ThinkingText(chat.thinking) if chat else None)
        self._cancelled = False
        self._run = self._steps()

    def __iter__(self):
        return self

    def __next__(self) -> Token:
        return next(self._run)

    def run(self) -> Generation:
        """To the end."""
        for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """End it before the next token, or the next piece of the prompt; from any thread."""
        self._cancelled = True

    # ---- what it came to ----

    @property
    def state(self):
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
    def ids(self) -> np.ndarray:
        return np.array([token.id for token in self.tokens], np.int64)

    @property
    def logprobs(self) -> np.ndarray:
        return np.array([token.logprob for token in self.tokens], np.float64)

    @property
    def top_ids(self) -> np.ndarray:
        return self._top(0, np.int64)

    @property
    def top_logprobs(self) -> np.ndarray:
        return self._top(1, np.float64)

    def _top(self, column, dtype) -> np.ndarray:
        k = min(self._logprobs, self.model.config.vocab_size)
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

    def _steps(self):
        """Yields the Tokens.  Whatever ends it, `finish_reason` says it before the last is out."""
        if self._max_tokens == 0:
            self.finish_reason = "length"
            return
        start = perf_counter()
        self.sampler.accept(self._ids)
        logits = self._compute_prompt()
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
            logits = self._session.advance([token], self)
        self.finish_reason = self.finish_reason or "cancelled"

    def _compute_prompt(self) -> np.ndarray | None:
        """-> the logits after it; None when it was cancelled."""
        session = self._session
        done = self.cached_tokens = session.begin(self._ids, self)
        self.on_prompt(done)
        logits = session.logits
        for stop in (self._boundary, len(self._ids)):
            while done < stop:
                if self._cancelled:
                    return None
                piece = self._ids[done:min(done + PIECE, stop)]
                logits = session.advance(piece, self)
                done += len(piece)
                self.on_prompt(len(piece))
            if stop and session.position == stop:
                session.mark()
        return logits

    def _choose(self, logits) -> int:
        forced = self._budget.forced(self._text.inside) if self._budget else None
        if forced is None:
            return self.sampler.sample(logits)
        self.sampler.accept([forced])
        return forced

    def _as_token(self, token, logits) -> Token:
        logs = log_probabilities(logits)
        top = tuple((int(i), float(logs[i])) for i in largest(logs, self._logprobs))
        self.thinking_tokens += self._text.inside
        ended = token in self._end_ids
        text, thinking = ("", "") if ended else self._text.push(token)
        if ended or self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) + 1 == self._max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            rest = self._text.flush()
            text, thinking = text + rest[0], thinking + rest[1]
        self.tokens.append(Token(token, float(logs[token]), text, thinking, top))
        return self.tokens[-1]


def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise InputError(f"{name}: want an integer of at least 0, got {value!r}")


class _ThinkingBudget:
    """Forces the closing tag's ids, one after the other, once the budget is spent."""

    def __init__(self, budget, tokenizer):
        self._left = None
        if budget is not None:
            _check_count("reasoning_budget", budget)
            self._left, self._closing = budget, tokenizer.encode(CLOSE, special=True)

    def forced(self, thinking: bool) -> int | None:
        """The id that has to come next, where the model is not free."""
        if self._left is None or not thinking:
            return None
        self._left -= 1
        return None if self._left >= 0 else self._closing[(-1 - self._left) % len(self._closing)]


class _Text:
    """Tokens to (text, thinking), up to the first stop string in the text; holds back what may
    become one.  inside: whether it stands inside the thinking tags."""

    def __init__(self, tokenizer, stop_strings, thinking: ThinkingText | None = None):
        for stop in stop_strings:
            if not isinstance(stop, str) or not stop:
                raise InputError(f"stop_strings: want texts of at least one character, got {stop!r}")
        self._stream = tokenizer.stream(special=False) if tokenizer else None
        self._stop_strings = stop_strings
        self._thinking = thinking
        self._tags = _special_tags(tokenizer) if thinking else {}
        self._held = ""
        self.stopped = False

    @property
    def inside(self) -> bool:
        return self._thinking is not None and self._thinking.thinking

    def push(self, token: int) -> tuple[str, str]:
        """The characters that are certain now."""
        if not self._stream:
            return "", ""
        text, thinking = self._stream.push(token) + self._tags.get(token, ""), ""
        if self._thinking:
            thinking, text = self._thinking.push(text)
        return self._release(text), thinking

    def flush(self) -> tuple[str, str]:
        """The rest, when no token follows."""
        if self.stopped or not self._stream:
            return "", ""
        text, thinking = self._stream.flush(), ""
        if self._thinking:
            thought, text = self._thinking.push(text)
            more, rest = self._thinking.flush()
            thinking, text = thought + more, text + rest
        text = self._release(text)
        text, self._held = text + self._held, ""
        return text, thinking

    def _release(self, text) -> str:
        text = self._held + text
        found = [i for i in (text.find(stop) for stop in self._stop_strings) if i >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - max((overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[certain:]
        return text[:certain]


def _special_tags(tokenizer) -> dict[int, str]:
    """Thinking tags that a vocabulary has as special tokens, which have no text of their own."""
    ids = {tag: tokenizer.encode(tag, special=True) for tag in (OPEN, CLOSE)}
    return {i[0]: tag for tag, i in ids.items() if len(i) == 1 and tokenizer.is_special(i[0])}


# ---- what is kept between calls ----------------------------------------------------------------


class Session:
    """One sequence, kept between calls: where a prompt begins with what was computed, only the rest is.

        session = model.new_session()
        first = model.generate(messages, session=session)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "More."}]
        model.generate(messages, session=session).cached_tokens

    The bits are those of computing it all anew (of the locked arithmetics; float64 is NumPy's, whose
    last bits depend on how a prompt is cut).

    A delta net cannot go back by itself, so a session goes on from where it stands, when the prompt
    begins with all of that, or goes back to the last of its marks that the prompt agrees with: the
    ends of the last prompts, and of their messages.  A mark costs what the delta nets hold (63 MB
    for the 35B-A3B).  After a generation the last token drawn has not been computed yet.  An
    interrupt, even in the middle of a forward pass, leaves the marks in order; the next prompt starts
    at one.

    ids       list of the ids computed, in order;  position  their number
    logits    float32 [vocab] after them, None when there are none
    state     the model's
    It serves one generation at a time: an older one that is asked for more is an InputError.
    """

    def __init__(self, model, state=None, marks: int = 4):
        """marks: kept at most; 0: no prompt is looked at, the state is only continued."""
        self.model, self.state = model, model.new_state() if state is None else state
        self.ids: list[int] = []
        self.logits = None
        self._marks = marks
        self._whole = True  # False inside a forward pass, and after one that was interrupted
        self._owner = None

    @property
    def position(self) -> int:
        return len(self.ids)

    def begin(self, ids, owner=None) -> int:
        """Go back to where ids [T] can be continued from -> how many of them are computed."""
        self._owner = owner
        if not self._marks:
            return 0
        shared = _shared_length(self.ids, ids)
        if self._whole and shared == self.position:
            return shared
        self._whole = False
        marks = [mark for mark in self.state.marks if mark.position <= shared]
        if marks:
            self.state.rewind(marks[-1])
            self.logits = marks[-1].note
        else:
            self.state, self.logits = self.model.new_state(), None
        del self.ids[self.state.position:]
        self._whole = True
        return self.position

    def advance(self, ids, owner=None) -> np.ndarray:
        """Compute ids [T] -> float32 [vocab], the logits after them."""
        if owner is not self._owner:
            raise InputError("session: want the generation that began last, got an older one")
        self._whole = False
        self.logits = self.model.forward(ids, self.state, last_only=True)[0]
        self.ids.extend(int(i) for i in ids)
        self._whole = True
        return self.logits

    def mark(self) -> None:
        """Remember this point; the oldest is forgotten when there are too many."""
        if not self._marks or any(mark.position == self.position for mark in self.state.marks):
            return
        self.state.mark(self.logits)
        del self.state.marks[:-self._marks]


def _shared_length(a, b) -> int:
    """Length of the common beginning of two sequences of ids."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n], np.int64) != np.asarray(b[:n], np.int64))
    return int(differ[0]) if differ.size else n
