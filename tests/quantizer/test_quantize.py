"""The INT8 quantizer: the rule, the files, and what happens when something is wrong."""

import functools
import hashlib
import json
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from odd_model import DIMENSIONS
from paths import GOLDEN, QUANTIZED
from rewrite import rewrite, split_gguf
from widened import widened

import pyengine
from pyengine.checkpoint import provenance
from pyengine.checkpoint.families import model_specs
from pyengine.checkpoint.layout import GROUP, pack_int4, unpack_int4
from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.tensor import Tensor
from pyengine.checkpoint.writer import shard_names
from pyengine.cli import main
from pyengine.core import ops
from pyengine.core.matrices import Matrix
from pyengine.core.threads import Pool, available_isas, select_isa
from pyengine.errors import CheckpointError, InputError, PyengineError
from pyengine.files.gguf import GGUF, dequantize
from pyengine.files.numbers import float32_to_bfloat16
from pyengine.files.safetensors_writer import SafetensorsWriter
from pyengine.quantizer import quantize as quantize_module
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.quantize_pass import QuantizePass
from pyengine.quantizer.rule import quantize_groups
from pyengine.quantizer.verify_files import verify_files

PLAIN = GOLDEN / "pattern31.gguf"
LOCK = json.loads((QUANTIZED / "LOCK.json").read_text())["files"]
OTHERS = [name for name in LOCK if name not in ("UD", "NVFP4")]

finite = st.floats(-60000, 60000, width=32, allow_subnormal=True)
groups = arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 300)), elements=finite)


def dequantized(codes, scales):
    per_column = np.repeat(scales.astype(np.float64), GROUP, axis=1)[:, : codes.shape[1]]
    return codes * per_column, per_column


@given(groups)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_nothing_clips_and_the_nearest_code_is_taken(x):
    codes, scales = quantize_groups(x)
    values, step = dequantized(codes, scales)
    assert codes.dtype == np.int8 and scales.dtype == np.float16
    assert codes.min() >= -127 and codes.max() <= 127
    assert np.isfinite(scales).all() and (scales >= 0).all()
    assert (np.abs(x - values) <= step / 2).all()
    for g in range(scales.shape[1]):
        zero = ~x[:, g * GROUP : (g + 1) * GROUP].any(axis=1)
        assert np.array_equal(scales[:, g] == 0, zero)


@given(groups)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_negation_and_idempotence(x):
    codes, scales = quantize_groups(x)
    negated, same = quantize_groups(-x)
    assert np.array_equal(negated, -codes) and np.array_equal(same, scales)
    values, _ = dequantized(codes, scales)
    again, scales_again = quantize_groups(values.astype(np.float32))
    normal = scales >= 2.0**-14  # below, float16 is too coarse for a scale to come back
    for g in range(scales.shape[1]):
        rows, part = normal[:, g], slice(g * GROUP, (g + 1) * GROUP)
        assert np.array_equal(scales_again[rows, g], scales[rows, g])
        assert np.array_equal(again[rows, part], codes[rows, part])


def test_ties_go_to_even_and_one_ulp_away_to_the_neighbour():
    x = np.zeros((1, 8), np.float32)
    x[0] = [
        127,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        np.nextafter(np.float32(0.5), np.float32(1)),
        np.nextafter(np.float32(2.5), np.float32(0)),
    ]
    codes, scales = quantize_groups(x)
    assert scales[0, 0] == 1
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, 1, 2]


def test_subnormal_scales_do_not_clip():
    for amax in np.float32(2.0) ** np.arange(-40, -6, dtype=np.float32) * np.float32(1.37):
        codes, scales = quantize_groups(np.array([[amax, -amax / 3]], np.float32))
        values, step = dequantized(codes, scales)
        assert scales[0, 0] > 0 and (np.abs(values[0, 0] - amax) <= step / 2).all()


def test_a_scale_beyond_float16_is_an_error():
    with pytest.raises(InputError, match="beyond float16's range"):
        quantize_groups(np.full((1, 4), 1e8, np.float32))


