"""tokenize: text to token ids, and back."""

from __future__ import annotations

from .options import MODEL, STDIN, new_command, read_ids_file, read_text


def add_commands(commands):
    parser = new_command(
        commands,
        "tokenize",
        _tokenize,
        "Convert text to token ids, or ids to text. --ids and --ids-file of other commands read the ids.",
    )
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=MODEL)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", metavar="TEXT", help="a text; -: standard input")
    source.add_argument("-f", "--file", metavar="F", help="a text in UTF-8; -: standard input")
    source.add_argument(
        "--decode",
        metavar='"1 2 3"',
        help='token ids; commas and brackets too: "[1, 2, 3]"; -: standard input',
    )
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help="text that spells a special token (<|im_start|>) is that token (default: it is plain text)",
    )
    parser.add_argument("--pieces", action="store_true", help="each id on a line, with its text")
    parser.add_argument("--count", action="store_true", help="only the number of ids")


def _tokenize(options):
    from ..text.tokenizer import Tokenizer

    given = _ids(options.decode) if options.decode is not None else _text(options)
    tokenizer = Tokenizer.open(options.model)
    ids = given if options.decode is not None else tokenizer.encode_prompt(given, options.parse_special)
    if options.count:
        print(len(ids))
    elif options.pieces:
        for i in ids:
            print(f"{i:>7}  {tokenizer.token_bytes(int(i))!r}"[:2000])
    elif options.decode is not None:
        print(tokenizer.decode(ids))
    else:
        print(*ids)


def _ids(text):
    from ..ids import parse_ids

    return read_ids_file(STDIN) if text == STDIN else parse_ids(text, "--decode")


def _text(options) -> str:
    if options.prompt is not None and options.prompt != STDIN:
        return options.prompt
    return read_text(options.file or STDIN)
