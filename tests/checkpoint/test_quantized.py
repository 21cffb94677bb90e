"""Files that llama.cpp quantized to every block type: its values, and the float64 logits, bit for bit."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from bits import assert_same_bits
from gguf import GGMLQuantizationType as T
from paths import QUANTIZED, TOOLS
from rewrite import rewrite
from widened import widened

import pyengine
from pyengine.checkpoint.open import open_checkpoint
from pyengine.core.matrices import as_matrix
from pyengine.errors import CheckpointError
from pyengine.files.ggml_blocks import BY_NAME
from pyengine.files.gguf import GGUF, dequantize
from pyengine.quantizer.quantize import quantize

SAID = json.loads((QUANTIZED / "LOCK.json").read_text())
IDS, LOCK = SAID["ids"], SAID["files"]


def path_of(name):
    return QUANTIZED / f"{name}.gguf"


def test_the_files_have_every_type():
    types = {kind for facts in LOCK.values() for kind in facts["types"]}
    assert types == set(BY_NAME) - {"F16", "BF16"}


@pytest.mark.parametrize("name", LOCK)
def test_values_are_llama_cpp_s(name):
    path, digest = path_of(name), hashlib.sha256()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == LOCK[name]["sha256"]
    for tensor in GGUF.open(path).tensors.values():
        digest.update(dequantize(tensor))
    assert digest.hexdigest() == LOCK[name]["values"]


@pytest.mark.golden
def test_llama_cpp_and_hugging_face_say_it_again():
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    tool = TOOLS / "golden" / "make_quantized.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"equal: {len(LOCK)} files" in done.stderr


ALWAYS = ("Q4_K_M", "IQ", "NVFP4")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in LOCK]
)
def test_float64_is_hugging_face_s_code_over_these_values(name):
    logits = pyengine.load(path_of(name), "float64").forward(IDS)
    assert hashlib.sha256(np.ascontiguousarray(logits, "<f4")).hexdigest() == LOCK[name]["logits"]


@pytest.mark.parametrize(
    "name", ["UD", *(pytest.param(n, marks=pytest.mark.slow) for n in LOCK if n != "UD")]
)
def test_a_file_widened_to_float32_is_the_same_model(tmp_path, name):
    ids = np.arange(20) * 7 % 128
    twins = path_of(name), widened(path_of(name), tmp_path / "x.gguf")
    quantized, wide = (pyengine.load(path, "float64").forward(ids) for path in twins)
    assert_same_bits(quantized, wide)


@pytest.mark.parametrize("name", ["IQ", "NVFP4"])
def test_locked_says_in_one_line_that_float64_runs_a_type(name):
    with pytest.raises(CheckpointError, match=r"want F32 or .*, got (NVFP4|T?I?Q\w+) \(float64 runs it\)$"):
        pyengine.load(path_of(name))


# ---- the scale beside a weight -----------------------------------------------------------------

WEIGHT = "blk.0.ffn_up.weight"
SCALE, INPUT_SCALE = "blk.0.ffn_up.scale", "blk.0.ffn_up.input_scale"


def with_tensors(tmp_path, tensors, name="NVFP4", drop=()):
    return rewrite(path_of(name), tmp_path / "x.gguf", tensors=tensors, drop=drop)


def f32(*values):
    return np.array(values, np.float32), T.F32


def test_a_scale_multiplies_the_weight_and_rounds_once(tmp_path):
    path = with_tensors(tmp_path, {SCALE: f32(0.3)})
    values = dequantize(GGUF.open(path).tensors[WEIGHT])
    tensor = open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"]
    want = (values.astype(np.float64) * np.float64(np.float32(0.3))).astype(np.float32)
    assert_same_bits(tensor.stored_float32(), want)
    assert_same_bits(tensor.float64(), want.astype(np.float64))
    assert_same_bits(tensor.stored_float32(rows=np.array([5, 1])), want[[5, 1]])


def test_no_scale_is_one_and_an_input_scale_changes_nothing(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    bare = with_tensors(tmp_path, {}, drop=[SCALE, INPUT_SCALE])
    assert_same_bits(
        open_checkpoint(bare).tensors[name].stored_float32(), dequantize(GGUF.open(bare).tensors[WEIGHT])
    )
    other = with_tensors(tmp_path, {INPUT_SCALE: f32(1e9)})
    first, second = (open_checkpoint(path).tensors[name] for path in (path_of("NVFP4"), other))
    assert_same_bits(first.stored_float32(), second.stored_float32())


def test_each_expert_has_its_scale(tmp_path):
    """Of any type: llama.cpp does not ask for the weight's."""
    path = with_tensors(tmp_path, {"blk.0.ffn_down_exps.scale": f32(2, -0.5)}, "UD")
    name = "model.layers.0.mlp.experts.down_proj"
    plain, scaled = (open_checkpoint(p).tensors[name] for p in (path_of("UD"), path))
    want = np.stack([plain.stored_float32(0) * 2, plain.stored_float32(1) * np.float32(-0.5)])
    assert_same_bits(scaled.stored_float32(), want)
    assert_same_bits(scaled.rows_float32(1, 3, 9), want[1, 3:9])
    assert_same_bits(scaled.rows(4, 8, "part").stored_float32(1), want[1, 4:8])


