"""OpenAI's Responses: a request as a chat's, and a chat's answer as a response, whole or as events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ..text.generate import Generation
from ..text.model import TextModel
from ..text.tokens import Token
from ..text.tool_calls import CallPart
from .answers import Body, ChatCompletion
from .errors import ApiError
from .requests import ResponsesRequest

_SAME = (
    "model",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "stream",
    "metadata",
    "user",
    "store",
    "seed",
)


def chat_of(fields: ResponsesRequest) -> Body:
    """The body of the chat completion that a response is.  Errors: ApiError."""
    body = {name: getattr(fields, name) for name in _SAME if getattr(fields, name) is not None}
    body["messages"] = _messages(fields)
    if fields.max_output_tokens is not None:
        body["max_completion_tokens"] = fields.max_output_tokens
    if fields.tools:
        body["tools"] = [_tool(i, tool) for i, tool in enumerate(fields.tools)]
    choice = fields.tool_choice
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    if choice is not None:
        body["tool_choice"] = choice
    if fields.reasoning and fields.reasoning.get("effort"):
        body["reasoning_effort"] = fields.reasoning["effort"]
    form = (fields.text or {}).get("format")
    if form is not None:
        body["response_format"] = _form(form)
    return body


def _form(form: Any) -> Any:
    if not isinstance(form, dict):
        raise ApiError("text: want an object with format", "text")
    if form.get("type") == "json_schema":
        return {
            "type": "json_schema",
            "json_schema": {"name": form.get("name"), "schema": form.get("schema")},
        }
    return form


def _tool(index: int, tool: Body) -> Body:
    if tool.get("type") != "function":
        raise ApiError(f"tools[{index}]: want type function, got {str(tool.get('type'))[:100]!r}", "tools")
    function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _messages(fields: ResponsesRequest) -> list[Body]:
    items = fields.input
    if items is None:
        raise ApiError("input: want a text or a list of items, got none", "input")
    messages: list[Body] = []
    if fields.instructions:
        messages.append({"role": "system", "content": fields.instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _content(i, item.get("content"))})
        elif kind == "function_call":
            call = {"name": item.get("name"), "arguments": item.get("arguments")}
            entry = {"id": item.get("call_id"), "type": "function", "function": call}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(entry)
        elif kind == "function_call_output":
            output = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            messages.append(output)
        elif kind != "reasoning":  # an earlier turn's thinking: templates leave it out
            want = "a message, function_call, function_call_output or reasoning"
            raise ApiError(f"input[{i}]: want {want}, got {str(kind)[:100]!r}", "input")
    return messages


def _content(index: int, content: Any) -> Any:
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text", "text"):
            got = part.get("type") if isinstance(part, dict) else part
            raise ApiError(f"input[{index}]: want texts as content, got {str(got)[:100]!r}", "input")
        parts.append({"type": "text", "text": part.get("text")})
    return parts


class ResponseAnswer(ChatCompletion):
    """A response: items of output, in the order in which the model began them.

    kinds of items: reasoning, message, function_call.  As a stream, each item comes as OpenAI's events.
    """

    object, prefix, last_line = "response", "resp", ""

    def __init__(self, model: TextModel, name: str, generations: list[Generation], request: Any, seed: int):
        super().__init__(model, name, generations, request, seed)
        self.items: list[Body] = []
        self.number = 0  # of the next event
        self.include_usage = False

    def take(self, index: int, token: Token) -> Body | None:
        for _ in self._pieces(token):
            pass
        return super().take(index, token)

    def whole(self) -> Body:
        generation = self.generations[0]
        cut = generation.finish_reason == "length"
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": int(self.head["created"]),
            "completed_at": int(time.time()),
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "model": self.head["model"],
            "output": [self._done(item) for item in self.items],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": self._usage(),
            "seed": self.head["seed"],
        }

    def _usage(self) -> Body:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }

    # ---- a stream ----

    def begin(self) -> Iterator[Body]:
        """Before the first token."""
        response = self.whole() | {"status": "in_progress", "output": [], "usage": None, "completed_at": None}
        response["incomplete_details"] = None
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)

    def delta(self, index: int, token: Token) -> Iterator[Body]:
        super().take(index, token)
        yield from self._pieces(token)

    def end(self, index: int) -> Iterator[Body]:
        if self.items:
            yield from self._close(self.items[-1])
        response = self.whole()
        yield self._event(f"response.{response['status']}", response=response)

    def _pieces(self, token: Token) -> Iterator[Body]:
        if token.thinking:
            yield from self._open("reasoning")
            yield from self._grow("response.reasoning_text.delta", token.thinking)
        if token.text:
            yield from self._open("message")
            yield from self._grow("response.output_text.delta", token.text)
        for part in token.calls:
            if part.name is not None:
                yield from self._open("function_call", part)
            if part.arguments:
                yield from self._grow("response.function_call_arguments.delta", part.arguments)

    def _open(self, kind: str, part: CallPart | None = None) -> Iterator[Body]:
        """A new item, unless text goes on."""
        if self.items and self.items[-1]["type"] == kind and part is None:
            return
        if self.items:
            yield from self._close(self.items[-1])
        short = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item: Body = {"type": kind, "id": f"{short}_{self.head['id'].rpartition('-')[2]}_{len(self.items)}"}
        item |= {"text": "", "status": "in_progress"}
        if part:
            item |= {"name": part.name, "call_id": self._call_id(0, part.number)}
        self.items.append(item)
        yield self._event(
            "response.output_item.added", output_index=len(self.items) - 1, item=self._done(item, empty=True)
        )
        if kind == "message":
            yield self._event("response.content_part.added", **self._where(item), part=_text_part(""))

    def _grow(self, kind: str, text: str) -> Iterator[Body]:
        item = self.items[-1]
        item["text"] += text
        more = {"logprobs": []} if item["type"] == "message" else {}
        yield self._event(kind, **self._where(item), delta=text, **more)

    def _close(self, item: Body) -> Iterator[Body]:
        if item["status"] == "completed":
            return
        item["status"] = "completed"
        where, text = self._where(item), item["text"]
        if item["type"] == "reasoning":
            yield self._event("response.reasoning_text.done", **where, text=text)
        elif item["type"] == "message":
            yield self._event("response.output_text.done", **where, text=text, logprobs=[])
            yield self._event("response.content_part.done", **where, part=_text_part(text))
        else:
            named = {"name": item["name"], "arguments": text}
            yield self._event("response.function_call_arguments.done", **where, **named)
        yield self._event(
            "response.output_item.done", output_index=where["output_index"], item=self._done(item)
        )

    def _where(self, item: Body) -> Body:
        where = {"item_id": item["id"], "output_index": self.items.index(item)}
        return where if item["type"] == "function_call" else where | {"content_index": 0}

    def _done(self, item: Body, empty: bool = False) -> Body:
        """An item as OpenAI has it."""
        text, status = ("", "in_progress") if empty else (item["text"], "completed")
        body = {"type": item["type"], "id": item["id"], "status": status}
        if item["type"] == "reasoning":
            content = [] if empty else [{"type": "reasoning_text", "text": text}]
            return body | {"summary": [], "content": content}
        if item["type"] == "message":
            return body | {"role": "assistant", "content": [] if empty else [_text_part(text)]}
        return body | {"call_id": item["call_id"], "name": item["name"], "arguments": text}

    def _event(self, kind: str, **fields: Any) -> Body:
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **fields}


def _text_part(text: str) -> Body:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
