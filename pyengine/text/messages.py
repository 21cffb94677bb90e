"""Messages in the form that chat templates read.

As in Hugging Face's `apply_chat_template`, a null field is an absent field, and a message has its thinking
as `reasoning_content` and as `thinking`, also if a client names it `reasoning`.

Clients of OpenAI's API need more than Hugging Face does.  These are always changed:
  content as a list of parts          -> one text
  arguments of a tool call as JSON    -> an object; "" and null are an object without members
  several leading system and developer messages -> one message, with blank lines between the texts,
      because most templates take one system message, at the beginning
These are changed if the template fails or refuses without the change (`fallback`):
  an absent or null content           -> ""
  the role developer                  -> system, which developer is OpenAI's newer name for
A prompt (`ChatTemplate.prompt`) has system for developer also if the template treats developer like a role
that does not exist.  Such a template drops the text in silence, or writes a turn that no model knows.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import InputError, quote

INSTRUCTIONS = ("system", "developer")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the first that is there counts


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy in that form.  Errors: InputError naming the message."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError("messages: want a list of at least one message")
    return _joined([_message(message, f"messages[{i}]") for i, message in enumerate(messages)])


def fallback(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Checked messages in the form for a template that fails on them, or None if nothing would change."""
    other = [message if "content" in message else {**message, "content": ""} for message in messages]
    other = without_developer(other)
    return other if other != messages else None


def without_developer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the role system in place of developer."""
    return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"{where}: want an object with a role and a content")
    given = {name: value for name, value in message.items() if value is not None}
    for name in REASONING_FIELDS:
        if name in given:
            given[name] = _content(given[name], f"{where}.{name}")
    reasoning = next((given[name] for name in REASONING_FIELDS if name in given), None)
    if "content" not in message and reasoning is None and not given.get("tool_calls"):
        raise InputError(f"{where}: want a content, got none")
    if "content" in given:
        given["content"] = _content(given["content"], f"{where}.content")
    if given.get("tool_calls"):
        given["tool_calls"] = _tool_calls(given["tool_calls"], f"{where}.tool_calls")
    if reasoning is not None:
        given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
    return given


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(f"{where}: want text, or a list of its parts, got {type(content).__name__}")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"{where}[{i}]: want {{'type': 'text', 'text': ...}}: nothing else can be "
                f"read here; got {quote(part if kind == 'text' else kind)}"
            )
    return "".join(part["text"] for part in content)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}: want a list of objects")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Its arguments, in `function` or beside a name of its own, as an object."""
    if "name" in call and "function" not in call:
        return _with_arguments(call, where)
    if not isinstance(call.get("function"), dict):
        raise InputError(f"{where}.function: want an object, got {quote(call.get('function'))}")
    return call | {"function": _with_arguments(call["function"], f"{where}.function")}


def _with_arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(function.get("name"), str):
        raise InputError(f"{where}.name: want text, got {quote(function.get('name'))}")
    if "arguments" not in function:
        return function
    arguments = _parsed(function["arguments"])
    if not isinstance(arguments, dict):
        raise InputError(f"{where}.arguments: want JSON of an object, got {quote(function['arguments'])}")
    return function | {"arguments": arguments}


def _parsed(arguments: Any) -> Any:
    """The value of JSON in a text, or the text itself if it is not JSON; {} for "" and null."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        value = json.loads(arguments or "null")
    except (ValueError, RecursionError):
        return arguments
    return {} if value is None else value


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leading system and developer messages as one."""
    count = next((i for i, m in enumerate(messages) if m["role"] not in INSTRUCTIONS), len(messages))
    if count < 2:
        return messages
    leading = messages[:count]
    role = next((m["role"] for m in leading if m["role"] == "system"), "developer")
    text = "\n\n".join(m["content"] for m in leading if m.get("content"))
    return [{**leading[0], "role": role, "content": text}, *messages[count:]]
