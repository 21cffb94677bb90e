"""A checkpoint directory that is written whole or not at all, and the digests of one that is not written."""

import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.checkpoint.writer import (
    CheckpointWriter,
    DigestSink,
    TensorEntry,
    check_destinations,
    shard_names,
    split_into_shards,
)
from pyengine.errors import InputError
from pyengine.files.safetensors import DTYPES, SafetensorsDirectory

PARAMETERS = [
    [TensorEntry("a_i8", "I8", (4, 6)), TensorEntry("a_scale_i8", "F16", (1, 4))],
    [TensorEntry("b", "F32", (5,))],
    [TensorEntry("c", "BF16", (2, 3))],
]
ENTRIES = [entry for parameter in PARAMETERS for entry in parameter]


def values(entry):
    seed = int.from_bytes(entry.name.encode(), "little")
    return np.random.default_rng(seed).integers(0, 99, entry.shape).astype(DTYPES[entry.dtype])


def fill(sink, entries=ENTRIES):
    for entry in entries:
        if sink.wants(entry.name):
            for row in values(entry):
                sink.write(entry.name, row)


def read(directory):
    return {name: tensor.data.copy() for name, tensor in SafetensorsDirectory.open(directory).tensors.items()}


@pytest.mark.parametrize("shard_bytes", [1, 40, 1000])
def test_what_is_written_is_read(tmp_path, shard_bytes):
    digests = DigestSink()
    with CheckpointWriter(tmp_path / "d", PARAMETERS, shard_bytes) as writer:
        fill(writer)
        fill(digests)
        writer.write_index()
        assert not (tmp_path / "d").exists()
        writer.publish()
    assert os.listdir(tmp_path) == ["d"]
    found = read(tmp_path / "d")
    assert all(np.array_equal(found[entry.name], values(entry)) for entry in ENTRIES)
    want = {entry.name: hashlib.sha256(values(entry).tobytes()).hexdigest() for entry in ENTRIES}
    assert writer.digests == digests.digests == want and list(writer.digests) == list(want)
    files = sorted(os.listdir(tmp_path / "d"))
    if shard_bytes == 1000:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "d" / files.pop()).read_text())
        assert index["metadata"] == {"total_size": writer.nbytes}
        assert index["weight_map"]["a_i8"] == index["weight_map"]["a_scale_i8"] == files[0]


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=3), min_size=1), st.integers(1, 120))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_files_are_full_and_never_cut_a_parameter(sizes, limit):
    parameters = [
        [TensorEntry(f"{i}.{k}", "U8", (size,)) for k, size in enumerate(group)]
        for i, group in enumerate(sizes)
    ]
    shards = split_into_shards(parameters, limit)
    assert [name for name, _ in shards] == shard_names(len(shards))
    assert [entry for _, entries in shards for entry in entries] == [e for p in parameters for e in p]
    held = [[int(entry.name.split(".")[0]) for entry in entries] for _, entries in shards]
    assert all(set(a).isdisjoint(b) for a, b in zip(held, held[1:]))
    nbytes = [sum(entry.nbytes for entry in entries) for _, entries in shards]
    for i, size in enumerate(nbytes):
        assert size <= limit or len(set(held[i])) == 1
        if i + 1 < len(nbytes):
            assert size + sum(sizes[held[i + 1][0]]) > limit


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
@pytest.mark.parametrize("identity", [None, "the same"])
def test_an_error_leaves_a_directory_only_for_a_run_that_can_continue(tmp_path, error, identity):
    with pytest.raises(error), CheckpointWriter(tmp_path / "d", PARAMETERS, 1, identity) as writer:
        fill(writer, ENTRIES[:3])
        writer.write("c", values(ENTRIES[3])[0])
        raise error
    kept = identity is not None and error is not ValueError
    assert os.listdir(tmp_path) == (["d.partial"] if kept else [])
    with CheckpointWriter(tmp_path / "d", PARAMETERS, 1, identity) as writer:
        assert [e.name for e in ENTRIES if writer.wants(e.name)] == (
            ["c"] if kept else ["a_i8", "a_scale_i8", "b", "c"]
        )
        fill(writer)
        writer.write_index()
        writer.publish()
    assert os.listdir(tmp_path) == ["d"] and len(os.listdir(tmp_path / "d")) == 4
    assert np.array_equal(read(tmp_path / "d")["c"], values(ENTRIES[3]))


@pytest.mark.parametrize("change", ["another identity", "bytes", "tensors", "no list", "no log"])
def test_files_that_cannot_be_taken_over_are_written_again(tmp_path, change):
    with pytest.raises(OSError), CheckpointWriter(tmp_path / "d", PARAMETERS, 1, "x") as writer:
        fill(writer)
        raise OSError
    log = tmp_path / "d.partial" / "complete_files.json"
    shard = tmp_path / "d.partial" / shard_names(3)[1]
    if change == "bytes":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    elif change in ("tensors", "no list"):
        fields = json.loads(log.read_text())
        fields["files"][shard.name] = {} if change == "tensors" else "x"
        log.write_text(json.dumps(fields))
    elif change == "no log":
        log.write_text("{")
    with CheckpointWriter(tmp_path / "d", PARAMETERS, 1, "y" if "identity" in change else "x") as writer:
        assert writer.wants("b") and writer.wants("a_i8") == (change in ("another identity", "no log"))
        fill(writer)
        writer.write_index()
        writer.publish()
    assert all(np.array_equal(read(tmp_path / "d")[entry.name], values(entry)) for entry in ENTRIES)


def test_destinations(tmp_path):
    check_destinations(tmp_path / "a", tmp_path / "b")
    (tmp_path / "file").write_text("")
    for paths, message in [
        ((tmp_path / "a", tmp_path / "a"), "want two directories, got one twice"),
        ((tmp_path,), "want a directory that does not exist yet"),
        ((tmp_path / "file",), "want a directory that does not exist yet"),
        ((tmp_path / "no" / "a",), f"want a directory to write in, got no {tmp_path / 'no'}"),
        ((tmp_path / "file" / "a",), "want a directory to write in"),
    ]:
        with pytest.raises(InputError, match=message):
            check_destinations(*paths)
