"""Texts that are observed: names, digests, token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, quote
from ..ids import Ids, as_ids


@dataclass(frozen=True, eq=False)
class Text:
    """name; sha256 and size of its bytes in UTF-8; ids [T], T >= 1."""

    name: str
    sha256: str
    nbytes: int
    ids: Ids

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "bytes": self.nbytes, "tokens": len(self.ids)}


def encode(model: Any, name: str, text: str) -> Text:
    """Ids by the model's tokenizer, behind its BOS if it asks for one.  InputError: a text of no token."""
    data = text.encode()
    ids = model.tokenizer.encode_prompt(text) if text else []
    if not len(ids):
        raise InputError(f"{name}: want a text of at least one token, got none")
    return Text(name, hashlib.sha256(data).hexdigest(), len(data), as_ids(ids, model.config.vocab_size, name))


def windows(texts: list[Text], tokens: int) -> Iterator[Ids]:
    """Every text in pieces of at most so many tokens, each of which starts from an empty state."""
    for text in texts:
        for start in range(0, len(text.ids), tokens):
            yield text.ids[start : start + tokens]


def split_probes(name: str, text: str) -> list[tuple[str, str]]:
    """A text per line -> [("NAME:LINE", text)]; empty lines are none.

    A name that ends in .jsonl: a line is a JSON string, or an object whose "text" is one.
    Errors: InputError naming the line; no probes.
    """
    probes = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"{name}:{number}"
            probes.append((where, _text_of_json(where, line) if name.endswith(".jsonl") else line))
    if not probes:
        raise InputError(f"{name}: want a probe per line, got none")
    return probes


def _text_of_json(where: str, line: str) -> str:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: want JSON, got {quote(line)}") from None
    text = said.get("text") if isinstance(said, dict) else said
    if not isinstance(text, str):
        raise InputError(f'{where}: want a string, or an object whose "text" is one, got {quote(said)}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: want characters of Unicode, got half a surrogate pair") from None
    return text
