"""OpenAI's completions and chat completions over HTTP: `pyengine serve`.

    app = create_app(model, "my-model")          # an ASGI application
    uvicorn.run(app, host="127.0.0.1", port=8080)

POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /v1/models/NAME, GET /health.

One sequence is computed at a time.  Requests wait in the order in which they came, and are dropped
when their client leaves, before their turn or in the middle of it.  What a prompt shares with the one
before it is not computed again (`Session`); no bit depends on that, nor on who else is served.

Where this differs from OpenAI: sampling that a request leaves open is the checkpoint's; the seed is
1729 where none is given, and choice i of n has seed + i; thinking comes as `reasoning_content`, and
counts; tool calls come as the text that the model writes.  Beside OpenAI's parameters there are
top_k, min_p, repeat_penalty, ignore_eos, parse_special (completions), chat_template_kwargs and
reasoning_budget (chat).  What is not known, or not done here, is an error and never ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

from .errors import InputError, PyengineError
from .generate import Generation, TextModel, Token

LARGEST_BODY = 1 << 25  # bytes of a request
MOST_WAITING = 1024  # requests
MOST_CHOICES = 128  # of one request: prompts times n
DEFAULT_TOKENS = 16  # of a completion: OpenAI's


def create_app(model: TextModel, name: str, *, context: int | None = None,
               max_tokens: int | None = None, reasoning: str = "auto",
               reasoning_budget: int | None = None, sampling: dict | None = None):
    """A Starlette application that serves one model.

    name        what /v1/models calls it
    context     tokens of prompt and answer at most; None: what the model was made for
    max_tokens  of a chat's answer, and reasoning, reasoning_budget, sampling (keywords of `Sampler`):
                for requests that leave it open
    Errors: InputError without the extra `serve`.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route
    except ImportError:
        raise InputError("serve: want the package's extra: pip install 'pyengine[serve]'") from None
    defaults = dict(context=context, max_tokens=max_tokens, reasoning=reasoning,
                    reasoning_budget=reasoning_budget, sampling=sampling or {})
    service = Service(model, name, defaults)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        service.line.start()
        yield
        service.line.stop()

    app = Starlette(lifespan=lifespan, routes=[
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model_card),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
    ], exception_handlers={Refusal: _refused, HTTPException: _http_error, Exception: _internal_error})
    app.state.service = service
    return app


# ---- errors, in OpenAI's form ------------------------------------------------------------------


class Refusal(Exception):
    """An answer that is an error: HTTP status, message, the parameter at fault, OpenAI's code."""

    def __init__(self, message, param=None, status=400, code=None, kind="invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": str(message), "type": kind, "param": param, "code": code}}


def _json(body, status=200):
    from starlette.responses import JSONResponse

    return JSONResponse(body, status)


async def _refused(request, error: Refusal):
    return _json(error.body, error.status)


async def _http_error(request, error):
    refusal = Refusal(f"{request.method} {request.url.path}: {error.detail}")
    return _json(refusal.body, error.status_code)


async def _internal_error(request, error):
    return _json(_internal(error).body, 500)


def _internal(error) -> Refusal:
    return Refusal(f"{type(error).__name__}: {error}", status=500, kind="server_error")


def _of_input(error: InputError) -> Refusal:
    """The engine's own errors begin with the argument at fault."""
    param = str(error).partition(":")[0].partition("[")[0]
    return Refusal(error, {"stop_strings": "stop"}.get(param, param))


# ---- the line: one at a time, first come first served ------------------------------------------


