"""The options of a generation, checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..checks import integer
from ..errors import InputError, nearest, quote
from .chat import REASONING
from .grammar import check_form
from .sampler import Sampler

SAMPLING = tuple(inspect.signature(Sampler).parameters)

# Of a chat template: variables that template_options cannot replace, and those that are options of their own.
RESERVED = ("messages", "chat_template")
NAMED = ("tools", "documents", "continue_final_message", "add_generation_prompt")


@dataclass(frozen=True)
class GenerationOptions:
    """How a prompt is continued.  Each field is a keyword of `generate`, and so is each of `Sampler`'s.

    max_tokens    the most tokens of the answer, thinking included; None or -1: until the context is full
    min_tokens    no end id and no id of stop_ids is drawn before the answer has this many tokens; the
                  reported log-probabilities stay the model's own
    logprobs      number of likeliest ids that each token reports, with its own log-probability; the head is
                  read whole for it.  None: nothing is reported
    prompt_logprobs  number of likeliest ids that each token of the prompt reports, with its own
                  log-probability; the whole prompt is computed for it.  None: nothing is reported
    stop          a text, or several, that ends the answer; the answer ends before it
    stop_ids      ids that end the answer, beside the model's own end ids
    ignore_end    True: the model's own end ids do not end the answer
    context       the most tokens of prompt and answer together; None: the number that the model was made for
    special       True: text of a prompt that spells a special token (`<|im_start|>`) is that token.  Text
                  of messages never is
    tools         for messages: JSON schemas of functions, given to the chat template
    tool_calls    for messages: calls of the tools are taken out of the text (`generation.tool_calls`).
                  "auto": the model decides; "required", or a tool's name: the answer is such calls alone
    most_tool_calls  the answer ends after so many; None: when the model ends it
    guided        the answer's form: {"json": schema}, {"regex": text}, {"choice": texts} or
                  {"grammar": Lark or GBNF}; the thinking is free.  None: the answer is free
    documents     for messages: texts to answer from, given to the chat template
    continue_final_message  for messages: True, or a field's name: the answer continues the last message;
                  None: it does where the last message is an assistant's without tool calls
    add_generation_prompt   for messages: whether a turn of the assistant's is begun; None: unless the
                  last message is continued
    reasoning     for messages: thinking "on", "off" or, "auto", as the template decides
    reasoning_budget  for messages: the tokens of thinking after which the closing tag is forced; None or
                  -1: no limit
    template_options  for messages: further variables of the chat template, by name
    sampling      keywords of `Sampler`; those that are absent or None are as the checkpoint's settings

    Errors: InputError, "FIELD: want X, got Y".
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    context: int | None = None
    special: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_calls: str | None = None
    most_tool_calls: int | None = None
    guided: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    continue_final_message: bool | str | None = None
    add_generation_prompt: bool | None = None
    reasoning: str = "auto"
    reasoning_budget: int | None = None
    template_options: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        self._check_guided()
        for name in NAMED:
            own, other = getattr(self, name), (self.template_options or {}).get(name)
            if own is not None and other is not None and own != other:
                raise InputError(
                    f"template_options: want {name} as it is given beside them, got {quote(other)}"
                )

    def _check_guided(self) -> None:
        """What a form excludes."""
        demanded = self.tool_calls not in (None, "auto")
        if self.tool_calls is not None and not self.tools:
            raise InputError(f"tool_calls: want tools with it, got {self.tool_calls!r} without")
        if demanded and self.guided:
            raise InputError("guided: want it without tool calls that are demanded, got both")
        for name, value in (("min_tokens", self.min_tokens), ("ignore_end", self.ignore_end)):
            if value and (demanded or self.guided):
                raise InputError(f"{name}: want it without guided and without demanded tool calls, got both")

    def updated(self, **keywords: Any) -> GenerationOptions:
        """A copy with other fields; keywords of `Sampler` go into `sampling`.

        Errors: InputError for a keyword that is neither.
        """
        names = [f.name for f in fields(self)]
        own = {name: value for name, value in keywords.items() if name in names}
        sampling = {name: value for name, value in keywords.items() if name not in own}
        for name in sampling:
            if name not in SAMPLING:
                known = ", ".join((*(n for n in names if n != "sampling"), *SAMPLING))
                raise InputError(f"{name}: want a keyword of generate ({known}), got another")
        if sampling:
            own["sampling"] = {**own.get("sampling", self.sampling), **sampling}
        return replace(self, **own)


