"""files/output.py: the same bytes past the page cache or not, and however little is taken at once."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.files import output
from pyengine.files.output import OutputFile

BLOCK = output.BLOCK


def pieces_of(sizes):
    return [bytes((i * 7 + j) % 251 for j in range(size)) for i, size in enumerate(sizes)]


def opened(path, direct):
    """expected: whatever makes the writes direct, or not; it decides no byte."""
    return OutputFile(path, output.DIRECT_BYTES if direct else output.DIRECT_BYTES - 1)


def write(path, pieces, direct):
    file = opened(path, direct)
    for piece in pieces:
        file.write(piece)
    file.close()
    assert file.closed
    return path.read_bytes()


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(output, "BUFFER_BYTES", 2 * BLOCK)


@settings(max_examples=30)
@given(
    sizes=st.lists(
        st.sampled_from([0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3]), max_size=6
    ),
    direct=st.booleans(),
)
def test_the_bytes_that_were_written(tmp_path_factory, sizes, direct):
    path = tmp_path_factory.getbasetemp() / "output"
    pieces = pieces_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "BUFFER_BYTES", 2 * BLOCK)
        assert write(path, pieces, direct) == b"".join(pieces)


@pytest.mark.parametrize("sizes", [[BLOCK * 9], [BLOCK * 9 + 5], [10, BLOCK * 4], []])
def test_past_the_page_cache(tmp_path, small_buffer, sizes):
    pieces = pieces_of(sizes)
    for direct in (True, False):
        assert write(tmp_path / f"{direct}", pieces, direct) == b"".join(pieces)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes")
@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_without_direct_writes(tmp_path, monkeypatch, small_buffer, refused):
    original, seen = getattr(os, refused), []

    def refuse(what, *arguments):
        flags = arguments[0] if refused == "open" else _flags(what)
        seen.append(bool(flags & os.O_DIRECT))
        if seen[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(what, *arguments)

    monkeypatch.setattr(os, refused, refuse)
    pieces = pieces_of([3 * BLOCK, 7])
    assert write(tmp_path / "f", pieces, True) == b"".join(pieces)
    assert seen[0] and not any(seen[1:])


@pytest.mark.parametrize("most", [1, 1000, BLOCK, BLOCK + 512])
def test_a_system_that_takes_less_at_once(tmp_path, monkeypatch, small_buffer, most):
    original = os.write
    monkeypatch.setattr(os, "write", lambda f, data: original(f, data[:most]))
    pieces = pieces_of([2 * BLOCK, 700])
    assert write(tmp_path / "f", pieces, False) == b"".join(pieces)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes")
def test_after_part_of_a_block_writes_are_ordinary(tmp_path, monkeypatch, small_buffer):
    """As on a disk that fills up: the system takes what it can, and is asked again for the rest."""
    original, flags = os.write, []

    def once_less(descriptor, data):
        flags.append(bool(_flags(descriptor) & os.O_DIRECT))
        if len(flags) > 1:
            return original(descriptor, data)
        _ordinary(descriptor)
        count = original(descriptor, data[:1000])
        _direct(descriptor)
        return count

    monkeypatch.setattr(os, "write", once_less)
    pieces = pieces_of([5 * BLOCK])
    assert write(tmp_path / "f", pieces, True) == b"".join(pieces)
    assert flags[0] and not any(flags[1:])


@pytest.mark.parametrize("direct", [True, False])
def test_a_full_disk_is_said(tmp_path, monkeypatch, small_buffer, direct):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = opened(tmp_path / "f", direct)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        file.write(bytes(2 * BLOCK))
    file.discard()
    file.discard()
    assert file.closed
    file = opened(tmp_path / "f", direct)
    file.write(b"a")
    with pytest.raises(OSError, match="No space"):
        file.close()
    assert file.closed


@pytest.mark.parametrize("expected", [0, 1, BLOCK, 3 * BLOCK + 1])
def test_the_buffer_is_no_greater_than_the_file(tmp_path, expected):
    file = OutputFile(tmp_path / "f", expected)
    assert len(file._buffer) in range(max(expected, 1), max(expected, 1) + BLOCK)
    file.write(bytes(5 * BLOCK))  # more than was said
    file.close()
    assert (tmp_path / "f").stat().st_size == 5 * BLOCK


def test_the_error_of_opening_is_the_system_s(tmp_path):
    for direct in (True, False):
        with pytest.raises(FileNotFoundError):
            opened(tmp_path / "no" / "f", direct)


def _flags(descriptor):
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


def _ordinary(descriptor):
    import fcntl

    fcntl.fcntl(descriptor, fcntl.F_SETFL, _flags(descriptor) & ~os.O_DIRECT)


def _direct(descriptor):
    import fcntl

    fcntl.fcntl(descriptor, fcntl.F_SETFL, _flags(descriptor) | os.O_DIRECT)
