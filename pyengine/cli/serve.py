"""The OpenAI API over HTTP."""

from __future__ import annotations

import socket
from pathlib import Path

from ..errors import InputError
from .options import (
    add_arithmetic,
    add_generation,
    add_model,
    add_reasoning,
    load_model,
    new_command,
    sampling_options,
)


def add_commands(commands):
    parser = new_command(commands, "serve", _serve, "Serve the OpenAI API: completions and chat "
                         "completions, streamed or whole. One sequence at a time, in order of arrival.")
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST",
                        help="default: 127.0.0.1, this machine alone; nobody is asked for a password")
    parser.add_argument("--port", type=int, default=8080, metavar="PORT",
                        help="default: 8080; 0: any that is free")
    parser.add_argument("-a", "--alias", metavar="NAME", help="the model's name (default: its file's)")
    add_arithmetic(parser)
    add_reasoning(parser)
    add_generation(parser, predict=None)


def _serve(options):
    from ..server import create_app

    try:
        import uvicorn
    except ImportError:
        raise InputError("serve: want the package's extra: pip install 'pyengine[serve]'") from None
    if options.reverse_prompt:
        raise InputError("-r: want it in the requests, as stop")
    name = options.alias or Path(options.model).resolve().stem
    listener = _listen(options.host, options.port)
    model = load_model(options)
    # Faults come before the first request.
    model.tokenizer, model.new_sampler(**sampling_options(options))
    app = create_app(model, name, context=options.ctx_size, max_tokens=options.predict,
                     reasoning=options.reasoning, reasoning_budget=options.reasoning_budget,
                     sampling=sampling_options(options))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"{name}: http://{host}:{port}/v1 (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listener])


def _listen(host, port) -> socket.socket:
    """Before the model is loaded, which takes longer than to see that a port is taken."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: {reason}") from None
