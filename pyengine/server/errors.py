"""Errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ..errors import InputError
from ..text.model import ContextError, renamed


class ApiError(Exception):
    """An answer that is an error: HTTP status, message, the parameter at fault, OpenAI's code.

    Halves of surrogate pairs and control characters in message and param are written as escapes.
    """

    def __init__(
        self,
        message: object,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        text = _printable(str(message), 4096)
        super().__init__(text)
        self.status = status
        param = None if param is None else _printable(param, 100)
        self.body = {"error": {"message": text, "type": kind, "param": param, "code": code}}


def _printable(text: str, most: int) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:most])


async def refused(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status)


async def http_error(request: Request, error: HTTPException) -> JSONResponse:
    refusal = ApiError(f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(refusal.body, error.status_code, error.headers)


async def left(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads the answer to a request that was not sent to its end."""
    return Response(status_code=400)


async def internal_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(internal(error).body, 500)


def internal(error: Exception) -> ApiError:
    return ApiError(f"{type(error).__name__}: {error}", status=500, kind="server_error")


def closing() -> ApiError:
    return ApiError("the server is shutting down", status=503, code="shutting_down", kind="server_error")


# A keyword of `generate`, or what its errors begin with: the parameter of a request.
_PARAMETERS = {
    "stop_ids": "stop_token_ids",
    "reasoning": "reasoning_effort",
    "ignore_end": "ignore_eos",
    "special": "parse_special",
    "template_options": "chat_template_kwargs",
    "repetition_penalty": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
    "tool_calls": "tool_choice",
    "grammar": "response_format",
    "guided": "response_format",
}


def of_input(error: InputError, fields: Iterable[str], prompt: str) -> ApiError:
    """An error of the engine's, in the request's words.

    fields  the parameters that the request's kind has;  prompt  the one that holds the prompt
    """
    if isinstance(error, ContextError):
        return _too_long(error, prompt)
    names = {**_PARAMETERS, "prompt": prompt, "ids": prompt, "text": prompt}
    message = str(renamed(error, names))
    param = message.partition(":")[0].partition("[")[0].partition(".")[0]
    return ApiError(message, param if param in fields else None)


def _too_long(error: ContextError, prompt: str) -> ApiError:
    """Clients know this error by its code, or by the beginning of this sentence."""
    return ApiError(
        f"This model's maximum context length is {error.context} tokens. However, your {prompt} resulted in "
        f"{error.tokens} tokens, which leaves no room for an answer. Please send fewer.",
        prompt,
        code="context_length_exceeded",
    )
