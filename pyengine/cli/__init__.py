"""The command line.  Everything that prints or exits is here; flags are llama.cpp's where it has
them.  Exit codes: 0 done (verify: equal), 1 verify: different, 2 unusable input, one line."""

from __future__ import annotations

import argparse
import os
import sys

from ..errors import InputError, PyengineError


def main(arguments=None) -> int:
    """Run one command; -> exit code.  Never a traceback for what a user can get wrong."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options) or 0
    except PyengineError as error:
        return _fail(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except MemoryError:
        return _fail("out of memory")
    except KeyboardInterrupt:
        return 130


def _fail(error) -> int:
    print(f"pyengine: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from .. import __version__
    from . import (bench, chat, demo, generate, info, perplexity, quality, quantize, serve, tokenize,
                   traces)

    parser = _Parser(prog="pyengine", description="Reference inference for Qwen3.5-35B-A3B-class "
                     "models. MODEL is a GGUF file (or the first of its splits) or a directory.")
    parser.add_argument("--version", action="version", version=f"pyengine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     parser_class=_Parser)
    for room in (info, quantize, quality, tokenize, generate, chat, serve, traces, perplexity, bench,
                 demo):
        room.add_commands(commands)
    return parser
