"""A server that runs in a thread, and what asks it without a client library."""

import contextlib
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request


@contextlib.contextmanager
def serving(app, **settings):
    """-> the address of an application that is being served, as `pyengine serve` does it."""
    from pyengine.server.run import new_server  # needs the extra serve

    running = new_server(app)
    for name, value in settings.items():
        setattr(running.config, name, value)
    running.install_signal_handlers = lambda: None
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    app.state.tasks = running.server_state.tasks  # requests that are being answered
    app.state.server = running
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def ask(address, path, body=None, headers=None):
    """-> (status, parsed JSON).  body: bytes as they are, else JSON."""
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(address + path, data, headers or {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def stream(address, path, body):
    """-> (the chunks of a stream, its comments)."""
    data = json.dumps(body | {"stream": True}).encode()
    with urllib.request.urlopen(urllib.request.Request(address + path, data), timeout=30) as answer:
        lines = [line for line in answer.read().decode().split("\n\n") if line]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    chunks = [json.loads(line) for line in data if line != "[DONE]"]
    return chunks, [line for line in lines if line.startswith(":")]


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def connect(address):
    host, port = re.fullmatch(r"http://(.*):(\d+)", address).groups()
    return socket.create_connection((host, int(port)), timeout=30)


def send(address, body, path="/v1/completions"):
    """A request whose answer nobody reads yet -> its connection."""
    data = json.dumps(body).encode()
    connection = connect(address)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection
