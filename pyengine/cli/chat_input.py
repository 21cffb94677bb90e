"""Messages for `chat` from lines that are typed, pasted or piped.

one line                    a message, or a command
a line that ends with \\    goes on in the next line
\"\"\" ... \"\"\"                 everything between them, over as many lines as it takes, is a message
a paste of several lines    a message
"""

from __future__ import annotations

import os
import select
import sys
from typing import NamedTuple

from ..errors import InputError

QUOTES = '"""'
PROMPT, GOES_ON = "> ", "  "
COMMANDS = "/think", "/nothink", "/clear", "/save", "/help", "/exit", "/quit", "/bye"
PASTE_PAUSE = 0.02  # seconds; too short for a hand to type a line


class Message(NamedTuple):
    """text; whether it may be a command, as a single line without quotes may."""

    text: str
    may_be_command: bool


def open_input():
    """-> Typed or Piped, with `read() -> Message`.  EOFError: there are no more."""
    if sys.stdin is None:
        raise InputError("standard input: want messages, got a closed one")
    return Typed() if sys.stdin.isatty() else Piped()


class Typed:
    """Messages of a terminal."""

    terminal = True

    def __init__(self):
        self._waiting: list[str] = []
        self._ended = False
        _edit_lines()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")

    def read(self) -> Message:
        """InputError: a message is not UTF-8."""
        return _read(self._next)

    def _next(self, prompt) -> str:
        """A line, or the lines of a paste."""
        if not self._waiting:
            self._waiting = _without_commands(self._lines(prompt))
        return self._waiting.pop(0)

    def _lines(self, prompt) -> list[str]:
        """A line, and those that come with it: a terminal that does not mark a paste sends its lines at once.

        Lines that were typed while the model answered are not such a paste.
        """
        if self._ended:
            raise EOFError
        typed_ahead = _input_waits(0)
        lines = [input(prompt)]
        while not (typed_ahead or self._ended) and _input_waits(PASTE_PAUSE):
            try:
                lines.append(input())
            except EOFError:
                self._ended = True
        return lines


def _edit_lines() -> None:
    """Line editing and history for `input`, where Python has them.

    GNU readline takes a paste as one line when the terminal marks its beginning and its end ("bracketed
    paste").  Python turns that off when it loads readline.
    """
    try:
        import readline
    except ImportError:
        return
    if "libedit" in (readline.__doc__ or ""):  # macOS: it has no such thing
        return
    readline.parse_and_bind(r'"\e[200~": bracketed-paste-begin')
    if os.environ.get("TERM", "dumb") != "dumb":
        readline.parse_and_bind("set enable-bracketed-paste on")


def _without_commands(lines) -> list[str]:
    """Lines -> texts: each command alone, and all lines between two commands together."""
    texts, joined = [], []
    for line in lines:
        if is_command(line):
            texts += ["\n".join(joined)] * bool(joined) + [line]
            joined = []
        else:
            joined.append(line)
    return texts + ["\n".join(joined)] * bool(joined)


def is_command(line) -> bool:
    return bool(line.strip()) and line.split(maxsplit=1)[0] in COMMANDS and "\n" not in line


def _input_waits(seconds: float) -> bool:
    return bool(select.select([sys.stdin], [], [], seconds)[0])


class Piped:
    """Messages of a file or a pipe, in UTF-8.  line: the number of the last message's first line."""

    terminal = False

    def __init__(self):
        self.line = self._lines = 0
        self._stream = getattr(sys.stdin, "buffer", sys.stdin)

    def read(self) -> Message:
        """InputError: a message is not UTF-8."""
        self.line = self._lines + 1
        return _read(self._next)

    def _next(self, prompt) -> str:
        line = self._stream.readline()
        if not line:
            raise EOFError
        self._lines += 1
        text = line.decode("utf-8", "surrogateescape") if isinstance(line, bytes) else line
        return text.removesuffix("\n").removesuffix("\r")


def _read(next_line) -> Message:
    """next_line(prompt) -> a line without its end.  Input that ends inside a message ends the message."""
    text = next_line(PROMPT).strip("\n")
    several = "\n" in text
    quoted = text.lstrip().startswith(QUOTES) and (_is_quoted(text) or not several)
    if quoted:
        text = _quoted(next_line, text.lstrip().removeprefix(QUOTES)).strip("\n")
    elif text.endswith("\\") and not several:
        text, several = _continued(next_line, text), True
    return Message(_checked(text), not (quoted or several))


def _is_quoted(text) -> bool:
    text = text.strip()
    return len(text) >= 2 * len(QUOTES) and text.startswith(QUOTES) and text.endswith(QUOTES)


def _quoted(next_line, text) -> str:
    while not text.rstrip().endswith(QUOTES):
        try:
            text += "\n" + next_line(GOES_ON)
        except EOFError:
            return text
    return text.rstrip().removesuffix(QUOTES)


def _continued(next_line, text) -> str:
    while text.endswith("\\"):
        text = text[:-1]
        try:
            text += "\n" + next_line(GOES_ON)
        except EOFError:
            break
    return text


def _checked(text) -> str:
    """surrogateescape has put half a surrogate pair in place of each byte that is not UTF-8."""
    for character in text:
        if 0xDC80 <= ord(character) <= 0xDCFF:
            raise InputError(f"message: want UTF-8, got byte {ord(character) - 0xDC00:#04x}")
    return text
