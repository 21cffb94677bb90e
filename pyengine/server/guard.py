"""Who may ask: the key of a request, the host that it names, and the page that it comes from."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError

OPEN = ("/", "/health", "/version")  # need no key: they tell nothing, and start nothing


class Guard:
    """ASGI middleware that refuses a request, in OpenAI's form, before anything is read of it.

    keys     one of them must be sent, as OpenAI's clients do (`Authorization: Bearer KEY`); none: no key
    hosts    names that a request may call this server by.  A page of another name that leads to a loopback
             address (DNS rebinding) is thus refused.  None: any
    origins  of pages of other servers that may ask, beside those of this server; "*": any.  A browser sends
             the origin with every request that could start work
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str] = (),
        hosts: Iterable[str] | None = None,
        origins: Iterable[str] = (),
    ):
        self.app, self.keys = app, [key.encode() for key in keys]
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["path"], Headers(scope=scope))
            except ApiError as error:
                headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
                await JSONResponse(error.body, error.status, headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts and not _is_loopback(_name(host)):
            raise ApiError(f"Host: want a name of this server, got {host!r}", status=403, code="host_refused")
        if method == "OPTIONS":  # a browser asks whether it may ask: it sends no key
            return
        self._check_origin(host, headers)
        if self.keys and path not in OPEN and not self._has_key(headers.get("authorization", "")):
            raise ApiError(
                "Authorization: want Bearer and a key of this server", status=401, code="invalid_api_key"
            )

    def _check_origin(self, host: str, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or "*" in self.origins or origin.lower() in self.origins:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(
                f"Origin: want a page of this server, or an origin of --cors-origin, got {origin!r}",
                status=403,
                code="origin_refused",
            )

    def _has_key(self, authorization: str) -> bool:
        kind, _, key = authorization.partition(" ")
        # Every key is compared, in constant time.
        equal = [hmac.compare_digest(key.strip().encode(), known) for known in self.keys]
        return kind.lower() == "bearer" and any(equal)


def _name(host: str) -> str:
    """Without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def hosts_of(host: str) -> list[str] | None:
    """The names to accept of a server that listens there; None: any, where other machines can ask."""
    return [host.lower()] if _is_loopback(host) else None
