"""Text in and text out, for both arithmetics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import Config
from ..errors import InputError, PyengineError, PyengineWarning, quote
from ..ids import as_ids
from .chat import ChatPrompt, ChatTemplate
from .generate import Generation
from .grammar import Constraint, Vocabulary, lark_of
from .options import NAMED, GenerationOptions
from .sampler import Sampler
from .sampling import checkpoint_settings
from .session import Session
from .thinking import CLOSE
from .tokenizer import Tokenizer, has_tokenizer
from .tool_calls import grammar_of_calls


class ContextError(InputError):
    """A prompt leaves no room for an answer in the context.

    context   the tokens that prompt and answer can have together
    tokens    the tokens of the prompt
    """

    def __init__(self, context: int, tokens: int, most: int):
        super().__init__(f"prompt: want at most {most} of the context's {context} tokens, got {tokens}")
        self.context, self.tokens = context, tokens


class TextModel:
    """What every model that `load` returns can do with text.

    tokenizer      the checkpoint's; reading it the first time takes up to 2 s, and the extra `text`
    chat_template  the checkpoint's
    generation_settings  keywords of `Sampler` that the checkpoint asks for
    """

    # Of the model that this class is mixed into.
    checkpoint: Checkpoint
    config: Config
    new_state: Callable[[], Any]
    forward: Callable[..., np.ndarray]
    forward_batch: Callable[..., list[np.ndarray]]

    def __repr__(self) -> str:
        config = self.config
        sizes = f"{len(config.layer_types)} layers, vocabulary {config.vocab_size}"
        return f"<{type(self).__name__} {self.checkpoint.path}: {sizes}>"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.open(self.checkpoint)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate.open(self.checkpoint)

    @cached_property
    def generation_settings(self) -> dict[str, Any]:
        return checkpoint_settings(self.checkpoint)

    @property
    def context(self) -> int:
        """The tokens of prompt and answer that the model was made for."""
        return self.config.context

    def new_session(self) -> Session:
        """A sequence to keep between calls of `generate`."""
        return Session(self)

    def generate(
        self,
        prompt: Any,
        max_tokens: int | None = None,
        *,
        stream: bool = False,
        session: Session | None = None,
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Any:
        """Continue a prompt -> a `Generation`; of a batch, a list of them.

        prompt       text; or messages, a list of {"role": str, "content": str}, which the model's chat
                     template turns into a prompt; or ids [T], integers; or a list of any of these, a
                     batch.  The prompts of a batch are computed one after the other, each with the
                     bits, and the draws, that it would get alone
        max_tokens   the most tokens of the answer, thinking included; None: until the context is full
        stream       True: nothing is computed yet, and iterating over the Generation computes and
                     yields each `Token`.  False: the Generation has run to its end
        session      the beginning of the prompt that the session holds is not computed again
        options      a `GenerationOptions`; the keywords replace its fields
        keywords     min_tokens, logprobs, prompt_logprobs, guided, tool_calls, most_tool_calls, stop,
                     stop_ids, ignore_end, context, special, tools, documents, continue_final_message,
                     add_generation_prompt, reasoning, reasoning_budget, template_options: as of
                     `GenerationOptions`.  temperature, top_k, top_p, min_p, seed (1729),
                     repetition_penalty, presence_penalty, frequency_penalty, penalty_last_n, logit_bias
                     {id: bias}: as of `Sampler`; those that are absent or None are as
                     `generation_settings` has them, or greedy and unfiltered

        Errors: InputError, at once and before anything is computed (ContextError for a prompt that the
        context cannot hold); FileFormatError for a tokenizer, template or settings with a fault.
        A context above the model's is a warning.
        """
        options = options if options is not None else GenerationOptions()
        if not isinstance(options, GenerationOptions):
            raise InputError(f"options: want GenerationOptions, got {type(options).__name__}")
        if max_tokens is not None:
            keywords["max_tokens"] = max_tokens
        options = options.updated(**keywords)
        self._check_session(session)
        self.warn_of_context(options.context, stacklevel=3)
        batch = is_batch(prompt)
        prompts = [(one, f"prompt[{i}]") for i, one in enumerate(prompt)] if batch else [(prompt, "prompt")]
        generations = [self._generation(one, where, options, session) for one, where in prompts]
        if not stream:
            for generation in generations:
                generation.run()
        return generations if batch else generations[0]

    def _generation(
        self, prompt: Any, where: str, options: GenerationOptions, session: Session | None
    ) -> Generation:
        check_prompt(prompt, where)
        chat = self._chat_prompt(prompt, options)
        ids = chat.ids if chat else self._prompt_ids(prompt, where, options.special)
        tokenizer = self._tokenizer_if_any(options.stop)
        return Generation(
            self,
            ids,
            replace(options, max_tokens=self._room(ids, options)),
            Session(self, marks=0) if session is None else session,
            self.new_sampler(**options.sampling),
            tokenizer,
            chat,
            () if options.ignore_end else tokenizer.end_ids if tokenizer else self.config.eos_token_ids,
            self._constraint(options, chat),
        )

    def _constraint(self, options: GenerationOptions, chat: ChatPrompt | None) -> Constraint | None:
        """Of the answer's form, where the options ask for one."""
        lark = None
        if options.guided:
            lark = lark_of(options.guided)
        elif chat and options.tool_calls not in (None, "auto"):
            lark = self._calls_grammar(options)
        if lark is None:
            return None
        return self._grammar_vocabulary.constraint(lark, chat is not None and chat.thinking)

    def _calls_grammar(self, options: GenerationOptions) -> str:
        name = None if options.tool_calls == "required" else options.tool_calls
        tools = options.tools or []
        names = [str(tool.get("function", tool).get("name")) for tool in tools]
        if name is not None and name not in names:
            raise InputError(f"tool_calls: want one of the tools ({', '.join(names)}), got {quote(name)}")
        template = "\n".join(self.chat_template.sources.values())
        return grammar_of_calls(tools, template, options.most_tool_calls, name)

    @cached_property
    def _grammar_vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.config.vocab_size)

    def warn_of_context(self, context: int | None, stacklevel: int = 2) -> None:
        """A PyengineWarning where a context is longer than the model's."""
        if context is not None and context > self.context:
            warnings.warn(
                f"context: {context} tokens are more than the {self.context} that the model was made for; "
                f"beyond {self.context} its answers may be nonsense",
                PyengineWarning,
                stacklevel,
            )

    def new_sampler(self, **sampling: Any) -> Sampler:
        """With the checkpoint's settings for the keywords that are absent; None counts as absent."""
        given = {name: value for name, value in sampling.items() if value is not None}
        try:
            sampler = Sampler(**{**self.generation_settings, **given})
        except TypeError:
            raise InputError(
                f"sampling: want the keywords of Sampler, got {', '.join(sorted(given))}"
            ) from None
        sampler.check_vocabulary(self.config.vocab_size)
        return sampler

    def _check_session(self, session: Session | None) -> None:
        if session is not None and not isinstance(session, Session):
            raise InputError(f"session: want one of new_session, got {type(session).__name__}")
        if session is not None and session.model is not self:
            raise InputError("session: want one of this model, got another model's")

    def _chat_prompt(self, prompt: Any, options: GenerationOptions) -> ChatPrompt | None:
        named = {name: getattr(options, name) for name in NAMED}
        if is_messages(prompt):
            _check_switches(options)
            chat = self.chat_template.prompt(
                self.tokenizer, prompt, reasoning=options.reasoning, options=options.template_options, **named
            )
            if (
                prompt[-1].get("role") != "assistant"
            ):  # a message that is continued may think, or have thought
                _check_thinking(chat, options)
            return chat
        given = dict(
            named,
            reasoning=options.reasoning != "auto",
            reasoning_budget=options.reasoning_budget is not None,
            template_options=options.template_options,
        )
        for name in (name for name, value in given.items() if value):
            kind = "text" if isinstance(prompt, str) else "ids"
            raise InputError(f"{name}: want it with messages, got it with {kind}")
        return None

    def _prompt_ids(self, prompt: Any, where: str, special: bool) -> np.ndarray:
        if not isinstance(prompt, str):
            return as_ids(prompt, self.config.vocab_size, where)
        try:
            ids = self.tokenizer.encode_prompt(prompt, special)
        except InputError as error:
            raise renamed(error, {"text": where}) from None
        return as_ids(ids, self.config.vocab_size, where)

    def _tokenizer_if_any(self, stop: tuple[str, ...]) -> Tokenizer | None:
        """Ids can go in and come out without one."""
        try:
            return self.tokenizer if has_tokenizer(self.checkpoint) else None
        except PyengineError:
            if stop:
                raise
            return None

    def _room(self, ids: np.ndarray, options: GenerationOptions) -> int:
        """The tokens that the answer can have."""
        context = self.context if options.context is None else options.context
        most = context if options.max_tokens == 0 else context - 1
        if len(ids) > most:
            raise ContextError(context, len(ids), most)
        room = context - len(ids)
        return room if options.max_tokens is None else min(options.max_tokens, room)


