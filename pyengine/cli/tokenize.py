"""Text to token ids, and back."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import InputError
from .options import new_command


def add_commands(commands):
    parser = new_command(commands, "tokenize", _tokenize, "Text to token ids, or --decode: ids to "
                         "text. The ids are what --ids and --ids-file of other commands read.")
    parser.add_argument("-m", "--model", required=True, metavar="MODEL")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", metavar="TEXT")
    source.add_argument("-f", "--file", metavar="F", help="a text, UTF-8; -: standard input")
    source.add_argument("--decode", metavar='"1 2 3"', help="token ids")
    parser.add_argument("--parse-special", action="store_true",
                        help="text that spells a special token (<|im_start|>) is that token")
    parser.add_argument("--pieces", action="store_true", help="each id on a line, with its text")
    parser.add_argument("--count", action="store_true", help="only how many")


def _tokenize(options):
    from ..ids import parse_ids
    from ..tokenizer import Tokenizer

    given = parse_ids(options.decode, "--decode") if options.decode is not None else _text(options)
    tokenizer = Tokenizer.open(options.model)
    ids = given if options.decode is not None else tokenizer.encode(given, options.parse_special)
    if options.count:
        print(len(ids))
    elif options.pieces:
        for i in ids:
            print(f"{i:>7}  {tokenizer.token_bytes(int(i))!r}"[:2000])
    elif options.decode is not None:
        print(tokenizer.decode(ids))
    else:
        print(*ids)


def _text(options) -> str:
    if options.prompt is not None:
        return options.prompt
    try:
        data = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{options.file}: want UTF-8, got byte {data[error.start]:#04x} at offset "
                         f"{error.start}") from None
