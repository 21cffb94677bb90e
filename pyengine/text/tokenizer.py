"""Text to token ids and back, from a GGUF's vocabulary or a tokenizer.json.

`tokenizer_json` puts a GGUF into the form of a tokenizer.json.  The engine runs this definition, exports
it with a checkpoint, and transformers reads it.  Only running it needs the `tokenizers` library.

Normalization.  A GGUF does not say whether text is put into NFC first, and llama.cpp never does it.
Hugging Face's tokenizers of these families (`Qwen3_5Tokenizer`, `Qwen2Tokenizer`) do, and so do we for
the published vocabularies: Qwen3.5's, known by its token 248044, and the one of Qwen2 up to Qwen3-Next, known
by its token 151643.  Any other vocabulary is read without NFC, unless
`nfc=True` asks for it.  A tokenizer.json states its normalizer.

BOS.  The vocabulary's BOS comes before a prompt, and before a text that is scored, if the model's files
say so (`bos_id`).  In a GGUF the key `tokenizer.ggml.add_bos_token` says so; the BOS is id 11 if the GGUF
has no bos_token_id, as in llama.cpp.  In a directory a post-processor of tokenizer.json says so, or
`add_bos_token` and `bos_token` of tokenizer_config.json.  `encode_prompt` has this rule; it adds no second
BOS to a text that begins with one.  `generate`, completions, `perplexity` and `tokenize` use it.  A chat
prompt has the BOS that the template writes, and no other, as in Hugging Face.

Special tokens.  Files give some control tokens the kind of <think>, and text would spell them.  A token is
special if its file says so, if it looks special (`looks_special`), or if it ends a text; in a directory
also if a field of tokenizer_config.json such as `eos_token` names it.
"""

from __future__ import annotations

import bisect
import codecs
import re
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import read_hf_config
from ..errors import FileFormatError, InputError
from ..files.gguf import GGUF
from ..files.strict_json import read_object
from ..optional import require
from .directory_vocabulary import (
    END_TEXTS,
    directory_bos,
    family_json,
    stated_vocab_size,
    tokenizer_config,
    with_control_tokens,
)
from .gguf_vocabulary import (
    BYTE_OF_CHARACTER,
    CHARACTER_OF_BYTE,
    MAX_TOKENS,
    TOKENS,
    _dumps,
    _Vocabulary,
    gguf_bos,
)

_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as "surrogateescape" has such bytes


# ---- the tokenizer ---------------------------------------------------------------------------


