"""OpenAI completions and chat completions over HTTP (README.md beside this file)."""

from typing import Any

from ..optional import require


def create_app(model: Any, name: str, **options: Any) -> Any:
    """An ASGI application that serves one model; the keywords are those of `app.create_app`.

    Errors: InputError without the extra `serve`.
    """
    for package in ("starlette", "pydantic"):
        require(package, extra="serve", what="serve")
    from . import app

    return app.create_app(model, name, **options)


__all__ = ["create_app"]
