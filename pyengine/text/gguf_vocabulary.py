"""A GGUF's vocabulary as a tokenizer.json."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from ..errors import FileFormatError
from ..files.gguf import GGUF
from ..ids import NO_TOKEN

# Source: transformers' models/qwen3_5/tokenization_qwen3_5.py, PRETOKENIZE_REGEX.
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The family's older one, without \p{M}.
QWEN2_PATTERN = QWEN35_PATTERN.replace(r"[\p{L}\p{M}]", r"\p{L}").replace(r"\p{M}", "")
PATTERNS = {"qwen35": QWEN35_PATTERN, "qwen2": QWEN2_PATTERN}  # by llama.cpp's name of the pre-tokenizer
# An id and a text that only the published vocabulary pairs: Qwen3.5's; that of Qwen2 up to Qwen3-Next.
PUBLISHED_ENDS = {"qwen35": (248044, "<|endoftext|>"), "qwen2": (151643, "<|endoftext|>")}
# Llama 3's, for students of another family: digits by threes.
# Source: tokenizer.json of Meta-Llama-3-8B.
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)

# llama.cpp's token types.  Unknown and control tokens are special: text spells them only on demand.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL_TYPES = (UNKNOWN, CONTROL)
ADDED_TYPES = (UNKNOWN, CONTROL, USER_DEFINED)

TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "merges"))
END_KEYS = tuple(f"tokenizer.ggml.{key}" for key in ("eos_token_id", "eot_token_id", "eos_token_ids"))
# By the names that Hugging Face has for them.
SPECIAL_TOKEN_IDS = {
    f"{name}_token": f"tokenizer.ggml.{key}_token_id"
    for name, key in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("sep", "seperator"),
        ("pad", "padding"),
        ("cls", "cls"),
        ("mask", "mask"),
    )
}
TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
ADD_BOS, GPT2_BOS = "tokenizer.ggml.add_bos_token", 11  # llama.cpp's BOS where a GGUF names none


# Files call some control tokens user-defined, or even normal.  Their spelling says what they are.
# Source: llama.cpp's convert_hf_to_gguf.py, does_token_look_special.
CONTROL_SPELLING = re.compile(r"<\|[^|]+\|>|<｜[^｜]+｜>|<pad>|<mask>|<2mass>|\[@BOS@\]|<unused[^>]*>")


def looks_special(text: str) -> bool:
    """Whether a token's text is spelled as that of a control token."""
    return CONTROL_SPELLING.fullmatch(text) is not None


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 fixed it."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


CHARACTER_OF_BYTE = _byte_alphabet()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}


# ---- a tokenizer.json -------------------------------------------------------------------------

MAX_TOKENS = 1 << 24


# ---- a GGUF's vocabulary ---------------------------------------------------------------------


def tokenizer_json(gguf: GGUF, nfc: bool | None = None) -> dict[str, Any]:
    """The tokenizer.json of a GGUF's vocabulary, parsed.  Errors: FileFormatError naming the key."""
    return _Vocabulary(gguf).to_json(nfc)


def gguf_templates(gguf: GGUF) -> dict[str, str]:
    """Its chat templates by name; the one without a name is `default`."""
    keys = {"default": TEMPLATE} if TEMPLATE in gguf.metadata else {}
    if TEMPLATES in gguf.metadata:
        names = gguf.metadata.require(TEMPLATES, list, of=str)
        keys |= {name: f"{TEMPLATE}.{name}" for name in names if name not in keys}
    return {name: gguf.metadata.require(key, str) for name, key in keys.items()}


def gguf_special_tokens(gguf: GGUF, tokens: list[str] | None = None) -> dict[str, str]:
    """The texts of its special tokens by name: `bos_token`, `eos_token`, ...  tokens: if known."""
    if TOKENS not in gguf.metadata:
        return {}
    tokens = gguf.metadata.require(TOKENS, list, of=str) if tokens is None else tokens
    keys = {
        name: key
        for name, key in SPECIAL_TOKEN_IDS.items()
        if key in gguf.metadata and gguf.metadata.require(key, int) not in NO_TOKEN
    }
    return {name: tokens[_token_id(gguf, key, len(tokens))] for name, key in keys.items()}


