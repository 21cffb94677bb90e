"""A quantized checkpoint as compressed-tensors' `pack-quantized`: the same values to the bit."""

import json
import re

import numpy as np
import pytest
from paths import GOLDEN

from pyengine.checkpoint.open import open_checkpoint
from pyengine.errors import CheckpointError, InputError
from pyengine.files.safetensors import SafetensorsDirectory
from pyengine.files.safetensors_writer import SafetensorsWriter
from pyengine.quantizer.compressed_tensors import FUSED, export_compressed_tensors, scales_of_groups
from pyengine.quantizer.quantize import quantize

TWINS = [*((name, bits) for name in ("pattern31", "nextn", "odd") for bits in (8, 4)), ("next", 8)]
MIXED = [("pattern31", "mixed"), ("next", "mixed")]
TWINS += MIXED
MIX = "*.experts.*=int4,*.layers.0.*=int8,*.k_proj=int4,*.layers.[13].*=int8"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, odd_model):
    """{(model, bits): (our directory, what was exported from it)}"""
    root, found = tmp_path_factory.mktemp("export"), {}
    for name, bits in TWINS:
        if bits == 8:
            source = odd_model if name == "odd" else GOLDEN / f"{name}.gguf"
            mixed = root / f"{name}-mixed" if (name, "mixed") in TWINS else None
            quantize(source, root / f"{name}-8", root / f"{name}-4", mixed, mix=MIX)
        source, packed = root / f"{name}-{bits}", root / f"{name}-{bits}-packed"
        export_compressed_tensors(source, packed)
        found[name, bits] = source, packed
    return found


def tensors_of(directory):
    return {name: view.data for name, view in SafetensorsDirectory.open(directory).tensors.items()}


def group_of(config, module):
    """The one group of config.json's whose targets have a module, a Linear."""
    groups = config["config_groups"]
    (name,) = [
        name
        for name, group in groups.items()
        if any(
            target == "Linear" or re.match(target.removeprefix("re:"), module) for target in group["targets"]
        )
    ]
    return name, groups[name]["weights"]


