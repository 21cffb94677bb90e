"""Numbers of a server for Prometheus, at /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..text.generate import Generation
from .jobs import JobQueue


class Metrics:
    """Counts of one server.  page(): Prometheus's text format."""

    def __init__(self, jobs: JobQueue) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"pyengine_{name}", meaning, labels, registry=registry)

        def gauge(name: str, meaning: str, value: Callable[[], float]) -> None:
            Gauge(f"pyengine_{name}", meaning, registry=registry).set_function(value)

        self.requests = counter("requests", "requests by path and status", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts")
        self.cached_tokens = counter("cached_tokens", "tokens of prompts that were not computed again")
        self.completion_tokens = counter("completion_tokens", "tokens of answers")
        self.seconds = Histogram("pyengine_request_seconds", "from a request to its end", registry=registry)
        self.first_token = Histogram(
            "pyengine_prompt_seconds", "from an answer's turn to its first token", registry=registry
        )
        gauge("requests_running", "requests that are computed", lambda: len(jobs.running))
        gauge("requests_waiting", "requests before their turn", lambda: jobs.waiting)
        gauge("prefix_bytes", "memory of sequences that have ended", lambda: jobs.prefixes.nbytes)

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def answered(self, generations: list[Generation]) -> None:
        for generation in generations:
            self.prompt_tokens.inc(generation.prompt_tokens)
            self.cached_tokens.inc(generation.cached_tokens)
            self.completion_tokens.inc(generation.completion_tokens)
            if generation.tokens:
                self.first_token.observe(generation.prompt_seconds)