def gguf_bos(gguf: GGUF) -> int | None:
    """The id that stands before a prompt, where tokenizer.ggml.add_bos_token is true."""
    if ADD_BOS not in gguf.metadata or not gguf.metadata.require(ADD_BOS, bool):
        return None
    key = SPECIAL_TOKEN_IDS["bos_token"]
    if key not in gguf.metadata:
        return GPT2_BOS
    count = gguf.metadata.type_of(TOKENS).length if TOKENS in gguf.metadata else None
    count = MAX_TOKENS if count is None else count
    return _token_id(gguf, key, count)


def _token_id(gguf: GGUF, key: str, count: int) -> int:
    token = gguf.metadata.require(key, int)
    if not 0 <= token < count:
        raise FileFormatError(gguf.path, key, f"want 0 to {count - 1}, got {token}")
    return int(token)


def export_tokenizer(gguf: Any, directory: Any) -> list[Path]:
    """Write a GGUF's tokenizer as a checkpoint directory has it -> the files written.

    tokenizer.json, tokenizer_config.json, chat_template.jinja when the GGUF has a template, and
    additional_chat_templates/NAME.jinja for those with names.
    Takes a path or an open GGUF; does not need the `tokenizers` library.
    """
    gguf, directory = gguf if isinstance(gguf, GGUF) else GGUF.open(gguf), Path(directory)
    vocabulary = _Vocabulary(gguf)
    files = {
        "tokenizer.json": _dumps(vocabulary.to_json()),
        "tokenizer_config.json": json.dumps(vocabulary.config_json(), indent=2, ensure_ascii=False) + "\n",
    }
    for name, template in gguf_templates(gguf).items():
        _check_file_name(gguf, name)
        place = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
        files[f"{place}.jinja"] = template
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        # newline: a template's line ends are part of the prompt
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    return [directory / name for name in files]


