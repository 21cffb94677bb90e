"""OpenAI's completions and chat completions over HTTP: `pyengine serve`.

    app = create_app(model, "my-model")          # an ASGI application
    new_server(app).run()                        # run.py; any ASGI server does

POST /v1/completions, /v1/chat/completions, /v1/responses, /tokenize, /detokenize; GET /v1/models,
/v1/models/NAME, /health, /version, /props, /tokenizer_info, /metrics, /openapi.json; and / is a page to chat
in.

`parallel` answers are computed together (`JobQueue`).  Further requests wait in the order of their arrival.
A request is dropped when its client leaves, before its turn or in the middle of it.  The beginning that a
prompt shares with earlier prompts is not computed again (`Prefixes`).  No bit depends on that, nor on who
else is served.

README.md beside this file says where this differs from OpenAI; requests.py has the tables of parameters.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .._version import __version__
from ..errors import InputError, PyengineError
from ..text.generate import Generation
from ..text.model import TextModel
from ..text.options import GenerationOptions
from ..text.prefixes import CACHE_MEMORY, Prefixes
from ..text.tokenizer import Tokenizer
from .asked import Asked, Reader
from .body import agreed, checked, read_body
from .delivery import cancel_when_left, stream, whole
from .errors import ApiError, closing, http_error, internal, internal_error, left, of_input, refused
from .guard import Guard
from .jobs import Job, JobQueue
from .metrics import Metrics
from .openapi import openapi
from .page import page_route
from .request_log import RequestLog, counts, difference, log
from .requests import MOST_CHOICES, DetokenizeRequest, TokenizeRequest

HANDLERS: dict[Any, Any] = {
    ApiError: refused,
    HTTPException: http_error,
    ClientDisconnect: left,
    Exception: internal_error,
}


def create_app(
    model: TextModel,
    name: str,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    reasoning: str = "auto",
    reasoning_budget: int | None = None,
    sampling: dict[str, Any] | None = None,
    cors_origins: Iterable[str] = (),
    parallel: int = 1,
    cache_memory: int = CACHE_MEMORY,
    cache_directory: Path | None = None,
    api_keys: Iterable[str] = (),
    hosts: Iterable[str] | None = None,
    page: bool = True,
) -> Starlette:
    """A Starlette application that serves one model.

    name          what /v1/models calls it
    context       the most tokens of prompt and answer; None: what the model was made for
    max_tokens    the most tokens of a chat's answer.  max_tokens, reasoning, reasoning_budget and sampling
                  (keywords of `Sampler`) are for requests that leave them open
    cors_origins  origins whose pages may ask from a browser ("https://example.com"); "*": any page
    parallel      answers that are computed together
    cache_memory, cache_directory  bytes for sequences that have ended, and where they outlast the server:
                  see `Prefixes`
    api_keys, hosts  see `Guard`
    page          whether there is a page to chat in, at /
    Errors: InputError.
    """
    defaults = GenerationOptions(
        context=context,
        max_tokens=max_tokens,
        reasoning=reasoning,
        reasoning_budget=reasoning_budget,
        sampling=sampling or {},
    )
    prefixes = Prefixes(model, cache_memory, cache_directory)
    service = Service(model, name, defaults, JobQueue(model, prefixes, parallel))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.jobs.start()
        yield
        service.close()
        service.jobs.stop()

    origins = [check_origin(origin) for origin in cors_origins]
    routes = [
        *([page_route()] if page else []),
        Route("/health", service.health),
        Route("/version", service.version),
        Route("/props", service.props),
        Route("/tokenizer_info", service.tokenizer_info),
        Route("/metrics", service.metrics_page),
        Route("/openapi.json", service.openapi),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model_card),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
        Route("/v1/responses", service.responses, methods=["POST"]),
    ]
    app = Starlette(
        lifespan=lifespan,
        routes=routes,
        middleware=[
            Middleware(RequestLog, service.metrics, [route.path for route in routes]),
            *_cors(origins),
            Middleware(Guard, api_keys, hosts, origins),
        ],
        exception_handlers=HANDLERS,
    )
    app.state.service = service
    return app


def _cors(origins: list[str]) -> list[Middleware]:
    if not origins:
        return []
    return [
        Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    ]


def check_origin(origin: str, name: str = "cors_origins") -> str:
    """An origin as browsers write it: scheme and host, no path.  Errors: InputError."""
    scheme, slashes, host = origin.partition("://")
    rest = set(host) & set("/?#@* ")
    if origin in ("*", "null") or (scheme and slashes and host and not rest):
        return origin.lower()
    raise InputError(f"{name}: want * or an origin such as https://example.com, got {origin!r}")


# ---- the service -------------------------------------------------------------------------------


class Service:
    """The endpoints.

    jobs      those that are being computed, and those that wait
    defaults  options of requests that leave them open
    """

    def __init__(self, model: TextModel, name: str, defaults: GenerationOptions, jobs: JobQueue):
        self.model, self.name, self.defaults, self.jobs = model, name, defaults, jobs
        self.reader = Reader(name, defaults)
        self.created = int(time.time())
        self.metrics = Metrics(jobs)
        self._closing = asyncio.Event()
        self._watches: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """End every request with an error, now, and take no more."""
        self._closing.set()
        self.jobs.close()

    # ---- the endpoints ----

    async def health(self, request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "model": self.name,
                "waiting": self.jobs.waiting,
                "running": len(self.jobs.running),
            }
        )

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def tokenizer_info(self, request: Request) -> Response:
        """vLLM's: what lm-evaluation-harness reads before it leaves the tokens to the server."""
        tokenizer, sources = self.model.tokenizer, self.model.chat_template.sources
        return JSONResponse(
            {
                "tokenizer_class": "pyengine",
                **{name: text or None for name, text in _ends(tokenizer).items()},
                "chat_template": sources.get("default"),
                "model_max_length": self._card()["max_model_len"],
            }
        )

    async def props(self, request: Request) -> Response:
        """llama.cpp's: what clients of it read."""
        tokenizer, sources = self.model.tokenizer, self.model.chat_template.sources
        return JSONResponse(
            {
                "default_generation_settings": {"n_ctx": self._card()["max_model_len"]},
                "total_slots": self.jobs.parallel,
                "model_alias": self.name,
                "chat_template": sources.get("default", ""),
                **_ends(tokenizer),
                "build_info": f"pyengine {__version__}",
            }
        )

    async def metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi(self.name))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model_card(self, request: Request) -> Response:
        self.reader.check_name(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        """The context length under vLLM's name, under OpenRouter's, and in llama.cpp's `meta`."""
        context = self.model.context if self.defaults.context is None else self.defaults.context
        config = self.model.config
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "pyengine",
            "max_model_len": context,
            "context_length": context,
            "meta": {"n_ctx": context, "n_ctx_train": self.model.context, "n_vocab": config.vocab_size},
        }

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self.reader.completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, self.reader.chat)

    async def tokenize(self, request: Request) -> Response:
        """vLLM's and llama.cpp's."""
        body = await read_body(request)
        fields: TokenizeRequest = checked(body, TokenizeRequest)
        self.reader.check_name(fields.model)
        pieces = bool(fields.with_pieces)
        ids = await _in_thread(lambda: self._ids_of(fields, body))
        texts = [self.model.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
        objects = [{"id": i, "piece": text} for i, text in zip(ids, texts)]
        answer: dict[str, Any] = {"tokens": objects if pieces else ids, "count": len(ids)}
        if fields.return_token_strs:
            answer["token_strs"] = texts
        return JSONResponse(answer | {"max_model_len": self._card()["max_model_len"]})

    def _ids_of(self, fields: TokenizeRequest, body: dict[str, Any]) -> list[int]:
        text = agreed(fields, "prompt", "content")
        if (text is None) == (fields.messages is None):
            raise ApiError("prompt: want either a text or messages", "prompt")
        try:
            if fields.messages is not None:
                options = fields.chat_template_kwargs or {}
                more = {"tools": fields.tools, "add_generation_prompt": fields.add_generation_prompt}
                template, tokenizer = self.model.chat_template, self.model.tokenizer
                prompt = template.prompt(tokenizer, fields.messages, options=options, **more)
                return [int(i) for i in prompt.ids]
            special = fields.parse_special is not False
            if agreed(fields, "add_special_tokens", "add_special") is False:
                return self.model.tokenizer.encode(text, special)
            return self.model.tokenizer.encode_prompt(text, special)
        except InputError as error:
            raise of_input(error, body, "prompt") from None

    async def detokenize(self, request: Request) -> Response:
        fields: DetokenizeRequest = checked(await read_body(request), DetokenizeRequest)
        self.reader.check_name(fields.model)
        if fields.tokens is None:
            raise ApiError("tokens: want a list of token ids, got none", "tokens")
        beyond = max(fields.tokens, default=0)
        if beyond >= self.model.config.vocab_size:
            raise ApiError(f"tokens: want ids below {self.model.config.vocab_size}, got {beyond}", "tokens")
        text = self.model.tokenizer.decode(fields.tokens)
        return JSONResponse({"prompt": text, "content": text})

    async def responses(self, request: Request) -> Response:
        return await self._answer(request, self.reader.response)

    # ---- a request to generations ----

    async def _answer(self, request: Request, reader: Callable[[dict[str, Any]], Asked]) -> Response:
        asked, job = await self._unless_closing(self._queued(request, reader))
        request.state.note = lambda: self._note(job)
        watch = asyncio.create_task(cancel_when_left(request, job))
        self._watches.add(watch)  # keep a reference, or the task may be collected
        watch.add_done_callback(self._watches.discard)
        answer = asked.kind(self.model, self.name, job.generations, asked.fields, asked.seed)
        if not asked.fields.stream:
            return await whole(job, answer)
        return StreamingResponse(
            stream(job, answer), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    def _note(self, job: Job) -> str:
        """At the end of an answer: of the log's line."""
        self.metrics.answered(job.generations)
        for reuse in job.reuse:
            if text := difference(reuse, self.model.tokenizer):
                log.info(text)
        return counts(job.generations)

    async def _queued(self, request: Request, reader: Callable[[dict[str, Any]], Asked]) -> tuple[Asked, Job]:
        """Read and check a request, and queue it."""
        body = await read_body(request)

        def prepare() -> tuple[Asked, list[Generation]]:
            try:
                asked = reader(body)
            except InputError as error:
                raise of_input(error, body, "prompt") from None
            return asked, self._generations(asked)

        asked, generations = await _in_thread(prepare)
        job = Job(generations)
        self.jobs.add(job)
        return asked, job

    async def _unless_closing(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Wait for some work, but not beyond the end of the server."""
        tasks = asyncio.ensure_future(work), asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise closing()
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()

    def _generations(self, asked: Asked) -> list[Generation]:
        n = asked.fields.n or 1
        if n * len(asked.prompts) > MOST_CHOICES:
            raise ApiError(f"n: want at most {MOST_CHOICES} choices of all prompts", "n")
        try:
            return [
                self.model.generate(prompt, stream=True, options=asked.options, seed=asked.seed + i)
                for prompt in asked.prompts
                for i in range(n)
            ]
        except InputError as error:
            raise of_input(error, type(asked.fields).model_fields, asked.prompt) from None
        except PyengineError as error:
            raise internal(error) from None


def _ends(tokenizer: Tokenizer) -> dict[str, str]:
    """The texts of the tokens that begin and end a text; "" where there is none."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.end_ids), None)}
    return {name: "" if token_id is None else tokenizer.decode([token_id]) for name, token_id in ids.items()}


async def _in_thread(function: Callable[[], Any]) -> Any:
    """The result of a function that takes its time.  Nothing waits for its thread when the program ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(method: str, value: Any) -> None:
        if not future.done():  # else nobody waits any more
            getattr(future, method)(value)

    def run() -> None:
        try:
            outcome = "set_result", function()
        except Exception as error:
            outcome = "set_exception", error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="pyengine-request", daemon=True).start()
    return await future