class Job:
    """Generations to run one after the other, and what comes of them, for one client.

    events   (index, Token), (index, None) at each one's end, an error, and None at the end of all
    """

    def __init__(self, generations: list[Generation]):
        self.generations, self.cancelled = generations, False
        self.events: asyncio.Queue = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def cancel(self) -> None:
        self.cancelled = True
        for generation in self.generations:
            generation.cancel()

    def run(self) -> None:
        """In the line's thread; one that is cancelled ends at once."""
        try:
            for index, generation in enumerate(self.generations):
                if self.cancelled:
                    break
                for token in generation:
                    self._put((index, token))
                self._put((index, None))
        except Exception as error:
            self._put(error)
        finally:
            self._put(None)

    def _put(self, event):
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Line:
    """A thread that runs jobs in the order in which they came.

    waiting   jobs before their turn;  running  the one whose turn it is, or None
    """

    def __init__(self):
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = None
        self.running: Job | None = None

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="pyengine-line", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel everything and end."""
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                job.cancel()
                job.run()
        self._jobs.put(None)
        if self.running:
            self.running.cancel()
        self._thread.join()

    def add(self, job: Job) -> None:
        if self.waiting >= MOST_WAITING:
            raise Refusal(f"{MOST_WAITING} requests are waiting already", status=503,
                          code="overloaded", kind="server_error")
        self._jobs.put(job)

    def _serve(self):
        while (job := self._jobs.get()) is not None:
            self.running = job
            job.run()
            self.running = None


# ---- the service -------------------------------------------------------------------------------


class Service:
    """The endpoints.  line: what is being computed and what waits."""

    def __init__(self, model: TextModel, name: str, defaults: dict):
        self.model, self.name, self.defaults = model, name, defaults
        self.line = Line()
        self.session = model.new_session()
        self.created = int(time.time())
        self._watches = set()

    async def health(self, request):
        return _json({"status": "ok", "model": self.name, "waiting": self.line.waiting,
                      "running": self.line.running is not None})

    async def models(self, request):
        return _json({"object": "list", "data": [self._card()]})

    async def model_card(self, request):
        self._check_name(request.path_params["name"])
        return _json(self._card())

    def _card(self):
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "pyengine"}

    def _check_name(self, name):
        if name not in (None, self.name):
            raise Refusal(f"model: want {self.name!r}, got {name!r}", "model", 404, "model_not_found")

    async def completions(self, request):
        fields = _checked(await _body(request), COMPLETION)
        if fields.get("prompt") is None:
            raise Refusal("prompt: want text or token ids, got none", "prompt")
        prompt = fields["prompt"]
        prompts = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
        options = self._options(fields) | dict(
            max_tokens=fields.get("max_tokens", DEFAULT_TOKENS), logprobs=fields.get("logprobs", 0),
            special=fields.get("parse_special", False))
        return await self._answer(request, fields, prompts, options, Completion)

    async def chat_completions(self, request):
        fields = _checked(await _body(request), CHAT)
        if fields.get("messages") is None:
            raise Refusal("messages: want a list of messages, got none", "messages")
        messages = [{**message, "role": "system"} if message.get("role") == "developer" else message
                    for message in fields["messages"]]  # OpenAI's newer name for it
        if "top_logprobs" in fields and not fields.get("logprobs"):
            raise Refusal("top_logprobs: want logprobs to be true with it", "top_logprobs")
        limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
        reasoning = self.defaults["reasoning"] if "reasoning_effort" not in fields else (
            "off" if fields["reasoning_effort"] == "none" else "on")
        options = self._options(fields) | dict(
            max_tokens=self.defaults["max_tokens"] if limit is None else limit,
            logprobs=fields.get("top_logprobs", 0), reasoning=reasoning,
            reasoning_budget=fields.get("reasoning_budget", self.defaults["reasoning_budget"]),
            tools=None if fields.get("tool_choice") == "none" else fields.get("tools"),
            template_options=fields.get("chat_template_kwargs"))
        return await self._answer(request, fields, [messages], options, ChatCompletion)

    def _options(self, fields) -> dict:
        """Keywords of `generate` that both kinds have."""
        self._check_name(fields.get("model"))
        sampling = {**self.defaults["sampling"],
                    **{name: fields[field] for field, name in _SAMPLING.items() if field in fields}}
        if "logit_bias" in fields:
            sampling["logit_bias"] = {int(i): float(bias) for i, bias in fields["logit_bias"].items()}
        return dict(stop=fields.get("stop", ()), ignore_end=fields.get("ignore_eos", False),
                    context=self.defaults["context"], **sampling)

    async def _answer(self, request, fields, prompts, options, kind):
        n = fields.get("n", 1)
        if n * len(prompts) > MOST_CHOICES:
            raise Refusal(f"n: want at most {MOST_CHOICES} choices of all prompts", "n")
        job = Job(await asyncio.to_thread(self._generations, prompts, n, options))
        self.line.add(job)
        watch = asyncio.create_task(_cancel_when_left(request, job))
        self._watches.add(watch)  # the loop alone would not keep it
        watch.add_done_callback(self._watches.discard)
        answer = kind(self, job.generations, fields)
        if not fields.get("stream"):
            return await _whole(job, answer)
        from starlette.responses import StreamingResponse

        return StreamingResponse(_stream(job, answer), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-cache"})

    def _generations(self, prompts, n, options) -> list[Generation]:
        seed = options.pop("seed", None)
        seed = 1729 if seed is None else seed
        try:
            return [self.model.generate(prompt, stream=True, session=self.session, seed=seed + i,
                                        **options)
                    for prompt in prompts for i in range(n)]
        except InputError as error:
            raise _of_input(error) from None
        except PyengineError as error:
            raise _internal(error) from None


async def _cancel_when_left(request, job):
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()  # of a job that is done: nothing


async def _events(job):
    """A job's events; it is cancelled when they are no longer wanted."""
    try:
        while (event := await job.events.get()) is not None:
            yield event
    finally:
        job.cancel()


