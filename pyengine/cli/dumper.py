"""dumper: a file to copy, which writes traces from another program."""

from __future__ import annotations

from .options import check_output, new_command


def add_commands(commands):
    from ..oracle.dumpers import DUMPERS

    parser = new_command(
        commands,
        "dumper",
        _dumper,
        "Print a file to copy into a program that writes traces. It needs no other file of this package: c "
        "(also for C++) is one header, rust one module of std alone, torch needs PyTorch, and llama.cpp is a "
        "`cb_eval` that includes the file of c.",
    )
    parser.add_argument("language", choices=tuple(DUMPERS), metavar="LANGUAGE", help=", ".join(DUMPERS))
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: standard output)")


def _dumper(options):
    from ..files.whole import write_text
    from ..oracle.dumpers import dumper

    if options.output is None:
        print(dumper(options.language), end="")
    else:
        write_text(check_output(options.output), dumper(options.language))
