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
from ...files.whole import write_text
from .. import quality, quality_report
from . import page, tables

NAME = "README.md"  # of a card that lies in its checkpoint
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


# ---- the figures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What quantizing one checkpoint costs.

    line       the figures that count most
    headline   how they were measured
    charts     by the title of the table that each belongs to
    """

    line: str
    headline: str
    tables: list[tables.Table]
    charts: dict[str, page.Chart]


def costs_on_texts(report: tables.Report) -> list[Cost]:
    """Of each candidate of measure.py's report."""
    return [_on_texts(report | {"candidates": [one]}) for one in report["candidates"]]


def _on_texts(report: tables.Report) -> Cost:
    (one,) = report["candidates"]
    line = ", ".join(
        f"{tables.percent(text['same_top'])} same token and {text['kld']['value']:.1e} nats on {text['text']}"
        for text in one["texts"]
    )
    return Cost(line, tables.headline(report), tables.tables(report), page.charts_of(report))


def cost_of_weights(measured: quality.Measurement, source: Any) -> Cost:
    """Of the weights alone; no text is read."""
    whole = measured.quantized
    titles = {"layer": "The error by layer", "together": "The error of all"}
    sections = [section for section in quality_report.sections([measured]) if section.rows[0][0] in titles]
    return Cost(
        f"a relative error of {whole.relative_error:.2e} ({whole.snr_db:.1f} dB signal to noise) of the "
        "quantized weights; not measured on a text",
        f"The weights against those of {Path(source).name}. The error is that of a layer's quantized weights "
        "together, relative to their norm; SNR is the same in dB. The worst group of columns that share a "
        "scale stands beside it, with its place.",
        [tables.Table(titles[rows[0][0]], "", rows, align) for rows, align in sections],
        {},
    )


# ---- the card ------------------------------------------------------------------------------------


def write_card(path: Any, directory: Any, origin: Origin, cost: Cost) -> None:
    """A file that appears whole.  Errors: InputError, as of `check_card`; FileFormatError, no provenance."""
    write = as_html if check_card(path).suffix.lower() == ".html" else as_markdown
    write_text(path, write(directory, origin, cost))


def as_markdown(directory: Any, origin: Origin, cost: Cost) -> str:
    said = provenance.read(directory)
    parts = [
        "\n".join(["---", *_front(said, origin), "---"]),
        f"# {_title(directory)}",
        "\n".join(f"* {line}" for line in _facts(directory, said, origin, cost)),
        "## How to load",
        "With transformers, which needs torch and not pyengine:",
        f"```python\n{_transformers(directory)}\n```",
        "With pyengine:",
        f"```sh\n{_pyengine(directory)}\n```",
        "## What quantizing costs",
        tables.in_markdown(cost.headline, cost.tables, "###"),
    ]
    return "\n\n".join(parts) + "\n"


def as_html(directory: Any, origin: Origin, cost: Cost) -> str:
    said = provenance.read(directory)
    facts = "\n".join(f"<li>{escape(line)}</li>" for line in _facts(directory, said, origin, cost))
    code = "\n".join(
        f"<pre>{escape(text)}</pre>" for text in (_transformers(directory), _pyengine(directory))
    )
    before = f"<ul>\n{facts}\n</ul>\n<h2>How to load</h2>\n{code}"
    return page.in_html(_title(directory), before, cost.headline, cost.tables, cost.charts)


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


def _facts(directory: Any, said: provenance.Document, origin: Origin, cost: Cost) -> list[str]:
    files = ", ".join(f"{file['name']} (sha256 {file['sha256']})" for file in said["source"]["files"])
    nbytes = open_checkpoint(directory).summary.weight_bytes
    facts = [
        f"Base model: {origin.base_model or 'not stated'}",
        f"Licence: {origin.licence or 'not stated'}",
        f"Weights: {KINDS[provenance.kind_of(said)]}, {nbytes:,} bytes; one float16 scale for each row "
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
    return [*facts, f"Cost: {cost.line}"]


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
