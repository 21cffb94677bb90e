"""Documents to label, from files: text, JSON lines, Parquet.  A file is read again each time it is asked for.

    PATH.jsonl, .ndjson   one JSON object per line
    PATH.parquet          one object per row (pyarrow, the extra `distill`)
    PATH, any other       one text in UTF-8
    a folder              its .txt, .md, .jsonl, .ndjson and .parquet files, and those of its folders, by name

An object has one of
    messages              [{role, content, ...}], through the chat template; `tools` may stand beside it
    conversations         [{from, value}]: the same under older names
    prompt, completion    two texts, or two lists of messages; the completion is learnt
    text                  a text
    input_ids             with the option ids: token ids; `assistant_masks` may stand beside them
and may have an `id`, which becomes the document's name.  Without it the name is the file's and the line's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, PyengineError, quote
from ..ids import as_ids
from ..optional import require
from ..text.chat import ChatTemplate
from ..text.tokenizer import Tokenizer
from . import conversations
from .conversations import Tokens

LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet",)
SUFFIXES = (".txt", ".md", *LINES, *PARQUET)
LENGTHS = ("fail", "split", "truncate")
EMPTY = ("fail", "skip")
ROLES = {"gpt": "assistant", "human": "user"}  # of `conversations`


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the data set, before it has labels.

    document, start, ids, mask  as layout.py has them; ids int32, mask int8 [T]
    following  the id that comes after the last one in the document; None: the document ends
    """

    document: str
    start: int
    ids: NDArray[np.int32]
    mask: NDArray[np.int8]
    following: int | None