def test_locked_refuses_a_scale(tmp_path):
    path = with_tensors(tmp_path, {"blk.0.attn_qkv.scale": f32(2)}, "MXFP4")
    with pytest.raises(CheckpointError) as caught:
        as_matrix(open_checkpoint(path).tensors["model.layers.0.linear_attn.in_proj_qkv.weight"])
    assert str(caught.value) == (
        "blk.0.attn_qkv.weight: want no scale beside it, which the locked arithmetic lacks, got one "
        "(float64 runs it)"
    )


@pytest.mark.parametrize("name, stored, problem", [
    (SCALE, f32(1, 2), "want (1,) F32, got (2,) F32"),
    (SCALE, (np.ones(1, np.float16), T.F16), "want (1,) F32, got (1,) F16"),
    (SCALE, f32(np.nan), "want finite values, got NaN or infinity"),
    (SCALE, f32(-np.inf), "want finite values, got NaN or infinity"),
    ("blk.0.ffn_up.weight.scale", f32(1), "want only tensors that the architecture qwen35 has, got this one"),
    ("token_embd.scale", f32(1), "want only tensors that the architecture qwen35 has, got this one"),
])  # fmt: skip
def test_a_scale_that_is_not_read_is_refused(tmp_path, name, stored, problem):
    path = with_tensors(tmp_path, {name: stored})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {name}: {problem}")


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.scale", "blk.0.ffn_gate_inp_shexp.scale"])
def test_the_router_has_no_scale(tmp_path, name):
    path = with_tensors(tmp_path, {name: f32(1)}, "UD")
    with pytest.raises(CheckpointError, match=f"{name}: want only tensors that"):
        open_checkpoint(path)


def test_scales_of_gate_and_up_fused_are_refused(tmp_path):
    file = GGUF.open(path_of("MXFP4"))
    parts = [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up")]
    fused = np.concatenate([file.tensors[name].data for name in parts], axis=1)
    tensors = {"blk.0.ffn_gate_up_exps.weight": (fused, T.MXFP4)}
    path = with_tensors(tmp_path, tensors, "MXFP4", drop=parts)
    twin = open_checkpoint(path_of("MXFP4")).tensors
    for name in ("gate_proj", "up_proj"):
        name = f"model.layers.0.mlp.experts.{name}"
        assert_same_bits(open_checkpoint(path).tensors[name].stored_float32(), twin[name].stored_float32())
    for name in ("blk.0.ffn_gate_up_exps.scale", "blk.0.ffn_up_exps.scale"):
        path = with_tensors(tmp_path, tensors | {name: f32(1, 1)}, "MXFP4", drop=parts)
        with pytest.raises(CheckpointError, match=f"{name}: want "):
            open_checkpoint(path)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, weight, position, word, got", [
    ("Q4_K_M", "blk.0.ffn_up.weight", 2, b"\x00\x7c", "of Q4_K: want a finite value, got NaN or infinity"),
    ("MXFP4", "blk.0.ffn_up_exps.weight", 0, b"\xff",
     "of MXFP4: want a finite value, got NaN or a scale whose values float32 does not hold"),
    ("MXFP4", "blk.0.ffn_up_exps.weight", 0, b"\xfd",
     "of MXFP4: want a finite value, got NaN or a scale whose values float32 does not hold"),
    ("NVFP4", "blk.0.ffn_up.weight", 3, b"\x7f",
     "of NVFP4: want a finite value, got NaN or a negative scale"),
    ("NVFP4", "blk.0.ffn_up.weight", 3, b"\x80",
     "of NVFP4: want a finite value, got NaN or a negative scale"),
    ("IQ", "blk.1.ffn_up.weight", 53, b"\xff\xff\x7f", "of IQ1_M: want a finite value, got NaN or infinity"),
])  # fmt: skip
def test_a_scale_that_is_refused_is_named(tmp_path, name, weight, position, word, got):
    """Loading names the block; the quantizer, the row."""
    tensor = GGUF.open(path_of(name)).tensors[weight]
    data = tensor.data.copy()
    row = data.reshape(-1, data.shape[-1])[7]
    row[position : position + len(word)] = list(word)
    path = with_tensors(tmp_path, {weight: (data, tensor.type)}, name)
    block = (*np.unravel_index(7, tensor.shape[:-1]), 0)
    with pytest.raises(CheckpointError) as caught:
        pyengine.load(path, "float64")
    assert str(caught.value) == f"{path}: {weight}: scale of block {tuple(map(int, block))} {got}"
    with pytest.raises(CheckpointError, match=f"{weight}: (expert 0, )?row 7, group 0: want finite values"):
        quantize(path, tmp_path / "int8")


@pytest.mark.parametrize("kind", [name for name, row in BY_NAME.items() if not row.dense])
def test_a_vector_of_blocks_is_refused(tmp_path, kind):
    name, row = "blk.0.attn_norm.weight", BY_NAME[kind]
    stored = np.zeros(row.stored_columns(256), np.uint8), row.ggml
    path = with_tensors(tmp_path, {name: stored})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: {name}: want type F32, F16, BF16, got {kind}"
