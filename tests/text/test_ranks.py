"""Tokenizers from ranks, and the ids of bytes."""

from base64 import b64encode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from vocabularies import BYTES, tokenizer_of

from pyengine.errors import FileFormatError, InputError
from pyengine.text.gguf_vocabulary import LLAMA3_PATTERN, QWEN2_PATTERN
from pyengine.text.ranks import from_ranks, open_ranks, read_ranks

TOKENS = st.lists(st.text("ab é1", min_size=2, max_size=4), max_size=12)


def tiktokens(ranks, piece):
    """tiktoken's rule for one piece: the piece if it is a token, else the merge of lowest rank, again."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=15),
    st.text("abé", min_size=1, max_size=12),
)
def test_merges_are_tiktokens(merges, word):
    """Ranks as training makes them: each token is two earlier ones.  A word of letters is one piece."""
    tokens = [
        b"a",
        b"b",
        b"\xc3",
        b"\xa9",
        *(byte for byte in BYTES if byte not in (b"a", b"b", b"\xc3", b"\xa9")),
    ]
    for i, j in merges:
        made = tokens[i % 4 if i < 8 else -(i % 8) - 1] + tokens[j % 4 if j < 8 else -(j % 8) - 1]
        if made not in tokens:
            tokens.append(made)
    ranks = {token: i for i, token in enumerate(tokens)}
    tokenizer = from_ranks(ranks, QWEN2_PATTERN, nfc=False)
    assert tokenizer.encode(word) == tiktokens(ranks, word.encode())


def test_digits_by_pattern():
    assert len(tokenizer_of(["12", "123"]).encode("1234")) == 4
    assert tokenizer_of(["12", "123"], pattern=LLAMA3_PATTERN).encode("1234") == [257, ord("4")]


def test_added_tokens_follow():
    made = tokenizer_of(["th"], ["<|end|>", "<think>"], vocab_size=300)
    assert made.encode("th<|end|><think>", special=True) == [256, 257, 258]
    assert (made.vocab_size, made.is_special(257), made.is_special(258)) == (300, True, False)
    assert made.is_added(258) and not made.is_added(256) and made.token_bytes(299) == b""


# ---- bytes -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(TOKENS, st.binary(max_size=12), st.text("ab é1\n", max_size=12))
def test_any_bytes_come_back(tokens, data, text):
    tokenizer = tokenizer_of(tokens, ["<|end|>", "<think>"])
    for some in (data, text.encode(), data + text.encode() + data, text.encode()[1:], text.encode()[:-1]):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(some)) == some
    assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)


def test_bytes_around_text():
    tokenizer = tokenizer_of(["th", " \xc3".encode("latin-1"), b"\xa9t"], ["<|end|>", "<think>"])
    # " " and half a letter are a word's beginning; "\xa9th" is one word.
    assert tokenizer.encode_bytes(b"a \xc3") == [ord("a"), 257]
    assert tokenizer.encode_bytes(b"\xa9th") == [0xA9, 256]
    assert tokenizer.encode_bytes(b"<think>\xa9") == [260, 0xA9]
    assert tokenizer.encode_bytes(b"<|end|>\xa9") == [*b"<|end|>", 0xA9]  # text is no special token


# ---- files -----------------------------------------------------------------------------------------


def lines_of(*tokens):
    return b"".join(b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


def test_a_file(tmp_path):
    path = tmp_path / "some.tiktoken"
    path.write_bytes(lines_of(*BYTES, b"th"))
    assert read_ranks(path)[b"th"] == 256
    with pytest.raises(
        InputError, match="want a file of ranks that Qwen published, whose pattern and special tok"
    ):
        open_ranks(path)


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"!!! 3", "want a token in base64 and its rank"),
        (b"YQ==", "want a token in base64 and its rank"),
        (b"YQ== x", "want a token in base64 and its rank"),
        (b"YQ== 9", "want every token once, got b'a' again"),
        (b" 9", "want a token of at least one byte"),
    ],
)
def test_bad_lines(tmp_path, line, problem):
    path = tmp_path / "some.tiktoken"
    path.write_bytes(lines_of(b"a", b"b") + line + b"\n")
    with pytest.raises(FileFormatError, match=f"line 3: {problem}"):
        read_ranks(path)


def test_ranks_with_a_hole():
    with pytest.raises(InputError, match="ranks: want 0 to 1, each once"):
        from_ranks({b"a": 0, b"b": 2}, QWEN2_PATTERN)