@given(arrays(np.float32, 50, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_bfloat16_is_the_nearest(x):
    x = np.clip(x, -3e38, 3e38).astype(np.float32)
    bits = float32_to_bfloat16(x).astype(np.uint32)
    value = (bits << 16).view(np.float32).astype(np.float64)
    for other in (bits - 1, bits + 1):
        neighbour = ((other & 0xFFFF) << 16).view(np.float32).astype(np.float64)
        ok = (
            ~np.isfinite(neighbour)
            | (np.sign(neighbour) != np.sign(value))
            | (np.abs(x - value) <= np.abs(x - neighbour))
        )
        assert ok.all()


def test_the_odd_model_differs_in_every_dimension(odd_model):
    one, other = (open_checkpoint(path).config for path in (PLAIN, odd_model))
    assert len(DIMENSIONS) > 15
    for name in [*DIMENSIONS, "layer_types"]:
        assert getattr(one, name) != getattr(other, name), name


@pytest.mark.parametrize("name", ["pattern31", "nextn", "fused", "tied", "bfloat16", "odd"])
def test_written_codes_are_the_rule_applied_to_the_source(tmp_path, odd_model, name):
    source = odd_model if name == "odd" else GOLDEN / f"{name}.gguf"
    quantize(source, tmp_path / "int8")
    assert_int8_of(source, tmp_path / "int8")


def assert_int8_of(source, directory):
    before, after = open_checkpoint(source).tensors, open_checkpoint(directory).tensors
    assert list(before) == list(after)
    for key, tensor in after.items():
        x, y = before[key].float64().astype(np.float32), tensor.float64()
        if tensor.type == "INT8":
            flat = x.reshape(-1, x.shape[-1])
            values, _ = dequantized(*quantize_groups(flat))
            assert np.array_equal(y.reshape(flat.shape), values), key
        elif tensor.type == "BF16":
            assert np.array_equal(y, (float32_to_bfloat16(x).astype(np.uint32) << 16).view(np.float32)), key
        else:
            assert tensor.type == "F32" and np.array_equal(y, x), key


def in_type(source, destination, kind):
    """The GGUF with its matrices in a float type."""
    changed = {}
    for name, tensor in GGUF.open(source).tensors.items():
        if len(tensor.shape) > 1 and "conv1d" not in name:
            x = dequantize(tensor)
            stored = {"F32": x, "F16": x.astype(np.float16), "BF16": float32_to_bfloat16(x)}[kind]
            changed[name] = stored, T[kind]
    return rewrite(source, destination, tensors=changed)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", ["pattern31", "odd"])
def test_a_gguf_of_floats(tmp_path, odd_model, name, kind):
    original = odd_model if name == "odd" else PLAIN
    source = in_type(original, tmp_path / "m.gguf", kind)
    assert open_checkpoint(source).tensors["model.layers.0.mlp.experts.down_proj"].type == kind
    quantize(source, tmp_path / "int8", tmp_path / "int4")
    assert_int8_of(source, tmp_path / "int8")
    if kind == "F32":  # the exact values of Q8_0: the same twins
        quantize(original, tmp_path / "a8", tmp_path / "a4")
        for mine, other in (("int8", "a8"), ("int4", "a4")):
            assert_same_tensors(tmp_path / mine, tmp_path / other)


@pytest.mark.parametrize("name", ["UD", "NVFP4", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_a_gguf_of_blocks(tmp_path, name):
    """The twins of the same values in F32; provenance says the source's own types."""
    source = QUANTIZED / f"{name}.gguf"
    wide = widened(source, tmp_path / "wide.gguf")
    quantize(source, tmp_path / "int8", tmp_path / "int4")
    quantize(wide, tmp_path / "w8", tmp_path / "w4")
    for mine, other in (("int8", "w8"), ("int4", "w4")):
        assert_same_tensors(tmp_path / mine, tmp_path / other)
    said = provenance.read(tmp_path / "int4")["source"]["tensor_types"]
    assert said == LOCK[name]["types"] | {"F32": said["F32"]}
    assert verify_files(tmp_path / "int8", tmp_path / "int4", source) == []
    assert verify_files(tmp_path / "int8", source=wide) != []


def assert_same_tensors(one, other):
    a, b = (open_checkpoint(directory).file.tensors for directory in (one, other))
    assert list(a) == list(b)
    assert all(np.array_equal(a[n].data, b[n].data) for n in a)


def test_shards_give_the_same_tensors(tmp_path):
    quantize(PLAIN, tmp_path / "one")
    quantize(PLAIN, tmp_path / "many", shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    assert_same_tensors(tmp_path / "one", tmp_path / "many")


def test_the_same_bytes_twice_and_what_provenance_says(tmp_path):
    for name in ("a", "b"):
        quantize(PLAIN, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    said = json.loads((tmp_path / "a" / "noesis_provenance.json").read_text())
    source = said["source"]["files"][0]
    assert source == {
        "name": PLAIN.name,
        "size": PLAIN.stat().st_size,
        "sha256": hashlib.sha256(PLAIN.read_bytes()).hexdigest(),
    }
    assert said["seed"] == 1729 and said["group_size"] == 128 and said["bits"] == 8
    tensors = open_checkpoint(tmp_path / "a").file.tensors
    assert set(said["tensors"]) == set(tensors)
    for name, digest in said["tensors"].items():
        assert hashlib.sha256(tensors[name].data.tobytes()).hexdigest() == digest["sha256"], name


def test_what_travels_with_the_tensors(tmp_path):
    quantize(PLAIN, tmp_path / "int8")
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ):
        assert (tmp_path / "int8" / name).exists(), name


def test_destination_that_exists_is_refused(tmp_path):
    (tmp_path / "int8").mkdir()
    with pytest.raises(InputError, match="want a directory that does not exist yet"):
        quantize(PLAIN, tmp_path / "int8")
    with pytest.raises(InputError, match="want a directory to write in"):
        quantize(PLAIN, tmp_path / "no" / "int8")


def test_nonfinite_source_names_tensor_row_and_group_and_leaves_nothing(tmp_path):
    data = GGUF.open(PLAIN).tensors["blk.1.attn_gate.weight"].data.copy()
    data[5, 34:36] = np.array([0x7E00], np.uint16).view(np.uint8)
    bad = rewrite(PLAIN, tmp_path / "bad.gguf", tensors={"blk.1.attn_gate.weight": (data, T.Q8_0)})
    # The file's row 5 is row 5 of value head 0, which is tiled head 0 too.
    with pytest.raises(CheckpointError, match=r"blk.1.attn_gate.weight: row 5, group 0"):
        quantize(bad, tmp_path / "int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.gguf"]


NOT_FINITE = [np.nan, np.inf, -np.inf]


def spoilt(kind, source, path):
    """The source with one thing wrong, and what the message must name."""
    name = "blk.3.attn_k.weight"
    tensor = GGUF.open(source).tensors[name]
    if kind == "unknown name":
        rewrite(source, path, tensors={"blk.3.attn_k_weight": (tensor.data.copy(), tensor.type)})
        return "blk.3.attn_k_weight: want only tensors"
    if kind == "no linear":
        rewrite(source, path, tensors={name: (tensor.data[0].copy(), tensor.type)})
        return f"{name}: want "
    if kind == "block scale":
        data = tensor.data.copy()
        data[1, :2] = np.array([0xFC00], np.uint16).view(np.uint8)
        rewrite(source, path, tensors={name: (data, tensor.type)})
        return f"{name}: row 1, group 0: want finite values"
    values = np.zeros(tensor.shape, np.float32)
    values[2, 40] = kind
    rewrite(source, path, tensors={name: (values, T.F32)})
    return f"{name}: row 2, group 0: want finite values"


@pytest.mark.parametrize("kind", ["unknown name", "no linear", "block scale", *NOT_FINITE])
@pytest.mark.parametrize("model", ["pattern31", "odd"])
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, odd_model, model, kind):
    named = spoilt(kind, odd_model if model == "odd" else PLAIN, tmp_path / "bad.gguf")
    assert (
        main(
            [
                "quantize",
                str(tmp_path / "bad.gguf"),
                "--int8",
                str(tmp_path / "int8"),
                "--int4",
                str(tmp_path / "int4"),
            ]
        )
        == 2
    )
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and named in err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def test_a_destination_that_exists_is_one_line(tmp_path, capsys):
    destinations = ["--int8", str(tmp_path), "--int4", str(tmp_path / "int4")]
    assert main(["quantize", str(PLAIN), *destinations]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "want a directory that does not exist yet" in err
    assert not list(tmp_path.iterdir())


def tree(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("source", [PLAIN, "odd"], ids=["pattern31", "odd"])
@pytest.mark.parametrize("after", [1, 40, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 60))])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, monkeypatch, odd_model, source, after):
    source, options = odd_model if source == "odd" else source, {"shard_bytes": 40_000, "threads": 1}
    quantize(source, tmp_path / "whole8", tmp_path / "whole4", **options)
    calls, original = [], QuantizePass._write_parameter

    def fail(self, wanted):
        calls.append(wanted)
        if len(calls) == after:
            raise KeyboardInterrupt
        original(self, wanted)

    monkeypatch.setattr(QuantizePass, "_write_parameter", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "int8", tmp_path / "int4", **options)
    assert not (tmp_path / "int8").exists() and not (tmp_path / "int4").exists()
    before = len(calls)
    quantize(source, tmp_path / "int8", tmp_path / "int4", **options)
    if after > 20:  # complete files were not written again
        assert len(calls) - before < len(model_specs(open_checkpoint(source).config)) - 4
    for bits in (8, 4):
        assert tree(tmp_path / f"int{bits}") == tree(tmp_path / f"whole{bits}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int4", "int8", "whole4", "whole8"]


def test_a_damaged_file_of_an_interrupted_run_is_written_again(tmp_path, monkeypatch):
    quantize(PLAIN, tmp_path / "whole", shard_bytes=40_000)
    with monkeypatch.context() as patch:
        patch.setattr(quantize_module, "write_companions", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(PLAIN, tmp_path / "int8", shard_bytes=40_000)
    damaged = sorted((tmp_path / "int8.partial").glob("model-*"))[2]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    quantize(PLAIN, tmp_path / "int8", shard_bytes=40_000)
    assert tree(tmp_path / "int8") == tree(tmp_path / "whole")


def _interrupt(*arguments, **named):
    raise KeyboardInterrupt


def test_a_full_disk_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    original = SafetensorsWriter.write

    def full(self, name, array):
        if "layers.1" in name:
            self.abort()
            raise OSError(28, "No space left on device", str(self.path))
        original(self, name, array)

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        quantize(PLAIN, tmp_path / "int8")
    assert [p.name for p in tmp_path.iterdir()] == ["int8.partial"]


def test_a_disk_that_the_system_says_is_full(tmp_path, odd_model):
    """For once not pretended: the system lets no file grow beyond a size."""
    command = [
        sys.executable,
        "-m",
        "pyengine",
        "quantize",
        odd_model,
        "--int8",
        tmp_path / "int8",
        "--int4",
        tmp_path / "int4",
    ]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (300_000, 300_000))
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"int8.partial", "int4.partial"}
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*provenance*"))
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    quantize(odd_model, tmp_path / "whole8", tmp_path / "whole4")
    for bits in (8, 4):
        assert tree(tmp_path / f"int{bits}") == tree(tmp_path / f"whole{bits}")


def test_a_run_that_was_killed_continues(tmp_path, odd_model):
    """SIGKILL, at any moment: nothing of the process's own can tidy up."""
    code = (
        "import sys\nfrom pyengine.quantizer.quantize import quantize\n"
        "quantize(sys.argv[1], sys.argv[2], shard_bytes=40_000, threads=1)"
    )
    command = [sys.executable, "-c", code, odd_model, tmp_path / "int8"]
    process = subprocess.Popen(command, cwd=tmp_path)
    while not list(tmp_path.glob("int8.partial/model-00004*")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    subprocess.run(command, check=True, cwd=tmp_path) if not (tmp_path / "int8").exists() else None
    quantize(odd_model, tmp_path / "whole", shard_bytes=40_000)
    assert tree(tmp_path / "int8") == tree(tmp_path / "whole")


def test_a_quantized_directory_is_no_source(tmp_path):
    quantize(PLAIN, tmp_path / "int8")
    with pytest.raises(InputError, match="got a checkpoint that is quantized"):
        quantize(tmp_path / "int8", tmp_path / "again")


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "want --int8 DIR, --int4 DIR, --mixed DIR or several"),
        ({"int8": "x", "group_size": 33}, "group size: want an even number"),
        ({"int8": "x", "scale": "best"}, "scale: want absmax or mse or .*, got 'best'"),
        ({"int8": "x", "int4": "x"}, "want two directories, got one twice"),
    ],
)
def test_options_are_checked(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        quantize(PLAIN, **options)
    assert not list(tmp_path.iterdir())


# ---- groups of another size ------------------------------------------------------------------


@pytest.mark.parametrize("name, group", [("pattern31", 32), ("tied", 48), ("nextn", 256)])
@pytest.mark.parametrize("bits", [8, 4])
def test_other_groups_run_in_float64_only(tmp_path, capsys, name, group, bits):
    directory = tmp_path / "out"
    quantize(GOLDEN / f"{name}.gguf", **{f"int{bits}": directory}, group_size=group)
    before, after = open_checkpoint(GOLDEN / f"{name}.gguf").tensors, open_checkpoint(directory).tensors
    for key, tensor in after.items():
        if tensor.type in ("INT8", "INT4"):
            x = before[key].float64().astype(np.float32).reshape(-1, tensor.shape[-1])
            codes, scales = quantize_groups(x, 127 if bits == 8 else 7, group)
            values = codes * np.repeat(scales.astype(np.float64), group, axis=1)[:, : x.shape[1]]
            assert np.array_equal(tensor.float64().reshape(x.shape), values), key
    ids = [1, 2, 3]
    got, source = (pyengine.load(p, "float64").forward(ids) for p in (directory, GOLDEN / f"{name}.gguf"))
    assert np.corrcoef(got.ravel(), source.ravel())[0, 1] > (0.999 if bits == 8 else 0.8)
    assert main(["logits", "-m", str(directory), "--ids", "1", "-o", str(tmp_path / "x.npy")]) == 2
    error = capsys.readouterr().err
    assert f"want groups of 128 columns, which the locked arithmetic has, got {group}" in error
    assert error.count("\n") == 1 and not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize(
    "said, message",
    [
        (64, r"want \(1, 256\) F16"),
        (0, "pyengine_group_size: want a positive integer, got 0"),
        ("128", "want a positive integer, got '128'"),
        (True, "want a positive integer"),
    ],
)
def test_a_group_size_that_the_tensors_do_not_have_is_refused(tmp_path, said, message):
    quantize(PLAIN, tmp_path / "out", group_size=32)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pyengine_group_size": said}))
    with pytest.raises(PyengineError, match=message):
        open_checkpoint(tmp_path / "out")


# ---- the C core against the definition -------------------------------------------------------


@given(groups, st.sampled_from([127, 7]), st.sampled_from(["absmax", "mse"]), st.sampled_from([128, 32, 10]))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_the_c_core_gives_the_definitions_bits(x, largest, scale, group):
    expected_codes, expected_scales = quantize_groups(x, largest, group, scale)
    for isa in available_isas():
        select_isa(isa)
        codes, scales = ops.quantize_weights(
            POOL, Matrix("F32", x.shape[1], x), None, None, 0, len(x), largest, group, scale
        )
        assert np.array_equal(scales.view(np.uint16), expected_scales.view(np.uint16))
        assert np.array_equal(codes, expected_codes)


POOL = Pool(2)


@pytest.mark.parametrize("rows, cols", [(1, 2), (15, 30), (3, 99_998)])  # one part, and several
def test_the_c_core_packs_as_the_definition_does(rows, cols):
    pairs = np.stack(np.meshgrid(np.arange(-7, 8), np.arange(-7, 8)), axis=-1).astype(np.int8)
    codes = np.resize(pairs, (rows, cols))
    assert np.array_equal(ops.pack_int4(POOL, codes), pack_int4(codes))
    assert np.array_equal(unpack_int4(ops.pack_int4(POOL, codes)), codes)
    with pytest.raises(InputError, match="even number of columns"):
        ops.pack_int4(POOL, np.zeros((2, 3), np.int8))


def test_every_float16_scale_comes_out_of_its_own_maximum():
    scales = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(np.float16)
    x = (scales.astype(np.float32) * np.float32(127))[:, None]
    codes, again = ops.quantize_weights(POOL, Matrix("F32", 1, x), None, None, 0, len(x), 127, 128, "absmax")
    assert np.array_equal(again[:, 0], scales) and (codes == 127).all()


def test_the_ties_of_every_scale_and_their_neighbours(each_isa):
    """All there are: the codes must not depend on how exactly a level divides."""
    scales = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)[:, None]
    for largest in (127, 7):
        j = np.arange(largest)
        ties = scales * (j.astype(np.float32) + np.float32(0.5))  # exact
        below, above = np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))
        x = np.concatenate([scales * np.float32(largest), below, ties, above], axis=1)
        wanted = np.concatenate([[largest], j, j + j % 2, j + 1])
        for sign in (1, -1):
            matrix = Matrix("F32", x.shape[1], np.float32(sign) * x)
            codes, got = ops.quantize_weights(
                POOL, matrix, None, None, 0, len(x), largest, x.shape[1], "absmax"
            )
            assert np.array_equal(got.astype(np.float32), scales)
            assert (codes == sign * wanted).all()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_every_source_type(kind):
    rng = np.random.default_rng(1729)
    x = rng.normal(size=(20, 300)).astype(np.float32)
    data = {"F32": x, "F16": x.astype(np.float16), "BF16": float32_to_bfloat16(x)}[kind]
    exact = Tensor("x", kind, x.shape, data).stored_float32()
    rows, cols = rng.permutation(20), rng.permutation(300)
    codes, scales = ops.quantize_weights(POOL, Matrix(kind, 300, data), rows, cols, 3, 17, 127, 128, "absmax")
    expected = quantize_groups(exact[rows][:, cols][3:17])
    assert np.array_equal(codes, expected[0]) and np.array_equal(scales, expected[1])


