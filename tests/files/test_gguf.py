"""The GGUF reader: values against gguf-py's own, laziness, splits, and hostile files."""

import os
import shutil
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as GGML
from gguf.constants import GGUFValueType as Value
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import FileFormatError, InputError, PyengineError
from pyengine.files.ggml_blocks import BY_NAME
from pyengine.files.gguf import GGUF, MAX_ENTRIES, MAX_STRINGS, dequantize, first_nonfinite_scale
from pyengine.files.safetensors import SafetensorsFile
from pyengine.files.strict_json import read_object

TYPES = [GGML.F32, GGML.F16, GGML.BF16, GGML.Q8_0, GGML.Q4_0]
SCALAR_FORMATS = {Value.UINT32: "<I", Value.INT32: "<i", Value.UINT16: "<H", Value.FLOAT32: "<f"}


# --- files made by hand -----------------------------------------------------


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def string(text):
    return u64(len(text)) + text


def scalar(key, kind, value):
    payload = string(value) if kind == Value.STRING else struct.pack(SCALAR_FORMATS[kind], value)
    return string(key) + u32(kind) + payload


def array(key, element, length, payload):
    return string(key) + u32(Value.ARRAY) + u32(element) + u64(length) + payload


def info(name=b"t", dims=(32,), kind=GGML.F32, offset=0):
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf_bytes(values=(), infos=(), data=b"", version=3, n_values=None, n_tensors=None, align=32):
    n_values = len(values) if n_values is None else n_values
    n_tensors = len(infos) if n_tensors is None else n_tensors
    head = b"GGUF" + u32(version) + u64(n_tensors) + u64(n_values)
    head += b"".join(values) + b"".join(infos)
    return head + bytes(-len(head) % align) + data


def write(tmp_path, content, name="m.gguf"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


# --- files made by gguf-py --------------------------------------------------


def random_quantized(kind, shape, seed=0):
    """Random bytes of a type, scales finite: -> array as GGUFWriter wants it."""
    rng = np.random.default_rng(seed)
    if kind in (GGML.F32, GGML.F16):
        return rng.standard_normal(shape).astype(np.float32 if kind == GGML.F32 else np.float16)
    if kind == GGML.BF16:
        return gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), dtype=np.uint8)
    blocks[..., 1] &= 0xBF  # the top exponent bit: no NaN, no infinity, subnormals stay
    return blocks.reshape(*shape[:-1], -1)


def write_tensor(path, kind, shape, seed=0):
    stored = random_quantized(kind, shape, seed)
    writer = gguf.GGUFWriter(path, "test")
    writer.add_tensor("t", stored, raw_dtype=kind)
    finish(writer)
    return stored


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- values -----------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(lead=st.lists(st.integers(1, 4), max_size=2), blocks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_dequantize_equals_gguf_py_in_bits(tmp_path_factory, kind, lead, blocks, seed):
    path = tmp_path_factory.mktemp("q") / "m.gguf"
    shape = (*lead, 32 * blocks)
    stored = write_tensor(path, kind, shape, seed)
    tensor = GGUF.open(path).tensors["t"]
    assert (tensor.shape, tensor.type) == (shape, kind)
    values = dequantize(tensor)
    want = gguf.quants.dequantize(stored, kind).reshape(shape)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32), want.view(np.uint32))
    assert first_nonfinite_scale(tensor) is None


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(64,), (6, 64), (5, 3, 64)])
def test_dequantize_rows(tmp_path, kind, shape):
    write_tensor(tmp_path / "m.gguf", kind, shape)
    tensor = GGUF.open(tmp_path / "m.gguf").tensors["t"]
    full = dequantize(tensor)
    for rows in (slice(1, 4), slice(None, None, 2), slice(4, 0, -1), slice(2, 2), 3, [3, 0, 3]):
        np.testing.assert_array_equal(dequantize(tensor, rows), full[rows])


def test_q4_0_nibble_order(tmp_path):
    block = struct.pack("<e", 0.5) + bytes(range(16))  # high nibbles 0, low ones 0..15
    path = write(tmp_path, gguf_bytes(infos=[info(kind=GGML.Q4_0)], data=block))
    want = [0.5 * (i - 8) for i in range(16)] + [-4.0] * 16
    assert dequantize(GGUF.open(path).tensors["t"]).tolist() == want


