"""A file that is written whole or not at all."""

import json
import os
import stat

import numpy as np
import pytest

from pyengine.files.kld import LogProbsWriter
from pyengine.files.safetensors_writer import SafetensorsWriter
from pyengine.files.whole import open_whole, write_bytes, write_json, write_text


def by_open_whole(path, fail):
    with open_whole(path) as file:
        file.write(b"new")
        if fail:
            raise fail


def by_safetensors(path, fail):
    with SafetensorsWriter(path, [("x", "I8", (3,))]) as writer:
        writer.write("x", np.array([1, 2], np.int8))
        if fail:
            raise fail
        writer.write("x", np.array([3], np.int8))


def by_kld(path, fail):
    with LogProbsWriter(path, np.zeros((1, 4), np.int64), 3) as writer:
        if fail:
            raise fail
        writer.write(np.zeros((1, 3), np.float32))


@pytest.fixture(params=[by_open_whole, by_safetensors, by_kld])
def write(request):
    return request.param


@pytest.mark.parametrize("fail", [ValueError(), OSError("disk"), KeyboardInterrupt(), SystemExit()])
def test_an_error_leaves_what_was_there(tmp_path, write, fail):
    path = tmp_path / "a"
    with pytest.raises(type(fail)):
        write(path, fail)
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"old")
    with pytest.raises(type(fail)):
        write(path, fail)
    assert os.listdir(tmp_path) == ["a"] and path.read_bytes() == b"old"


def test_a_file_is_replaced_and_never_half_there(tmp_path, write):
    path = tmp_path / "a"
    path.write_bytes(b"old" * 1000)
    before = path.stat().st_ino
    write(path, None)
    assert os.listdir(tmp_path) == ["a"] and path.stat().st_ino != before
    assert not path.read_bytes().startswith(b"old")


def test_a_link_stays_a_link(tmp_path, write):
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    link, target = tmp_path / "near" / "a", tmp_path / "far" / "b"
    link.symlink_to(target)
    for _ in range(2):  # it leads nowhere yet, and then to a file
        write(link, None)
        assert link.is_symlink() and target.is_file()
        assert os.listdir(link.parent) == ["a"] and os.listdir(target.parent) == ["b"]


def test_a_device_is_written_and_stays_a_device(write):
    write("/dev/null", None)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(ValueError):
        write("/dev/null", ValueError())
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_disk(write):
    with pytest.raises(OSError, match="No space left"):
        write("/dev/full", None)


def test_a_pipe(tmp_path, write):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write(fifo, None)
        assert os.read(reader, 100) and os.listdir(tmp_path) == ["fifo"]
    finally:
        os.close(reader)


def test_a_folder_that_is_not_there(tmp_path, write):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "a", None)


def test_the_short_forms(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"\r\n\0")
    assert path.read_bytes() == b"\r\n\0"
    write_text(path, "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()
    write_json(path, {"a": [1, "é"]})
    assert path.read_text() == '{\n  "a": [\n    1,\n    "\\u00e9"\n  ]\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {1, 2})
    assert json.loads(path.read_text()) == {"a": [1, "é"]} and os.listdir(tmp_path) == ["a"]
