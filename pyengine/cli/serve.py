"""The OpenAI API over HTTP."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

from ..errors import InputError
from ..optional import require
from .generation import add_generation, add_reasoning, sampling_options
from .options import add_arithmetic, add_model, load_model, memory_size, new_command, positive


def add_commands(commands):
    from ..text.prefixes import CACHE_MEMORY

    parser = new_command(
        commands,
        "serve",
        _serve,
        "Serve the OpenAI API: completions and chat completions, streamed or whole. Requests are answered "
        "in order of arrival, --parallel of them together. A request that names no seed starts from seed "
        "1729, or from -s: two equal requests get equal answers. Seed -1 is a fresh one each time.",
    )
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="default: 127.0.0.1, this machine alone"
    )
    parser.add_argument(
        "--port", type=int, default=8080, metavar="PORT", help="default: 8080; 0: any that is free"
    )
    parser.add_argument("-a", "--alias", metavar="NAME", help="the model's name (default: its file's)")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin ask from a browser: https://example.com, or * for any page; "
        "may be given again (default: none)",
    )
    parser.add_argument(
        "-np",
        "--parallel",
        type=positive,
        default=1,
        metavar="N",
        help="answers that are computed together, by one reading of the weights; each has the bits that it "
        "would have alone (default: 1)",
    )
    parser.add_argument(
        "--cache-memory",
        type=memory_size,
        default=CACHE_MEMORY,
        metavar="SIZE",
        help="memory for prompts and answers that have ended, whose beginnings later prompts share "
        "(512M, 4G; default: 2G)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where they go that outgrow this memory, and when the server ends; DIR holds as much as "
        "--cache-memory says (default: nowhere)",
    )
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a request must have this key, as OpenAI's clients send it; may be given again. Other users of "
        "the machine can read a command line; they cannot read PYENGINE_API_KEY in the environment, nor "
        "--api-key-file (default: none)",
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="the same, one key per line (default: none)"
    )
    parser.add_argument("--no-page", action="store_true", help="leave out the page to chat in")
    parser.add_argument("--verbose", action="store_true", help="log more: health checks, and parameters")
    add_arithmetic(parser)
    add_reasoning(parser)
    add_generation(parser, predict=None)


def _serve(options):
    for package in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
        require(package, extra="serve", what="serve", package=package.replace("_", "-"))
    if options.reverse_prompt:
        raise InputError("-r: not supported by serve: send stop in the requests")
    from ..server.app import check_origin, create_app
    from ..server.guard import hosts_of
    from ..server.run import new_server

    keys = _keys(options)
    _log(options.verbose)
    origins = [check_origin(origin, "--cors-origin") for origin in options.cors_origin]
    name = options.alias or Path(options.model).resolve().stem
    with _listen(options.host, options.port) as listener:
        model = load_model(options)
        # Faults come before the first request.
        model.tokenizer, model.new_sampler(**sampling_options(options))
        app = create_app(
            model,
            name,
            context=options.ctx_size,
            max_tokens=options.predict,
            reasoning=options.reasoning,
            reasoning_budget=options.reasoning_budget,
            sampling=sampling_options(options),
            cors_origins=origins,
            parallel=options.parallel,
            cache_memory=options.cache_memory,
            cache_directory=options.cache_dir,
            api_keys=keys,
            hosts=hosts_of(options.host),
            page=not options.no_page,
        )
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"{name}: http://{host}:{port}/v1 (Ctrl-C ends it)", flush=True)
        new_server(app).run(sockets=[listener])


def _keys(options) -> list[str]:
    keys = [*options.api_key, os.environ.get("PYENGINE_API_KEY", "")]
    if options.api_key_file:
        try:
            keys += options.api_key_file.read_text().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {options.api_key_file}: {error}") from None
        if not any(map(str.strip, keys)):
            raise InputError(f"--api-key-file {options.api_key_file}: want a key, got none")
    return [key.strip() for key in keys if key.strip()]


class _Stderr(logging.StreamHandler):
    """To what sys.stderr is at the moment."""

    stream = property(lambda self: sys.stderr, lambda self, stream: None)


def _log(verbose: bool) -> None:
    """The server's lines go to stderr."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("pyengine.server")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


def _listen(host, port) -> socket.socket:
    """Listen before the model is loaded: loading takes longer than finding that a port is taken."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: {reason}") from None