@pytest.mark.parametrize("kind", TYPES)
def test_data_is_a_read_only_view_of_the_file(tmp_path, kind):
    stored = write_tensor(tmp_path / "m.gguf", kind, (4, 64))
    tensor = GGUF.open(tmp_path / "m.gguf").tensors["t"]
    np.testing.assert_array_equal(tensor.data.view(np.uint8), stored.view(np.uint8))
    assert np.shares_memory(tensor.data, tensor.data)
    assert not tensor.data.flags.writeable and not tensor.data.flags.owndata
    dtype = {GGML.F32: np.float32, GGML.F16: np.float16, GGML.BF16: np.uint16}.get(kind, np.uint8)
    assert tensor.data.dtype == dtype
    row = gguf.GGML_QUANT_SIZES[kind][1] * 64 // gguf.GGML_QUANT_SIZES[kind][0]
    assert tensor.data.shape == ((4, row) if dtype == np.uint8 else (4, 64))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bits", ["nan", "inf", "-inf"])
def test_first_nonfinite_scale(tmp_path, kind, bits, monkeypatch):
    stored = random_quantized(kind, (3, 5, 64)).copy()
    units = 64 if kind in TYPES[:3] else 2  # elements, or blocks, of a row
    fmt = {GGML.F32: "<f", GGML.BF16: "<f"}.get(kind, "<e")
    word = struct.pack(fmt, float(bits))[-2 if kind == GGML.BF16 else 0 :]
    flat = stored.view(np.uint8).reshape(3, 5, units, -1)
    for index in [(2, 4, units - 1), (1, 0, 1)]:  # the later one first
        flat[(*index, slice(len(word)))] = list(word)
        path = write(tmp_path, gguf_bytes(infos=[info(dims=(64, 5, 3), kind=kind)], data=stored.tobytes()))
        for chunk in (64 << 20, 16):
            monkeypatch.setattr("pyengine.files.refused.PIECE_BYTES", chunk)
            assert first_nonfinite_scale(GGUF.open(path).tensors["t"]) == index


def test_a_known_type_without_a_decoder_is_listed_only(tmp_path):
    path = write(tmp_path, gguf_bytes(infos=[info(dims=(256, 2), kind=GGML.Q8_K)], data=bytes(2 * 292)))
    tensor = GGUF.open(path).tensors["t"]
    assert (tensor.type, tensor.shape, tensor.nbytes) == (GGML.Q8_K, (2, 256), 584)
    for use in (lambda: tensor.data, lambda: dequantize(tensor), lambda: first_nonfinite_scale(tensor)):
        with pytest.raises(FileFormatError, match="tensor t: want type F32, .* got Q8_K"):
            use()


# --- metadata ---------------------------------------------------------------


@pytest.fixture
def metadata(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -5)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 1e-6)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "gr\u00fc\u00df \U0001f600")
    writer.add_array("sections", [11, 11, 10, 0])
    writer.add_array("layers", [True, False, True])
    writer.add_array("tokens", ["a", "", "\u0120b", "\U0001f600"])
    writer.add_array("bytes", [b"a", b"\xff\xfe"])
    writer.add_custom_alignment(64)
    finish(writer)
    return GGUF.open(tmp_path / "m.gguf").metadata


def test_scalars(metadata):
    want = {
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -5,
        "i32": -(2**31),
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f32": float(np.float32(1e-6)),
        "f64": 0.1,
        "yes": True,
        "text": "gr\u00fc\u00df \U0001f600",
        "general.architecture": "test",
    }
    for key, value in want.items():
        assert metadata[key] == value and type(metadata[key]) is type(value)
        assert metadata.require(key, type(value)) == value
    assert list(metadata)[-1] == "general.alignment" and len(metadata) == 17


def test_arrays(metadata):
    assert metadata["sections"].tolist() == [11, 11, 10, 0]
    assert metadata["layers"].tolist() == [True, False, True]
    assert metadata["layers"].dtype == bool
    assert not metadata["sections"].flags.writeable and not metadata["sections"].flags.owndata
    assert np.shares_memory(metadata["sections"], metadata["sections"])
    assert metadata["tokens"] == ["a", "", "\u0120b", "\U0001f600"]
    assert metadata.raw_strings("tokens")[2] == "\u0120b".encode()
    assert metadata.raw_strings("bytes") == [b"a", b"\xff\xfe"]
    with pytest.raises(FileFormatError, match=r"m.gguf: bytes: want UTF-8, .* at index 1"):
        metadata["bytes"]
    with pytest.raises(FileFormatError, match="u8: want strings, got uint8"):
        metadata.raw_strings("u8")


