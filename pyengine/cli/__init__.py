"""The command line.  Everything that prints or exits is here; flags are llama.cpp's where it has
them.  Exit codes:

    0    done (verify: equal)
    1    verify, verify-files: different
    2    unusable input: one line on stderr, "pyengine: ..."
    130  ended by Ctrl-C
    141  the reader of the output has closed it
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import warnings

from .._version import __version__
from ..errors import InputError, PyengineError, PyengineWarning


def main(arguments=None) -> int:
    """Run one command; -> exit code.  Never a traceback for what a user can get wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PyengineWarning)
        warnings.showwarning = _show(warnings.showwarning)
        return _run(arguments)


def _run(arguments) -> int:
    try:
        _print_any_character()
        options = _parse(arguments)
        code = options.run(options) or 0
        _flush()
        return code
    except SystemExit as end:  # of --help and --version
        return _ended(end.code or 0)
    except PyengineError as error:
        return _fail(error)
    except BrokenPipeError:
        return _ended(128 + signal.SIGPIPE)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error)
    except MemoryError:
        return _fail("out of memory")
    except KeyboardInterrupt:
        return _ended(128 + signal.SIGINT)


# ---- output ------------------------------------------------------------------------------------


def _print_any_character() -> None:
    """A character that the terminal's encoding lacks is printed as an escape, and is not an error."""
    stream = sys.stdout
    strict = getattr(stream, "errors", None) == "strict"
    lossy = getattr(stream, "errors", None) == "surrogateescape" and "utf" not in stream.encoding.lower()
    if (strict or lossy) and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Flush here, where an error still gets an exit code."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _ended(code: int) -> int:
    """-> code.  Output that cannot be written is dropped: else Python's flush at the exit prints an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
    return code


def _fail(error) -> int:
    try:
        if sys.stderr is not None:
            print(f"pyengine: {' '.join(str(error).split())}", file=sys.stderr)
    except OSError:
        pass  # nobody reads it
    return _ended(2)


def _show(otherwise):
    """A warning of ours as one plain line, once; others as Python shows them."""
    shown = set()

    def show(message, category, *rest, **named):
        line = f"pyengine: warning: {' '.join(str(message).split())}"
        if not issubclass(category, PyengineWarning):
            otherwise(message, category, *rest, **named)
        elif line not in shown and sys.stderr is not None:
            print(line, file=sys.stderr)
            shown.add(line)

    return show


# ---- arguments ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def _parse(arguments):
    """-> the command's options.  InputError names the help of the command that was asked for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(arguments)
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


# The module of each command, in the order of the list that --help prints.
COMMANDS = {
    name: name.replace("-", "_")
    for name in (
        "info quantize verify-files merge quality tokenize generate chat serve logits trace dumper verify "
        "bisect reference lm-eval perplexity calibrate census probe labels vocabulary relabel bench demo"
    ).split()
} | {"relabel": "vocabulary"}


def _wanted(arguments) -> list[str]:
    """The modules that are needed: to import all of them takes longer than `info` itself."""
    first = arguments[0] if arguments else ""
    if first == "--version":
        return []
    return [COMMANDS[first]] if first in COMMANDS else list(dict.fromkeys(COMMANDS.values()))


def _parser(arguments=()) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pyengine",
        description="Reference inference for Qwen3.5-35B-A3B-class "
        "models. MODEL is a GGUF file (or the first of its splits) or a directory.",
        epilog="`pyengine COMMAND --help` shows the options of a command, and examples.",
    )
    parser.add_argument("--version", action="version", version=f"pyengine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name in _wanted(arguments):
        importlib.import_module(f".{name}", __name__).add_commands(commands)
    return parser
