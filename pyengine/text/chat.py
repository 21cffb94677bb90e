"""Messages to a prompt, by the model's own Jinja template.

A template renders the text that Hugging Face's `apply_chat_template` gives for the same messages, with
the same variables, functions and white space rules.  messages.py lists the differences that OpenAI's
clients need.  chat_files.py finds the templates of a model.  chat_sandbox.py limits a hostile template.

A request is text.  If a request spells a special token (`<|im_end|>`), it gets the ids of those
characters, so it cannot end its own turn.  template_text.py tells a request's characters from a
template's.  Every other prompt has the ids that `apply_chat_template` gives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import FileFormatError, InputError
from ..ids import common_length
from ..optional import require
from . import chat_sandbox
from .chat_files import chat_files, has_chat_template
from .messages import check_messages, fallback, without_developer
from .thinking import CLOSE, OPEN
from .tokenizer import Tokenizer

__all__ = ["ChatPrompt", "ChatTemplate", "check_messages", "has_chat_template"]

REASONING = ("auto", "on", "off")
SECONDS = 10.0  # of processor time, for a rendering
THINKING_FIELDS = ("thinking", "reasoning_content")  # a message has the same text under both names
MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # Hugging Face's; the space shows whether a template trims


Message = dict[str, Any]
Messages = list[Message]
Variables = dict[str, Any]


class ChatPrompt(NamedTuple):
    """A conversation, ready to be continued.

    ids         int64 [T]
    boundaries  numbers of ids that later prompts are likely to share, ascending: up to the end of the first
                message, up to the last message, and up to the generation prompt, which a later prompt of
                the same conversation may render differently
    thinking    whether the answer begins inside the thinking tags
    text        what the template made
    """

    ids: np.ndarray
    boundaries: tuple[int, ...]
    thinking: bool
    text: str


class Rendered(NamedTuple):
    """text, and [start, stop] of each run of characters that the template wrote."""

    text: str
    written: list[list[int]]


_MESSAGES_FAULTS = {
    "refused": "the chat template refuses them",
    "failed": "the chat template fails on them",
    "nested": "want JSON values",
}
_TEMPLATE_FAULTS = {
    "syntax": ("syntax", "Jinja"),
    "limit": ("rendering", "a prompt"),
    "unsafe": ("sandbox", "a template that stays inside"),
}

NO_ROLE = "a role that no template knows"
PROBE = [{"role": "user", "content": "?"}]
ANSWER, NO_ANSWER = {"add_generation_prompt": True}, {"add_generation_prompt": False}

# Variables of the template that are parameters here.
_PARAMETERS = ("tools", "documents", "add_generation_prompt", "continue_final_message")
_RESERVED = ("messages", "chat_template")

# Values that differ in a word: a template that shows them renders two texts.
_EXAMPLES: dict[str, Callable[[str], Any]] = {
    "tools": lambda name: [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": name,
                "parameters": {
                    "type": "object",
                    "properties": {name: {"type": "string", "description": name}},
                    "required": [name],
                },
            },
        }
    ],
    "documents": lambda name: [{"doc_id": name, "title": name, "text": name, "contents": name}],
}


class ChatTemplate:
    """A chat template, or several with names.  Threads may share it.  A child process runs it."""

    def __init__(
        self,
        source: str | dict[str, str],
        where: str = "chat template",
        special_tokens: dict[str, str] | None = None,
    ):
        """source: Jinja, or {name: Jinja}, where `tool_use` renders messages with tools and `default`
        all others.  where: the place that errors name.  special_tokens: variables of the template by name
        (`eos_token`); their texts become special tokens when the template writes them."""
        require("jinja2", extra="text", what="chat template")
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.where, self.special_tokens = where, dict(special_tokens or {})
        self._shown: dict[str, bool] = {}
        self._lock = threading.Lock()
        self._process: Any = None  # a subprocess.Popen with pipes, while it runs

    @classmethod
    def open(cls, model: Any) -> ChatTemplate:
        """Of a GGUF, a checkpoint directory or a `Checkpoint` of either (chat_files.py).
        Errors: InputError when it has none, FileFormatError."""
        return cls(*chat_files(model))

    @property
    def source(self) -> str:
        """The Jinja for messages without tools."""
        return self.sources[self._name(None)]

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """The text of messages, each {"role": ..., "content": ...}.  Errors as of `prompt`."""
        field = _continued_field(continue_final_message)
        if field:
            add_generation_prompt = False
        variables = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        return self._conversation(check_messages(messages), [variables], field)[0].text

    def prompt(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        reasoning: str = "auto",
        options: dict[str, Any] | None = None,
        *,
        documents: list[Any] | None = None,
        continue_final_message: bool | str | None = None,
        add_generation_prompt: bool | None = None,
    ) -> ChatPrompt:
        """Messages to ids, up to where the answer begins.

        tools, documents  lists of objects, given to the template as they are: JSON schemas of
                   functions; texts to answer from
        reasoning  "on" or "off": `enable_thinking`, where the options do not say it; "auto": the
                   template decides
        options    further variables of the template, by name
        continue_final_message  True: the answer goes on with the last message, which is not closed;
                   a text: with that field of it (`reasoning_content`); None: True where the last
                   message is an assistant's without tool calls and the other parameter is None too
        add_generation_prompt   whether an assistant's turn is begun; None: where none is continued
        tools, documents and the last two may stand among the options, as clients send them.
        Errors: InputError for messages, for what the template refuses, for tools or documents that it
        does not show; FileFormatError for a template with a fault, that tries to leave its sandbox, or
        that takes too long or too much.
        """
        if reasoning not in REASONING:
            raise InputError(f"reasoning: want {' or '.join(REASONING)}, got {reasoning!r}")
        given = dict(
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        given, options = _apart(given, options or {})
        messages = self._with_known_roles(check_messages(messages))
        field = _field_to_continue(messages, given)
        variables = {"tools": given["tools"], "documents": given["documents"]} | options
        if reasoning != "auto":
            variables.setdefault("enable_thinking", reasoning == "on")
        for name in ("tools", "documents"):
            self._check_shown(name, variables, messages)
        # `history` is the text without the generation prompt; some templates render it differently.
        if field:
            whole = self._conversation(messages, [variables | NO_ANSWER], field)[0]
            history = self._history(messages[:-1], variables)
        else:
            ask = {"add_generation_prompt": given["add_generation_prompt"] is not False}
            whole, history = self._conversation(messages, [variables | ask, variables | NO_ANSWER])
        ids, before = (tokenizer.encode_written(*one) for one in (whole, history))
        if not ids:
            raise InputError("messages: want a prompt of at least one token, got none from the template")
        # A tag that a message spells begins no answer, but that of a message that is continued.
        said = whole.text if field else _written_text(whole)
        start = said[len(os.path.commonprefix([whole.text, history.text])) :]
        thinking = start.rfind(OPEN) > start.rfind(CLOSE)
        boundaries = _boundaries(ids, common_length(ids, before), tokenizer)
        return ChatPrompt(np.array(ids, np.int64), boundaries, thinking, whole.text)

    def thinking_can_be_switched(self) -> bool:
        """Whether `enable_thinking` changes what the template writes."""
        on, off = self._render(PROBE, [ANSWER | {"enable_thinking": on} for on in (True, False)])
        return on.text != off.text

    # ---- renderings ----

    def _conversation(
        self, messages: Messages, renderings: list[Variables], field: str | None = None
    ) -> list[Rendered]:
        """The texts of checked messages with each set of variables.  field: the last message ends with this
        field, and is not closed."""
        try:
            return self._continued(messages, renderings, field)
        except InputError:
            other = fallback(messages)
            if other is None:
                raise
            try:
                return self._continued(other, renderings, field)
            except InputError:
                pass
            raise

    def _continued(
        self, messages: Messages, renderings: list[Variables], field: str | None
    ) -> list[Rendered]:
        if not field:
            return self._render(messages, renderings)
        last = messages[-1]
        text = last.get(field, "" if field == "content" else None)
        if not isinstance(text, str) or field == "role":
            raise InputError(f"messages[{len(messages) - 1}].{field}: want a text to continue, got none")
        mark, said = MARK, _json([messages, renderings])
        while mark.strip() in said:
            mark = "_" + mark
        names = THINKING_FIELDS if field in THINKING_FIELDS else (field,)
        marked = last | dict.fromkeys(names, text + mark)
        return [_up_to_mark(one, text, mark) for one in self._render([*messages[:-1], marked], renderings)]

    def _history(self, messages: Messages, variables: Variables) -> Rendered:
        """The text of the messages before a continued message, or "" if the template refuses them."""
        try:
            return self._conversation(messages, [variables | NO_ANSWER])[0]
        except InputError:  # no messages, or a template that wants the last one too
            return Rendered("", [])

    def _with_known_roles(self, messages: Messages) -> Messages:
        """The role developer is system's newer name, for templates that do not know it."""
        if all(message["role"] != "developer" for message in messages):
            return messages
        if "developer" not in self._shown:
            known, unknown = self._with_role("developer"), self._with_role(NO_ROLE)
            self._shown["developer"] = known != (unknown and unknown.replace(NO_ROLE, "developer"))
        return messages if self._shown["developer"] else without_developer(messages)

    def _with_role(self, role: str) -> str | None:
        try:
            return self._render([{"role": role, "content": "!"}, *PROBE], [ANSWER])[0].text
        except InputError:
            return None

    def _check_shown(self, name: str, variables: Variables, messages: Messages) -> None:
        """InputError for tools or documents that the template does not show."""
        value = variables[name]
        if value is None or value == [] or value == ():
            return
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
            raise InputError(f"{name}: want a list of objects")
        if name not in self._shown:
            self._shown[name] = self._shows(name, {}, PROBE)
        if not self._shown[name] and not self._shows(name, variables, messages):
            raise InputError(f"{name}: the chat template shows no {name}")

    def _shows(self, name: str, variables: Variables, messages: Messages) -> bool:
        """Whether the text changes with them."""
        try:
            one, other = self._conversation(
                messages, [variables | {name: _EXAMPLES[name](word)} | ANSWER for word in "ab"]
            )
        except InputError:
            return False
        return one.text != other.text

    # ---- the child process ----

    def _name(self, tools: list[Any] | None) -> str:
        if tools is not None and "tool_use" in self.sources:
            return "tool_use"
        if "default" not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise InputError(f"{self.where}: want a chat template with the name default, got {names}")
        return "default"

    def _render(self, messages: Messages, renderings: list[Variables]) -> list[Rendered]:
        requests = [
            {
                "template": self._name(variables.get("tools")),
                "variables": {"tools": None, "documents": None, **variables, "messages": messages},
                "written": self.special_tokens,
            }
            for variables in renderings
        ]
        line = _json(requests).encode() + b"\n"
        with self._lock:
            try:
                answer = self._ask(line)
            except BaseException:  # an interrupt too: the rest of the answer belongs to no request
                self.close()
                raise
        if "texts" in answer:
            return [Rendered(*pair) for pair in zip(answer["texts"], answer["written"])]
        kind, message = answer["error"], answer["message"]
        if kind in _MESSAGES_FAULTS:
            raise InputError(f"messages: {_MESSAGES_FAULTS[kind]}: {message}")
        field, want = _TEMPLATE_FAULTS[kind]
        raise FileFormatError(self.where, field, f"want {want}, got {message}")

    def _ask(self, line: bytes) -> dict[str, Any]:
        if self._process is None:
            self._start()
        process = self._process
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            late = process.wait() == -signal.SIGPROF
            raise FileFormatError(
                self.where,
                "rendering",
                "want a prompt, got "
                + (f"none in {SECONDS:g} seconds" if late else "the end of the process that ran it"),
            )
        said: dict[str, Any] = json.loads(answer)
        return said

    def _start(self) -> None:
        # A session of its own: Ctrl-C in the terminal is not for it.
        self._process = subprocess.Popen(
            [sys.executable, chat_sandbox.__file__, str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._process.stdin.write(json.dumps(self.sources).encode() + b"\n")

    def close(self) -> None:
        """End the child process; a later rendering starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdout.close()
            try:
                process.stdin.close()
            except BrokenPipeError:  # what it did not read any more
                pass

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages: want JSON values: {error}") from None


# ---- parameters --------------------------------------------------------------------------------


def _apart(given: Variables, options: Variables) -> tuple[Variables, Variables]:
    """-> (parameters, other variables).  An option sets the parameter of the same name, if that is None."""
    options = dict(options)
    for name in options:
        if not isinstance(name, str) or name in _RESERVED:
            raise InputError(f"template options: want the names of further variables, got {name!r:.200}")
    for name in _PARAMETERS:
        if name in options:
            value = options.pop(name)
            given[name] = value if given[name] is None else given[name]
    return given, options


def _continued_field(said: Any) -> str | None:
    """The field of the last message that is continued."""
    if not isinstance(said, (bool, str)):
        raise InputError(f"continue_final_message: want true, false or a field's name, got {said!r:.200}")
    return "content" if said is True else said or None


def _field_to_continue(messages: Messages, given: Variables) -> str | None:
    said, ask = given["continue_final_message"], given["add_generation_prompt"]
    if not (ask is None or isinstance(ask, bool)):
        raise InputError(f"add_generation_prompt: want true or false, got {ask!r:.200}")
    if said is None:
        last = messages[-1]
        said = ask is None and last["role"] == "assistant" and not last.get("tool_calls")
    field = _continued_field(said)
    if field and ask:
        raise InputError("continue_final_message: want it without add_generation_prompt, got both")
    return field


def _boundaries(ids: list[int], end: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    """See ChatPrompt.  end: where the generation prompt begins.

    The control token that begins the generation prompt begins every message.  A message cannot hold it.
    """
    if end == len(ids) or not tokenizer.is_special(ids[end]):
        return (end,) if end else ()
    starts = [i for i, token in enumerate(ids[:end]) if token == ids[end]]
    return tuple(sorted({*starts[1:2], *starts[1:][-1:], end}))


def _up_to_mark(rendered: Rendered, text: str, mark: str) -> Rendered:
    """The text up to the mark behind the continued text."""
    place = rendered.text.rfind(mark.strip())
    if place < 0 or text.strip() not in rendered.text:
        raise InputError(
            "messages: the chat template does not show the last message as it is: it cannot be continued"
        )
    whole = rendered.text[:place]
    if not rendered.text.startswith(mark, place):  # the template trims, so the message ends without space
        whole = whole.rstrip()
    spans = [[start, min(stop, len(whole))] for start, stop in rendered.written if start < len(whole)]
    return Rendered(whole, spans)


def _written_text(rendered: Rendered) -> str:
    """The text, with NUL in place of every character that the template did not write."""
    pieces, end = [], 0
    for start, stop in rendered.written:
        pieces += ["\0" * (start - end), rendered.text[start:stop]]
        end = stop
    return "".join(pieces) + "\0" * (len(rendered.text) - end)
