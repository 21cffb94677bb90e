"""What a data set will hold: its parts, and the description that stands in `labels.json` (layout.py)."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..errors import InputError, quote
from .codec import Layout
from .documents import Documents, Row, tokenizer_digest
from .labels import LabelOptions
from .layout import FORMAT, ROW

Description = dict[str, Any]
Advance = Callable[[int], object]

DEFAULT_PART_TOKENS = 65536


@dataclass(frozen=True)
class Part:
    """Consecutive rows, which make one Parquet file."""

    index: int
    rows: int
    tokens: int


@dataclass
class Plan:
    """The parts of a data set, and figures of its input; digest: SHA-256 of every row."""

    part_tokens: int
    parts: list[Part] = field(default_factory=list)
    documents: int = 0
    rows: int = 0
    tokens: int = 0
    longest: int = 0
    digest: str = ""


def make_plan(
    documents: Iterable[Row], part_tokens: int = DEFAULT_PART_TOKENS, advance: Advance | None = None
) -> Plan:
    """Read every document once.  InputError for the first one that cannot be labelled, or for none at all."""
    if part_tokens < 1:
        raise InputError(f"part_tokens: want at least 1, got {part_tokens}")
    plan, digest = Plan(part_tokens), hashlib.sha256()
    rows = tokens = 0
    for row in documents:
        _update(digest, row)
        plan.documents += row.start == 0
        plan.longest = max(plan.longest, len(row.ids))
        rows, tokens = rows + 1, tokens + len(row.ids)
        plan.rows, plan.tokens = plan.rows + 1, plan.tokens + len(row.ids)
        if advance is not None:
            advance(len(row.ids))
        if tokens >= part_tokens:
            plan.parts.append(Part(len(plan.parts), rows, tokens))
            rows = tokens = 0
    if rows:
        plan.parts.append(Part(len(plan.parts), rows, tokens))
    if not plan.parts:
        raise InputError("input: want at least one document with a token, got none")
    plan.digest = digest.hexdigest()
    return plan


def _update(digest: Any, row: Row) -> None:
    name = row.document.encode()
    following = -1 if row.following is None else row.following
    head = f"{len(name)} {row.start} {len(row.ids)} {following} ".encode()
    digest.update(head + name + row.ids.astype("<i4").tobytes() + row.mask.tobytes())


def rows_of_parts(documents: Iterable[Row], plan: Plan) -> Iterator[tuple[Part, list[Row]]]:
    """Each part with its rows, in order.  InputError: the input is no longer what the plan saw."""
    rows = iter(documents)
    for part in plan.parts:
        some = list(itertools.islice(rows, part.rows))
        if len(some) != part.rows or sum(len(row.ids) for row in some) != part.tokens:
            raise InputError(
                f"input: want the documents that were there at the start, got others in part {part.index}"
            )
        yield part, some


# ---- description -------------------------------------------------------------------------------


def describe(
    checkpoint: Checkpoint,
    arithmetic: str,
    options: LabelOptions,
    layout: Layout,
    documents: Documents,
    plan: Plan,
    digest: str,
) -> Description:
    """digest: of the model, as `model_digest` gives it."""
    used = vars(documents)  # a tokenizer or a template that was not needed has no digest
    tokenizer, template = used.get("tokenizer"), used.get("template")
    sources = (
        "".join(f"{name}\0{text}\0" for name, text in sorted(template.sources.items())) if template else ""
    )
    return {
        "format": FORMAT,
        "row": ROW,
        "engine": {"name": "pyengine", "version": __version__},
        "model": {
            "name": Path(checkpoint.path).name,
            "digest": digest,
            "architecture": checkpoint.config.architecture,
            "vocab_size": checkpoint.config.vocab_size,
        },
        "tokenizer": {"digest": tokenizer_digest(tokenizer)} if tokenizer else None,
        "chat_template": {"digest": hashlib.sha256(sources.encode()).hexdigest()} if template else None,
        "arithmetic": arithmetic,
        "temperature": float(options.temperature),
        "labels": options.describe(),
        "layout": layout,
        "input": {
            "digest": plan.digest,
            "documents": plan.documents,
            "rows": plan.rows,
            "tokens": plan.tokens,
            "longest": plan.longest,
            "context": documents.context,
            "too_long": documents.too_long,
        },
        "part_tokens": plan.part_tokens,
        "parts": len(plan.parts),
    }


def model_digest(checkpoint: Checkpoint, advance: Advance = lambda nbytes: None) -> str:
    """SHA-256 of the SHA-256 of every file with tensors, and of a directory's config.json."""
    digest = hashlib.sha256()
    files = list(checkpoint.source_files)
    config = Path(checkpoint.path) / "config.json"
    for path in [*files, *([config] if config.is_file() else [])]:
        digest.update(bytes.fromhex(provenance.describe_file(path, advance)["sha256"]))
    return digest.hexdigest()


def model_bytes(checkpoint: Checkpoint) -> int:
    """What `model_digest` reads, within a config.json."""
    return sum(path.stat().st_size for path in checkpoint.source_files)


def check_same(where: str, wanted: Description, found: Any) -> None:
    """InputError naming the first field in which an earlier run's description differs."""
    difference = _difference("", wanted, found)
    if difference is not None:
        name, want, got = difference
        raise InputError(
            f"{where}: {name}: want {quote(want)}, as asked for, got {quote(got)}: "
            "the directory has another data set"
        )


NOT_COMPARED = ("engine", "complete", "model.name")


def _difference(name: str, wanted: Any, found: Any) -> tuple[str, Any, Any] | None:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            inner = f"{name}.{key}" if name else key
            if inner in NOT_COMPARED:
                continue
            difference = _difference(inner, wanted.get(key), found.get(key))
            if difference is not None:
                return difference
        return None
    return None if wanted == found else (name or "file", wanted, found)
