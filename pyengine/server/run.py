"""The application on a socket, by uvicorn; Ctrl-C ends it at once."""

from __future__ import annotations

import logging
import socket

import uvicorn
from starlette.applications import Starlette

KEEP_ALIVE_SECONDS = (
    120  # that a connection without a request stays open: longer than proxies and clients keep it
)
GRACE_SECONDS = 1  # for answers to end, once they have been told to


def new_server(app: Starlette) -> Server:
    """A server for an application of `create_app`."""
    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )


class Server(uvicorn.Server):
    """Tells the clients that it ends, instead of waiting for their answers and then breaking them off."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.service.close()  # type: ignore[union-attr]
        # A client that does not read its error in time is cut off; nobody needs the traceback of that.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