def test_lookups(metadata):
    assert "tokens" in metadata and "absent" not in metadata
    assert metadata.get("absent", 7) == 7
    with pytest.raises(KeyError):
        metadata["absent"]
    assert str(metadata.type_of("tokens")) == "array of 4 string"
    assert metadata.type_of("u8") == (Value.UINT8, None, None)
    assert metadata.require("tokens", list, of=str)[0] == "a"
    assert metadata.require("layers", list, of=bool).tolist() == [True, False, True]


@pytest.mark.parametrize("key, kind, of, problem", [
    ("absent", int, None, "absent: want int, got no such key"),
    ("yes", int, None, "yes: want int, got bool"),
    ("u8", float, None, "u8: want float, got uint8"),
    ("f32", int, None, "f32: want int, got float32"),
    ("text", list, None, "text: want list, got string"),
    ("tokens", str, None, "tokens: want str, got array of 4 string"),
    ("tokens", list, int, "tokens: want list of int, got array of 4 string"),
    ("sections", list, str, "sections: want list of str, got array of 4 int32"),
    ("text", list, str, "text: want list of str, got string"),
])  # fmt: skip
def test_require_names_what_it_wanted(metadata, key, kind, of, problem):
    with pytest.raises(FileFormatError, match=problem):
        metadata.require(key, kind, of)


def test_file_properties(tmp_path):
    path = write(
        tmp_path,
        gguf_bytes(
            [scalar(b"general.alignment", Value.UINT32, 64)],
            [info(offset=64), info(b"s", (2, 3), GGML.F16, 0)],
            bytes(192),
            version=2,
            align=64,
        ),
    )
    file = GGUF.open(str(path))
    assert (file.path, file.paths, file.version, file.alignment) == (path, (path,), 2, 64)
    assert file.size == path.stat().st_size
    assert list(file.tensors) == ["t", "s"]
    assert file.tensors["s"].shape == (3, 2)


def test_views_outlive_the_file_object(tmp_path):
    stored = write_tensor(tmp_path / "m.gguf", GGML.Q8_0, (4, 64))
    data = GGUF.open(tmp_path / "m.gguf").tensors["t"].data
    os.unlink(tmp_path / "m.gguf")
    np.testing.assert_array_equal(data, stored)


def test_opening_a_full_vocabulary_decodes_nothing(tmp_path):
    def strings(count):
        return b"".join(string(b"%x" % (i * 2654435761 % 2**32)) for i in range(count))

    values = [array(b"tokens", Value.STRING, 248320, strings(248320)),
              array(b"types", Value.INT32, 248320, bytes(4 * 248320)),
              array(b"merges", Value.STRING, 247587, strings(247587)),
              scalar(b"last", Value.UINT32, 7)]  # fmt: skip
    path = write(tmp_path, gguf_bytes(values))
    start = time.perf_counter()
    metadata = GGUF.open(path).metadata
    opening = time.perf_counter() - start
    tokens = metadata["tokens"]
    decoding = time.perf_counter() - start - opening
    print(f"opened in {opening * 1e3:.0f} ms; tokens decoded in {decoding * 1e3:.0f} ms")
    assert opening < 2
    assert len(tokens) == 248320 and tokens[1] == "9e3779b1" and metadata["last"] == 7
    tracemalloc.start()
    assert "tokens" in GGUF.open(path).metadata
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # the positions of five values, and not one token


# --- splits -----------------------------------------------------------------