def is_messages(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def is_batch(prompt: Any) -> bool:
    """Whether it is a list of prompts, and not one."""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 1
    return (
        isinstance(prompt, (list, tuple))
        and len(prompt) > 0
        and (isinstance(prompt[0], (str, list, tuple, np.ndarray)))
    )


def check_prompt(prompt: Any, where: str) -> None:
    """InputError unless it is text, messages or a sequence; `as_ids` and `check_messages` look inside."""
    if (
        isinstance(prompt, (bytes, bytearray, Mapping, set, frozenset))
        or not hasattr(prompt, "__len__")
        or getattr(prompt, "shape", None) == ()
    ):
        raise InputError(
            f"{where}: want text, a list of messages, token ids, or a list of these, got {quote(prompt)}"
        )
    if not len(prompt):
        raise InputError(f"{where}: want at least one token, got none")


def renamed(error: InputError, names: dict[str, str]) -> InputError:
    """The same error, where it begins with an argument that the caller knows by another name."""
    name = str(error)[: len(str(error)) - len(str(error).lstrip("abcdefghijklmnopqrstuvwxyz_"))]
    return InputError(names[name] + str(error)[len(name) :]) if name in names else error


def _check_thinking(chat: ChatPrompt, options: GenerationOptions) -> None:
    """InputError where the template begins the answer otherwise than it was asked to."""
    asked: Any = {"on": True, "off": False}.get(options.reasoning)
    name = "reasoning"
    if asked is None:
        asked, name = (options.template_options or {}).get("enable_thinking"), "template_options"
    if asked is False and chat.thinking:
        raise InputError(f"{name}: want thinking: this chat template cannot turn it off, got none")
    if asked is True and chat.text.rstrip().endswith(CLOSE):
        raise InputError(f"{name}: want no thinking: this chat template cannot turn it on, got thinking")


def _check_switches(options: GenerationOptions) -> None:
    """InputError where two switches of one thing differ."""
    asked = (options.template_options or {}).get("enable_thinking")
    if options.reasoning != "auto" and asked is not None and bool(asked) != (options.reasoning == "on"):
        want = f"enable_thinking as reasoning {options.reasoning!r} has it"
        raise InputError(f"template_options: want {want}, got {quote(asked)}")
