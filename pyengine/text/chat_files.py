"""The chat templates of a model, and the special tokens that templates name.

A directory has templates as Hugging Face's tokenizers read them.  The first of these places counts:
  1. chat_template.jinja, with the name `default`, and additional_chat_templates/NAME.jinja
  2. `chat_template` of tokenizer_config.json: a text, or a list of {"name": ..., "template": ...}
  3. chat_template.json, which older processors wrote
A GGUF has tokenizer.chat_template, and tokenizer.chat_template.NAME for each name in
tokenizer.chat_templates.

A directory has special tokens (`bos_token`, `eos_token`, ...) in the fields of tokenizer_config.json whose
names end in _token, as texts or as objects with a `content`; in `extra_special_tokens` and
`model_specific_special_tokens`, if those are objects; and in special_tokens_map.json, if
tokenizer_config.json has no added_tokens_decoder.  A GGUF has the keys tokenizer.ggml.*_token_id.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FileFormatError, InputError, quote
from ..files.gguf import GGUF
from ..files.strict_json import read_object
from .directory_vocabulary import tokenizer_config
from .gguf_vocabulary import TEMPLATE, gguf_special_tokens, gguf_templates
from .tokenizer import model_source

# Defaults of Hugging Face's tokenizer classes for this family, for fields that tokenizer_config.json does
# not have.  transformers chooses the class by config.json; without that file, by `tokenizer_class`.
CLASSES = [name + end for name in ("Qwen2Tokenizer", "Qwen3_5Tokenizer") for end in ("", "Fast")]
CLASS_TOKENS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")

# Fields whose value is a token or null; others that end in _token may be flags (`add_bos_token`).
TOKEN_FIELDS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
MORE_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")


class ChatFiles(NamedTuple):
    """templates {name: Jinja}, their place for errors, and special_tokens {name: text}."""

    templates: dict[str, str]
    where: str
    special_tokens: dict[str, str]


def chat_files(model: Any) -> ChatFiles:
    """Of a path, a GGUF or a Checkpoint.  Errors: InputError without a template, FileFormatError."""
    source = model_source(model)
    where: Any
    if isinstance(source, GGUF):
        templates, where = gguf_templates(source), f"{source.path}: {TEMPLATE}"
        special_tokens = gguf_special_tokens(source)
    else:
        config = tokenizer_config(source)
        templates, where = next((place for place in _places(source, config) if place[0]), ({}, source))
        special_tokens = _special_tokens(source, config)
    if not templates:
        raise InputError(f"{getattr(source, 'path', source)}: want a chat template, got none")
    return ChatFiles(templates, str(where), special_tokens)


def has_chat_template(model: Any) -> bool:
    """Whether a model (a path, a GGUF or a Checkpoint) carries a chat template."""
    try:
        return bool(chat_files(model).templates)
    except InputError:
        return False


# ---- a directory -------------------------------------------------------------------------------


def _places(directory: Path, config: dict[str, Any]) -> Iterator[tuple[dict[str, str], Any]]:
    """Yields (templates, where); the first with templates counts."""
    yield _jinja_files(directory), directory / "chat_template.jinja"
    for path, value in (
        (directory / "tokenizer_config.json", config.get("chat_template")),
        (directory / "chat_template.json", _read(directory / "chat_template.json").get("chat_template")),
    ):
        yield {} if value is None else _named(path, value), f"{path}: chat_template"


def _jinja_files(directory: Path) -> dict[str, str]:
    paths = {p.stem: p for p in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    main = directory / "chat_template.jinja"
    if main.exists():
        paths["default"] = main
    return {name: _text(path) for name, path in paths.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(
            path, "file", f"want UTF-8, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None


def _named(path: Path, value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    named = value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
    if not isinstance(named, dict):
        raise FileFormatError(path, "chat_template", f"want text, got {type(value).__name__}")
    for name, template in named.items():
        if not (isinstance(name, str) and isinstance(template, str)):
            raise FileFormatError(
                path, "chat_template", f"want text, got {type(value).__name__} without a name and a template"
            )
    return named


def _special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """As Hugging Face reads them: a later source replaces an earlier one.  Errors: FileFormatError."""
    path = directory / "tokenizer_config.json"
    sources = [(path, config)]
    if "added_tokens_decoder" not in config:
        path = directory / "special_tokens_map.json"
        sources.append((path, _read(path)))
    of_family = (directory / "config.json").exists() or config.get("tokenizer_class") in CLASSES
    found: dict[str, str | None] = dict(CLASS_TOKENS if of_family else {})
    for path, source in sources:
        found |= {name: _token(path, name, v) for name, v in source.items() if name.endswith("_token")}
    for path, source in sources:
        for more in (source.get(field) for field in MORE_TOKENS):
            if isinstance(more, dict):
                found |= {name: _token(path, name, v) for name, v in more.items()}
    return {name: text for name, text in found.items() if text is not None}


def _token(path: Path, name: str, value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if name in TOKEN_FIELDS and not (value is None or isinstance(text, str)):
        raise FileFormatError(path, name, f"want a token's text, got {quote(value)}")
    return text if isinstance(text, str) else None


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, constants=True, long_integers=True) if path.exists() else {}
