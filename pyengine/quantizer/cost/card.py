"""A model card: what the checkpoint is, its base, its licence, the figures, how to load it.

README.md as Hugging Face reads it, with its front matter, or the same as one HTML page.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ...checkpoint import provenance
from ...checkpoint.open import open_checkpoint
from ...errors import InputError
from ...files.gguf import GGUF
from . import page, tables

SUFFIXES = (".md", ".html")
KINDS = {"int8": "INT8", "int4": "INT4", "mixed": "INT8 and INT4"}


@dataclass(frozen=True)
class Origin:
    """Of the base model: its name and its licence, None where nothing says them."""

    base_model: str | None
    licence: str | None


def check_card(path: Any) -> Path:
    """InputError: a name that is neither Markdown nor HTML."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: want a file name that ends in {' or '.join(SUFFIXES)}")
    return path


def origin_of(source: Any, base_model: str | None = None, licence: str | None = None) -> Origin:
    """What is given, or else what the source says: a GGUF's `general` keys, a directory's README.md."""
    said = _said_by(open_checkpoint(source))
    return Origin(base_model or said.base_model, licence or said.licence)


def _said_by(checkpoint: Any) -> Origin:
    if isinstance(checkpoint.file, GGUF):
        metadata = checkpoint.file.metadata
        keys = ("general.source.huggingface.repository", "general.base_model.0.name", "general.name")
        names = [metadata[key] for key in keys if isinstance(metadata.get(key), str)]
        licence = metadata.get("general.license")
        return Origin(names[0] if names else None, licence if isinstance(licence, str) else None)
    front = _front_matter(checkpoint.path / "README.md")
    return Origin(front.get("base_model") or checkpoint.path.name, front.get("license"))


def _front_matter(path: Path) -> dict[str, str]:
    """The lines `key: value` of the front matter; {}: there is none."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    lines = found[1].splitlines() if found else []
    pairs = (re.fullmatch(r"(\w+): *[\"']?([^\"'\[\]{}]+?)[\"']? *", line) for line in lines)
    return {pair[1]: pair[2] for pair in pairs if pair}


# ---- the card ------------------------------------------------------------------------------------


def as_markdown(directory: Any, origin: Origin, report: tables.Report) -> str:
    said = provenance.read(directory)
    parts = [
        "\n".join(["---", *_front(said, origin), "---"]),
        f"# {_title(directory)}",
        "\n".join(f"* {line}" for line in _facts(said, origin, report)),
        "## How to load",
        "With transformers, which needs torch and not pyengine:",
        f"```python\n{_transformers(directory)}\n```",
        "With pyengine:",
        f"```sh\n{_pyengine(directory)}\n```",
        "## What quantizing costs",
        tables.as_markdown(report, "###"),
    ]
    return "\n\n".join(parts) + "\n"


def as_html(directory: Any, origin: Origin, report: tables.Report) -> str:
    said = provenance.read(directory)
    facts = "\n".join(f"<li>{escape(line)}</li>" for line in _facts(said, origin, report))
    code = "\n".join(
        f"<pre>{escape(text)}</pre>" for text in (_transformers(directory), _pyengine(directory))
    )
    before = f"<ul>\n{facts}\n</ul>\n<h2>How to load</h2>\n{code}"
    return page.as_html(report, _title(directory), before)


def _title(directory: Any) -> str:
    return Path(directory).resolve().name


def _front(said: provenance.Document, origin: Origin) -> list[str]:
    """YAML; a string of JSON is one of YAML."""
    lines = []
    if origin.licence:
        lines.append(f"license: {json.dumps(origin.licence)}")
    if origin.base_model:
        lines += [f"base_model: {json.dumps(origin.base_model)}", "base_model_relation: quantized"]
    kinds = sorted({"int8", "int4"} if "mix" in said else {provenance.kind_of(said)})
    return [*lines, "library_name: transformers", "pipeline_tag: text-generation", "tags:"] + [
        f"  - {tag}" for tag in ("pyengine", *kinds)
    ]


def _facts(said: provenance.Document, origin: Origin, report: tables.Report) -> list[str]:
    files = ", ".join(f"{file['name']} (sha256 {file['sha256']})" for file in said["source"]["files"])
    one = report["candidates"][0]
    facts = [
        f"Base model: {origin.base_model or 'not stated'}",
        f"Licence: {origin.licence or 'not stated'}",
        f"Weights: {KINDS[provenance.kind_of(said)]}, {one['bytes']:,} bytes; one float16 scale for each row "
        f"and {said['group_size']} columns; embeddings, head and norms are floats",
        f"Made from: {files}",
        f"Method: {said['method']}: {said.get('method_in_words', 'see the provenance')}",
    ]
    if "calibration" in said:
        texts = ", ".join(
            f"{text['name']} (sha256 {text['sha256']})" for text in said["calibration"].get("texts", ())
        )
        facts.append(
            f"Calibrated on: {texts or 'texts that are not stated'}; statistics of sha256 "
            f"{said['calibration']['sha256']}"
        )
    if "mix" in said:
        rules = "; ".join(f"{pattern} has {bits} bits" for pattern, bits in said["mix"])
        facts.append(f"Mix, of which the first pattern that matches decides: {rules}; the rest has 4")
    best = ", ".join(
        f"{tables.percent(text['same_top'])} same token and {text['kld']['value']:.1e} nats on {text['text']}"
        for text in one["texts"]
    )
    return [*facts, f"Cost: {best}"]


def _transformers(directory: Any) -> str:
    name = _title(directory)
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)'
    )


def _pyengine(directory: Any) -> str:
    name = _title(directory)
    return f"pyengine verify-files {name}\npyengine chat -m {name}"
