"""One line per request, in the log `pyengine.server`.

A line has the method, path and status; the tokens of the prompt, how many of them were cached, and the rate
of computing the others; the tokens of the answer and their rate; how it ended; the seconds.  A second line
says where a prompt differs from the conversation that it goes on with: from there on it is computed again.
"""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..text.generate import Generation
from ..text.prefixes import Reuse
from ..text.thinking import OPEN
from ..text.tokenizer import Tokenizer
from .metrics import Metrics

log = logging.getLogger("pyengine.server")

QUIET = ("/health", "/metrics")  # asked again and again: logged as details


class RequestLog:
    """ASGI middleware: a line and a count for each request, when its answer has been sent.

    A route puts `note` into the request's state: a function that gives the text of the line's middle.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: list[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})
        started, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self._done(scope, status, time.perf_counter() - started)

    def _done(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        known = path if path in self.paths else "other"
        self.metrics.requests.labels(known, str(status)).inc()
        self.metrics.seconds.observe(seconds)
        note = scope["state"].get("note", lambda: "")()
        level = logging.DEBUG if path in QUIET else logging.INFO
        printable = "".join(c if c.isprintable() else "?" for c in path[:200])
        words = (f"{scope['method']} {printable}", str(status or "no answer"), note, f"{seconds:.2f} s")
        log.log(level, ", ".join(word for word in words if word))


def counts(generations: list[Generation]) -> str:
    """The middle of an answer's line."""
    prompt = sum(g.prompt_tokens for g in generations)
    cached = sum(g.cached_tokens for g in generations)
    tokens = sum(g.completion_tokens for g in generations)
    reasons = ", ".join(dict.fromkeys(g.finish_reason or "not ended" for g in generations))
    prompt_rate = _rate(prompt - cached, sum(g.prompt_seconds for g in generations))
    later = sum(max(g.completion_tokens - 1, 0) for g in generations)
    rate = _rate(later, sum(g.completion_seconds for g in generations))
    return f"prompt {prompt} tokens ({cached} cached){prompt_rate}, answer {tokens} tokens{rate}, {reasons}"


def _rate(tokens: int, seconds: float) -> str:
    return f" at {tokens / seconds:.1f}/s" if tokens > 0 and seconds > 0 else ""


def difference(reuse: Reuse, tokenizer: Tokenizer) -> str:
    """Where a prompt leaves an earlier sequence that did not end there; "" where it does not."""
    if not reuse.before or not reuse.shared:
        return ""
    before, now = (tokenizer.decode(ids) for ids in (reuse.before, reuse.now))
    why = ""
    if OPEN in before and OPEN not in now:
        why = ": the chat template leaves out the thinking of an earlier turn"
    where = f"at token {reuse.shared} from an earlier one, of which {reuse.cached} tokens are used"
    return f"prompt: it differs {where}: it has {now!r}, and the earlier one {before!r}{why}"