@dataclass(frozen=True)
class Documents:
    """The documents of files; iterating gives their rows, the same ones each time.

    model      what `load` returns: its tokenizer and its chat template are read when they are needed
    ids_column the name of the field with token ids; None: there are texts
    context    the most tokens of a row
    too_long   a longer document: "fail" is an InputError, "split" makes rows of `context` tokens and a rest,
               "truncate" drops what is beyond
    empty      a document without a token: "fail" or "skip"
    """

    paths: tuple[str, ...]
    model: Any
    vocab_size: int
    context: int
    ids_column: str | None = None
    too_long: str = "fail"
    empty: str = "fail"

    def check(self) -> Documents:
        """InputError for options that are none, and for a path that is not there."""
        for name, value, known in ("too_long", self.too_long, LENGTHS), ("empty", self.empty, EMPTY):
            if value not in known:
                raise InputError(f"{name}: want {' or '.join(known)}, got {quote(value)}")
        if self.context < 1:
            raise InputError(f"context: want at least 1 token, got {self.context}")
        self.files()
        return self

    def files(self) -> list[tuple[str, Path]]:
        """[(name, path)] of the files, in order.  InputError: none."""
        found = []
        for path in map(Path, self.paths):
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
                found += [(p.relative_to(path).as_posix(), p) for p in inside]
            elif path.is_file():
                found.append((path.name, path))
            else:
                raise InputError(
                    f"{path}: want a file or a folder, got no such path, or one that is read only once"
                )
        if not found:
            raise InputError(f"{', '.join(self.paths)}: want {', '.join(SUFFIXES)} files, got none")
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        found: Tokenizer = self.model.tokenizer
        return found

    @cached_property
    def template(self) -> ChatTemplate:
        found: ChatTemplate = self.model.chat_template
        return found

    def __iter__(self) -> Iterator[Row]:
        for where, name, record in self._records():
            try:
                sequence = self._sequence(record)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            yield from self._rows(where, name, sequence)

    # ---- one document ----

    def _rows(self, where: str, name: str, sequence: Tokens) -> Iterator[Row]:
        ids, mask = sequence
        if not len(ids):
            if self.empty == "skip":
                return
            raise InputError(f"{where}: want at least one token, got none (--empty skip leaves it out)")
        if len(ids) > self.context:
            if self.too_long == "fail":
                raise InputError(
                    f"{where}: want at most {self.context} tokens, the context, got {len(ids)} "
                    "(--too-long split or truncate)"
                )
            if self.too_long == "truncate":
                yield Row(name, 0, ids[: self.context], mask[: self.context], int(ids[self.context]))
                return
        for start in range(0, len(ids), self.context):
            stop = start + self.context
            following = int(ids[stop]) if stop < len(ids) else None
            yield Row(name, start, ids[start:stop], mask[start:stop], following)

    def _sequence(self, record: dict[str, Any]) -> Tokens:
        if self.ids_column is not None:
            return self._ids(self.ids_column, record)
        if _has(record, "messages"):
            return self._messages(record["messages"], record)
        if _has(record, "conversations"):
            return self._messages(_with_newer_names(record["conversations"]), record)
        if _has(record, "prompt") and _has(record, "completion"):
            return self._completion(record)
        if _has(record, "text"):
            return conversations.of_text(self.tokenizer, _string("text", record["text"]))
        names = ", ".join(sorted(record)) or "none"
        raise InputError(
            "want messages, conversations, prompt and completion, or text (token ids: --ids), "
            f"got the fields {names[:200]}"
        )

    def _ids(self, name: str, record: dict[str, Any]) -> Tokens:
        if not _has(record, name):
            raise InputError(f"{name}: want token ids, got none")
        listed = record[name]
        if hasattr(listed, "__len__") and not len(listed):
            return Tokens(np.empty(0, np.int32), np.empty(0, np.int8))
        ids = as_ids(listed, self.vocab_size, name).astype(np.int32)
        if not _has(record, "assistant_masks"):
            return Tokens(ids, np.ones(len(ids), np.int8))
        mask = np.asarray(record["assistant_masks"])
        if mask.shape != ids.shape or mask.dtype.kind not in "iub" or not np.isin(mask, (0, 1)).all():
            raise InputError(f"assistant_masks: want {len(ids)} values of 0 or 1, got {quote(mask.tolist())}")
        return Tokens(ids, mask.astype(np.int8))

    def _messages(self, messages: Any, record: dict[str, Any], learn_from: int = 0) -> Tokens:
        messages, tools = _parsed("messages", messages), _parsed("tools", record.get("tools"))
        return conversations.of_messages(self.tokenizer, self.template, messages, tools or None, learn_from)

    def _completion(self, record: dict[str, Any]) -> Tokens:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return conversations.of_completion(self.tokenizer, prompt, completion)
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._messages([*prompt, *completion], record, len(prompt))
        raise InputError(
            "prompt, completion: want two texts or two lists of messages, "
            f"got {type(prompt).__name__} and {type(completion).__name__}"
        )

    # ---- files ----

    def _records(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(place for messages, name, fields) of every document."""
        for name, path in self.files():
            for number, record in self._of_file(path):
                place = "" if number is None else f":{number}"
                given = record.get("id")
                named = str(given) if isinstance(given, (str, int)) and str(given) else name + place
                yield f"{path}{place}", named, record

    def _of_file(self, path: Path) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """(number, fields) of a file's documents; None for a file that is one document."""
        if path.suffix in LINES:
            yield from _lines(path)
        elif path.suffix in PARQUET:
            yield from _parquet_rows(path)
        elif self.ids_column is None:
            yield None, {"text": _text(path)}
        else:
            kind = path.suffix or "a text"
            raise InputError(f"{path}: want .jsonl or .parquet files with --ids, got {kind}")


def _has(record: dict[str, Any], name: str) -> bool:
    return record.get(name) is not None


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name}: want a text, got {quote(value)}")
    return value


def _parsed(name: str, value: Any) -> Any:
    """JSON in a text, where a column cannot hold the objects themselves."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{name}: want JSON, got: {error}") from None
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Parquet gives every message every field of any; those without a value were not there."""
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None or key == "content"}
    return value


def _with_newer_names(turns: Any) -> list[dict[str, Any]]:
    turns = _parsed("conversations", turns)
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and {"from", "value"} <= set(t) for t in turns
    ):
        raise InputError(f"conversations: want a list of {{from, value}}, got {quote(turns)}")
    return [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{path}: want UTF-8, got byte {byte:#04x} at offset {error.start}") from None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of every line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: want a JSON object, got: {error}") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: want a JSON object, got {quote(record)}")
            yield number, record


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 0, fields) of every row; a few at a time are in memory."""
    parquet: Any = require("pyarrow.parquet", extra="distill", what="Parquet")
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    yield number, record
                    number += 1
    except (OSError, ValueError) as error:
        if isinstance(error, PyengineError):
            raise
        raise InputError(f"{path}: want a Parquet file, got: {error}") from None


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of every id's kind and bytes: two files of one vocabulary have one digest."""
    digest = hashlib.sha256()
    for i in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(i)
        digest.update(bytes([tokenizer.is_special(i)]) + len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()
