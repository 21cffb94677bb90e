"""Token ids from arguments, text files and .npy, and what is refused."""

import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.errors import InputError
from pyengine.ids import as_ids, parse_ids, read_ids


def npy(descr="'<i8'", shape="(2,)", data=b"\1" + bytes(7) + b"\2" + bytes(7), order="False", header=None):
    if header is None:
        header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text = header.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def test_text_and_npy(tmp_path):
    (tmp_path / "ids").write_text("1 2,3\n-4")
    assert read_ids(tmp_path / "ids").tolist() == [1, 2, 3, -4]
    for dtype in ("<i8", ">i4", "u1", "<u8"):
        np.save(tmp_path / "ids.npy", np.array([1, 2, 3], dtype))
        ids = read_ids(tmp_path / "ids.npy")
        assert ids.tolist() == [1, 2, 3] and ids.dtype == np.int64
    (tmp_path / "ids.npy").write_bytes(npy())
    assert read_ids(tmp_path / "ids.npy").tolist() == [1, 2]


BLANKS = st.text(" \t\r\n", max_size=2)
SEPARATORS = st.sampled_from([" ", ",", ", ", "\n", ",\n ", " , "])


@given(st.lists(st.integers(-(10**17), 10**17)), SEPARATORS, BLANKS, BLANKS, st.booleans())
def test_every_form_of_the_same_ids(ids, separator, before, after, bracketed):
    """Blanks, commas and one pair of brackets: the forms of people, JSON, Python, NumPy, llama-tokenize."""
    text = separator.join(map(str, ids))
    text = f"[{before}{text}{after}]" if bracketed else text
    assert parse_ids(before + text + after, "--ids").tolist() == ids
    for form in (str(ids), str(np.array(ids, np.int64)) if len(ids) < 100 else str(ids)):
        assert parse_ids(form, "--ids").tolist() == ids


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "ids").write_text("[1, 2]\n", encoding="utf-8-sig")
    assert read_ids(tmp_path / "ids").tolist() == [1, 2]


class Bomb:
    """What a pickle can do when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def object_array():
    return npy("'|O'", data=pickle.dumps(np.array([Bomb(), Bomb()], object)))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", None),  # older NumPys take it for a pickle
        (b"\x93NUMPY", "EOF: reading magic string, expected 8 bytes got 6"),
        (object_array(), "Array can't be memory-mapped: Python objects in dtype."),
        (npy("[('a', '|O')]", data=object_array()), "Array can't be memory-mapped: Python objects in dtype."),
        (npy("'<f8'"), "want integers [T], got float64 (2,)"),
        (npy("'<U2'"), "want integers [T], got <U2 (2,)"),
        (npy("'|b1'"), "want integers [T], got bool (2,)"),
        (npy("'<m8[ns]'"), "want integers [T], got timedelta64[ns] (2,)"),
        (npy(shape="(1, 2)"), "want integers [T], got int64 (1, 2)"),
        (npy(shape="()"), "want integers [T], got int64 ()"),
        (npy("'<u8'", data=b"\xff" * 16), "want integers below 2^63, got 18446744073709551615"),
        (npy(shape="(3,)"), "mmap length is greater than file size"),
        (npy(shape="(2**62,)"), None),
        (npy(shape="(1152921504606846976,)"), None),
        (npy(shape="(-1,)"), None),
        (npy(shape="(True,)"), None),
        (npy("'<i8' * 3"), None),
        (npy("['<i8']"), None),
        (npy(header="{"), None),
        (npy(header="(" * 9000), None),
        (npy(header="9" * 9000), None),
        (npy(header="__import__('os').mkdir('exploded')"), None),
        (npy(header=" " * 20000), None),
        (pickle.dumps(Bomb()), None),
        (b"PK\3\4" + bytes(100), None),
    ],
)
def test_hostile_npy(tmp_path, monkeypatch, content, message):
    """No pickle is loaded, nothing of the header's promises is allocated.  None: NumPy's own words."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ids.npy"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_ids(path)
    before = f"{path}: want token ids as text or .npy, got: "
    assert str(caught.value).startswith(before) and str(caught.value).isprintable()
    assert message is None or str(caught.value) == before + message
    assert os.listdir(tmp_path) == ["ids.npy"]


@pytest.mark.parametrize(
    "text, word",
    [
        ("1 x", "x"),
        ("1 2.0", "2.0"),
        ("1 99999999999999999999", "99999999999999999999"),
        ("9" * 10**6, "9" * 40),
        ("0x10", "0x10"),
        ("1_0", "1_0"),  # Python's own, and nobody else's
        ("\u0661", "\u0661"),
        ("[", "["),
        ("]", "]"),
        ("[1", "[1"),
        ("1]", "1]"),
        ("[[1]]", "[1]"),
        ("[1] [2]", "1]"),
        ("(1, 2)", "(1"),
        ("[1, 2,]x", "[1"),
        ("1\x1b[2J", "1\\x1b[2J"),
    ],
)
def test_hostile_text(text, word):
    with pytest.raises(InputError) as caught:
        parse_ids(text, "--ids")
    assert str(caught.value) == f"--ids: want integers, got '{word}'"


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "ids").write_bytes(b"1 \xff")
    with pytest.raises(InputError, match="want token ids as text or .npy, got: 'utf-8' codec"):
        read_ids(tmp_path / "ids")
    with pytest.raises(InputError, match="none: want token ids as text or .npy, got: No such file"):
        read_ids(tmp_path / "none")


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "ids: want at least one id in a flat sequence, got shape (0,)"),
        ([[1]], "ids: want at least one id in a flat sequence, got shape (1, 1)"),
        ([[1], [1, 2]], "ids: want a flat sequence of integers"),
        ([1.0], "ids: want integers, got float64"),
        (["1"], "ids: want integers, got <U1"),
        ([None], "ids: want integers, got object"),
        ([2**64], "ids: want integers, got object"),
        ([1, 10], "ids: want 0 to 9, got 10 at index 1"),
        ([-1], "ids: want 0 to 9, got -1 at index 0"),
    ],
)
def test_ids_are_checked(ids, message):
    with pytest.raises(InputError) as caught:
        as_ids(ids, 10)
    assert str(caught.value) == message
