"""make_slice: blocks of every type, and the types that llama.cpp's quantizer gives each matrix."""

import dataclasses
import subprocess
import sys

import draw_blocks
import gguf
import make_slice
import numpy as np
import pytest
import quantizer_types
from paths import TOOLS
from small_slice import SMALL

import pyengine
from pyengine.checkpoint.config import FULL, LINEAR
from pyengine.checkpoint.families import model_specs


def types_in(path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_slice_runs(tmp_path, kind):
    make_slice.write_slice(tmp_path / "a.gguf", SMALL, kind)
    model = pyengine.load(tmp_path / "a.gguf")
    assert model.config.layer_types == SMALL.layer_types and model.config.rotary_dim == 16
    assert model.checkpoint.tensors["model.layers.0.mlp.experts.up_proj"].type == kind
    logits = model.forward(np.arange(20))
    assert sane(logits)
    make_slice.write_slice(tmp_path / "b.gguf", SMALL, kind)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def sane(logits) -> bool:
    return np.isfinite(logits).all() and 0.3 < logits.std() < 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", make_slice.BLOCK_TYPES + make_slice.MIXES)
def test_a_slice_of_every_type_is_the_model_that_llama_cpp_runs(tmp_path, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    make_slice.write_slice(tmp_path / "a.gguf", SMALL, kind)
    ids = np.arange(20)
    logits = pyengine.load(tmp_path / "a.gguf", "float64").forward(ids, last_only=True)[0]
    assert sane(logits)
    llama = llama_cpp.Llama(str(tmp_path / "a.gguf"), n_gpu_layers=0, logits_all=True, verbose=False)
    llama.eval(ids.tolist())
    assert np.corrcoef(logits, llama.scores[len(ids) - 1])[0, 1] > 0.95  # one expert may be another
    llama.close()


def test_the_slice_has_the_sizes_of_the_model():
    types = make_slice.slice_types(make_slice.slice_config(), "Q8_0")
    assert sum(make_slice.file_bytes(*item) for item in types.items()) == 7_378_436_608
    whole = model_specs(make_slice.slice_config(layers=40, vocabulary=248_320))
    assert sum(int(np.prod(spec.shape)) for spec in whole) == 34_660_610_688


@pytest.mark.parametrize("kind", draw_blocks.LAYOUTS)
def test_blocks_of_every_type(kind):
    """Finite values, zero on average, of the size that was asked for; the second witness reads them."""
    rng = np.random.default_rng(make_slice.SEED)
    blocks = draw_blocks.draw_blocks(rng, (256, 2048), kind, 0.02)
    values = gguf.dequantize(blocks.reshape(256, -1), gguf.GGMLQuantizationType[kind])
    assert values.shape == (256, 2048) and np.isfinite(values).all()
    even = 13 / 12  # the mean square of scales between 1/2 and 3/2
    assert values.std() == pytest.approx(0.02 * even**0.5, rel=0.03) and abs(values.mean()) < 0.02 / 50


def test_most_values_of_a_code_are_drawn():
    """The sub-blocks' scales and minimums are not all alike: a kernel that mixes them up would be seen."""
    blocks = draw_blocks.draw_blocks(np.random.default_rng(0), (1, 256 * 64), "Q4_K", 1.0)[0]
    scales, minimums = gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16])
    assert scales.min() == minimums.min() == 32 and scales.max() == minimums.max() == 63
    assert (scales != minimums).mean() > 0.9


def test_a_mix(tmp_path):
    path = tmp_path / "a.gguf"
    drawn = make_slice.write_slice(path, SMALL, "Q4_K_M")
    assert set(types_in(path).values()) == {"Q4_K", "Q6_K", "F32"} == set(drawn)
    assert types_in(path)["output.weight"] == "Q6_K" and types_in(path)["blk.0.ssm_beta.weight"] == "Q4_K"
    stored = sum(make_slice.file_bytes(*item) for item in make_slice.slice_types(SMALL, "Q4_K_M").items())
    assert drawn.total() == stored < path.stat().st_size < stored + 40_000
    assert gguf.GGUFReader(path).fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M


def test_columns_that_no_block_fits():
    config = dataclasses.replace(SMALL, hidden_size=192)
    with pytest.raises(ValueError, match="token_embd.weight: want a multiple of 256 columns, got 192"):
        make_slice.slice_types(config, "Q6_K")
    narrow = make_slice.slice_types(config, "Q6_K", mix=True)
    assert set(narrow.values()) == {"Q6_K", "Q8_0", "F32"}


def test_the_command_wants_a_file_type(tmp_path):
    command = [sys.executable, TOOLS / "bench" / "make_slice.py", tmp_path / "a.gguf", "--mix"]
    done = subprocess.run([*command, "--type", "Q3_K"], capture_output=True, text=True)
    assert done.returncode == 2 and "--mix: want one of Q8_0 Q4_0" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("layers, queries", [(8, 4), (17, 2)])
def test_the_types_are_those_of_the_quantizer(tmp_path, layers, queries):
    llama_cpp = pytest.importorskip("llama_cpp")
    kinds = tuple(LINEAR if (i + 1) % 4 else FULL for i in range(layers))
    config = dataclasses.replace(
        SMALL,
        layer_types=kinds,
        num_attention_heads=queries,
        head_dim=64,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        moe_intermediate_size=96,
    )
    make_slice.write_slice(tmp_path / "source.gguf", config, "Q8_0")
    for name in quantizer_types.FILE_TYPES:
        out = tmp_path / f"{name}.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = gguf.LlamaFileType[f"MOSTLY_{name}"], True
        source = str(tmp_path / "source.gguf").encode()
        assert llama_cpp.llama_model_quantize(source, str(out).encode(), params) == 0
        expected = {spec.gguf: kind for spec, kind in make_slice.slice_types(config, name, mix=True).items()}
        assert {key: kind for key, kind in types_in(out).items() if expected[key] != kind} == {}, name
        assert set(types_in(out)) == {spec.gguf for spec in model_specs(config)}
