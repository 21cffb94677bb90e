"""The INT8 quantizer: the rule, the files, and what happens when something is wrong."""

import hashlib
import json

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rewrite import GOLDEN, rewrite

import pyengine
from pyengine.checkpoint import GROUP, open_checkpoint
from pyengine.errors import CheckpointError, InputError
from pyengine.files.gguf import GGUF
from pyengine.quantize import quantize, quantize_groups, to_bfloat16

PLAIN = GOLDEN / "pattern31.gguf"

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
        zero = ~x[:, g * GROUP:(g + 1) * GROUP].any(axis=1)
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
    x[0] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, np.nextafter(np.float32(0.5), np.float32(1)),
            np.nextafter(np.float32(2.5), np.float32(0))]
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
    bits = to_bfloat16(x).astype(np.uint32)
    value = (bits << 16).view(np.float32).astype(np.float64)
    for other in (bits - 1, bits + 1):
        neighbour = ((other & 0xFFFF) << 16).view(np.float32).astype(np.float64)
        ok = ~np.isfinite(neighbour) | (np.sign(neighbour) != np.sign(value)) | (
            np.abs(x - value) <= np.abs(x - neighbour))
        assert ok.all()


@pytest.mark.parametrize("name", ["pattern31", "nextn", "fused", "tied", "bfloat16"])
def test_written_codes_are_the_rule_applied_to_the_source(tmp_path, name):
    source = GOLDEN / f"{name}.gguf"
    quantize(source, tmp_path / "int8")
    before, after = open_checkpoint(source).tensors, open_checkpoint(tmp_path / "int8").tensors
    assert list(before) == list(after)
    for key, tensor in after.items():
        x, y = before[key].float64().astype(np.float32), tensor.float64()
        if tensor.type == "INT8":
            flat = x.reshape(-1, x.shape[-1])
            values, _ = dequantized(*quantize_groups(flat))
            assert np.array_equal(y.reshape(flat.shape), values), key
        elif tensor.type == "BF16":
            assert np.array_equal(y, (to_bfloat16(x).astype(np.uint32) << 16).view(np.float32)), key
        else:
            assert tensor.type == "F32" and np.array_equal(y, x), key


def test_shards_give_the_same_tensors(tmp_path):
    quantize(PLAIN, tmp_path / "one")
    quantize(PLAIN, tmp_path / "many", shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    a, b = (open_checkpoint(tmp_path / d).file.tensors for d in ("one", "many"))
    assert set(a) == set(b)
    assert all(np.array_equal(a[n].data, b[n].data) for n in a)


def test_the_same_bytes_twice_and_what_provenance_says(tmp_path):
    for name in ("a", "b"):
        quantize(PLAIN, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    said = json.loads((tmp_path / "a" / "noesis_provenance.json").read_text())
    source = said["source"]["files"][0]
    assert source == {"name": PLAIN.name, "size": PLAIN.stat().st_size,
                      "sha256": hashlib.sha256(PLAIN.read_bytes()).hexdigest()}
    assert said["seed"] == 1729 and said["group_size"] == 128 and said["bits"] == 8
    tensors = open_checkpoint(tmp_path / "a").file.tensors
    assert set(said["tensors"]) == set(tensors)
    for name, digest in said["tensors"].items():
        assert hashlib.sha256(tensors[name].data.tobytes()).hexdigest() == digest["sha256"], name


def test_what_travels_with_the_tensors(tmp_path):
    quantize(PLAIN, tmp_path / "int8")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                 "chat_template.jinja", "model.safetensors"):
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


def test_a_crash_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyengine.quantize._write_plain", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(PLAIN, tmp_path / "int8")
    assert not list(tmp_path.iterdir())


def test_a_directory_is_no_source(tmp_path):
    quantize(PLAIN, tmp_path / "int8")
    with pytest.raises(InputError, match="want a GGUF file"):
        quantize(tmp_path / "int8", tmp_path / "again")


def test_the_int8_model_runs_in_both_arithmetics(tmp_path):
    quantize(PLAIN, tmp_path / "int8")
    ids = np.random.default_rng(1729).integers(0, 288, 12)
    locked = pyengine.load(tmp_path / "int8").forward(ids)
    float64 = pyengine.load(tmp_path / "int8", "float64").forward(ids)
    assert np.abs(locked - float64).max() < 0.01