# Variables that the templates of many models have.
SWITCHES = (
    "enable_thinking",
    "preserve_thinking",
    "add_generation_prompt",
    "continue_final_message",
    "reasoning_effort",
)


# ---- checks: (name, value) -> the value in its one form ----------------------------------------


def check_count(name: str, value: Any, least: int = 0) -> int:
    """An integer of at least `least`.  Errors: InputError."""
    return integer(name, value, least)


def _limit(name: str, value: Any) -> int | None:
    if value is None or (isinstance(value, int) and value == -1):
        return None
    return check_count(name, value)


def _context(name: str, value: Any) -> int | None:
    return None if value is None else check_count(name, value, 1)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name}: want True or False, got {quote(value)}")
    return bool(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else _several(name, value, "a text or several")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InputError(f"{name}: want texts of at least one character, got {quote(text)}")
    return texts


def _ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(check_count(name, i) for i in _several(name, value, "a list of ids"))


def _several(name: str, value: Any, want: str) -> tuple[Any, ...]:
    if isinstance(value, (bytes, Mapping)):
        raise InputError(f"{name}: want {want}, got {quote(value)}")
    try:
        return tuple(value)
    except TypeError:
        raise InputError(f"{name}: want {want}, got {quote(value)}") from None


def _objects(name: str, value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise InputError(f"{name}: want a list of objects, got {quote(value)}")
    return list(value) or None


def _name(name: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise InputError(f'{name}: want "auto", "required" or the name of a tool, got {quote(value)}')


def _optional_flag(name: str, value: Any) -> bool | None:
    return None if value is None else _flag(name, value)


def _continued(name: str, value: Any) -> bool | str | None:
    if value is None or isinstance(value, (bool, str)):
        return value
    raise InputError(f"{name}: want True, False or a field's name, got {quote(value)}")


def _reasoning(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in REASONING:
        raise InputError(f"{name}: want {' or '.join(REASONING)}, got {quote(value)}")
    return value


def _variables(name: str, value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name}: want an object, got {quote(value)}")
    for key in value:
        if key in RESERVED:
            raise InputError(f"{name}: want no variable {key}, which generate sets itself, got one")
    return _with_switches(name, value)


def _with_switches(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Templates ignore in silence what they do not know, and a text "false" switches nothing off.

    A switch that is null is left open.  Errors: InputError.
    """
    for key in value:
        near = nearest(key, SWITCHES, 0.9)
        if near and key not in SWITCHES:
            raise InputError(f"{name}: want {near}, got {quote(key)}")
    thinking = value.get("enable_thinking")
    if not (thinking is None or isinstance(thinking, bool)):
        raise InputError(f"{name}: want enable_thinking true or false, got {quote(thinking)}")
    return {key: one for key, one in value.items() if not (key in SWITCHES and one is None)}


def _optional_count(name: str, value: Any) -> int | None:
    return None if value is None else check_count(name, value)


def _sampling(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(key in SAMPLING for key in value):
        raise InputError(f"{name}: want keywords of Sampler ({', '.join(SAMPLING)}), got {quote(value)}")
    return dict(value)


_CHECKS = {
    "max_tokens": _limit,
    "min_tokens": check_count,
    "logprobs": _optional_count,
    "prompt_logprobs": _optional_count,
    "stop": _texts,
    "stop_ids": _ids,
    "ignore_end": _flag,
    "context": _context,
    "special": _flag,
    "tools": _objects,
    "tool_calls": _name,
    "most_tool_calls": lambda name, value: None if value is None else check_count(name, value, 1),
    "guided": check_form,
    "documents": _objects,
    "continue_final_message": _continued,
    "add_generation_prompt": _optional_flag,
    "reasoning": _reasoning,
    "reasoning_budget": _limit,
    "template_options": _variables,
    "sampling": _sampling,
}
