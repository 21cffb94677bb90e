"""Messages to a prompt, by the model's own Jinja template; and an answer to thinking and text.

The template gets `messages`, `tools`, `add_generation_prompt`, and `enable_thinking` where thinking
is asked on or off; whitespace rules and functions are those of Hugging Face's `apply_chat_template`
(chat_sandbox.py, which also says what bounds a hostile template).

What a message says is text: where it spells a special token (`<|im_end|>`), it gets the ids of those
characters, and so cannot end its own turn.  Every other prompt has the ids that `apply_chat_template`
gives.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import chat_sandbox
from .config import read_json
from .errors import FileFormatError, InputError
from .tokenizer import TEMPLATE, model_source

OPEN, CLOSE = "<think>", "</think>"
REASONING = ("auto", "on", "off")
SECONDS = 10.0  # of processor time, for a rendering


class ChatPrompt(NamedTuple):
    """A conversation, ready to be continued.

    ids       int64 [T]
    boundary  how many of them stand for the messages alone: the rest asks for the answer, and may
              be written otherwise once the answer is known
    thinking  whether the answer begins inside the thinking tags
    text      what the template made
    """

    ids: np.ndarray
    boundary: int
    thinking: bool
    text: str


_MESSAGES_FAULTS = {"refused": "refuses them", "failed": "fails on them"}
_TEMPLATE_FAULTS = {"syntax": ("syntax", "Jinja"), "limit": ("rendering", "a prompt"),
                    "unsafe": ("sandbox", "a template that stays inside")}


# ---- the template ------------------------------------------------------------------------------


class ChatTemplate:
    """A chat template; may be shared by threads.  It is run by a child process of its own."""

    def __init__(self, source: str, where: str = "chat template"):
        """source: Jinja.  where: what errors call it."""
        if importlib.util.find_spec("jinja2") is None:
            raise InputError("chat template: want the package's extra: pip install 'pyengine[text]'")
        self.source, self.where = source, where
        self._lock = threading.Lock()
        self._process = None

    @classmethod
    def open(cls, model) -> ChatTemplate:
        """Of a GGUF, a checkpoint directory (chat_template.jinja, or in tokenizer_config.json) or a
        `Checkpoint` of either.  Errors: InputError when it has none, FileFormatError."""
        source = model_source(model)
        if not isinstance(source, Path):
            if TEMPLATE not in source.metadata:
                raise InputError(f"{source.path}: want a chat template, got none")
            return cls(source.metadata.require(TEMPLATE, str), f"{source.path}: {TEMPLATE}")
        return cls(*_directory_template(source))

    def render(self, messages, tools=None, add_generation_prompt: bool = True, **variables) -> str:
        """The text of messages, each {"role": ..., "content": ...}.  Errors as of `prompt`."""
        messages = check_messages(messages)
        return self._render([{"messages": messages, "tools": tools, **variables,
                              "add_generation_prompt": add_generation_prompt}])[0]

    def prompt(self, tokenizer, messages, tools=None, reasoning: str = "auto",
               options: dict | None = None) -> ChatPrompt:
        """Messages to ids, up to where the answer begins.

        tools      list of JSON schemas, passed to the template as they are
        reasoning  "on" or "off": `enable_thinking`; "auto": the template decides
        options    further variables of the template, by name
        Errors: InputError for messages, and for what the template refuses; FileFormatError for a
        template with a fault, that tries to leave its sandbox, or that takes too long or too much.
        """
        if reasoning not in REASONING:
            raise InputError(f"reasoning: want {' or '.join(REASONING)}, got {reasoning!r}")
        messages, tools, mark = _disarmed(check_messages(messages), tools, tokenizer.special_texts)
        variables = {"messages": messages, "tools": tools, **(options or {})}
        if reasoning != "auto":
            variables["enable_thinking"] = reasoning == "on"
        # Ends here what is kept between turns.  Not all templates agree to end there.
        whole, history = self._render([variables | {"add_generation_prompt": True},
                                       variables | {"add_generation_prompt": False}])
        ids, before = (_encode(tokenizer, text, mark) for text in (whole, history))
        start = whole[len(os.path.commonprefix([whole, history])):]
        return ChatPrompt(np.array(ids, np.int64), _shared(ids, before),
                          start.rfind(OPEN) > start.rfind(CLOSE), whole.replace(mark, ""))

    def thinking_can_be_switched(self) -> bool:
        """Whether `enable_thinking` changes what the template writes."""
        variables = {"messages": [{"role": "user", "content": "?"}], "tools": None,
                     "add_generation_prompt": True}
        on, off = self._render([variables | {"enable_thinking": on} for on in (True, False)])
        return on != off

    # ---- the child process ----

    def _render(self, requests) -> list[str]:
        try:
            line = json.dumps(requests).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"messages: want JSON values: {error}") from None
        with self._lock:
            try:
                answer = self._ask(line)
            except BaseException:  # an interrupt too: what it still writes belongs to no request
                self.close()
                raise
        if "texts" in answer:
            return answer["texts"]
        kind, message = answer["error"], answer["message"]
        if kind in _MESSAGES_FAULTS:
            raise InputError(f"messages: the chat template {_MESSAGES_FAULTS[kind]}: {message}")
        field, want = _TEMPLATE_FAULTS[kind]
        raise FileFormatError(self.where, field, f"want {want}, got {message}")

    def _ask(self, line: bytes) -> dict:
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
            raise FileFormatError(self.where, "rendering", "want a prompt, got " + (
                f"none in {SECONDS:g} seconds" if late else "the end of the process that ran it"))
        return json.loads(answer)

    def _start(self):
        # A session of its own: Ctrl-C in the terminal is not for it.
        self._process = subprocess.Popen(
            [sys.executable, chat_sandbox.__file__, str(SECONDS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True)
        self._process.stdin.write(json.dumps(self.source).encode() + b"\n")

    def close(self):
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

    def __del__(self):
        if getattr(self, "_process", None) is not None:
            self.close()


def has_chat_template(model) -> bool:
    """Whether a model (a path, a GGUF or a Checkpoint) carries a chat template."""
    source = model_source(model)
    if not isinstance(source, Path):
        return TEMPLATE in source.metadata
    try:
        return bool(_directory_template(source))
    except InputError:
        return False


def _directory_template(directory: Path) -> tuple[str, str]:
    """-> (Jinja, where it stands)."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8"), str(path)
    path = directory / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if template is None:
        raise InputError(f"{directory}: want a chat template, got none")
    if not isinstance(template, str):
        raise FileFormatError(path, "chat_template", f"want text, got {type(template).__name__}")
    return template, f"{path}: chat_template"


