"""What several commands share: the model, its arithmetic, the ids, the output file."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError


def new_command(commands, name, run, text):
    """run(options) -> exit code or None."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse names the type in its message


def add_model(parser):
    parser.add_argument("-m", "--model", required=True, metavar="MODEL")
    parser.add_argument("-t", "--threads", type=positive, metavar="N",
                        help="of the locked arithmetic (default: physical cores)")
    parser.add_argument("--pin", action="store_true", help="one processor a thread")


def add_arithmetic(parser):
    from ..model import ARITHMETICS

    parser.add_argument("--arithmetic", choices=ARITHMETICS, default="locked")


def add_ids_run(parser):
    add_model(parser)
    ids = parser.add_mutually_exclusive_group(required=True)
    ids.add_argument("--ids", metavar='"1 2 3"', help="token ids")
    ids.add_argument("--ids-file", metavar="F", help="token ids as text or .npy")
    add_arithmetic(parser)
    parser.add_argument("--chunk", type=positive, metavar="N",
                        help="prompt tokens computed at a time; changes no bit")
    parser.add_argument("-o", "--output", required=True, metavar="OUT")


def load_model(options):
    from .. import load

    return load(options.model, getattr(options, "arithmetic", "locked"), options.threads,
                pin=options.pin)


def read_ids_option(options):
    from ..ids import parse_ids, read_ids

    return parse_ids(options.ids, "--ids") if options.ids is not None else read_ids(options.ids_file)


def check_output(path) -> Path:
    """Known to be writable before the work begins."""
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{path}: want a file in a directory that exists")
    return path


def write_text(path, text: str) -> None:
    """Written whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
