"""Answers to their clients, whole or as server-sent events, as long as the client is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..text.tokens import Token
from .answers import Completion
from .errors import ApiError, internal
from .jobs import Job

PING_SECONDS = 5.0  # of silence in a stream, after which a comment is sent


async def cancel_when_left(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()  # of a job that is done: nothing


async def _events(job: Job) -> AsyncIterator[tuple[int, Token | None] | None]:
    """A job's events, and None after each silence; the job is cancelled when they are no longer wanted.

    Errors: those of the job.
    """
    coming = asyncio.ensure_future(job.events.get())
    try:
        while True:
            if not (await asyncio.wait({coming}, timeout=PING_SECONDS))[0]:
                yield None
                continue
            event = coming.result()
            if event is None:
                return
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Exception):
                raise internal(event)
            coming = asyncio.ensure_future(job.events.get())
            yield event
    finally:
        coming.cancel()
        job.cancel()


async def whole(job: Job, answer: Completion) -> Response:
    async for event in _events(job):
        if event is None:
            continue
        index, token = event
        if token is None:
            answer.finish(index)
        else:
            answer.take(index, token)
    return JSONResponse(answer.whole())


async def stream(job: Job, answer: Completion) -> AsyncIterator[str]:
    """Server-sent events.  Clients ignore the comments, but know by them that the server is there."""
    try:
        for chunk in answer.begin():
            yield _event(chunk)
        async for event in _events(job):
            if event is None:
                yield ": still working\n\n"
                continue
            index, token = event
            for chunk in answer.end(index) if token is None else answer.delta(index, token):
                yield _event(chunk)
        if answer.include_usage:
            yield _event(answer.last_chunk())
        if answer.last_line:
            yield answer.last_line
    except Exception as error:  # the status is out already
        yield _event((error if isinstance(error, ApiError) else internal(error)).body)


def _event(body: dict[str, Any]) -> str:
    """A chunk; one that has a type (of a response) begins with it."""
    kind = f"event: {body['type']}\n" if "sequence_number" in body else ""
    return f"{kind}data: {json.dumps(body, ensure_ascii=False)}\n\n"