def _check_file_name(gguf: GGUF, name: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise FileFormatError(gguf.path, TEMPLATES, f"want names of letters, digits, _ and -, got {name!r}")


class _Vocabulary:
    """A GGUF's tokens, types and merges, checked.  Its id is a token's place in `tokens`."""

    def __init__(self, gguf: GGUF):
        self.path, self.metadata = gguf.path, gguf.metadata
        self._kind("tokenizer.ggml.model", "gpt2")
        self.pre = self._kind("tokenizer.ggml.pre", *PATTERNS)
        self.tokens = self.metadata.require(TOKENS, list, of=str)
        self.types = self._types()
        self.merges = self.metadata.require(MERGES, list, of=str)
        self.end_ids = self._end_ids()
        self._find_control_tokens()
        self.model_vocabulary = self._model_vocabulary()
        self.special_tokens = gguf_special_tokens(gguf, self.tokens)
        self.bos_id = gguf_bos(gguf)
        if self.bos_id is not None:
            self._in_range(SPECIAL_TOKEN_IDS["bos_token"], self.bos_id)

    def to_backend(self, library: Any, nfc: bool | None = None) -> Any:
        """A `tokenizers.Tokenizer`, the same as of `to_json`.

        The vocabulary goes to the library as it is: serializing to JSON first takes twice as long.
        """
        definition = self._to_json(nfc)
        options = {
            name: value
            for name, value in definition["model"].items()
            if value is not None and name not in ("type", "vocab", "merges")
        }
        try:
            model = library.models.BPE(
                vocab=self.model_vocabulary,
                **options,
                merges=[tuple(merge.split(" ")) for merge in self.merges],
            )
        except Exception:  # the library's own message names no index
            self._check_merges()
            raise
        definition |= {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        backend = library.Tokenizer.from_str(_dumps(definition))
        backend.model = model
        runs = itertools.groupby(self._added_tokens(), key=lambda token: token["special"])
        for special, tokens in runs:
            add = backend.add_special_tokens if special else backend.add_tokens
            add([library.AddedToken(token["content"], normalized=False, special=special) for token in tokens])
        return backend

    def to_json(self, nfc: bool | None = None) -> dict[str, Any]:
        self._check_merges()
        return self._to_json(nfc)

    def _to_json(self, nfc: bool | None) -> dict[str, Any]:
        if nfc is None:
            end, text = PUBLISHED_ENDS[self.pre]
            nfc = len(self.tokens) > end and self.tokens[end] == text
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "normalizer": {"type": "NFC"} if nfc else None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": PATTERNS[self.pre]},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": False,
                        "use_regex": False,
                    },
                ],
            },
            "post_processor": self._post_processor(),
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self.model_vocabulary,
                # "a b" and not ["a", "b"]: every version of the library reads it, in half the time.
                "merges": self.merges,
            },
        }

    def config_json(self) -> dict[str, Any]:
        """tokenizer_config.json: the class is the one that takes tokenizer.json as it stands."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "bos_token": self.special_tokens.get("bos_token"),
            "clean_up_tokenization_spaces": False,
            "eos_token": self.tokens[self.end_ids[0]] if self.end_ids else None,
            "model_max_length": self._context_length(),
            "pad_token": self.special_tokens.get("pad_token"),
            "split_special_tokens": False,
            "unk_token": self.special_tokens.get("unk_token"),
        }

    # ---- parts ----

    def _post_processor(self) -> dict[str, Any] | None:
        """Hugging Face's way to say that BOS stands before a text."""
        if self.bos_id is None:
            return None
        bos = self.tokens[self.bos_id]
        return {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
        }

    def _context_length(self) -> int:
        key = f"{self.metadata.require('general.architecture', str)}.context_length"
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

    def _added_tokens(self) -> list[dict[str, Any]]:
        return [
            {
                "id": i,
                "content": self.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind in SPECIAL_TYPES,
            }
            for i, kind in enumerate(self.types)
            if kind in ADDED_TYPES
        ]

    def _find_control_tokens(self) -> None:
        """Types of those that the file has wrongly: else a request could spell a control token, or no
        template.  User-defined: those that look special, and those that end a text.  Normal: those that look
        special and that no merge makes, so that no text has them."""
        look = [i for i, text in enumerate(self.tokens) if looks_special(text)]
        for i in [*look, *self.end_ids]:
            if self.types[i] == USER_DEFINED:
                self.types[i] = CONTROL
        normal = [i for i in look if self.types[i] == NORMAL]
        if normal:
            made = {merge.replace(" ", "", 1) for merge in self.merges}
            for i in normal:
                if self.tokens[i] not in made:
                    self.types[i] = CONTROL

    def _end_ids(self) -> list[int]:
        ids = []
        for key in END_KEYS:
            if key not in self.metadata:
                continue
            many = self.metadata.type_of(key).python_type() is list
            ids += (
                [self._in_range(key, i) for i in self.metadata.require(key, list, of=int)]
                if many
                else [self._id(key)]
            )
        return ids

    def _id(self, key: str) -> int:
        return self._in_range(key, self.metadata.require(key, int))

    # ---- checks ----

    def _fail(self, key: str, problem: str) -> NoReturn:
        raise FileFormatError(self.path, key, problem)

    def _kind(self, key: str, *known: str) -> str:
        got: str = self.metadata.require(key, str)
        if got not in known:
            self._fail(key, f"want {' or '.join(map(repr, known))}, got {got!r}")
        return got

    def _in_range(self, key: str, token_id: int) -> int:
        if not 0 <= token_id < len(self.tokens):
            self._fail(key, f"want 0 to {len(self.tokens) - 1}, got {token_id}")
        return int(token_id)

    def _types(self) -> list[int]:
        types: list[int] = self.metadata.require(TYPES, list, of=int).tolist()
        if len(types) != len(self.tokens):
            self._fail(TYPES, f"want {len(self.tokens)} entries as {TOKENS}, got {len(types)}")
        for i, kind in enumerate(types):
            if not NORMAL <= kind <= BYTE:
                self._fail(TYPES, f"want {NORMAL} to {BYTE}, got {kind} at index {i}")
        if len(set(self.tokens)) != len(self.tokens):
            first: dict[str, int] = {}
            twice = next(i for i, text in enumerate(self.tokens) if first.setdefault(text, i) != i)
            self._fail(TOKENS, f"want every token once, got {self.tokens[twice]!r} again at index {twice}")
        return types

    def _check_merges(self) -> None:
        """Every merge "left right", all three of left, right and left + right in the BPE's vocabulary."""
        vocabulary = self.model_vocabulary
        for i, merge in enumerate(self.merges):
            left, _, right = merge.partition(" ")
            if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
                self._fail(MERGES, f"want two tokens that make a third, got {merge!r} at index {i}")


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
