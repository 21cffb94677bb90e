"""What several commands share: the model, its arithmetic, the text or the ids, the output file."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
import warnings
from pathlib import Path

from ..errors import InputError, PyengineWarning
from .examples import EXAMPLES

WIDTH = 78  # of a command's description
MODEL = "a GGUF file (or the first of its splits), a checkpoint directory, or default: the embedded model"
STDIN = "-"  # the name of standard input, where a file is wanted


def new_command(commands, name, run, text):
    """run(options) -> exit code or None.  The first sentence of the text stands in the list of commands."""
    parser = commands.add_parser(
        name,
        help=text.partition(". ")[0].rstrip("."),
        description=textwrap.fill(text, WIDTH),
        epilog=_examples(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def _examples(name) -> str | None:
    return "examples:" + textwrap.indent(textwrap.dedent(EXAMPLES[name]), "  ") if name in EXAMPLES else None


# ---- values: text -> value, or an ArgumentTypeError that says what was wanted ----------------------


def integer(text: str, want="an integer") -> int:
    """ASCII digits, perhaps with a sign.  `int` alone takes blanks, underscores and other digits too."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"want {want}, got {text[:40]!r}")
    return int(text)


def _at_least(low: int, text: str, want: str) -> int:
    value = integer(text, want)
    if value < low:
        raise argparse.ArgumentTypeError(f"want {want}, got {text[:40]!r}")
    return value


def memory_size(text: str) -> int:
    """512M, 4G, 4.5GiB -> bytes; units are powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"want a size such as 512M or 4G, got {text[:40]!r}")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def positive(text: str) -> int:
    return _at_least(1, text, "an integer of at least 1")


def limit(text: str) -> int | None:
    """A number of tokens -> the number; -1 -> None, no limit."""
    value = _at_least(-1, text, "a number of tokens, or -1")
    return None if value == -1 else value


def lengths(text: str) -> list[int]:
    """Numbers of tokens between commas, as llama-bench takes them."""
    want = "a list of integers of at least 0, as 128,512"
    return [_at_least(0, word, want) for word in text.split(",")]


def positives(text: str) -> list[int]:
    return [_at_least(1, word, "a list of integers of at least 1, as 1,2") for word in text.split(",")]


# ---- options -----------------------------------------------------------------------------------


def add_model(parser):
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=MODEL)
    add_threads(parser)
    parser.add_argument("--pin", action="store_true", help="pin each thread to one processor")
    add_memory(parser)


def add_threads(parser, kind=positive, default=None):
    parser.add_argument(
        "-t",
        "--threads",
        type=kind,
        default=default,
        metavar="N",
        help="number of threads; it changes no bit (default: the physical cores)",
    )


def add_memory(parser):
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="memory for the weights, such as 16G; experts that do not fit are read from the file when they "
        "are chosen; it changes no bit (default: what is available, less the state; where not all fit, nine "
        "tenths of that)",
    )


def add_texts(parser):
    parser.add_argument(
        "-f",
        "--file",
        action="append",
        required=True,
        metavar="FILE",
        help="a text in UTF-8, all of which counts; -: standard input; may be given again",
    )


def add_window(parser, default):
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=positive,
        default=default,
        metavar="N",
        help=f"tokens of a window; each window starts from an empty state (default: {default})",
    )


def add_json(parser, what="the figures"):
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON (default: as text)")


def add_arithmetic(parser, choices=None):
    from ..load import ARITHMETICS

    parser.add_argument(
        "--arithmetic",
        choices=choices or ARITHMETICS,
        default="locked",
        help="locked: the engine; locked-kv16: the same with a float16 key-value cache; "
        "float64: the specification, slow (default: locked)",
    )


def add_chunk(parser):
    parser.add_argument(
        "--chunk",
        type=positive,
        metavar="N",
        help="prompt tokens computed at a time; changes no bit (default: the model's own choice)",
    )


def add_prompt(parser):
    """-p, -f, --ids or --ids-file, one of them, and --parse-special: see `read_prompt`."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="a text; -: standard input, as with -f")
    prompt.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="a text in UTF-8, without the newline at its end; -: standard input",
    )
    prompt.add_argument("--ids", metavar='"1 2 3"', help='token ids; commas and brackets too: "[1, 2, 3]"')
    prompt.add_argument(
        "--ids-file", metavar="F", help="token ids as text or .npy; -: standard input, as text"
    )
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help="text of the prompt that spells a special token is that token (default: it is plain text)",
    )


def add_ids_run(parser):
    add_model(parser)
    add_prompt(parser)
    add_arithmetic(parser)
    add_chunk(parser)
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the file to write")


# ---- from options to values ------------------------------------------------------------------------


def load_model(options, path=None):
    """path: instead of -m."""
    from .. import load

    warn_threads(options.threads)
    path = options.model if path is None else path
    context = getattr(options, "ctx_size", None)
    model = load(
        path,
        getattr(options, "arithmetic", "locked"),
        options.threads,
        pin=options.pin,
        chunk=getattr(options, "chunk", None),
        memory=getattr(options, "memory", None),
        context=context,
    )
    model.warn_of_context(context)
    return model


def warn_threads(threads: int | None) -> None:
    """Warn of more threads than processors: they wait for each other."""
    from ..core.processors import processors

    most = processors()
    if threads is not None and threads > most:
        _warn(f"-t: {threads} threads on {most} processor{'s' * (most > 1)} are slower than fewer")


def _warn(message) -> None:
    warnings.warn(message, PyengineWarning, stacklevel=3)


def read_prompt(options):
    """What `add_prompt` was given -> a text, or ids, int64 [T]."""
    from ..ids import parse_ids

    if options.ids is not None:
        return parse_ids(options.ids, "--ids")
    if options.ids_file is not None:
        return read_ids_file(options.ids_file)
    if options.prompt is not None and options.prompt != STDIN:
        return options.prompt
    text = read_text(options.file or STDIN)
    # As llama.cpp does: editors and `echo` add the newline at the end.
    return text.removesuffix("\n").removesuffix("\r")


def read_ids_option(options):
    """The same as ids: a text by the model's tokenizer."""
    prompt = read_prompt(options)
    if not isinstance(prompt, str):
        return prompt
    from ..text.tokenizer import Tokenizer

    return Tokenizer.open(options.model).encode(prompt, options.parse_special)


def read_ids_file(name):
    """A file of ids; "-" is standard input -> int64 [T]."""
    from ..ids import parse_ids, read_ids

    return parse_ids(read_text(STDIN), "standard input") if name == STDIN else read_ids(name)


def read_text(name) -> str:
    """A text in UTF-8; "-" is standard input.  InputError names the first byte that is not UTF-8."""
    where = "standard input" if name == STDIN else name
    data = _read_stdin() if name == STDIN else Path(name).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: want UTF-8, got byte {data[error.start]:#04x} at offset {error.start}"
        ) from None


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise InputError("standard input: want a text, got a closed one")
    return sys.stdin.buffer.read()


def check_output(path) -> Path:
    """InputError, before the work begins, for a path that cannot be written."""
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{path}: want a file in a directory that exists")
    return path