class Tokenizer:
    """A byte-level BPE.  Made by `from_gguf`, `from_file` or `open`; may be shared by threads.

    vocab_size   ids are 0 to vocab_size - 1; ids without a token (a padded vocabulary) decode to ""
    end_ids      tuple of ids that end a text: the file's own first, then <|im_end|>, <|endoftext|>
    bos_id       the id that comes before a prompt (above), or None
    special_texts  tuple of the spellings of special tokens, longest first
    """

    def __init__(self, backend: Any, vocab_size: int, end_ids: Iterable[int] = (), bos_id: int | None = None):
        """backend: a `tokenizers.Tokenizer`; end_ids: the file's own."""
        self._backend, self.bos_id = backend, bos_id
        self._lock = threading.Lock()  # `encode` sets an option of the backend, then runs it
        backend.no_truncation()
        backend.no_padding()
        self._added = backend.get_added_tokens_decoder()
        self.special_texts = tuple(
            sorted((t.content for t in self._added.values() if t.special), key=len, reverse=True)
        )
        self._special = re.compile("|".join(map(re.escape, self.special_texts)) or "(?!)")
        plain = sorted((t.content for t in self._added.values() if not t.special), key=len, reverse=True)
        self._plain_added = re.compile(f"({'|'.join(map(re.escape, plain)) or '(?!)'})")
        self._special_anywhere = re.compile(f"(?=({self._special.pattern}))")  # overlapping ones too
        self._special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.vocab_size = vocab_size
        known = (backend.token_to_id(text) for text in END_TEXTS)
        self.end_ids = tuple(dict.fromkeys([*end_ids, *(i for i in known if i is not None)]))

    # ---- from files ----

    @classmethod
    def from_gguf(cls, gguf: Any, nfc: bool | None = None) -> Tokenizer:
        """A GGUF's path, or an open one.  nfc: put text into NFC; None: as the family does (above).

        Errors: FileFormatError naming the key; InputError when `tokenizers` is not installed.
        """
        gguf = gguf if isinstance(gguf, GGUF) else GGUF.open(gguf)
        library = _tokenizers()
        vocabulary = _Vocabulary(gguf)
        backend = vocabulary.to_backend(library, nfc)
        return cls(backend, len(vocabulary.tokens), vocabulary.end_ids, vocabulary.bos_id)

    @classmethod
    def from_file(cls, path: Any, vocab_size: int | None = None, end_ids: Iterable[int] = ()) -> Tokenizer:
        """A tokenizer.json; vocab_size as the model has it, which may be more than the tokens.

        Errors: FileFormatError if it is not a tokenizer.json of a byte-level BPE; InputError without
        `tokenizers`.
        """
        return cls._of_json(path, read_object(path), {}, vocab_size, end_ids)

    @classmethod
    def of_directory(cls, directory: Any) -> Tokenizer:
        """The tokenizer.json of a Hugging Face directory of any family, for its vocabulary.

        vocab_size is config.json's, if there is one: the model may have more ids than tokens.
        Errors: FileFormatError as of `from_file`, and for a vocab_size that is no number.
        """
        path, config = Path(directory) / "tokenizer.json", Path(directory) / "config.json"
        vocab_size = stated_vocab_size(config) if config.exists() else None
        return cls._of_json(path, read_object(path), tokenizer_config(directory), vocab_size, ())

    @classmethod
    def from_definition(
        cls, name: str, definition: dict[str, Any], vocab_size: int | None = None
    ) -> Tokenizer:
        """A tokenizer.json, parsed; its name for messages.  Errors as of `from_file`."""
        return cls._of_json(Path(name), definition, {}, vocab_size, ())

    @classmethod
    def _of_json(
        cls,
        path: Any,
        said: dict[str, Any],
        config: dict[str, Any],
        vocab_size: int | None,
        end_ids: Iterable[int],
    ) -> Tokenizer:
        """said: of tokenizer.json; config: of tokenizer_config.json."""
        library = _tokenizers()
        definition = family_json(path, said)
        own_ids = tuple(end_ids)
        definition["added_tokens"] = with_control_tokens(definition["added_tokens"], config, own_ids)
        text = _dumps(definition)
        try:
            backend = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise FileFormatError(path, "file", f"want a tokenizer.json, got: {error}") from None
        last = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if last >= (vocab_size or MAX_TOKENS):
            raise FileFormatError(
                path, "model.vocab", f"want ids of 0 to {(vocab_size or MAX_TOKENS) - 1}, got {last}"
            )
        bos = directory_bos(path, said, config, vocab_size or last + 1)
        return cls(backend, vocab_size or last + 1, own_ids, bos)

    @classmethod
    def open(cls, model: Any) -> Tokenizer:
        """The tokenizer of a model: a GGUF, a checkpoint directory, or a `Checkpoint` of either.

        Errors as of `from_gguf` and `from_file`; `has_tokenizer` says beforehand if there is one.
        """
        source = model_source(model)
        if isinstance(source, GGUF):
            return cls.from_gguf(source)
        config, path = read_hf_config(source), source / "tokenizer.json"
        said, more = read_object(path), tokenizer_config(source)
        return cls._of_json(path, said, more, config.vocab_size, config.eos_token_ids)

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def write_tokenizer_json(self, path: Any) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    # ---- text to ids ----

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text.  No id is put before or behind them.

        special: text that spells a special token (control tokens: <|im_start|>) becomes that token;
        otherwise it is text like any other.  User-defined tokens that are not special (<think>) are
        always found, as by Hugging Face and llama.cpp.
        Errors: InputError for a value that is not a str, or contains half a surrogate pair.
        """
        ids = self._encode(text, special)
        return ids if special or self._special_ids.isdisjoint(ids) else self._without_special(ids)

    def encode_prompt(self, text: str, special: bool = False) -> list[int]:
        """`encode`, with the BOS before it if the model's files ask for it (above)."""
        ids = self.encode(text, special)
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def encode_written(self, text: str, spans: Sequence[Sequence[int]]) -> list[int]:
        """`encode`, where a special token must lie inside one of the spans.

        spans: [start, stop] in characters, ascending, not adjacent.  If no text outside the spans spells a
        special token, the ids are those of `special=True`.  Errors as of `encode`.
        """
        if self._all_written(text, spans):
            return self.encode(text, special=True)
        ids, end = [], 0
        for start, stop in spans:
            for found in self._special.finditer(text, start, stop):
                token = self._backend.token_to_id(found[0])
                before = text[end : found.start()]
                ids += self.encode(before.rstrip() if self._added[token].lstrip else before)
                ids.append(token)
                end = found.end()
                if self._added[token].rstrip:
                    end = len(text) - len(text[end:].lstrip())
        return ids + self.encode(text[end:])

    def _all_written(self, text: str, spans: Sequence[Sequence[int]]) -> bool:
        """Whether every special token that the text spells, overlapping ones too, lies in a span."""
        if not unicodedata.is_normalized("NFC", text):
            return False  # the library may look for tokens in text that it has changed
        starts = [start for start, _ in spans]
        for found in self._special_anywhere.finditer(text):
            i = bisect.bisect_right(starts, found.start()) - 1
            if i < 0 or found.end(1) > spans[i][1]:
                return False
        return True

    def _without_special(self, ids: list[int]) -> list[int]:
        """The ids of a token's characters in place of a special token that the BPE itself made of them."""
        plain = []
        for i in ids:
            characters = self._backend.id_to_token(i) if i in self._special_ids else None
            plain += [i] if characters is None else [j for c in characters for j in self._encode(c, False)]
        if not self._special_ids.isdisjoint(plain):
            raise InputError(
                "text: want characters that are not special tokens by themselves in this vocabulary"
            )
        return plain

    def _encode(self, text: str, special: bool) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"text: want str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: want Unicode characters, got half a surrogate pair at index {error.start}"
            ) from None
        with self._lock:
            self._backend.encode_special_tokens = not special
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of bytes as they are, which may begin or end within a character.

        Of text in UTF-8 they are those of `encode`, without special tokens, unless these have other bytes:
        nothing is put into NFC.  Bytes that are not UTF-8 are cut as letters are.
        The bytes of the ids are `data`, if the vocabulary has every byte.
        """
        text = data.decode("utf-8", "surrogateescape")
        if not _NOT_UTF8.search(text):
            ids = self.encode(text)
            if self.decode_bytes(ids) == data:
                return ids
        ids = []
        for i, part in enumerate(self._plain_added.split(text)):
            ids += [self._backend.token_to_id(part)] if i % 2 else self._merged(part)
        return ids

    def _merged(self, text: str) -> list[int]:
        """The ids of text, without the normaliser and added tokens."""
        # A letter in place of each byte has as many bytes, and the pieces are cut by bytes below.
        pieces = self._backend.pre_tokenizer.pre_tokenize_str(_NOT_UTF8.sub("a", text))
        characters = "".join(CHARACTER_OF_BYTE[byte] for byte in text.encode("utf-8", "surrogateescape"))
        ids, start = [], 0
        for piece, _ in pieces:
            end = start + len(piece)
            ids += [token.id for token in self._backend.model.tokenize(characters[start:end])]
            start = end
        return ids

    # ---- ids to text ----

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        """The text of a sequence of ids; bytes that are not UTF-8 become U+FFFD.

        special: False leaves special tokens out.  Errors: InputError for an id out of range.
        """
        return self.decode_bytes(ids, special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], special: bool = True) -> bytes:
        """The bytes of a sequence of ids; may begin or end within a character."""
        return b"".join(self.token_bytes(i) for i in ids if special or not self.is_special(i))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; b"" for an id of no token.  InputError: out of range."""
        if not 0 <= token_id < self.vocab_size:
            raise InputError(f"id: want 0 to {self.vocab_size - 1}, got {token_id}")
        text = self._backend.id_to_token(int(token_id)) or ""
        if token_id in self._added:
            return text.encode("utf-8")
        try:
            return bytes(map(BYTE_OF_CHARACTER.__getitem__, text))
        except KeyError:  # no byte-level token: its text, as Hugging Face's decoder has it
            return text.encode("utf-8")

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special (control) token."""
        added = self._added.get(int(token_id))
        return added is not None and added.special

    def is_added(self, token_id: int) -> bool:
        """Whether the id is a token that is found whole in a text, and not made by merges."""
        return int(token_id) in self._added

    def stream(self, special: bool = True) -> TextStream:
        """Decodes one id after the other.  special as of `decode`."""
        return TextStream(self, special)


class TextStream:
    """Text as ids arrive: never half a character, and all pieces together are `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, special: bool = True):
        self._tokenizer, self._special = tokenizer, special
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes; "" when there are none yet."""
        return self._characters.decode(self._tokenizer.decode_bytes([token_id], self._special))

    def flush(self) -> str:
        """The rest at the end: "", or U+FFFD for a character that was never completed."""
        return self._characters.decode(b"", final=True)


def has_tokenizer(model: Any) -> bool:
    """Whether a model (a path, a GGUF or a Checkpoint) carries a vocabulary to read text with."""
    source = model_source(model)
    if isinstance(source, GGUF):
        return TOKENS in source.metadata
    return (source / "tokenizer.json").exists()


def model_source(model: Any) -> GGUF | Path:
    """The open GGUF, or the directory, that a model is."""
    if isinstance(model, GGUF):
        return model
    if isinstance(model, Checkpoint):
        return model.file if isinstance(model.file, GGUF) else Path(model.path)
    path = Path(model)
    if not path.exists():
        raise InputError(f"{path}: want a GGUF file or a checkpoint directory, got no such path")
    return path if path.is_dir() else GGUF.open(path)


def prompt_bos(model: Any) -> int | None:
    """The id that comes before a prompt (above), or None.  Does not need the `tokenizers` library."""
    source = model_source(model)
    if isinstance(source, GGUF):
        return gguf_bos(source)
    path = source / "tokenizer.json"
    said = read_object(path) if path.exists() else {}
    return directory_bos(path, said, tokenizer_config(source), MAX_TOKENS)


def _tokenizers() -> Any:
    return require("tokenizers", extra="text", what="tokenizer")
