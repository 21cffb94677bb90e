"""The other kind of text: the Jargon File, which the mother of `merge_table.py` learns.

Source: the Debian package `dict-jargon`, whose `/usr/share/dictd/jargon.dict.dz` holds "The Jargon File
(version 4.4.7, 29 Dec 2003)".  The file says of itself: "This document (the Jargon File) is in the public
domain, to be freely used, shared, and modified."

    entries(jargon_text())  -> the entries, in the file's order
    split(entries)          -> training, held out: whole entries, drawn from seed 1729
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
from pathlib import Path

from tiny_text import SEED, package_file

PACKAGE, MEMBER = "dict-jargon", "usr/share/dictd/jargon.dict.dz"
TEXT_SHA256 = "6c8118c277d0b00736d406d4941b77b69932d6ab125f7179ff88fe12939cc19e"

HELD_OUT_BYTES = 96 * 1024


def jargon_text(deb: Path | None = None) -> str:
    """The text of a `.deb` given, else of the installed package, else of `apt-get download`'s.

    Errors: ValueError when it is another text.
    """
    text = gzip.decompress(package_file(PACKAGE, MEMBER, deb))
    if hashlib.sha256(text).hexdigest() != TEXT_SHA256:
        raise ValueError(
            f"{PACKAGE}: want text of sha256 {TEXT_SHA256}, got {hashlib.sha256(text).hexdigest()}"
        )
    return text.decode()


def entries(text: str) -> list[str]:
    """A head word at the line's beginning, then indented lines; the first two are of the format."""
    return [entry.rstrip() + "\n\n" for entry in re.split(r"(?m)^(?=\S)", text) if "\n " in entry][2:]


def split(every: list[str]) -> tuple[list[str], list[str]]:
    """-> training and held-out entries, each in the file's order."""
    order = list(range(len(every)))
    random.Random(SEED).shuffle(order)
    held_out: list[int] = []
    while sum(len(every[i].encode()) for i in held_out) < HELD_OUT_BYTES:
        held_out.append(order.pop())
    return [every[i] for i in sorted(order)], [every[i] for i in sorted(held_out)]
