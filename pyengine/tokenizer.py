"""Text to token ids and back, from a GGUF's vocabulary or a tokenizer.json.

A GGUF is put into the form of a tokenizer.json (`tokenizer_json`): the same definition is run here,
exported with a checkpoint and read by transformers.
Only running it takes the `tokenizers` library; `export_tokenizer` does without.

Normalisation.  A GGUF does not say whether text is put into NFC first, and llama.cpp never does it.
Hugging Face's tokenizer of this family (`Qwen3_5Tokenizer`) does, and so do we for Qwen3.5's
published vocabulary, known by its token 248044.  Any other vocabulary is read without, unless
`nfc=True` asks for it.  A tokenizer.json says it itself.
"""

from __future__ import annotations

import codecs
import itertools
import json
import threading
from pathlib import Path

from .checkpoint import Checkpoint
from .config import read_hf_config
from .errors import FileFormatError, InputError, quote
from .files.gguf import GGUF
from .files.strict_json import read_object

# Source: transformers' models/qwen3_5/tokenization_qwen3_5.py, PRETOKENIZE_REGEX.
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# The family's older one, without \p{M}.
QWEN2_PATTERN = QWEN35_PATTERN.replace(r"[\p{L}\p{M}]", r"\p{L}").replace(r"\p{M}", "")

END_TEXTS = ("<|im_end|>", "<|endoftext|>")
PUBLISHED_END = 248044, "<|endoftext|>"  # an id and a text that only the published vocabulary pairs

# llama.cpp's token types.  Unknown and control tokens are special: text spells them only on demand.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL_TYPES = (UNKNOWN, CONTROL)
ADDED_TYPES = (UNKNOWN, CONTROL, USER_DEFINED)

TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "merges"))
END_KEYS = tuple(f"tokenizer.ggml.{key}" for key in ("eos_token_id", "eot_token_id", "eos_token_ids"))
PADDING, TEMPLATE = "tokenizer.ggml.padding_token_id", "tokenizer.chat_template"


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 fixed it."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_byte_alphabet())}


# ---- the tokenizer ---------------------------------------------------------------------------


