"""A family is data: the dense one, used in every way, and one that a test makes up."""

import dataclasses
import json

import numpy as np
import odd_model
import pytest
from gguf.constants import GGUFValueType as V
from hf_directory import hf_tensors, write_single
from make_slice import write_slice
from paths import GOLDEN
from rewrite import rewrite

import pyengine
from pyengine.checkpoint import families
from pyengine.checkpoint.config import Config
from pyengine.checkpoint.families import FAMILIES, model_specs
from pyengine.checkpoint.families.family import Spec
from pyengine.checkpoint.families.qwen35 import QWEN35, mixer_specs
from pyengine.checkpoint.open import open_checkpoint
from pyengine.cli import main
from pyengine.errors import FileFormatError, PyengineError
from pyengine.files.gguf import GGUF
from pyengine.oracle.trace import record_trace
from pyengine.quantizer.compressed_tensors import export_compressed_tensors
from pyengine.quantizer.quality import measure
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.verify_files import verify_files

DENSE, MOE = GOLDEN / "dense.gguf", GOLDEN / "tied.gguf"
IDS = [3, 1, 4, 1, 5, 9, 2, 6]

CONFIG = dataclasses.replace(
    odd_model.CONFIG,
    architecture="qwen35",
    intermediate_size=224,
    num_experts=0,
    num_experts_per_tok=0,
    moe_intermediate_size=0,
    shared_expert_intermediate_size=0,
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A dense model with a head and a tokenizer of its own, odd in every dimension."""
    path = tmp_path_factory.mktemp("dense") / "odd.gguf"
    write_slice(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def twins(tmp_path_factory, wide):
    root = tmp_path_factory.mktemp("twins")
    quantize(wide, root / "int8", root / "int4")
    return root


def fault(path):
    with pytest.raises(PyengineError) as caught:
        open_checkpoint(path)
    return str(caught.value).removeprefix(f"{path}: ")


# ---- the dense family, used ---------------------------------------------------------------------


def test_a_dense_gguf(wide):
    config = open_checkpoint(wide).config
    assert config == dataclasses.replace(CONFIG, eos_token_ids=(258,), pad_token_id=257)
    assert config.num_experts == 0 and not any("expert" in spec.name for spec in model_specs(config))


def test_both_arithmetics_are_one_model(wide):
    exact, locked = (pyengine.load(wide, a).forward(IDS) for a in ("float64", "locked"))
    assert np.abs(exact - locked).max() < 1e-3 * np.abs(exact).max()


def test_every_instruction_set_thread_and_split(wide, each_isa):
    want = None
    for threads in (1, 3):
        model = pyengine.load(wide, threads=threads)
        whole, state = model.forward(IDS), model.new_state()
        steps = np.concatenate([model.forward([i], state) for i in IDS])
        assert np.array_equal(whole, steps)
        want = whole if want is None else want
        assert np.array_equal(whole, want)
    assert np.array_equal(model.forward(IDS, chunk=3), want)


@pytest.mark.parametrize("prefix, of_head", [("model.", ""), ("model.language_model.", ""),
                                             ("language_model.model.", "language_model.")])  # fmt: skip
def test_a_dense_directory(tmp_path, prefix, of_head):
    plain = pyengine.load(write_single(tmp_path / "plain", DENSE, hf_tensors(DENSE))).forward(IDS)
    tensors = {
        prefix + name.removeprefix("model.") if name.startswith("model.") else of_head + name: tensor
        for name, tensor in hf_tensors(DENSE).items()
    }
    text = open_checkpoint(DENSE).config.to_hf()
    assert text["model_type"] == "qwen3_5_text" and text["architectures"] == ["Qwen3_5ForCausalLM"]
    write_single(tmp_path / "a", DENSE, tensors)
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    assert np.array_equal(pyengine.load(tmp_path / "a").forward(IDS), plain)


def test_its_twins_are_what_they_say(wide, twins, tmp_path):
    assert verify_files(twins / "int8", twins / "int4", wide) == []
    said = json.loads((twins / "int8" / "config.json").read_text())
    assert said["model_type"] == "pyengine_qwen3_5" and said["intermediate_size"] == 224
    assert not any("expert" in key for key in said)
    assert said["auto_map"]["AutoModelForCausalLM"] == "modeling_pyengine.PyengineDenseForCausalLM"
    model = pyengine.load(twins / "int8")
    assert model.config == pyengine.load(wide).config
    assert measure(twins / "int8", wide).quantized.snr_db > 40
    for bits in (8, 4):
        export_compressed_tensors(twins / f"int{bits}", tmp_path / f"ct{bits}")
        exported = json.loads((tmp_path / f"ct{bits}" / "config.json").read_text())
        assert exported["architectures"] == ["Qwen3_5ForCausalLM"]


@pytest.mark.slow
def test_text_and_the_command_line(wide, twins, capsys):
    for path in (wide, twins / "int8"):
        model = pyengine.load(path)
        want = int(model.forward(IDS)[-1].argmax())
        generation = model.generate(IDS, 3, stream=True)
        assert [token.id for token in generation][:1] == ([] if want == 258 else [want])
        assert main(["generate", "-m", str(path), "-p", "a b", "-n", "2"]) == 0
        assert main(["bench", "-m", str(path), "-p", "4", "-n", "2", "-r", "1"]) == 0
        assert "qwen35 " in capsys.readouterr().out
        assert main(["info", str(path)]) == 0
        said = capsys.readouterr().out
        assert "mlp_size                 224" in said and "experts" not in said


@pytest.mark.parametrize("budget", ["float32", "bfloat16"])
def test_the_oracle_names_a_mistake_in_it(tmp_path, capsys, budget):
    model = pyengine.load(DENSE, "float64")
    record_trace(model, IDS).save(tmp_path / "right.safetensors")
    swiglu = model.op.swiglu
    model.op.swiglu = lambda gate, up: swiglu(up, gate)
    record_trace(model, IDS).save(tmp_path / "wrong.safetensors")

    def verify(name):
        status = main(["verify", str(DENSE), str(tmp_path / f"{name}.safetensors"), "--budget", budget])
        return status, capsys.readouterr().out

    assert verify("right")[0] == 0
    status, said = verify("wrong")
    assert status == 1 and "gate and up are swapped" in said and "model.layers.0.mlp.down_proj" in said


@pytest.mark.golden
def test_transformers_own_trace_of_it_is_within_the_budget(tmp_path, capsys):
    pytest.importorskip("transformers")
    from hf_float64 import load_float64

    from pyengine.testing import record

    record(load_float64(DENSE).float(), IDS).save(tmp_path / "hf.safetensors")
    assert main(["verify", str(DENSE), str(tmp_path / "hf.safetensors"), "--budget", "float32"]) == 0
    assert "not compared" not in capsys.readouterr().out


# ---- facts that contradict each other ----------------------------------------------------------


@pytest.mark.parametrize("key, value", [
    ("expert_count", 4),
    ("expert_used_count", 2),
    ("expert_shared_feed_forward_length", 32),
])  # fmt: skip
def test_a_dense_file_that_claims_experts(tmp_path, key, value):
    path = rewrite(DENSE, tmp_path / "x.gguf", {f"qwen35.{key}": (value, V.UINT32)})
    assert fault(path) == f"qwen35.{key}: want 0 or no such key, got {value}"
    assert open_checkpoint(rewrite(DENSE, tmp_path / "y.gguf", {f"qwen35.{key}": (0, V.UINT32)}))


def test_tensors_of_the_other_family(tmp_path):
    tensor = GGUF.open(MOE).tensors["blk.0.ffn_gate_inp.weight"]
    path = rewrite(DENSE, tmp_path / "x.gguf", tensors={tensor.name: (tensor.data.copy(), tensor.type)})
    assert fault(path).startswith(
        f"{tensor.name}: want only tensors that the architecture qwen35 has, got this one"
    )


def test_a_size_that_the_tensors_contradict(tmp_path):
    path = rewrite(DENSE, tmp_path / "x.gguf", {"qwen35.feed_forward_length": (96, V.UINT32)})
    assert fault(path).startswith("blk.0.ffn_gate.weight: want shape (96, 64), got (")
    path = rewrite(DENSE, tmp_path / "y.gguf", {"qwen35.feed_forward_length": None})
    assert fault(path) == "qwen35.feed_forward_length: want int, got no such key"


def test_config_json_of_two_families():
    text = open_checkpoint(DENSE).config.to_hf()
    assert Config.from_hf({"model_type": "qwen3_5", "text_config": text}).architecture == "qwen35"
    with pytest.raises(FileFormatError) as caught:
        Config.from_hf({"model_type": "qwen3_5_moe", "text_config": text})
    assert str(caught.value) == (
        "config.json: model_type: want 'qwen3_5_text' or 'qwen3_5' or 'pyengine_qwen3_5', got 'qwen3_5_moe'"
    )
    with pytest.raises(FileFormatError, match="num_experts: want 0 or no such key, got 4"):
        Config.from_hf(text | {"num_experts": 4})
    assert Config.from_hf(text | {"num_experts": 0}) == Config.from_hf(text)


# ---- a family that a test makes up ---------------------------------------------------------------


def upright_specs(config, layer):
    """The dense layer with another converter's names, up before gate."""
    mlp, gguf = f"model.layers.{layer}.mlp", f"blk.{layer}"
    hidden, ff = config.hidden_size, config.intermediate_size
    return [
        *mixer_specs(config, layer),
        Spec(f"{mlp}.up_proj.weight", f"{gguf}.w3.weight", (ff, hidden)),
        Spec(f"{mlp}.gate_proj.weight", f"{gguf}.w1.weight", (ff, hidden)),
        Spec(f"{mlp}.down_proj.weight", f"{gguf}.w2.weight", (hidden, ff)),
    ]


def test_a_new_family_is_one_row(tmp_path, monkeypatch):
    """Other keys, other names, another order: nothing but a Family is added."""
    family = dataclasses.replace(
        QWEN35,
        architecture="upright",
        model_types=("upright_text",),
        quantized_type="pyengine_upright",
        sizes={"intermediate_size": "mlp_width"},
        layer_specs=upright_specs,
    )
    monkeypatch.setitem(FAMILIES, "upright", family)
    for kind in ("upright_text", "pyengine_upright"):
        monkeypatch.setitem(families.MODEL_TYPES, kind, family)
    file, names = GGUF.open(DENSE), {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
    moved = {name: name for name in file.tensors if ".ffn_" in name}
    for old, new in names.items():
        moved = {name: other.replace(f".{old}.", f".{new}.") for name, other in moved.items()}
    tensors = {new: (file.tensors[old].data.copy(), file.tensors[old].type) for old, new in moved.items()}
    keys = {"general.architecture": ("upright", V.STRING)}
    for key in file.metadata:
        if key.startswith("qwen35."):
            kind = file.metadata.type_of(key)
            other = key.replace("qwen35.", "upright.").replace("feed_forward_length", "mlp_width")
            value = file.metadata[key]
            value = value.tolist() if kind.kind == V.ARRAY else value
            keys |= {key: None, other: (value, kind.kind, *([kind.element] if kind.element else []))}
    path = rewrite(DENSE, tmp_path / "x.gguf", keys, tensors, drop=list(moved))
    for arithmetic in ("float64", "locked"):
        got, want = (pyengine.load(p, arithmetic).forward(IDS) for p in (path, DENSE))
        assert np.array_equal(got, want)
    quantize(path, tmp_path / "int8")
    quantize(DENSE, tmp_path / "other8")
    a, b = (pyengine.load(tmp_path / name).forward(IDS) for name in ("int8", "other8"))
    assert np.array_equal(a, b) and verify_files(tmp_path / "int8", source=path) == []
