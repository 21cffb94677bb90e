"""safetensors: reading, writing, directories, and hostile files."""

import hashlib
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import CheckpointError, FileFormatError
from pyengine.files import output
from pyengine.files.safetensors import DTYPES, INDEX_NAME, SafetensorsDirectory, SafetensorsFile
from pyengine.files.safetensors_writer import SafetensorsWriter


def file_bytes(header, data=b""):
    """header: an object, or its text as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin, end, dtype="U8", shape=None):
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(tmp_path, content, name="m.safetensors"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def write_checkpoint(path, tensors, metadata=None):
    """tensors: name -> (dtype, array)."""
    plan = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with SafetensorsWriter(path, plan, metadata) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)
    return writer


def random_array(dtype, shape, seed=0):
    rng = np.random.default_rng(seed)
    dtype = DTYPES[dtype]
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


# --- reading and writing ----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_in_bits(tmp_path, dtype):
    want = {"a": (dtype, random_array(dtype, (3, 5))), "s": (dtype, random_array(dtype, ()))}
    writer = write_checkpoint(tmp_path / "m", want, {"k": "v"})
    file = SafetensorsFile.open(tmp_path / "m")
    assert file.metadata == {"k": "v"} and list(file.tensors) == ["a", "s"]
    assert file.size == (tmp_path / "m").stat().st_size
    for name, (_, array) in want.items():
        tensor = file.tensors[name]
        assert (tensor.name, tensor.dtype, tensor.shape) == (name, dtype, array.shape)
        assert tensor.data.dtype == DTYPES[dtype] and tensor.data.tobytes() == array.tobytes()
        assert writer.sha256[name] == hashlib.sha256(array.tobytes()).hexdigest()


def test_data_is_a_read_only_view_of_the_file(tmp_path):
    write_checkpoint(tmp_path / "m", {"a": ("BF16", random_array("BF16", (4, 8)))})
    tensor = SafetensorsFile.open(tmp_path / "m").tensors["a"]
    assert np.shares_memory(tensor.data, tensor.data)
    assert not tensor.data.flags.writeable and not tensor.data.flags.owndata


def test_data_order_may_differ_from_header_order(tmp_path):
    header = {"b": entry(2, 5), "empty": entry(2, 2), "a": entry(0, 2),
              "none": entry(5, 5, "F32", [0, 2**40])}  # fmt: skip
    file = SafetensorsFile.open(write(tmp_path, file_bytes(header, b"aabbb")))
    assert list(file.tensors) == ["b", "empty", "a", "none"]
    assert file.tensors["b"].data.tobytes() == b"bbb"
    assert file.tensors["a"].data.tobytes() == b"aa"
    assert file.tensors["none"].data.shape == (0, 2**40)


def test_chunks_of_any_layout_equal_one_write(tmp_path):
    array = random_array("F32", (7, 6))
    plan = [("a", "F32", (7, 6)), ("b", "F32", (6, 7))]
    with SafetensorsWriter(tmp_path / "one", plan) as one:
        one.write("a", array)
        one.write("b", array.T)
    with SafetensorsWriter(tmp_path / "many", plan) as many:
        for start in range(0, 7, 3):
            many.write("a", array[start : start + 3])
        many.write("b", np.asfortranarray(array.T[:4]))
        many.write("b", array.T[4:].copy())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
    assert one.sha256 == many.sha256 and list(one.sha256) == ["a", "b"]
    assert SafetensorsFile.open(tmp_path / "one").tensors["b"].data.tobytes() == array.T.tobytes()


def test_large_files_take_another_way_to_the_same_bytes(tmp_path, monkeypatch):
    plan = [("a", "F32", (300, 1000)), ("b", "U8", (5,))]
    arrays = [np.arange(300_000, dtype=np.float32).reshape(300, 1000), np.arange(5, dtype=np.uint8)]
    digests = []
    for name, limit in (("small", 1 << 30), ("large", 0)):
        monkeypatch.setattr(output, "DIRECT_BYTES", limit)
        with SafetensorsWriter(tmp_path / name, plan) as writer:
            for (tensor, _, _), array in zip(plan, arrays):
                writer.write(tensor, array)
        digests.append(writer.sha256)
    assert (tmp_path / "small").read_bytes() == (tmp_path / "large").read_bytes()
    assert digests[0] == digests[1]


def test_bytes_are_reproducible_and_aligned(tmp_path):
    tensors = {"\u00e9": ("I8", random_array("I8", (3,))), "a": ("U8", random_array("U8", (2,)))}
    write_checkpoint(tmp_path / "1", tensors, {"x": "1", "a": "2"})
    write_checkpoint(tmp_path / "2", tensors, {"a": "2", "x": "1"})
    content = (tmp_path / "1").read_bytes()
    assert content == (tmp_path / "2").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0 and len(content) == 8 + length + 5
    assert content[8:].startswith(b'{"__metadata__":{"a":"2","x":"1"},"\xc3\xa9":{"dtype":"I8"')


def test_the_file_appears_at_close_only(tmp_path):
    path = tmp_path / "m"
    writer = SafetensorsWriter(path, [("a", "U8", (2,))])
    writer.write("a", np.zeros(2, np.uint8))
    assert os.listdir(tmp_path) == ["m.partial"]
    writer.close()
    writer.close()
    assert os.listdir(tmp_path) == ["m"]


def test_no_tensors(tmp_path):
    write_checkpoint(tmp_path / "m", {})
    assert dict(SafetensorsFile.open(tmp_path / "m").tensors) == {}


WRITER_FAULTS = {
    "order": (lambda w: w.write("b", np.zeros(2, np.uint8)), "want a next, got b"),
    "unknown": (lambda w: w.write("c", np.zeros(2, np.uint8)), "want a next, got c"),
    "dtype": (lambda w: w.write("a", np.zeros(4, np.int8)), "a: want uint8 for U8, got int8"),
    "too long": (lambda w: w.write("a", np.zeros(5, np.uint8)), "a: want at most 4 more .* got 5"),
    "nothing": (lambda w: None, "a: want 4 bytes, got 0 at close"),
    "half": (lambda w: w.write("a", np.zeros(3, np.uint8)), "a: want 4 bytes, got 3 at close"),
    "one of two": (lambda w: w.write("a", np.zeros(4, np.uint8)), "b: want 8 bytes, got 0 at"),
}


@pytest.mark.parametrize("case", WRITER_FAULTS)
def test_writer_faults_leave_no_file(tmp_path, case):
    fault, message = WRITER_FAULTS[case]
    with (
        pytest.raises(CheckpointError, match=message),
        SafetensorsWriter(tmp_path / "m", [("a", "U8", (4,)), ("b", "F32", (2,))]) as writer,
    ):
        fault(writer)
    assert os.listdir(tmp_path) == []


def test_writer_refuses_more_than_planned(tmp_path):
    with (
        pytest.raises(CheckpointError, match="want no more tensors next, got a"),
        SafetensorsWriter(tmp_path / "m", [("a", "U8", (1,))]) as writer,
    ):
        writer.write("a", np.zeros(1, np.uint8))
        writer.write("a", np.zeros(1, np.uint8))


def test_an_exception_of_the_caller_keeps_the_old_file(tmp_path):
    path = write(tmp_path, b"old", "m")
    with pytest.raises(KeyError), SafetensorsWriter(path, [("a", "U8", (4,))]):
        raise KeyError
    assert os.listdir(tmp_path) == ["m"] and path.read_bytes() == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_leaves_no_partial_file(tmp_path):
    os.symlink("/dev/full", tmp_path / "m.partial")
    with pytest.raises(OSError), SafetensorsWriter(tmp_path / "m", [("a", "U8", (1 << 20,))]) as writer:
        writer.write("a", np.zeros(1 << 20, np.uint8))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("tensors, metadata, message", [
    ([("a", "U8", (1,)), ("a", "U8", (1,))], {}, "a: duplicate"),
    ([("__metadata__", "U8", (1,))], {}, "__metadata__: duplicate or reserved"),
    ([("a", "float", (1,))], {}, "a: want a known dtype, got float"),
    ([("a", "U8", (2, 0))], {}, "a: want at most 32 dimensions of at least 1"),
    ([("a", "U8", (1,) * 33)], {}, "a: want at most 32 dimensions"),
    ([], {"a": 1}, "__metadata__: want strings"),
])  # fmt: skip
def test_writer_plan_faults(tmp_path, tensors, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        SafetensorsWriter(tmp_path / "m", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_the_reference_library_agrees(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    want = {"a": random_array("I8", (3, 4)), "b": np.arange(6, dtype=np.float32).reshape(2, 3)}
    write_checkpoint(tmp_path / "m", {"a": ("I8", want["a"]), "b": ("F32", want["b"])}, {"k": "v"})
    loaded = library.load_file(tmp_path / "m")
    library.save_file(want, tmp_path / "theirs", {"k": "v"})
    theirs = SafetensorsFile.open(tmp_path / "theirs")
    assert theirs.metadata == {"k": "v"}
    for name, array in want.items():
        np.testing.assert_array_equal(loaded[name], array)
        np.testing.assert_array_equal(theirs.tensors[name].data, array)


# --- directories ------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    """Two files and their index."""
    for number, name in ((1, "a"), (2, "b")):
        array = np.full(4, number, np.uint8)
        write_checkpoint(tmp_path / f"model-{number}.safetensors", {name: ("U8", array)})
    write_index(tmp_path, {"b": "model-2.safetensors", "a": "model-1.safetensors"})
    return tmp_path


def write_index(path, weight_map):
    index = {"metadata": {"total_size": 8}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_indexed_directory(directory):
    opened = SafetensorsDirectory.open(str(directory))
    assert list(opened.tensors) == ["b", "a"]
    assert opened.tensors["b"].data.tolist() == [2, 2, 2, 2]
    assert opened.tensors["b"].path == directory / "model-2.safetensors"
    assert opened.size == sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def test_directory_of_a_single_file(tmp_path):
    with pytest.raises(FileFormatError, match="directory: want model.safetensors.index.json or"):
        SafetensorsDirectory.open(tmp_path)
    write_checkpoint(tmp_path / "model.safetensors", {"a": ("U8", np.ones(3, np.uint8))})
    assert SafetensorsDirectory.open(tmp_path).tensors["a"].data.tolist() == [1, 1, 1]


ONE, TWO = "model-1.safetensors", "model-2.safetensors"


OUTSIDE = [f"../{TWO}", "/etc/passwd", "..", ".", "", "..\\x", "x\0", "a:b", 3, None]


def index_fault(directory):
    with pytest.raises(FileFormatError) as caught:
        SafetensorsDirectory.open(directory)
    return str(caught.value).removeprefix(f"{directory}/")


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_of_its_folder_only(directory, name):
    write_index(directory, {"a": ONE, "b": name})
    assert index_fault(directory) == (
        f"{INDEX_NAME}: weight_map b: want the name of a file in this folder, got {name!r}"
    )


@pytest.mark.parametrize("weight_map, message", [
    ({}, f"{INDEX_NAME}: weight_map: want an object of tensor and file names, got {{}}"),
    ([ONE], f"{INDEX_NAME}: weight_map: want an object of tensor and file names, got ['{ONE}']"),
    (None, f"{INDEX_NAME}: weight_map: want an object of tensor and file names, got None"),
    ({"a": ONE, "b": "model-3.safetensors"},
     "model-3.safetensors: file: want a file that can be read, got: No such file or directory"),
    ({"a": ONE, "b": TWO, "c": TWO}, f"{INDEX_NAME}: tensor c: want it in {TWO}, got none"),
    ({"b": TWO, "c": ONE}, f"{INDEX_NAME}: tensor c: want it in {ONE}, got none"),
    ({"a": TWO, "b": TWO}, f"{INDEX_NAME}: tensor a: want it in {TWO}, got none"),
    ({"a": TWO, "b": ONE}, f"{INDEX_NAME}: tensor a: want it in {TWO}, got it in {ONE}"),
    ({"a": ONE, "b": INDEX_NAME}, f"{INDEX_NAME}: header length: want 2 to 104 bytes, got "
     "7017841271895827067"),
])  # fmt: skip
def test_index_faults(directory, weight_map, message):
    write_index(directory, weight_map)
    assert index_fault(directory) == message


def test_the_index_says_which_tensors_a_directory_has(directory):
    """A tensor that lies in a shard counts where the index names it, and nowhere else."""
    both = {name: ("U8", np.full(4, 7, np.uint8)) for name in ("a", "c")}
    write_checkpoint(directory / TWO, both | {"b": ("U8", np.full(4, 2, np.uint8))})
    opened = SafetensorsDirectory.open(directory)
    assert {name: view.data.tolist() for name, view in opened.tensors.items()} == {"a": [1] * 4, "b": [2] * 4}
    assert sorted((view.path.name, view.name) for view in opened.unindexed) == [(TWO, "a"), (TWO, "c")]


@pytest.mark.parametrize("weight_map", [
    {"a": ONE, "b": TWO, "c": TWO},
    {"a": ONE, "b": TWO, "c": "model-3.safetensors"},
    {"a": ONE, "b": TWO, "c": TWO, "c2": "model-3.safetensors"},
])  # fmt: skip
def test_what_is_optional_may_be_absent_with_its_file(directory, weight_map):
    write_index(directory, weight_map)
    opened = SafetensorsDirectory.open(directory, lambda name: name.startswith("c"))
    assert list(opened.tensors) == ["a", "b"] and len(opened.files) == 2
    assert index_fault(directory)


def test_an_optional_file_that_is_there_must_be_whole(directory):
    write_index(directory, {"a": ONE, "b": TWO, "c": "model-3.safetensors"})
    (directory / "model-3.safetensors").write_bytes(b"half")
    with pytest.raises(FileFormatError, match="model-3.safetensors: header length"):
        SafetensorsDirectory.open(directory, lambda name: name == "c")


ADVICE = f"remove model.safetensors, or {INDEX_NAME} and its files"


@pytest.mark.parametrize("single, message", [
    ({"a": ("U8", [1] * 4)}, f"tensor b: want it as in {TWO} by {INDEX_NAME}, got none"),
    ({"a": ("U8", [1] * 4), "b": ("U8", [2] * 3 + [3])},
     f"tensor b: want the bits of {TWO}, which {INDEX_NAME} names, got others"),
    ({"a": ("U8", [1] * 4), "b": ("I8", [2] * 4)}, f"tensor b: want U8 [4] as in {TWO}, got I8 [4]"),
    ({"a": ("U8", [1] * 2), "b": ("U8", [2] * 4)}, f"tensor a: want U8 [4] as in {ONE}, got U8 [2]"),
    ({"a": ("U8", [1] * 4), "b": ("U8", [2] * 4), "d": ("U8", [0])},
     f"tensor d: want no such tensor, as in {INDEX_NAME}, got one"),
])  # fmt: skip
def test_a_single_file_beside_an_index_holds_the_same_tensors(directory, single, message):
    dtypes = {"U8": np.uint8, "I8": np.int8}
    arrays = {name: (kind, np.array(values, dtypes[kind])) for name, (kind, values) in single.items()}
    write_checkpoint(directory / "model.safetensors", arrays)
    assert index_fault(directory) == f"model.safetensors: {message}; {ADVICE}"


def test_a_single_file_that_agrees_with_the_index(directory):
    arrays = {"b": ("U8", np.full(4, 2, np.uint8)), "a": ("U8", np.full(4, 1, np.uint8))}
    write_checkpoint(directory / "model.safetensors", arrays)
    assert list(SafetensorsDirectory.open(directory).tensors) == ["b", "a"]
    write_checkpoint(directory / "model.safetensors", arrays | {"c": ("U8", np.zeros(1, np.uint8))})
    assert (
        SafetensorsDirectory.open(directory, lambda name: name == "c").tensors["a"].data.tolist() == [1] * 4
    )


def test_half_a_single_file_beside_an_index(directory):
    (directory / "model.safetensors").write_bytes(b"half")
    assert index_fault(directory) == (
        f"model.safetensors: file: want {INDEX_NAME}'s tensors, got header length: want 8 bytes, got 4; "
        f"{ADVICE}"
    )


def test_a_single_file_that_the_index_names(directory):
    os.replace(directory / TWO, directory / "model.safetensors")
    write_index(directory, {"a": ONE, "b": "model.safetensors"})
    assert list(SafetensorsDirectory.open(directory).tensors) == ["a", "b"]


@pytest.mark.parametrize("link", [INDEX_NAME, "model.safetensors"])
def test_a_link_to_nothing_is_named(tmp_path, link):
    (tmp_path / link).symlink_to(tmp_path / "blob")
    with pytest.raises(
        FileFormatError, match=f"{link}: file: want a file that can be read, got: No such file"
    ):
        SafetensorsDirectory.open(tmp_path)


@pytest.mark.parametrize("names, found", [
    (["pytorch_model.bin", ".hidden.bin", "config.json"], ", but pytorch_model.bin"),
    (["m.gguf", "consolidated.safetensors"],
     ", but consolidated.safetensors, m.gguf: give the path of m.gguf"),
    ([f"pytorch_model-{i}.bin" for i in range(5)],
     ", but pytorch_model-0.bin, pytorch_model-1.bin, pytorch_model-2.bin and 2 more"),
    ([], ""),
])  # fmt: skip
def test_a_directory_with_weights_of_another_form(tmp_path, names, found):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileFormatError) as caught:
        SafetensorsDirectory.open(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: directory: want {INDEX_NAME} or model.safetensors, got neither{found}"
    )


@pytest.mark.parametrize("text, message", [
    (b'{"weight_map": {"a": "x", "a": "y"}}', "index: want a JSON object, got the key 'a' twice"),
    (b"[1]", "index: want a JSON object, got a list"),
    (b"[" * 100_000, "index: want a JSON object, got one nested too deeply"),
    (b'{"a": Infinity}', "index: want a JSON object, got the number Infinity"),
    (b"{1}", "index: want a JSON object, got Expecting property name enclosed in double quotes: "
     "line 1 column 2 (char 1)"),
    (b"", "file: want some bytes, got an empty file"),
])  # fmt: skip
def test_index_text_faults(directory, text, message):
    (directory / INDEX_NAME).write_bytes(text)
    assert index_fault(directory) == f"{INDEX_NAME}: {message}"


def test_an_index_of_100_mb_is_refused(directory):
    os.truncate(directory / INDEX_NAME, 100_000_001)
    assert index_fault(directory) == (f"{INDEX_NAME}: index: want at most 100000000 bytes, got 100000001")


# --- hostile files ----------------------------------------------------------

DUPLICATE = json.dumps(entry(0, 1)).encode()
HOSTILE = {
    "empty": (b"", "file: want some bytes, got an empty file"),
    "short": (b"1234567", "header length: want 8 bytes, got 7"),
    "header longer than the file": (
        struct.pack("<Q", 100) + b"{}", "header length: want 2 to 2 bytes, got 100"
    ),
    "header of 2^64-1": (struct.pack("<Q", 2**64 - 1) + b"{}",
        "header length: want 2 to 2 bytes, got 18446744073709551615"),
    "header of 0": (bytes(16), "header length: want 2 to 8 bytes, got 0"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'),
        "header: want a JSON object, got 'utf-8' codec can't decode byte 0xff in position "
        "2: invalid start byte"),
    "not JSON": (file_bytes(b"{abc}"),
        "header: want a JSON object, got Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)"),
    "not an object": (file_bytes([1]), "header: want a JSON object, got a list"),
    "nested": (file_bytes(b"[" * 200_000), "header: want a JSON object, got one nested too deeply"),
    "nested in an entry": (file_bytes(b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"),
        "tensor a: want dtype, shape and data_offsets, got [[[[...]]]]"),
    "text behind": (file_bytes(b"{} {}"),
        "header: want a JSON object, got Extra data: line 1 column 4 (char 3)"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"),
        "header: want a JSON object, got Unexpected UTF-8 BOM (decode using utf-8-sig): "
        "line 1 column 1 (char 0)"),
    "size 1e400": (file_bytes(b'{"a":{"dtype":"U8","shape":[1e400],"data_offsets":[0,1]}}', b"1"),
        "tensor a: want a shape of sizes below 2^63, got [inf]"),
    "offset 2^63": (file_bytes({"a": {**entry(0, 1), "data_offsets": [0, 2**63]}}, b"1"),
        "tensor a: want data_offsets [begin, end], got [0, 9223372036854775808]"),
    "offsets of 2^63 - 1": (
        file_bytes({"a": entry(2**63 - 2, 2**63 - 1)}, b"1"),
        "tensor a: want data from 0 on, got 9223372036854775806: a hole"
    ),
    "no tensors": (file_bytes({}, b"1"), "data: want 0 bytes, got 1: trailing bytes"),
    "entry with a field more": (file_bytes({"a": {**entry(0, 1), "x": 1}}, b"1"),
        "tensor a: want dtype, shape and data_offsets, got {'data_offsets': [0, 1], "
        "'dtype': 'U8', 'shape': [1], 'x': 1}"),
    "long number": (file_bytes(b'{"a":' + b"1" * 5000 + b"}"),
        "header: want a JSON object, got an integer of 5000 digits"),
    "not a number": (file_bytes(b'{"a": NaN}'), "header: want a JSON object, got the number NaN"),
    "duplicate name": (
        file_bytes(b'{"a":' + DUPLICATE + b',"a":' + DUPLICATE + b"}", b"1"),
        "header: want a JSON object, got the key 'a' twice",
    ),
    "duplicate field": (
        file_bytes(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        "header: want a JSON object, got the key 'dtype' twice",
    ),
    "metadata": (file_bytes({"__metadata__": {"a": 1}}),
        "__metadata__: want an object of strings, got {'a': 1}"),
    "metadata list": (file_bytes({"__metadata__": []}),
        "__metadata__: want an object of strings, got []"),
    "entry": (file_bytes({"a": 3}), "tensor a: want dtype, shape and data_offsets, got 3"),
    "entry without shape": (
        file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 0]}}),
        "tensor a: want dtype, shape and data_offsets, got {'data_offsets': [0, 0], "
        "'dtype': 'U8'}"
    ),
    "dtype": (file_bytes({"a": entry(0, 1, "Q8")}, b"1"), "tensor a: want a known dtype, got 'Q8'"),
    "dtype list": (file_bytes({"a": entry(0, 1, [])}, b"1"), "tensor a: want a known dtype, got []"),
    "negative size": (file_bytes({"a": entry(0, 1, "U8", [-1])}, b"1"),
        "tensor a: want a shape of sizes below 2^63, got [-1]"),
    "size true": (file_bytes({"a": entry(0, 1, "U8", [True])}, b"1"),
        "tensor a: want a shape of sizes below 2^63, got [True]"),
    "size 1.0": (file_bytes({"a": entry(0, 1, "U8", [1.0])}, b"1"),
        "tensor a: want a shape of sizes below 2^63, got [1.0]"),
    "size 2^63": (file_bytes({"a": entry(0, 1, "U8", [2**63])}, b"1"),
        "tensor a: want a shape of sizes below 2^63, got [9223372036854775808]"),
    "33 dimensions": (file_bytes({"a": entry(0, 1, "U8", [1] * 33)}, b"1"),
        "tensor a: want at most 32 dimensions, got 33"),
    "offsets reversed": (
        file_bytes({"a": {**entry(0, 1), "data_offsets": [1, 0]}}, b"1"),
        "tensor a: want data_offsets [begin, end], got [1, 0]"
    ),
    "three offsets": (
        file_bytes({"a": {**entry(0, 1), "data_offsets": [0, 1, 1]}}, b"1"),
        "tensor a: want data_offsets [begin, end], got [0, 1, 1]"
    ),
    "negative offset": (file_bytes({"a": entry(-1, 0)}, b"1"),
        "tensor a: want data_offsets [begin, end], got [-1, 0]"),
    "shape unlike range": (
        file_bytes({"a": entry(0, 8, "F32", [3])}, bytes(8)),
        "tensor a: want 12 bytes for F32 [3], got 8"
    ),
    "product overflows": (
        file_bytes({"a": entry(0, 0, "F32", [2**32, 2**32])}),
        "tensor a: want 73786976294838206464 bytes for F32 [4294967296, 4294967296], got 0"
    ),
    "empty, product overflows": (
        file_bytes({"a": entry(0, 0, "F32", [0, 2**32, 2**32])}),
        "tensor a: want sizes whose product is below 2^63, got [0, 4294967296, 4294967296]"
    ),
    "out of range": (
        file_bytes({"a": entry(0, 9)}, bytes(8)),
        "tensor a: want data within the file's 8 bytes, got its end at 9"
    ),
    "overlap": (
        file_bytes({"a": entry(0, 4), "b": entry(3, 8)}, bytes(8)),
        "tensor b: want data from 4 on, got 3: an overlap",
    ),
    "twice the same": (
        file_bytes({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
        "tensor b: want data from 8 on, got 0: an overlap"
    ),
    "hole": (
        file_bytes({"a": entry(0, 4), "b": entry(5, 8)}, bytes(8)),
        "tensor b: want data from 4 on, got 5: a hole",
    ),
    "hole at the start": (file_bytes({"a": entry(1, 8)}, bytes(8)),
        "tensor a: want data from 0 on, got 1: a hole"),
    "trailing bytes": (file_bytes({"a": entry(0, 7)}, bytes(8)),
        "data: want 7 bytes, got 8: trailing bytes"),
    "control characters": (file_bytes({"a\n\x1b": 3}),
        "tensor a\\n\\x1b: want dtype, shape and data_offsets, got 3"),
    "lone surrogate": (file_bytes({"\ud800": 3}),
        "tensor \\ud800: want dtype, shape and data_offsets, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_one_clear_error(tmp_path, case):
    content, message = HOSTILE[case]
    path = write(tmp_path, content)
    with pytest.raises(FileFormatError) as caught:
        SafetensorsFile.open(path)
    text = str(caught.value)
    assert text == f"{path}: {message}" and text.isprintable() and len(text) < 1000


def test_a_header_over_100_mb_is_refused(tmp_path):
    path = write(tmp_path, struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, 200_000_000)
    with pytest.raises(FileFormatError, match="header length: want 2 to 100000000 bytes"):
        SafetensorsFile.open(path)


VALID = file_bytes({"__metadata__": {"k": "v"}, "a": entry(0, 8, "F32", [2]), "b": entry(8, 12)}, bytes(12))


def test_every_truncation_is_an_error(tmp_path):
    SafetensorsFile.open(write(tmp_path, VALID))
    for length in range(len(VALID)):
        with pytest.raises(FileFormatError):
            SafetensorsFile.open(write(tmp_path, VALID[:length]))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 13), st.integers(0, 255)), max_size=3))
def test_a_damaged_header_opens_or_is_an_error(tmp_path_factory, changes):
    content = bytearray(VALID)
    for position, byte in changes:
        content[position] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        for tensor in SafetensorsFile.open(path).tensors.values():
            tensor.data.tobytes()
    except FileFormatError as error:
        assert str(error).startswith(f"{path}: ")