async def _whole(job, answer):
    async for event in _events(job):
        if isinstance(event, Exception):
            raise _internal(event)
        if event[1] is not None:
            answer.take(*event)
    return _json(answer.whole())


async def _stream(job, answer):
    """Server-sent events."""
    try:
        async for event in _events(job):
            if isinstance(event, Exception):
                raise event
            index, token = event
            for chunk in answer.end(index) if token is None else answer.delta(*event):
                yield _event(chunk)
        if answer.include_usage:
            yield _event(answer.chunk([], usage=answer.usage()))
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is out already
        yield _event(_internal(error).body)


def _event(body) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


# ---- answers -----------------------------------------------------------------------------------


class Completion:
    """The bodies of an answer, as a whole or in chunks."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, service: Service, generations: list[Generation], fields: dict):
        self.generations, self.tokenizer = generations, service.model.tokenizer
        self.n = fields.get("n", 1)
        asked = fields.get("logprobs")  # a number of a completion, 0 too; true or false of a chat
        self.wants_logprobs = asked is not None and asked is not False
        streams = fields.get("stream_options") or {}
        self.include_usage = bool(streams.get("include_usage"))
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()),
                     "model": service.name}
        self.records = [[] for _ in generations]  # logprobs, a token each
        self.lengths = [0] * len(generations)  # characters of text so far

    def take(self, index, token: Token) -> None:
        """Note a token for the logprobs."""
        if self.wants_logprobs:
            self.records[index].append(self.record(index, token))
        self.lengths[index] += len(token.text)

    def whole(self) -> dict:
        return {**self.head, "object": self.object, "usage": self.usage(),
                "choices": [self.choice(i) for i in range(len(self.generations))]}

    def chunk(self, choices, **more) -> dict:
        usage = {"usage": None} if self.include_usage else {}
        return {**self.head, "object": self.chunk_object, "choices": choices, **usage, **more}

    def usage(self) -> dict:
        """Counts of tokens; a prompt counts once, however many choices were asked for."""
        prompt = sum(g.prompt_tokens for g in self.generations[::self.n])
        completion = sum(g.completion_tokens for g in self.generations)
        return {
            "prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(g.cached_tokens for g in self.generations[::self.n])},
            "completion_tokens_details": {
                "reasoning_tokens": sum(g.thinking_tokens for g in self.generations)}}

    # ---- of completions ----

    def choice(self, index) -> dict:
        generation = self.generations[index]
        return self._choice(index, generation.text, self.records[index], generation.finish_reason)

    def delta(self, index, token):
        self.take(index, token)
        record = self.records[index][-1:]
        if token.text or record:
            yield self.chunk([self._choice(index, token.text, record, None)])

    def end(self, index):
        yield self.chunk([self._choice(index, "", [], self.generations[index].finish_reason)])

    def _choice(self, index, text, records, finish_reason):
        logprobs = None
        if self.wants_logprobs:
            logprobs = {key: [record[key] for record in records] for key in
                        ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def record(self, index, token) -> dict:
        return {"tokens": self.spelled(token.id), "token_logprobs": token.logprob,
                "top_logprobs": {self.spelled(i): logprob for i, logprob in token.top},
                "text_offset": self.lengths[index]}

    def spelled(self, token_id) -> str:
        """A token's text; as OpenAI has it, bytes:\\xe2\\x82 for what is no whole character."""
        raw = self.tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChatCompletion(Completion):
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service, generations, fields):
        super().__init__(service, generations, fields)
        self.greeted = set()  # choices whose role has been said

    def choice(self, index) -> dict:
        generation = self.generations[index]
        message = {"role": "assistant", "content": generation.text, "refusal": None}
        if generation.thinking:
            message["reasoning_content"] = generation.thinking
        return {"index": index, "message": message, "logprobs": self._logprobs(self.records[index]),
                "finish_reason": generation.finish_reason}

    def delta(self, index, token):
        self.take(index, token)
        yield from self._greet(index)
        texts = {"content": token.text, "reasoning_content": token.thinking}
        delta = {key: text for key, text in texts.items() if text}
        record = self.records[index][-1:]
        if delta or record:
            yield self._delta(index, delta, record)

    def end(self, index):
        yield from self._greet(index)
        yield self._delta(index, {}, [], self.generations[index].finish_reason)

    def _greet(self, index):
        if index not in self.greeted:
            self.greeted.add(index)
            yield self._delta(index, {"role": "assistant", "content": ""}, [])

    def _delta(self, index, delta, records, finish_reason=None):
        return self.chunk([{"index": index, "delta": delta, "finish_reason": finish_reason,
                            "logprobs": self._logprobs(records) if records else None}])

    def _logprobs(self, records):
        return {"content": records, "refusal": None} if self.wants_logprobs else None

    def record(self, index, token) -> dict:
        return self._entry(token.id, token.logprob) | {
            "top_logprobs": [self._entry(*pair) for pair in token.top]}

    def _entry(self, token_id, logprob):
        raw = self.tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