def quantization_config(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def values_of_source(directory):
    """{name in the export: float64 values}, the experts apart."""
    values = {}
    for name, tensor in open_checkpoint(directory).tensors.items():
        stem, part = name.rsplit(".", 1)
        if stem.endswith(".experts"):
            values |= {f"{stem}.{e}.{part}.weight": tensor.float64(e) for e in range(tensor.shape[0])}
        else:
            values[name] = tensor.float64()
    return values


# ---- to the bit ------------------------------------------------------------------------------


def unpack(words, shape, bits):
    """int32 [rows, words] -> codes [rows, cols]: bit by bit, as the layout is described."""
    rows, cols = shape
    codes = np.zeros((rows, cols), np.int64)
    for col in range(cols):
        word = words[:, col * bits // 32].astype(np.int64) & 0xFFFFFFFF
        codes[:, col] = (word >> (col * bits % 32)) & ((1 << bits) - 1)
    return codes - (1 << (bits - 1))


def unpacked_by_numpy(packed):
    """Every weight of an export in float32: our own reading of the layout, none of pyengine's code."""
    tensors, config = tensors_of(packed), quantization_config(packed)
    values = {
        name: as_float(array)
        for name, array in tensors.items()
        if name.endswith((".weight", ".A_log", ".dt_bias"))
    }
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        _, args = group_of(config, stem.removesuffix(".weight"))
        codes = unpack(tensors[name], tensors[f"{stem}_shape"], args["num_bits"])
        scales = np.repeat(tensors[f"{stem}_scale"], args["group_size"], axis=1)
        values[stem] = codes.astype(np.float32) * scales
    return values


def as_float(array):
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


@pytest.mark.parametrize("twin", TWINS)
def test_an_independent_unpacking_gives_the_same_values(exported, twin):
    source, packed = exported[twin]
    want = values_of_source(source)
    got = unpacked_by_numpy(packed)
    assert set(got) == set(want)
    for name, values in want.items():
        assert np.array_equal(got[name].reshape(values.shape), values), name


@pytest.mark.golden
@pytest.mark.parametrize("twin", TWINS)
def test_compressed_tensors_own_unpacking_gives_the_same_values(exported, twin):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    source, packed = exported[twin]
    said = quantization_config(packed)
    config = QuantizationConfig.model_validate(said)
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors, want = tensors_of(packed), values_of_source(source)
    stems = [n.removesuffix("_packed") for n in tensors if n.endswith(".weight_packed")]
    assert stems
    for stem in stems:
        parts = {
            f"weight_{part}": torch.from_numpy(tensors[f"{stem}_{part}"].copy())
            for part in ("packed", "scale", "shape")
        }
        group, _ = group_of(said, stem.removesuffix(".weight"))
        got = compressor.decompress(parts, config.config_groups[group])["weight"]
        assert np.array_equal(got.double().numpy(), want[stem]), stem


@pytest.mark.golden
@pytest.mark.parametrize("twin", TWINS)
def test_transformers_loads_it_with_the_same_weights(exported, twin):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source, packed = exported[twin]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        model(input_ids=torch.arange(4)[None])  # unpacks what is not unpacked yet
    state, checkpoint = model.state_dict(), open_checkpoint(source)
    for name, tensor in checkpoint.tensors.items():
        want = torch.from_numpy(tensor.float64())
        if name.endswith("experts.gate_proj"):
            up = checkpoint.tensors[name.replace("gate_proj", "up_proj")].float64()
            want = torch.cat([want, torch.from_numpy(up)], dim=1)
            name = name.replace("gate_proj", "gate_up_proj")
        if not name.endswith("experts.up_proj"):
            assert torch.equal(state[name].double().reshape(want.shape), want), name


# ---- the files -------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", TWINS)
def test_names_dtypes_and_what_config_says(exported, twin):
    _, packed = exported[twin]
    tensors, (model, bits) = tensors_of(packed), twin
    stem = "model.layers.0.mlp.experts.3.down_proj.weight"
    _, args = group_of(quantization_config(packed), stem.removesuffix(".weight"))
    bits = 4 if bits == "mixed" else bits
    assert args == {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    rows, cols = tensors[f"{stem}_shape"]
    assert tensors[f"{stem}_shape"].dtype == np.int64
    assert tensors[f"{stem}_packed"].shape == (rows, cols * bits // 32)
    assert tensors[f"{stem}_packed"].dtype == np.int32
    assert tensors[f"{stem}_scale"].shape == (rows, cols // 32)
    assert tensors[f"{stem}_scale"].dtype == np.float32
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == np.float32
    config = json.loads((packed / "config.json").read_text())
    of_next = model == "next"
    assert config["architectures"] == ["Qwen3NextForCausalLM" if of_next else "Qwen3_5MoeForCausalLM"]
    assert "auto_map" not in config


@pytest.mark.parametrize("twin", MIXED)
def test_fused_names_are_targets_or_ignored(exported, twin):
    """A server that fuses linears looks for the fused name: each has one place, and that of its parts."""
    _, packed = exported[twin]
    config, tensors = quantization_config(packed), tensors_of(packed)
    assert len(config["config_groups"]) == 2
    ignored = [name.removeprefix("re:") for name in config["ignore"] if name.startswith("re:")]
    for fused, parts in FUSED.items():
        stems = [f"model.layers.{layer}.{part}" for layer in range(4) for part in parts]
        stems = [stem for stem in stems if f"{stem}.weight_packed" in tensors]
        for stem in stems:
            layer = stem.split(".")[2]
            groups = {group_of(config, s)[0] for s in stems if s.split(".")[2] == layer}
            if len(groups) == 1:
                assert group_of(config, f"model.layers.{layer}.{fused}")[0] in groups
    for ends in ("in_proj_a", "in_proj_b", "in_proj_ba", "mlp.gate", "shared_expert_gate"):
        assert any(re.match(pattern, f"model.layers.0.linear_attn.{ends}") for pattern in ignored)


def test_what_travels_and_what_does_not(exported, tmp_path):
    source, packed = exported["pattern31", 8]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (packed / name).read_bytes() == (source / name).read_bytes()
    assert (packed / "noesis_source_provenance.json").exists()
    assert not (packed / "noesis_provenance.json").exists() and not list(packed.glob("*.py"))


def test_shards_give_the_same_tensors(exported, tmp_path):
    source, packed = exported["pattern31", 4]
    export_compressed_tensors(source, tmp_path / "many", shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = tensors_of(packed), tensors_of(tmp_path / "many")
    assert set(one) == set(many) and all(np.array_equal(one[name], many[name]) for name in one)


def test_groups_of_128_stay_where_they_divide():
    scales = np.random.default_rng(1729).random((16, 5)).astype(np.float16)
    assert np.array_equal(scales_of_groups(scales, 2048, 128, 128), scales.T)
    last = scales_of_groups(scales[:2], 192, 128, 64)  # one group of 128, and half a one
    assert np.array_equal(last, scales[[0, 0, 1]].T)


@pytest.mark.parametrize("group", [32, 64, 256])
def test_other_groups_give_the_same_values(tmp_path, group):
    quantize(GOLDEN / "nextn.gguf", tmp_path / "int8", group_size=group)
    export_compressed_tensors(tmp_path / "int8", tmp_path / "packed")
    got = unpacked_by_numpy(tmp_path / "packed")
    want = values_of_source(tmp_path / "int8")
    assert set(got) == set(want)
    assert all(np.array_equal(got[name].reshape(want[name].shape), want[name]) for name in want)


# ---- what is refused -------------------------------------------------------------------------


def test_columns_without_a_group_are_refused_and_nothing_is_written(tmp_path):
    quantize(GOLDEN / "tied.gguf", tmp_path / "int8")
    message = r"o_proj.weight_i8: want a multiple of 32 columns.*got 48"
    with pytest.raises(CheckpointError, match=message):
        export_compressed_tensors(tmp_path / "int8", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_groups_that_the_layout_lacks_are_refused(tmp_path):
    quantize(GOLDEN / "nextn.gguf", tmp_path / "int8", group_size=48)
    with pytest.raises(CheckpointError, match="want groups of a multiple of 32 columns, got 48"):
        export_compressed_tensors(tmp_path / "int8", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_experts_of_several_bits_are_refused(tmp_path):
    """transformers would read them all by one group: other values, without a word."""
    quantize(GOLDEN / "nextn.gguf", mixed=tmp_path / "mixed", mix="*.experts.down_proj=int8")
    message = r"want routed experts of one number of bits.* got INT4 \(.*gate_up_proj_q4\) and INT8 \("
    with pytest.raises(CheckpointError, match=message):
        export_compressed_tensors(tmp_path / "mixed", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


def test_a_source_that_is_not_quantized_is_refused(tmp_path):
    with pytest.raises(InputError, match="want a checkpoint that `pyengine quantize` wrote"):
        export_compressed_tensors(GOLDEN / "pattern31.gguf", tmp_path / "packed")


def test_a_destination_that_exists_is_refused(exported, tmp_path):
    source, packed = exported["pattern31", 8]
    with pytest.raises(InputError, match="want a directory that does not exist yet"):
        export_compressed_tensors(source, packed)
    with pytest.raises(InputError, match="want a directory to write in"):
        export_compressed_tensors(source, tmp_path / "no" / "packed")


def test_a_full_disk_leaves_nothing(exported, tmp_path, monkeypatch):
    original = SafetensorsWriter.write

    def full(self, name, array):
        if "layers.1" in name:
            raise OSError(28, "No space left on device", str(self.path))
        original(self, name, array)

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        export_compressed_tensors(exported["nextn", 8][0], tmp_path / "packed")
    assert not list(tmp_path.iterdir())
