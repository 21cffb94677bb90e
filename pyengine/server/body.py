"""The body of a request: bytes to an object of JSON, and that to one of the tables of requests.py."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from ..errors import FileFormatError, nearest
from ..files.strict_json import parse_object
from .errors import ApiError

LARGEST_BODY = 1 << 25  # bytes of a request
DEEPEST = 100  # objects and lists within each other: recursion over a body needs a bound


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object of a request.  Errors: ApiError, status 400 or 413."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > LARGEST_BODY:
            raise ApiError(f"body: want at most {LARGEST_BODY} bytes", status=413)
    try:
        body: dict[str, Any] = parse_object("request", "body", bytes(data))
    except FileFormatError as error:
        raise ApiError(f"body: {error.problem}") from None
    _check_values(body)
    return body


def _check_values(body: dict[str, Any]) -> None:
    """Every text is Unicode, and nothing is nested deeper than recursion can follow."""
    level: list[Any] = [body]
    for _ in range(DEEPEST):
        level = [item for value in level for item in _items(value)]
        for text in level:
            if isinstance(text, str) and not _is_unicode(text):
                raise ApiError(f"body: want Unicode text, got half a surrogate pair in {ascii(text)[:100]}")
        if not level:
            return
    raise ApiError(f"body: want at most {DEEPEST} objects and lists within each other, got more")


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def checked(body: dict[str, Any], kind: type[BaseModel]) -> Any:
    """A body as a `kind`; null counts as absent.  Errors: ApiError naming the field."""
    fields = {name: value for name, value in body.items() if value is not None}
    for name in fields:
        if name not in kind.model_fields:
            raise _unknown(name, kind)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_context=False)[0]["loc"][0])
        got = json.dumps(fields[name], ensure_ascii=False)
        raise ApiError(f"{name}: want {wanted(kind, name)}, got {got[:100]}", name) from None


def _unknown(name: str, kind: type[BaseModel]) -> ApiError:
    """With the parameter that was meant, where one is near."""
    near = nearest(name, kind.model_fields)
    hint = f": did you mean {near}?" if near else ""
    return ApiError(f"{name[:100]}: this parameter is not known here{hint}", name, code="unknown_parameter")


def agreed(request: BaseModel, *names: str) -> Any:
    """The value of a parameter that has several names.  Errors: ApiError where two of them differ."""
    given = {name: getattr(request, name) for name in names if getattr(request, name, None) is not None}
    for name, value in given.items():
        first = next(iter(given))
        if value != given[first]:
            raise ApiError(f"{name}: want {given[first]}, as {first} has it, got {value}", name)
    return next(iter(given.values()), None)


_SCHEMAS: dict[type[BaseModel], dict[str, Any]] = {}


def wanted(kind: type[BaseModel], name: str) -> str:
    """The values of a field, in words."""
    if kind not in _SCHEMAS:
        _SCHEMAS[kind] = kind.model_json_schema()
    return words(_SCHEMAS[kind]["properties"][name])


def words(schema: dict[str, Any]) -> str:
    """A JSON schema in words; null, which counts as absent, is left out."""
    if "x-want" in schema:
        return str(schema["x-want"])
    if "anyOf" in schema:
        return " or ".join(words(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    if schema["type"] == "array":
        return f"a list of {words(schema['items'])}"
    names = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "object": "an object",
    }
    return names[schema["type"]] + _span(schema.get("minimum"), schema.get("maximum"))


def _span(low: float | None, high: float | None) -> str:
    if low is None:
        return ""
    if high is None:
        return " of at least 0, or -1" if low == -1 else f" of at least {low:g}"
    return f" from {low:g} to {high:g}"