@pytest.fixture
def splits(tmp_path):
    """Three splits of five tensors -> the list of their paths."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test", split_max_tensors=2)
    for index in range(5):
        writer.add_tensor(f"t{index}", np.full((2, 32), index, np.float32))
    finish(writer)
    return [tmp_path / f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


def test_splits_read_as_one(splits):
    file = GGUF.open(splits[0])
    assert list(file.paths) == splits
    assert file.size == sum(path.stat().st_size for path in splits)
    assert list(file.tensors) == [f"t{index}" for index in range(5)]
    assert [int(dequantize(tensor)[1, 31]) for tensor in file.tensors.values()] == [0, 1, 2, 3, 4]
    assert file.tensors["t4"].path == splits[2]
    assert file.metadata["general.architecture"] == "test"


def split_bytes(number, count, names, total=None):
    values = [scalar(b"split.no", Value.UINT16, number), scalar(b"split.count", Value.UINT16, count)]
    if total is not None:
        values.append(scalar(b"split.tensors.count", Value.INT32, total))
    infos = [info(name, (32,), offset=128 * i) for i, name in enumerate(names)]
    return gguf_bytes(values, infos, bytes(128 * len(names)))


def test_split_faults(splits, tmp_path):
    def check(at, message, path=splits[0]):
        with pytest.raises(FileFormatError) as caught:
            GGUF.open(path)
        assert str(caught.value) == f"{at}: {message}"

    first, second, third = splits
    other = tmp_path / "other.gguf"
    check(second, f"split.no: want 0, got 1: give the path of {first.name}", second)
    shutil.copy(first, other)
    check(other, "file name: want NAME-00001-of-00003.gguf, got other.gguf", other)
    content = second.read_bytes()
    shutil.copy(third, second)
    check(second, "split.no: want 1, got 2")
    second.write_bytes(split_bytes(1, 2, [b"t2", b"t3"]))
    check(second, f"split.count: want 3 as in {first}, got 2")
    second.write_bytes(split_bytes(1, 3, [b"t0", b"t3"]))
    check(second, f"tensor t0: want it in one split, got it in {first} too")
    second.write_bytes(split_bytes(1, 3, [b"t2"]))
    check(first, "split.tensors.count: want 5 tensors in all splits, got 4")
    second.write_bytes(gguf_bytes())
    check(second, "split.count: want int, got no such key")
    second.write_bytes(b"")
    check(second, "file: want some bytes, got an empty file")
    second.unlink()
    check(second, "file: want a file that can be read, got: No such file or directory")
    huge = write(tmp_path, split_bytes(0, 65535, [b"t"]), "h-00001-of-65535.gguf")
    check(
        tmp_path / "h-00002-of-65535.gguf",
        "file: want a file that can be read, got: No such file or directory",
        huge,
    )
    second.write_bytes(content)
    assert len(GGUF.open(splits[0]).tensors) == 5


# --- hostile files ----------------------------------------------------------

HUGE = 2**63 - 1
ALIGNMENT = b"general.alignment"
READ = ", ".join(BY_NAME)

HOSTILE = {
    "empty": (b"", "file: want some bytes, got an empty file"),
    "short magic": (b"GG", "magic: want 4 bytes, got 2 to the end of the file"),
    "short header": (gguf_bytes()[:20], "key count: want 8 bytes, got 4 to the end of the file"),
    "magic": (b"GGML" + bytes(40), "magic: want b'GGUF', got b'GGML'"),
    "version 0": (gguf_bytes(version=0), "version: want 2 or 3, got 0"),
    "version 1": (gguf_bytes(version=1), "version: want 2 or 3, got 1"),
    "version 4": (gguf_bytes(version=4), "version: want 2 or 3, got 4"),
    "version 2^32-1": (gguf_bytes(version=2**32 - 1), "version: want 2 or 3, got 4294967295"),
    "big-endian": (gguf_bytes(version=3 << 24),
        "version: want a little-endian file, got 0x03000000: big-endian"),
    "tensor count": (gguf_bytes(n_tensors=2**64 - 1),
        "tensor count: want at most 0 in what is left of the file, got 18446744073709551615"),
    "tensor count, a bit high": (gguf_bytes(infos=[info()], n_tensors=2, data=bytes(128)),
        "tensor 1: want a length of 1 to 64 bytes, got 0"),
    "key count": (gguf_bytes(n_values=2**64 - 1),
        "key count: want at most 0 in what is left of the file, got 18446744073709551615"),
    "key count, a bit high": (
        gguf_bytes([scalar(b"a", Value.STRING, b"x" * 30)], n_values=2, align=1),
        "key 1: want 8 bytes, got 0 to the end of the file",
    ),
    "43 bytes": (
        b"GGUF" + u32(3) + u64(0) + u64(1) + u64(2**60) + bytes(11),
        "key 0: want a length of 1 to 65535 bytes, got 1152921504606846976"
    ),
    "key longer than the file": (
        gguf_bytes([u64(60000) + bytes(20)], align=1),
        "key 0: want 60000 bytes, got 20 to the end of the file"
    ),
    "long key": (gguf_bytes([scalar(b"k" * 65536, Value.UINT32, 1)]),
        "key 0: want a length of 1 to 65535 bytes, got 65536"),
    "empty key": (gguf_bytes([scalar(b"", Value.STRING, b"x")]),
        "key 0: want a length of 1 to 65535 bytes, got 0"),
    "key not UTF-8": (gguf_bytes([scalar(b"\xff", Value.STRING, b"x")]),
        "key 0: want UTF-8, got b'\\xff'"),
    "duplicate key": (
        gguf_bytes([scalar(b"a", Value.STRING, b"x"), scalar(b"a", Value.UINT32, 1)]),
        "a: want every key once, got it again as key 1",
    ),
    "value type": (gguf_bytes([string(b"a") + u32(13) + bytes(8)]),
        "a: want a value type of 0 to 12, got 13"),
    "element type": (gguf_bytes([array(b"a", 99, 1, bytes(8))]),
        "a: want a value type of 0 to 12, got 99"),
    "string length": (
        gguf_bytes([string(b"a") + u32(Value.STRING) + u64(HUGE)]),
        "a: want 9223372036854775807 bytes, got 19 to the end of the file"
    ),
    "number array length": (gguf_bytes([array(b"a", Value.INT32, HUGE, bytes(8))]),
        "a: want 36893488147419103228 bytes, got 15 to the end of the file"),
    "string array length": (
        gguf_bytes([array(b"a", Value.STRING, HUGE, bytes(8))]),
        "a: want at most 1 strings, got 9223372036854775807"
    ),
    "string in an array": (
        gguf_bytes([array(b"a", Value.STRING, 2, string(b"x") + u64(HUGE) + bytes(40))]),
        "a: want its strings within the file, got one that runs past the end",
    ),
    "last string of an array": (
        gguf_bytes([array(b"a", Value.STRING, 2, string(b"x") + u64(99))]),
        "a: want its strings within the file, got one that runs past the end",
    ),
    "string of 2^64-1": (
        gguf_bytes([array(b"a", Value.STRING, 2, u64(2**64 - 1) + bytes(40))]),
        "a: want its strings within the file, got one that runs past the end",
    ),
    "nested arrays": (
        gguf_bytes([array(b"a", Value.ARRAY, 1, (u32(Value.ARRAY) + u64(1)) * 5000)]),
        "a: want an array of scalars or strings, got nested arrays",
    ),
    "truncated scalar": (gguf_bytes([string(b"abcd") + u32(Value.FLOAT64) + b"123"], align=1),
                         "abcd: want 8 bytes, got 3 to the end of the file"),
    "bool of 2": (gguf_bytes([array(b"a", Value.BOOL, 3, b"\0\1\2")]),
        "a: want bools of 0 or 1, got 2"),
    "alignment 0": (gguf_bytes([scalar(ALIGNMENT, Value.UINT32, 0)]),
        "general.alignment: want a power of two from 8 to 1048576, got 0"),
    "alignment 4": (gguf_bytes([scalar(ALIGNMENT, Value.UINT32, 4)]),
        "general.alignment: want a power of two from 8 to 1048576, got 4"),
    "alignment 13": (gguf_bytes([scalar(ALIGNMENT, Value.UINT32, 13)]),
        "general.alignment: want a power of two from 8 to 1048576, got 13"),
    "alignment 2^31": (
        gguf_bytes([scalar(ALIGNMENT, Value.UINT32, 2**31)]),
        "general.alignment: want a power of two from 8 to 1048576, got 2147483648"
    ),
    "alignment float": (
        gguf_bytes([scalar(ALIGNMENT, Value.FLOAT32, 32)]),
        "general.alignment: want uint32, got float32"
    ),
    "alignment int32": (
        gguf_bytes([scalar(ALIGNMENT, Value.INT32, 32)]),
        "general.alignment: want uint32, got int32"
    ),
    "alignment array": (
        gguf_bytes([array(ALIGNMENT, Value.UINT32, 1, u32(32))]),
        "general.alignment: want uint32, got array of 1 uint32"
    ),
    "alignment string": (gguf_bytes([scalar(ALIGNMENT, Value.STRING, b"32")]),
        "general.alignment: want uint32, got string"),
    "no dimensions": (gguf_bytes(infos=[info(dims=()) + bytes(9)]),
        "tensor t: want 1 to 4 dimensions, got 0"),
    "5 dimensions": (gguf_bytes(infos=[info(dims=(1,) * 5)]),
        "tensor t: want 1 to 4 dimensions, got 5"),
    "2^32-1 dimensions": (
        gguf_bytes(infos=[string(b"t") + u32(2**32 - 1) + bytes(60)]),
        "tensor t: want 1 to 4 dimensions, got 4294967295"
    ),
    "zero dimension": (gguf_bytes(infos=[info(dims=(32, 0))]),
        "tensor t: want dimensions of at least 1, got (32, 0)"),
    "element product": (
        gguf_bytes(infos=[info(dims=(2**32, 2**32))]),
        "tensor t: want fewer than 2^63 elements and bytes, got dimensions (4294967296, "
        "4294967296)"
    ),
    "byte size": (gguf_bytes(infos=[info(dims=(2**62,))]),
        "tensor t: want fewer than 2^63 elements and bytes, got dimensions "
        "(4611686018427387904,)"),
    "four huge dimensions": (
        gguf_bytes(infos=[info(dims=(2**64 - 32,) * 4, kind=GGML.Q8_0)]),
        "tensor t: want fewer than 2^63 elements and bytes, got dimensions "
        "(18446744073709551584, 18446744073709551584, 18446744073709551584, "
        "18446744073709551584)"
    ),
    "offset misaligned": (
        gguf_bytes(infos=[info(offset=16)], data=bytes(256)),
        "tensor t: want an offset of a multiple of 32, got 16"
    ),
    "offset out of range": (
        gguf_bytes(infos=[info(offset=2**64 - 32)], data=bytes(256)),
        "tensor t: want data within the file's 256 bytes, got bytes 18446744073709551584 "
        "to 18446744073709551712"
    ),
    "overlap": (
        gguf_bytes(infos=[info(), info(b"s", offset=96)], data=bytes(256)),
        "tensor s: want an offset from 128 on, got 96: overlaps t",
    ),
    "same offset": (
        gguf_bytes(infos=[info(), info(b"s")], data=bytes(256)),
        "tensor s: want an offset from 128 on, got 0: overlaps t"
    ),
    "duplicate name": (
        gguf_bytes(infos=[info(), info(offset=128)], data=bytes(256)),
        "tensor t: want every name once, got it again as tensor 1"
    ),
    "long name": (gguf_bytes(infos=[info(b"t" * 65)], data=bytes(128)),
        "tensor 0: want a length of 1 to 64 bytes, got 65"),
    "empty name": (gguf_bytes(infos=[info(b"")], data=bytes(128)),
        "tensor 0: want a length of 1 to 64 bytes, got 0"),
    "name not UTF-8": (gguf_bytes(infos=[info(b"\xc3(")], data=bytes(128)),
        "tensor 0: want UTF-8, got b'\\xc3('"),
    "name longer than the file": (gguf_bytes(infos=[u64(60) + bytes(40)], align=1),
        "tensor 0: want 60 bytes, got 40 to the end of the file"),
    "block type": (gguf_bytes(infos=[info(kind=4)], data=bytes(128)),
        f"tensor t: want type {READ}, got ggml's number 4"),
    "block type 999": (gguf_bytes(infos=[info(kind=999)], data=bytes(128)),
        f"tensor t: want type {READ}, got ggml's number 999"),
    "row of 48": (
        gguf_bytes(infos=[info(dims=(48, 2), kind=GGML.Q8_0)], data=bytes(128)),
        "tensor t: want rows of a multiple of 32 for Q8_0, got 48",
    ),
    "block of 256": (gguf_bytes(infos=[info(dims=(32,), kind=GGML.Q6_K)], data=bytes(256)),
        "tensor t: want rows of a multiple of 256 for Q6_K, got 32"),
    "bytes that overflow, of blocks": (
        gguf_bytes(infos=[info(dims=(2**62,), kind=GGML.Q8_0)], data=bytes(256)),
        "tensor t: want data within the file's 256 bytes, got bytes 0 to 4899916394579099648"
    ),
    "truncated data": (
        gguf_bytes(infos=[info()], data=bytes(127)),
        "tensor t: want data within the file's 127 bytes, got bytes 0 to 128"
    ),
    "no data": (gguf_bytes(infos=[info()], align=1),
        "tensor t: want data within the file's 0 bytes, got bytes 0 to 128"),
    "control characters": (
        gguf_bytes([string(b"a\nb\x1b[2J") + u32(77) + bytes(8)]),
        "a\\nb\\x1b[2J: want a value type of 0 to 12, got 77"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_one_clear_error(tmp_path, case):
    content, message = HOSTILE[case]
    path = write(tmp_path, content)
    with pytest.raises(FileFormatError) as caught:
        GGUF.open(path)
    text = str(caught.value)
    assert text == f"{path}: {message}" and text.isprintable() and len(text) < 1000


def test_hostile_counts_allocate_nothing(tmp_path):
    paths = [write(tmp_path, content, f"{i}.gguf") for i, (content, _) in
             enumerate(HOSTILE.values())]  # fmt: skip
    tracemalloc.start()
    for path in paths:
        with pytest.raises(FileFormatError):
            GGUF.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


EMPTY = MAX_STRINGS // 2 + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "content, message",
    [
        ([array(b"a", Value.STRING, 2**30, b"")], f"a: want at most {MAX_STRINGS} strings, got {2**30}"),
        (
            [array(b"a", Value.STRING, EMPTY, bytes(8 * EMPTY)), array(b"b", Value.STRING, EMPTY, b"")],
            f"b: want at most {MAX_STRINGS - EMPTY} strings, got {EMPTY}",
        ),
        ([array(b"a", Value.BOOL, 2**33, b"")], f"a: want at most {MAX_STRINGS} bools, got {2**33}"),
        (2**17, f"key count: want at most {MAX_ENTRIES}, got {2**17}"),
    ],
)
def test_a_sparse_file_is_not_walked_for_long(tmp_path, content, message):
    many = isinstance(content, int)
    path = write(tmp_path, gguf_bytes(n_values=content) if many else gguf_bytes(content))
    os.truncate(path, 2**34)
    tracemalloc.start()
    start = time.thread_time()
    with pytest.raises(FileFormatError) as caught:
        GGUF.open(path)
    assert time.thread_time() - start < 10  # 0.2; this only catches a walk of all
    assert str(caught.value) == f"{path}: {message}" and tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("make, message", [
    (lambda path: None, "want a file that can be read, got: No such file or directory"),
    (lambda path: path.mkdir(), "want a file that can be read, got: Is a directory"),
    (lambda path: os.mkfifo(path), "want a regular file, got a named pipe"),
    (lambda path: path.symlink_to("/dev/zero"), "want a regular file, got a device"),
    (lambda path: path.symlink_to(path), "want a file that can be read, got: Too many levels of "
     "symbolic links"),
], ids=["missing", "directory", "fifo", "device", "loop"])  # fmt: skip
@pytest.mark.parametrize("open_file", [GGUF.open, SafetensorsFile.open, read_object])
def test_not_a_file(tmp_path, make, message, open_file):
    path = tmp_path / "m"
    make(path)
    with pytest.raises(FileFormatError) as caught:
        open_file(path)
    assert str(caught.value) == f"{path}: file: {message}"


VALID = gguf_bytes(
    [
        scalar(b"general.architecture", Value.STRING, b"test"),
        array(b"tokens", Value.STRING, 3, string(b"a") + string(b"bc") + string(b"")),
        array(b"layers", Value.BOOL, 2, b"\0\1"),
        scalar(ALIGNMENT, Value.UINT32, 32),
    ],
    [info(b"a", (32, 2), GGML.Q8_0, 0), info(b"b", (32,), GGML.F32, 96)],
    bytes(96 + 128),
)


def read_everything(path):
    file = GGUF.open(path)
    for key in file.metadata:
        file.metadata[key]
    for tensor in file.tensors.values():
        dequantize(tensor)
        first_nonfinite_scale(tensor)


def test_every_truncation_is_an_error(tmp_path):
    read_everything(write(tmp_path, VALID))
    for length in range(len(VALID)):
        path = write(tmp_path, VALID[:length])
        with pytest.raises(FileFormatError):
            GGUF.open(path)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 225), st.integers(0, 255)), max_size=4))
def test_a_damaged_header_opens_or_is_an_error(tmp_path_factory, changes):
    content = bytearray(VALID)
    for position, byte in changes:
        content[position] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    try:
        read_everything(path)
    except FileFormatError as error:
        assert str(error).startswith(f"{path}: ")


def test_errors_are_of_one_family():
    assert issubclass(FileFormatError, PyengineError) and issubclass(InputError, PyengineError)
    error = FileFormatError("p", "f" * 1000, "want a\nb")
    assert str(error) == "p: " + "f" * 160 + "...: want a\\nb"
