"""The OpenAPI page of the server, made from the tables of requests.py."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from .._version import __version__
from .requests import ChatRequest, CompletionRequest, DetokenizeRequest, ResponsesRequest, TokenizeRequest

_STATUS = {"status": "ok", "model": "NAME", "waiting": 0, "running": 0}


def openapi(name: str) -> dict[str, Any]:
    """The page, OpenAPI 3.1.  name: the model's."""
    kinds = (CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)
    models = [(kind, "validation") for kind in kinds]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"pyengine: {name}",
            "version": __version__,
            "description": "OpenAI's completions and chat completions. In a request, null counts as absent.",
        },
        "paths": {
            "/": {"get": _get("A page to chat in")},
            "/v1/completions": {"post": _post("Continue a prompt", "CompletionRequest")},
            "/v1/chat/completions": {"post": _post("Answer a conversation", "ChatRequest")},
            "/v1/responses": {"post": _post("Answer a conversation, as a response", "ResponsesRequest")},
            "/tokenize": {"post": _plain_post("A text or a conversation to ids", "TokenizeRequest")},
            "/detokenize": {"post": _plain_post("Ids to text", "DetokenizeRequest")},
            "/v1/models": {"get": _get("The models: one")},
            "/v1/models/{name}": {"get": {**_get("A model, with its context length"), **_named()}},
            "/health": {"get": _get("Whether it runs, and how many requests wait", _STATUS)},
            "/version": {"get": _get("This program's version", {"version": __version__})},
            "/props": {"get": _get("What clients of llama.cpp read: context, slots, chat template")},
            "/tokenizer_info": {"get": _get("The special tokens and the chat template")},
            "/metrics": {"get": _get("Numbers for Prometheus, as text")},
            "/openapi.json": {"get": _get("This page")},
        },
        "components": {"schemas": {**schemas["$defs"], "Error": _ERROR}},
    }


_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "the parameter at fault"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _post(summary: str, kind: str) -> dict[str, Any]:
    error = _json({"$ref": "#/components/schemas/Error"})
    answer = {
        **_json({"type": "object", "description": "OpenAI's answer, with the seed that was drawn from"}),
        "text/event-stream": {"schema": {"type": "string", "description": "with stream: its chunks"}},
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json({"$ref": f"#/components/schemas/{kind}"})},
        "responses": {
            "200": {"description": "the answer", "content": answer},
            "400": {"description": "a parameter is at fault", "content": error},
            "404": {"description": "another model's name", "content": error},
            "413": {"description": "the body is too large", "content": error},
            "500": {"description": "a fault of the engine", "content": error},
            "503": {
                "description": "too many requests wait, or the server is shutting down",
                "content": error,
            },
        },
    }


def _plain_post(summary: str, kind: str) -> dict[str, Any]:
    post = _post(summary, kind)
    post["responses"]["200"] = {"description": "the answer", "content": _json({"type": "object"})}
    del post["responses"]["503"]
    return post


def _get(summary: str, example: dict[str, Any] | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"type": "object"}}
    if example:
        content["example"] = example
    return {
        "summary": summary,
        "responses": {"200": {"description": "found", "content": {"application/json": content}}},
    }


def _named() -> dict[str, Any]:
    return {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
