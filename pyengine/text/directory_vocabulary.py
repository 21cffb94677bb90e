"""What tokenizer.json and the files beside it say of a vocabulary, checked."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..checks import is_integer
from ..errors import FileFormatError, quote
from ..files.strict_json import read_json, read_object
from .gguf_vocabulary import LLAMA3_PATTERN, MAX_TOKENS, QWEN2_PATTERN, QWEN35_PATTERN, looks_special

END_TEXTS = ("<|im_end|>", "<|endoftext|>")


def tokenizer_config(directory: Any) -> dict[str, Any]:
    """The object in tokenizer_config.json; {} without the file."""
    path = Path(directory) / "tokenizer_config.json"
    return read_object(path, constants=True, long_integers=True) if path.exists() else {}


def stated_vocab_size(path: Path) -> int | None:
    """vocab_size of a config.json; None where it has none.  Errors: FileFormatError."""
    config = read_json(path)
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get("vocab_size")
    if size is not None and not (is_integer(size) and 0 < size <= MAX_TOKENS):
        raise FileFormatError(path, "vocab_size", f"want 1 to {MAX_TOKENS}, got {quote(size)}")
    return size


def directory_bos(path: Path, said: dict[str, Any], config: dict[str, Any], vocab_size: int) -> int | None:
    """The id that comes before a prompt, or None.  Errors: FileFormatError.

    path, said: of tokenizer.json; config: of tokenizer_config.json.
    """
    bos = _first_of_post_processor(said.get("post_processor"))
    token = config.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if bos is None and config.get("add_bos_token") is True and isinstance(token, str):
        added = said.get("added_tokens") or []
        ids = [t.get("id") for t in added if isinstance(t, dict) and t.get("content") == token]
        model = said.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        bos = ids[0] if ids else vocabulary.get(token) if isinstance(vocabulary, dict) else None
        if bos is None:
            raise FileFormatError(
                path.with_name("tokenizer_config.json"),
                "bos_token",
                f"want a token of it, got {token!r:.200}",
            )
    if bos is not None and not (type(bos) is int and 0 <= bos < vocab_size):
        raise FileFormatError(path, "BOS", f"want an id of 0 to {vocab_size - 1}, got {quote(bos)}")
    return bos


def _first_of_post_processor(processor: Any) -> Any:
    """The id of the special token that a post-processor puts before a text."""
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "Sequence":
        found = [_first_of_post_processor(p) for p in processor.get("processors") or []]
        return next((bos for bos in found if bos is not None), None)
    if kind != "TemplateProcessing":
        return None
    try:
        token = processor["single"][0]["SpecialToken"]["id"]
        return processor["special_tokens"][token]["ids"][0]
    except (KeyError, IndexError, TypeError):  # the text comes first, or parts are missing
        return None


def family_json(path: Any, said: dict[str, Any] | None = None) -> dict[str, Any]:
    """The parts of a tokenizer.json that this family has; FileFormatError for other parts.

    The library does not get the other parts.  It panics on parts that contradict each other, which
    `except Exception` does not catch and which prints pages to stderr; and a pattern of the file's own
    may backtrack for minutes.
    Truncation, padding and post-processing are left out, since `encode` uses none.
    said: the file's object, where it has been read.
    """
    said = read_object(path) if said is None else said

    def part(name: str, *types: str | None) -> Any:
        value = said.get(name)
        kind = value.get("type") if isinstance(value, dict) else value
        if kind not in types:
            want = " or ".join("null" if t is None else t for t in types)
            raise FileFormatError(path, name, f"want {want}, got {quote(kind)}")
        return value

    model = part("model", "BPE")
    for key, plain in (
        ("dropout", (None, 0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
        ("byte_fallback", (None, False)),
    ):
        if model.get(key) not in plain:
            raise FileFormatError(path, f"model.{key}", f"want none, got {quote(model[key])}")
    pre_tokenizer = part("pre_tokenizer", "Sequence", "ByteLevel")
    _check_patterns(path, pre_tokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": said.get("added_tokens", []),
        "normalizer": part("normalizer", None, "NFC"),
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": part("decoder", "ByteLevel"),
        "model": model,
    }


def with_control_tokens(added: Any, config: dict[str, Any], end_ids: Collection[int]) -> Any:
    """The added tokens, where those are special that look it, end a text, or are named as such.

    A token that is not special is found in every text, and so a request could end its own turn.
    """
    if not isinstance(added, list):
        return added  # the library says what is wrong with it
    named = [
        v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")
    ]
    texts = {text for text in named if isinstance(text, str)} | set(END_TEXTS)

    def is_control(token: dict[str, Any]) -> bool:
        text = token.get("content")
        return isinstance(text, str) and (text in texts or looks_special(text) or token.get("id") in end_ids)

    return [t | {"special": True} if isinstance(t, dict) and is_control(t) else t for t in added]


def _check_patterns(path: Any, pre_tokenizer: dict[str, Any]) -> None:
    if pre_tokenizer["type"] == "ByteLevel":
        return
    field, parts = "pre_tokenizer.pretokenizers", pre_tokenizer.get("pretokenizers")
    kinds = parts
    if isinstance(parts, list):
        kinds = [p.get("type") if isinstance(p, dict) else p for p in parts]
    if not isinstance(parts, list) or kinds != ["Split", "ByteLevel"]:
        raise FileFormatError(path, field, f"want Split and ByteLevel, got {quote(kinds)}")
    pattern = parts[0].get("pattern")
    if pattern not in [{"Regex": known} for known in (QWEN35_PATTERN, QWEN2_PATTERN, LLAMA3_PATTERN)]:
        raise FileFormatError(
            path, field, f"want the pattern of Qwen3.5, Qwen2 or Llama 3, got {quote(pattern)}"
        )