# ---- messages ----------------------------------------------------------------------------------


def check_messages(messages) -> list[dict]:
    """A copy in the form that templates of this family read: content as one text, the arguments of
    tool calls as objects.  InputError naming the message."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError("messages: want a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message, where) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"{where}: want an object with a role and a content")
    message = dict(message)
    if "content" in message:
        message["content"] = _content(message["content"], f"{where}.content")
    elif not message.get("tool_calls"):
        raise InputError(f"{where}: want a content, got none")
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return message


def _content(content, where):
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(f"{where}: want text, or a list of its parts, got {type(content).__name__}")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where}[{i}]: want {{'type': 'text', 'text': ...}}: nothing else can be "
                             f"read here; got {kind!r}")
    return "".join(part["text"] for part in content)


def _tool_calls(calls, where) -> list:
    """The OpenAI API writes arguments as JSON in a string; templates walk through an object."""
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}: want a list of objects")
    out = []
    for i, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except ValueError:
                raise InputError(f"{where}[{i}].function.arguments: want JSON") from None
            call = call | {"function": function | {"arguments": arguments}}
        out.append(call)
    return out


def _disarmed(messages, tools, special_texts):
    """-> messages and tools with a mark inside every spelling of a special token, and that mark.

    The mark is a character that occurs in none of them; "" when nothing spells one.
    """
    if not special_texts:
        return messages, tools, ""
    spelled = re.compile("|".join(map(re.escape, special_texts)))
    texts = list(_texts([messages, tools]))
    if not any(spelled.search(text) for text in texts):
        return messages, tools, ""
    used = set().union(*texts)
    mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used)  # private use

    def disarm(value):
        if isinstance(value, str):
            return spelled.sub(lambda found: mark.join(found[0]), value)
        if isinstance(value, dict):
            return {key: disarm(item) for key, item in value.items()}
        return [disarm(item) for item in value] if isinstance(value, (list, tuple)) else value

    return disarm(messages), disarm(tools), mark


def _texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _encode(tokenizer, text: str, mark: str) -> list[int]:
    """The ids of a rendered text; where it is marked, special tokens are the template's own only."""
    if not mark:
        return tokenizer.encode(text, special=True)
    ids = []
    special = re.compile("(" + "|".join(map(re.escape, tokenizer.special_texts)) + ")")
    for i, piece in enumerate(special.split(text)):
        ids += tokenizer.encode(piece if i % 2 else piece.replace(mark, ""), special=bool(i % 2))
    return ids


def _shared(a, b) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# ---- answers -----------------------------------------------------------------------------------


class ThinkingText:
    """An answer's characters, as they come, to (thinking, text); the tags belong to neither, nor do
    the line ends around them.

    thinking   whether it stands inside the tags
    """

    def __init__(self, thinking: bool):
        self.thinking = thinking
        self._begun = thinking  # an answer may also begin with the tag itself
        self._fresh = thinking  # nothing but line ends since a tag
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """-> the characters of each that are certain now."""
        text, self._held = self._held + text, ""
        thought = ""
        if not self._begun:
            text = self._begin(text)
        if self.thinking:
            thought, text = self._think(text)
        return thought, self._trim(text)

    def flush(self) -> tuple[str, str]:
        """The rest, when nothing follows."""
        rest, self._held, self._begun = self._held, "", True
        return (self._trim(rest.rstrip("\n")), "") if self.thinking else ("", rest)

    def _begin(self, text) -> str:
        """Held back until it is known whether the answer begins with the tag."""
        start = text.lstrip("\n ")
        if len(start) < len(OPEN) and OPEN.startswith(start):
            self._held = text
            return ""
        self._begun = True
        if not start.startswith(OPEN):
            return text
        self.thinking = self._fresh = True
        return start[len(OPEN):]

    def _think(self, text) -> tuple[str, str]:
        """-> thinking, and the text behind it."""
        thought, tag, rest = text.partition(CLOSE)
        if not tag:
            thought = text[:len(text) - overlap(text, CLOSE)].rstrip("\n")
            self._held = text[len(thought):]
            return self._trim(thought), ""
        thought = self._trim(thought.rstrip("\n"))
        self.thinking, self._fresh = False, True
        return thought, rest

    def _trim(self, text) -> str:
        """Without the line ends that follow a tag."""
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


def overlap(text: str, stop: str) -> int:
    """How many of the text's last characters begin, but are not all of, the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