# ---- requests ----------------------------------------------------------------------------------


async def _body(request) -> dict:
    """The JSON object of a request."""
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > LARGEST_BODY:
            raise Refusal(f"body: want at most {LARGEST_BODY} bytes", status=413)
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"body: want JSON, got {error}") from None
    if not isinstance(body, dict):
        raise Refusal(f"body: want a JSON object, got {type(body).__name__}")
    return body


def _checked(body: dict, parameters: dict[str, Parameter]) -> dict:
    """The fields that are given; null is not."""
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name not in parameters:
            raise Refusal(f"{name}: this parameter is not known here", name, code="unknown_parameter")
        if not parameters[name].accepts(value):
            got = json.dumps(value)
            raise Refusal(f"{name}: want {parameters[name].want}, got {got[:100]}", name)
    return fields


class Parameter(NamedTuple):
    accepts: Callable[[object], bool]
    want: str


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ids(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_integer, value))


def _is_prompt(value) -> bool:
    return isinstance(value, str) or _is_ids(value) or (
        isinstance(value, list) and bool(value)
        and (all(isinstance(one, str) for one in value) or all(map(_is_ids, value))))


def _is_biases(value) -> bool:
    return isinstance(value, dict) and all(
        i.isdecimal() and i.isascii() and _is_number(bias) and -100 <= bias <= 100
        for i, bias in value.items())


def _is_stop(value) -> bool:
    return isinstance(value, str) or isinstance(value, list) and all(isinstance(s, str) for s in value)


def _integer(low, high=None) -> Parameter:
    span = f"from {low} to {high}" if high is not None else f"of at least {low}"
    return Parameter(lambda v: _is_integer(v) and low <= v and (high is None or v <= high),
                     f"an integer {span}")


def _number(low, high) -> Parameter:
    return Parameter(lambda v: _is_number(v) and low <= v <= high, f"a number from {low} to {high}")


def _objects(what) -> Parameter:
    return Parameter(lambda v: isinstance(v, list) and bool(v) and all(isinstance(x, dict) for x in v),
                     f"a list of {what}")


def _only(*values) -> Parameter:
    """What OpenAI has more of, and is not done here."""
    return Parameter(lambda v: any(v == one and type(v) is type(one) for one in values),
                     " or ".join(map(json.dumps, values)) + ": nothing else is done here")


_TEXT = Parameter(lambda v: isinstance(v, str), "text")
_FLAG = Parameter(lambda v: isinstance(v, bool), "true or false")
_OBJECT = Parameter(lambda v: isinstance(v, dict), "an object")

# Field: keyword of `Sampler`.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
             "seed": "seed", "repeat_penalty": "repetition_penalty",
             "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty"}

BOTH = {
    "model": _TEXT,
    "user": _TEXT,  # OpenAI's for its own records
    "n": _integer(1, MOST_CHOICES),
    "max_tokens": _integer(0),
    "seed": _integer(0),
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _integer(0),
    "min_p": _number(0, 1),
    "repeat_penalty": _number(0.01, 100),
    "presence_penalty": _number(-100, 100),
    "frequency_penalty": _number(-100, 100),
    "logit_bias": Parameter(_is_biases, "an object of token ids with numbers from -100 to 100"),
    "stop": Parameter(_is_stop, "text or a list of texts"),
    "ignore_eos": _FLAG,
    "stream": _FLAG,
    "stream_options": Parameter(
        lambda v: isinstance(v, dict) and set(v) <= {"include_usage"}
        and isinstance(v.get("include_usage", False), bool), '{"include_usage": true or false}'),
}

COMPLETION = BOTH | {
    "prompt": Parameter(_is_prompt, "text, token ids, or a list of one of them"),
    "logprobs": _integer(0, 100),
    "parse_special": _FLAG,
    "best_of": _only(1),
    "echo": _only(False),
    "suffix": _only(""),
}

CHAT = BOTH | {
    "messages": _objects("messages"),
    "max_completion_tokens": _integer(0),
    "logprobs": _FLAG,
    "top_logprobs": _integer(0, 100),
    "tools": _objects("tools"),
    "tool_choice": _only("auto", "none"),
    "parallel_tool_calls": _FLAG,  # the model does as it likes
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
    "store": _only(False),
    "reasoning_effort": Parameter(lambda v: v in ("none", "minimal", "low", "medium", "high", "xhigh"),
                                  '"none" for no thinking, or "minimal" to "xhigh", which are all one'),
    "chat_template_kwargs": _OBJECT,
    "reasoning_budget": _integer(0),
}