class Tokenizer:
    """A byte-level BPE.  Made by `from_gguf`, `from_file` or `open`; may be shared by threads.

    vocab_size   ids are 0 to vocab_size - 1; those of no token (a padded vocabulary) decode to ""
    end_ids      tuple of ids that end a text: the file's own first, then <|im_end|>, <|endoftext|>
    special_texts  tuple of what spells a special token, longest first
    """

    def __init__(self, backend, vocab_size: int, end_ids=()):
        """backend: a `tokenizers.Tokenizer`; end_ids: the file's own."""
        self._backend = backend
        self._lock = threading.Lock()  # `encode` sets an option of the backend, then runs it
        backend.no_truncation()
        backend.no_padding()
        self._added = backend.get_added_tokens_decoder()
        self.special_texts = tuple(sorted((t.content for t in self._added.values() if t.special),
                                          key=len, reverse=True))
        self.vocab_size = vocab_size
        known = (backend.token_to_id(text) for text in END_TEXTS)
        self.end_ids = tuple(dict.fromkeys([*end_ids, *(i for i in known if i is not None)]))

    # ---- from files ----

    @classmethod
    def from_gguf(cls, gguf, nfc: bool | None = None) -> Tokenizer:
        """A GGUF's path, or an open one.  nfc: put text into NFC; None: as the family does (above).

        Errors: FileFormatError naming the key; InputError when `tokenizers` is not installed.
        """
        gguf = gguf if isinstance(gguf, GGUF) else GGUF.open(gguf)
        library = _tokenizers()
        vocabulary = _Vocabulary(gguf)
        return cls(vocabulary.to_backend(library, nfc), len(vocabulary.tokens), vocabulary.end_ids)

    @classmethod
    def from_file(cls, path, vocab_size: int | None = None, end_ids=()) -> Tokenizer:
        """A tokenizer.json; vocab_size as the model has it, which may be more than the tokens.

        Errors: FileFormatError when it is none or no byte-level BPE; InputError without `tokenizers`.
        """
        library = _tokenizers()
        text = _dumps(_family_json(path))
        try:
            backend = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise FileFormatError(path, "file", f"want a tokenizer.json, got: {error}") from None
        last = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if last >= (vocab_size or MAX_TOKENS):
            raise FileFormatError(path, "model.vocab", f"want ids of 0 to "
                                  f"{(vocab_size or MAX_TOKENS) - 1}, got {last}")
        return cls(backend, vocab_size or last + 1, end_ids)

    @classmethod
    def open(cls, model) -> Tokenizer:
        """The tokenizer of a model: a GGUF, a checkpoint directory, or a `Checkpoint` of either.

        Errors as of `from_gguf` and `from_file`; `has_tokenizer` says beforehand if there is one.
        """
        source = model_source(model)
        if isinstance(source, GGUF):
            return cls.from_gguf(source)
        config = read_hf_config(source)
        return cls.from_file(source / "tokenizer.json", config.vocab_size, config.eos_token_ids)

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return self._backend.to_str()

    def write_tokenizer_json(self, path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    # ---- text to ids ----

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text; none is put before or behind it.

        special: text that spells a special token (control tokens: <|im_start|>) becomes that token;
        otherwise it is text like any other.  User-defined tokens that are not special (<think>) are
        always found, as by Hugging Face and llama.cpp.
        Errors: InputError for what is no str, or holds half a surrogate pair.
        """
        if not isinstance(text, str):
            raise InputError(f"text: want str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"text: want Unicode characters, got half a surrogate pair at index "
                             f"{error.start}") from None
        with self._lock:
            self._backend.encode_special_tokens = not special
            return self._backend.encode(text, add_special_tokens=False).ids

    # ---- ids to text ----

    def decode(self, ids, special: bool = True) -> str:
        """The text of a sequence of ids; bytes that are not UTF-8 become U+FFFD.

        special: False leaves special tokens out.  Errors: InputError for an id out of range.
        """
        return self.decode_bytes(ids, special).decode("utf-8", "replace")

    def decode_bytes(self, ids, special: bool = True) -> bytes:
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
        """What is left at the end: "", or U+FFFD for a character that was never completed."""
        return self._characters.decode(b"", final=True)


def has_tokenizer(model) -> bool:
    """Whether a model (a path, a GGUF or a Checkpoint) carries a vocabulary to read text with."""
    source = model_source(model)
    if isinstance(source, GGUF):
        return TOKENS in source.metadata
    return (source / "tokenizer.json").exists()


def model_source(model) -> GGUF | Path:
    """The open GGUF, or the directory, that a model is."""
    if isinstance(model, GGUF):
        return model
    if isinstance(model, Checkpoint):
        return model.file if model.kind == "gguf" else Path(model.path)
    path = Path(model)
    if not path.exists():
        raise InputError(f"{path}: want a GGUF file or a checkpoint directory, got no such path")
    return path if path.is_dir() else GGUF.open(path)


def _tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise InputError("tokenizer: want the package's extra: "
                         "pip install 'pyengine[text]'") from None
    return tokenizers


# ---- a tokenizer.json -------------------------------------------------------------------------

MAX_TOKENS = 1 << 24


def _family_json(path) -> dict:
    """What a tokenizer.json says of the parts that this family has; FileFormatError for others.

    The library is not shown the rest: it panics on parts that contradict each other, past `except
    Exception` and with pages on stderr, and a pattern of the file's own may backtrack for minutes.
    Truncation, padding and post-processing are left out, since `encode` uses none.
    """
    said = read_object(path)

    def part(name, *types):
        value = said.get(name)
        kind = value.get("type") if isinstance(value, dict) else value
        if kind not in types:
            want = " or ".join("null" if t is None else t for t in types)
            raise FileFormatError(path, name, f"want {want}, got {quote(kind)}")
        return value

    model = part("model", "BPE")
    for key, plain in (("dropout", (None, 0)), ("continuing_subword_prefix", (None, "")),
                       ("end_of_word_suffix", (None, "")), ("byte_fallback", (None, False))):
        if model.get(key) not in plain:
            raise FileFormatError(path, f"model.{key}", f"want none, got {quote(model[key])}")
    pre_tokenizer = part("pre_tokenizer", "Sequence", "ByteLevel")
    _check_patterns(path, pre_tokenizer)
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": said.get("added_tokens", []),
            "normalizer": part("normalizer", None, "NFC"), "pre_tokenizer": pre_tokenizer,
            "post_processor": None, "decoder": part("decoder", "ByteLevel"), "model": model}


def _check_patterns(path, pre_tokenizer) -> None:
    if pre_tokenizer["type"] == "ByteLevel":
        return
    field, parts = "pre_tokenizer.pretokenizers", pre_tokenizer.get("pretokenizers")
    kinds = parts
    if isinstance(parts, list):
        kinds = [p.get("type") if isinstance(p, dict) else p for p in parts]
    if kinds != ["Split", "ByteLevel"]:
        raise FileFormatError(path, field, f"want Split and ByteLevel, got {quote(kinds)}")
    pattern = parts[0].get("pattern")
    if pattern not in ({"Regex": QWEN35_PATTERN}, {"Regex": QWEN2_PATTERN}):
        raise FileFormatError(path, field,
                              f"want the pattern of Qwen3.5 or Qwen2, got {quote(pattern)}")


# ---- a GGUF's vocabulary ---------------------------------------------------------------------


def tokenizer_json(gguf: GGUF, nfc: bool | None = None) -> dict:
    """The tokenizer.json of a GGUF's vocabulary, parsed.  Errors: FileFormatError naming the key."""
    return _Vocabulary(gguf).to_json(nfc)


def export_tokenizer(gguf, directory) -> list[Path]:
    """Write a GGUF's tokenizer as a checkpoint directory has it -> the files written.

    tokenizer.json, tokenizer_config.json, and chat_template.jinja when the GGUF has a template.
    Takes a path or an open GGUF; does not need the `tokenizers` library.
    """
    gguf, directory = gguf if isinstance(gguf, GGUF) else GGUF.open(gguf), Path(directory)
    vocabulary = _Vocabulary(gguf)
    files = {
        "tokenizer.json": _dumps(vocabulary.to_json()),
        "tokenizer_config.json": json.dumps(vocabulary.config_json(), indent=2, ensure_ascii=False) + "\n",
    }
    if TEMPLATE in gguf.metadata:
        files["chat_template.jinja"] = gguf.metadata.require(TEMPLATE, str)
    for name, text in files.items():
        # newline: a template's line ends are part of the prompt
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    return [directory / name for name in files]


class _Vocabulary:
    """A GGUF's tokens, types and merges, checked.  Its id is a token's place in `tokens`."""

    def __init__(self, gguf: GGUF):
        self.path, self.metadata = gguf.path, gguf.metadata
        self._check_kind("tokenizer.ggml.model", "gpt2")
        self._check_kind("tokenizer.ggml.pre", "qwen35")
        self.tokens = self.metadata.require(TOKENS, list, of=str)
        self.types = self._types()
        self.merges = self.metadata.require(MERGES, list, of=str)
        self.model_vocabulary = self._model_vocabulary()
        self.end_ids = self._end_ids()

    def to_backend(self, library, nfc: bool | None = None):
        """A `tokenizers.Tokenizer`, the same as of `to_json`.

        The vocabulary goes to the library as it is: by way of a text it would take twice as long.
        """
        definition = self._to_json(nfc)
        options = {name: value for name, value in definition["model"].items()
                   if value is not None and name not in ("type", "vocab", "merges")}
        try:
            model = library.models.BPE(vocab=self.model_vocabulary, **options,
                                       merges=[tuple(merge.split(" ")) for merge in self.merges])
        except Exception:  # the library's own message names no index
            self._check_merges()
            raise
        definition |= {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        backend = library.Tokenizer.from_str(_dumps(definition))
        backend.model = model
        runs = itertools.groupby(self._added_tokens(), key=lambda token: token["special"])
        for special, tokens in runs:
            add = backend.add_special_tokens if special else backend.add_tokens
            add([library.AddedToken(token["content"], normalized=False, special=special)
                 for token in tokens])
        return backend

    def to_json(self, nfc: bool | None = None) -> dict:
        self._check_merges()
        return self._to_json(nfc)

    def _to_json(self, nfc) -> dict:
        if nfc is None:
            end, text = PUBLISHED_END
            nfc = len(self.tokens) > end and self.tokens[end] == text
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "normalizer": {"type": "NFC"} if nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN35_PATTERN}, "behavior": "Isolated",
                 "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                 "use_regex": False}]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                        "use_regex": False},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None,
                "continuing_subword_prefix": None, "end_of_word_suffix": None,
                "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": self.model_vocabulary,
                # "a b" and not ["a", "b"]: every version of the library reads it, in half the time.
                "merges": self.merges,
            },
        }

    def config_json(self) -> dict:
        """tokenizer_config.json: the class is the one that takes tokenizer.json as it stands."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": self.tokens[self.end_ids[0]] if self.end_ids else None,
            "model_max_length": self._context_length(),
            "pad_token": self._pad_token(),
            "split_special_tokens": False,
            "unk_token": None,
        }

    # ---- parts ----

    def _context_length(self) -> int:
        key = "qwen35moe.context_length"
        return self.metadata.require(key, int) if key in self.metadata else 262144

    def _model_vocabulary(self) -> dict[str, int]:
        """Text -> id of what the BPE makes, and of added tokens where the library needs their ids.

        The library numbers added tokens on from the BPE's; where they lie elsewhere (before it, or
        with gaps), their ids hold only when the BPE knows them too.  No merge leads there.
        """
        kinds = (NORMAL, BYTE)
        vocabulary = {t: i for i, (t, kind) in enumerate(zip(self.tokens, self.types)) if kind in kinds}
        added = [i for i, kind in enumerate(self.types) if kind in ADDED_TYPES]
        if added != list(range(len(vocabulary), len(vocabulary) + len(added))):
            vocabulary |= {self.tokens[i]: i for i in added}
        return vocabulary

    def _added_tokens(self) -> list[dict]:
        return [{"id": i, "content": self.tokens[i], "single_word": False, "lstrip": False,
                 "rstrip": False, "normalized": False, "special": kind in SPECIAL_TYPES}
                for i, kind in enumerate(self.types) if kind in ADDED_TYPES]

    def _pad_token(self) -> str | None:
        return self.tokens[self._id(PADDING)] if PADDING in self.metadata else None

    def _end_ids(self) -> list[int]:
        ids = []
        for key in END_KEYS:
            if key not in self.metadata:
                continue
            many = self.metadata.type_of(key).python_type() is list
            ids += [self._in_range(key, i) for i in self.metadata.require(key, list, of=int)] \
                if many else [self._id(key)]
        return ids

    def _id(self, key: str) -> int:
        return self._in_range(key, self.metadata.require(key, int))

    # ---- checks ----

    def _fail(self, key, problem):
        raise FileFormatError(self.path, key, problem)

    def _check_kind(self, key, want):
        got = self.metadata.require(key, str)
        if got != want:
            self._fail(key, f"want {want!r}, got {got!r}")

    def _in_range(self, key, token_id) -> int:
        if not 0 <= token_id < len(self.tokens):
            self._fail(key, f"want 0 to {len(self.tokens) - 1}, got {token_id}")
        return int(token_id)

    def _types(self) -> list[int]:
        types = self.metadata.require(TYPES, list, of=int).tolist()
        if len(types) != len(self.tokens):
            self._fail(TYPES, f"want {len(self.tokens)} entries as {TOKENS}, got {len(types)}")
        for i, kind in enumerate(types):
            if not NORMAL <= kind <= BYTE:
                self._fail(TYPES, f"want {NORMAL} to {BYTE}, got {kind} at index {i}")
        if len(set(self.tokens)) != len(self.tokens):
            first = {}
            twice = next(i for i, text in enumerate(self.tokens) if first.setdefault(text, i) != i)
            self._fail(TOKENS, f"want every token once, got {self.tokens[twice]!r} again at index {twice}")
        return types

    def _check_merges(self):
        """Every merge "left right", all three of left, right and left + right in the BPE's vocabulary."""
        vocabulary = self.model_vocabulary
        for i, merge in enumerate(self.merges):
            left, _, right = merge.partition(" ")
            if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
                self._fail(MERGES, f"want two tokens that make a third, got {merge!r} at index {i}")


def _dumps(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