def test_mse_is_never_worse_and_often_better():
    x = np.random.default_rng(1729).normal(size=(64, 512)).astype(np.float32)
    for largest in (127, 7):
        errors = []
        for scale in ("absmax", "mse"):
            codes, scales = quantize_groups(x, largest, scale=scale)
            errors.append(((x - dequantized(codes, scales)[0]) ** 2).reshape(64, -1, 128).sum(-1))
        assert (errors[1] <= errors[0] + 1e-12).all() and errors[1].sum() < errors[0].sum()


# ---- INT4, and other sources -----------------------------------------------------------------


def test_both_twins_of_one_pass_equal_those_of_two(tmp_path):
    quantize(PLAIN, tmp_path / "a8", tmp_path / "a4")
    quantize(PLAIN, tmp_path / "b8")
    quantize(PLAIN, int4=tmp_path / "b4")
    for bits in "84":
        assert tree(tmp_path / f"a{bits}") == tree(tmp_path / f"b{bits}")
    ids = [
        json.loads((tmp_path / d / "noesis_provenance.json").read_text())["twin"]["id"] for d in ("a8", "a4")
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", ["pattern31", "nextn", "fused", "tied", "bfloat16", "odd"])
def test_int4_codes_and_both_arithmetics(tmp_path, odd_model, name):
    source = odd_model if name == "odd" else GOLDEN / f"{name}.gguf"
    quantize(source, int4=tmp_path / "int4")
    before, after = open_checkpoint(source).tensors, open_checkpoint(tmp_path / "int4").tensors
    kinds = set()
    for key, tensor in after.items():
        kinds.add(tensor.type)
        if tensor.type == "INT4":
            x = before[key].float64().astype(np.float32).reshape(-1, tensor.shape[-1])
            values, _ = dequantized(*quantize_groups(x, 7))
            assert np.array_equal(tensor.float64().reshape(x.shape), values), key
    assert kinds == {"INT4", "BF16", "F32"}
    ids = np.random.default_rng(1729).integers(0, 100, 12)
    locked, float64 = (pyengine.load(tmp_path / "int4", a).forward(ids) for a in ("locked", "float64"))
    assert np.abs(locked - float64).max() < 0.01


def hf_directory(directory, source, prefix="model.", apart=False, files=1):
    """A float checkpoint in Hugging Face's layout with the source's exact values, in bfloat16 what is
    one; in one file, or several and an index."""
    checkpoint = open_checkpoint(source)
    directory.mkdir()
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        values = tensor.float64().astype(np.float32)
        if name.endswith("experts.up_proj"):
            continue
        if name.endswith("experts.gate_proj") and not apart:
            up = checkpoint.tensors[name.replace("gate_proj", "up_proj")].float64()
            name = name.replace("gate_proj", "gate_up_proj")
            values = np.concatenate([values, up.astype(np.float32)], axis=1)
        if apart and ".mlp.experts." in name:
            stem = name.rsplit(".", 1)[0]
            for part in ["gate_proj", "up_proj"] if "gate_proj" in name else ["down_proj"]:
                stack = checkpoint.tensors[f"{stem}.{part}"].float64().astype(np.float32)
                tensors |= {f"{stem}.{i}.{part}.weight": m for i, m in enumerate(stack)}
            continue
        tensors[name] = values
    tensors = {n.replace("model.", prefix, 1) if n.startswith("model.") else n: v for n, v in tensors.items()}
    bfloat16 = {n for n, v in tensors.items() if not (v.view(np.uint32) & 0xFFFF).any()}
    names, weight_map = list(tensors), {}
    for i, file in enumerate(shard_names(files)):
        part = names[i * len(names) // files : (i + 1) * len(names) // files]
        weight_map |= dict.fromkeys(part, file)
        with SafetensorsWriter(
            directory / file, [(n, "BF16" if n in bfloat16 else "F32", tensors[n].shape) for n in part]
        ) as writer:
            for name in part:
                writer.write(name, float32_to_bfloat16(tensors[name]) if name in bfloat16 else tensors[name])
    if files > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(checkpoint.config.to_hf()))
    return directory


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize("apart", [False, True])
def test_a_hugging_face_directory_gives_the_same_codes(tmp_path, prefix, apart):
    hf = hf_directory(tmp_path / "hf", PLAIN, prefix, apart)
    quantize(PLAIN, tmp_path / "a8", tmp_path / "a4")
    quantize(hf, tmp_path / "b8", tmp_path / "b4")
    for bits in "84":
        assert_same_tensors(tmp_path / f"a{bits}", tmp_path / f"b{bits}")
    ids = [1, 2, 3]
    assert np.array_equal(pyengine.load(hf).forward(ids).shape, (3, 288))


@pytest.mark.parametrize("name", ["pattern31", "odd"])
def test_a_hugging_face_directory_as_it_is_published(tmp_path, odd_model, name):
    """bfloat16, in several files with an index."""
    source = in_type(odd_model if name == "odd" else PLAIN, tmp_path / "m.gguf", "BF16")
    hf = hf_directory(tmp_path / "hf", source, "model.language_model.", files=3)
    kinds = [tensor.type for tensor in open_checkpoint(hf).tensors.values()]
    assert kinds.count("BF16") > len(kinds) // 2 and len(open_checkpoint(hf).source_files) == 3
    quantize(source, tmp_path / "a8", tmp_path / "a4")
    quantize(hf, tmp_path / "b8", tmp_path / "b4")
    for bits in "84":
        assert_same_tensors(tmp_path / f"a{bits}", tmp_path / f"b{bits}")
    assert len(provenance.read(tmp_path / "b8")["source"]["files"]) == 3


def test_a_split_source_gives_the_same_tensors(tmp_path):
    whole, parts = open_checkpoint(PLAIN), tmp_path / "m-00001-of-00002.gguf"
    names = list(whole.file.tensors)
    split_gguf(PLAIN, tmp_path / "m", [names[: len(names) // 2], names[len(names) // 2 :]])
    quantize(PLAIN, tmp_path / "a")
    quantize(parts, tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_the_int8_model_runs_in_both_arithmetics(tmp_path):
    quantize(PLAIN, tmp_path / "int8")
    ids = np.random.default_rng(1729).integers(0, 288, 12)
    locked = pyengine.load(tmp_path / "int8").forward(ids)
    float64 = pyengine.load(tmp_path / "int8", "float64").forward(ids)
    assert np.abs(locked - float64).max() < 0.01
