"""Models into one: the same bytes however they are computed, and one line for what cannot be merged."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from hf_directory import hf_tensors, stored, write_single
from merge_models import BASE, METHODS, census, configuration, write_child, write_configuration
from paths import GOLDEN
from rewrite import rewrite

from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.tensor import Tensor
from pyengine.cli import main
from pyengine.errors import CheckpointError, InputError, PyengineError
from pyengine.files.gguf import GGUF
from pyengine.files.numbers import float32_to_bfloat16
from pyengine.merge import merge as merge_module
from pyengine.merge import tensor_merge
from pyengine.merge.configuration import parse_configuration
from pyengine.merge.merge import MergeJob, merge
from pyengine.quantizer.quantize import quantize


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    root = tmp_path_factory.mktemp("parents")
    return [write_child(root / "mother", 1), write_child(root / "father", 2, dtype="F32", apart=True)]


def tree(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def values(directory):
    return {name: tensor.float64() for name, tensor in open_checkpoint(directory).tensors.items()}


def float32(path, name):
    return open_checkpoint(path).tensors[name].float64().astype(np.float32)


EACH = [
    method if method == "dare_ties" else pytest.param(method, marks=pytest.mark.slow) for method in METHODS
]
HOW = ("pieces", "rows", "shards")
BOTH = ("ties", "dare_ties")


# ---- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", EACH)
def test_a_merge_is_a_model(tmp_path, parents, method):
    path = write_configuration(tmp_path / "m.yaml", method, parents)
    merge(path, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {tensor.type for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.config.hidden_size == open_checkpoint(BASE).config.hidden_size
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["dtype"] == "bfloat16" and said["model_type"] == "qwen3_5_moe_text"
    for name in ("generation_config.json", "noesis_provenance.json"):
        assert (tmp_path / "out" / name).exists()
    assert (tmp_path / "out" / "tokenizer.json").exists() == (method != "linear")  # only the base has one


@pytest.mark.slow
def test_task_arithmetic_by_hand(tmp_path, parents):
    path = write_configuration(tmp_path / "m.yaml", "task_arithmetic", parents, dtype="float32")
    merge(path, tmp_path / "out")
    found, weight = open_checkpoint(tmp_path / "out"), np.float32(0.6)
    for name, tensor in found.tensors.items():
        base, mother, father = (float32(path, name) for path in (BASE, *parents))
        wanted = base + ((mother - base) * weight + (father - base) * weight)
        assert tensor.type == "F32" and np.array_equal(tensor.float64(), wanted), name


@pytest.mark.parametrize("how", ["threads", *(pytest.param(h, marks=pytest.mark.slow) for h in HOW)])
def test_the_same_bytes_however_they_are_computed(tmp_path, monkeypatch, parents, how):
    """Threads, and pieces of one row of any tensor, whose statistics are then put together."""
    for method in BOTH if how != "threads" else BOTH[1:]:
        path = write_configuration(tmp_path / f"{method}.yaml", method, parents)
        merge(path, tmp_path / f"{method}-1", threads=1)
        with monkeypatch.context() as patch:
            if how in ("pieces", "rows"):
                patch.setattr(tensor_merge, "PIECE", {"pieces": 700, "rows": 1}[how])
                patch.setattr(tensor_merge, "BLOCK", {"pieces": 5000, "rows": 100}[how])
            size = 40_000 if how == "shards" else 4 << 30
            merge(path, tmp_path / f"{method}-2", threads=3, shard_bytes=size)
        one, other = (tmp_path / f"{method}-{i}" for i in (1, 2))
        if how != "shards":
            assert tree(one) == tree(other)
            continue
        assert len(list(other.glob("model-*"))) > 3
        a, b = (json.loads((d / "noesis_provenance.json").read_text())["tensors"] for d in (one, other))
        assert a == b


@pytest.mark.slow
@pytest.mark.parametrize("block", [tensor_merge.BLOCK, 1000])
def test_twins_are_the_quantized_merge(tmp_path, monkeypatch, parents, block):
    """In one pass: the same codes and scales as by way of a directory of float32."""
    monkeypatch.setattr(tensor_merge, "BLOCK", block)
    path = write_configuration(tmp_path / "m.yaml", "dare_ties", parents, dtype="float32")
    merge(path, tmp_path / "floats")
    merge(path, int8=tmp_path / "int8", int4=tmp_path / "int4", scale="mse", threads=2)
    quantize(tmp_path / "floats", tmp_path / "a8", tmp_path / "a4", scale="mse")
    for mine, other in (("int8", "a8"), ("int4", "a4")):
        one, two = tree(tmp_path / mine), tree(tmp_path / other)
        del one["noesis_provenance.json"], two["noesis_provenance.json"]
        assert one.keys() == two.keys() and one == two


@pytest.mark.slow
def test_a_gguf_and_its_directory_are_the_same_parent(tmp_path, parents):
    """Experts apart, stacked or fused, rows in llama.cpp's order or in Hugging Face's."""
    floats = write_single(tmp_path / "base", BASE, hf_tensors(BASE))
    digests = []
    for i, base in enumerate((BASE, floats)):
        merge(write_configuration(tmp_path / f"{i}.yaml", "ties", parents, base=base), tmp_path / f"o{i}")
        said = json.loads((tmp_path / f"o{i}" / "noesis_provenance.json").read_text())
        digests.append(said["tensors"])
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_another_seed_is_another_merge(tmp_path, parents):
    path = write_configuration(tmp_path / "m.yaml", "dare_linear", parents, seed=5)
    merge(path, tmp_path / "a")
    merge(path, tmp_path / "b", seed=6)
    merge(path, tmp_path / "c", seed=5)
    assert tree(tmp_path / "a") == tree(tmp_path / "c")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "b" / "noesis_provenance.json").read_text())["seed"] == 6


@pytest.mark.slow
def test_both_ways_to_rescale(tmp_path, parents):
    """The one divides by the density, the other keeps the sum of the magnitudes."""
    found = {}
    for rescale in (False, "density", "l1"):
        said = configuration("dare_linear", parents[:1], own={"weight": 1, "density": 0.5})
        job = MergeJob(parse_configuration(said | {"parameters": {"rescale": rescale}}, "x"))
        (part,) = job.plan.parts["model.layers.1.linear_attn.in_proj_qkv.weight"]
        found[rescale] = part.merged(0, part.rows).astype(np.float64) - part.base.rows(0, part.rows)
        whole = (part.sources[0].rows(0, part.rows) - part.base.rows(0, part.rows)).astype(np.float64)
    kept = found[False] != 0
    assert 0.4 < kept.mean() < 0.6
    assert np.allclose(found["density"][kept], 2 * whole[kept], rtol=1e-5, atol=1e-7)
    assert np.isclose(np.abs(found["l1"]).sum(), np.abs(whole).sum(), rtol=1e-4)


# ---- experts and transplants -------------------------------------------------------------------


def test_a_transplant_is_the_models_own(tmp_path, parents):
    """A layer of the mother's, the dead experts' of the father's, bit for bit; the rest is merged."""
    mother, father = map(str, parents)
    counts = tmp_path / "census.json"
    counts.write_text(json.dumps(census(4, 6, dead={(1, 3)})))
    rules = [
        {"layers": [2], "model": mother},
        {"census": str(counts), "model": father},
        {"filter": "lm_head", "model": str(BASE)},
    ]
    path = write_configuration(tmp_path / "m.yaml", "dare_ties", parents, transplants=rules)
    merge(path, tmp_path / "out")
    out, of = values(tmp_path / "out"), {p: values(p) for p in (BASE, *parents)}

    def is_of(name, model, expert=...):
        rounded = float32_to_bfloat16(of[model][name][expert].astype(np.float32))
        return np.array_equal(float32_to_bfloat16(out[name][expert].astype(np.float32)), rounded)

    for name in out:
        if ".layers.2." in name:
            assert is_of(name, parents[0]), name
        elif ".mlp.experts." in name:
            assert [is_of(name, parents[1], e) for e in range(6)] == [
                e == 3 and ".1." in name for e in range(6)
            ]
    assert is_of("lm_head.weight", BASE) and not is_of("model.embed_tokens.weight", BASE)


def test_a_dead_expert_of_density_0_is_the_bases(tmp_path, parents):
    counts = tmp_path / "census.json"
    counts.write_text(json.dumps(census(4, 6, dead={(0, 1)})))
    own = {"weight": 1, "density": [{"census": str(counts), "dead": 0, "living": 0.6}, {"value": 0.8}]}
    path = write_configuration(tmp_path / "m.yaml", "dare_ties", parents[:1], own=own, dtype="float32")
    merge(path, tmp_path / "out")
    name = "model.layers.0.mlp.experts.up_proj"
    out, base = float32(tmp_path / "out", name), float32(BASE, name)
    assert [np.array_equal(out[e], base[e]) for e in range(6)] == [False, True, False, False, False, False]
    changed = (out != base).mean(axis=(1, 2))
    assert (abs(changed[[0, 2, 3, 4, 5]] - 0.6) < 0.1).all()


# ---- tensors that are no part of the text model ------------------------------------------------


def with_others(directory, seed, prefix="model."):
    vision = {"model.visual.blocks.0.weight": ("F16", np.full((3, 5), seed, np.float16))}
    extra = vision | {"mtp.fc.weight": ("BF16", np.arange(8, dtype=np.uint16))}
    directory = write_child(directory, seed, extra=extra)
    return directory


def test_other_tensors_need_a_rule(tmp_path):
    parent = with_others(tmp_path / "p", 1)
    path = write_configuration(tmp_path / "m.yaml", "ties", [parent])
    with pytest.raises(
        InputError, match="other_tensors: want a rule for .* of .*/p, which is no part of the text"
    ):
        merge(path, tmp_path / "out")
    rules = [{"filter": "visual", "leave_out": True}, {"filter": "mtp", "leave_out": True}]
    merge(write_configuration(path, "ties", [parent], other_tensors=rules), tmp_path / "out")
    assert not open_checkpoint(tmp_path / "out").other_tensors
    with pytest.raises(InputError, match=r"other_tensors\[2\]: want tensors with 'audio' in their names"):
        more = [*rules, {"filter": "audio", "leave_out": True}]
        merge(write_configuration(path, "ties", [parent], other_tensors=more), tmp_path / "o2")


@pytest.mark.slow
def test_other_tensors_are_copied(tmp_path):
    parents = [with_others(tmp_path / name, seed) for seed, name in enumerate("pq")]
    rules = [{"filter": "visual", "copy": str(parents[1])}, {"filter": "mtp", "leave_out": True}]
    path = write_configuration(tmp_path / "m.yaml", "dare_ties", parents, other_tensors=rules)
    merge(path, tmp_path / "out")
    tensors = open_checkpoint(tmp_path / "out").file.tensors
    (name,) = open_checkpoint(tmp_path / "out").other_tensors
    assert name == "model.visual.blocks.0.weight"
    assert tensors[name].dtype == "F16" and (tensors[name].data == 1).all() and tensors[name].shape == (3, 5)
    with pytest.raises(InputError, match="other_tensors: want `leave_out: true` for an INT8 or INT4"):
        merge(path, int8=tmp_path / "int8")


def test_the_names_and_the_config_of_a_multi_modal_model(tmp_path):
    """Copied vision tensors want their model's own config.json, and its prefix."""
    tensors = {
        (name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name): array
        for name, array in hf_tensors(BASE).items()
    }
    whole = write_single(tmp_path / "p", BASE, tensors | {"model.visual.x": stored(np.ones((2, 2)), "BF16")})
    text = json.loads((whole / "config.json").read_text())
    said = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text | {"dtype": "float32"},
        "vision_config": {"depth": 1},
    }
    (whole / "config.json").write_text(json.dumps(said))
    rules = [{"filter": "visual", "copy": str(whole)}]
    merge(write_configuration(tmp_path / "m.yaml", "ties", [whole], other_tensors=rules), tmp_path / "out")
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert out["architectures"] == said["architectures"] and out["vision_config"] == {"depth": 1}
    assert out["text_config"]["dtype"] == "bfloat16"
    assert set(open_checkpoint(tmp_path / "out").file.tensors) == set(open_checkpoint(whole).file.tensors)


def test_a_next_token_block_of_a_gguf(tmp_path):
    base = GOLDEN / "nextn.gguf"
    parent = write_child(tmp_path / "p", 1, source=base)
    path = write_configuration(tmp_path / "m.yaml", "ties", [parent], base=base)
    with pytest.raises(InputError, match=r"want a rule for blk\.\d+\..* of .*nextn.gguf"):
        merge(path, tmp_path / "out")
    rules = [{"filter": "blk.", "copy": str(base)}]
    with pytest.raises(InputError, match="want copies from a directory"):
        merge(write_configuration(path, "ties", [parent], base=base, other_tensors=rules), tmp_path / "out")
    rules = [{"filter": "blk.", "leave_out": True}]
    merge(write_configuration(path, "ties", [parent], base=base, other_tensors=rules), tmp_path / "out")


# ---- continued ---------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["floats", pytest.param("twins", marks=pytest.mark.slow)])
@pytest.mark.parametrize("after", [100, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 40, 130))])
def test_an_interrupted_merge_continues_to_the_same_bytes(tmp_path, monkeypatch, parents, output, after):
    path = write_configuration(tmp_path / "m.yaml", "dare_ties", parents)

    def run(name):
        if output == "floats":
            merge(path, tmp_path / name, shard_bytes=40_000, threads=1)
        else:
            merge(path, int8=tmp_path / name, int4=tmp_path / f"{name}4", shard_bytes=40_000, threads=1)

    run("whole")
    calls, original = [], tensor_merge.TensorMerge.merged

    def interrupted(self, *arguments):
        calls.append(self.name)
        if len(calls) == after:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(tensor_merge.TensorMerge, "merged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    before = len(calls)
    run("out")
    if after >= 100:  # complete files were not written again
        assert len(calls) - before < 100
    for name in ("", "4")[: 1 + (output == "twins")]:
        assert tree(tmp_path / f"out{name}") == tree(tmp_path / f"whole{name}")


@pytest.mark.slow
def test_a_merge_that_was_killed_continues(tmp_path, parents):
    """SIGKILL, at any moment: nothing of the process's own can tidy up."""
    path = write_configuration(tmp_path / "m.yaml", "dare_ties", parents)
    call = "merge(*sys.argv[1:3], shard_bytes=40_000, threads=1)"
    code = f"import sys\nfrom pyengine.merge.merge import merge\n{call}"
    command = [sys.executable, "-c", code, path, tmp_path / "out"]
    process = subprocess.Popen(command, cwd=tmp_path)
    while not list(tmp_path.glob("out.partial/model-00004*")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    if not (tmp_path / "out").exists():
        subprocess.run(command, check=True, cwd=tmp_path)
    merge(path, tmp_path / "whole", shard_bytes=40_000)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_another_configuration_does_not_continue(tmp_path, monkeypatch, parents):
    path = write_configuration(tmp_path / "m.yaml", "dare_ties", parents)
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "write_companions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(path, tmp_path / "out")
    merge(path, tmp_path / "out", seed=3)
    merge(path, tmp_path / "whole", seed=3)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def interrupt(*arguments, **named):
    raise KeyboardInterrupt


# ---- bad input ---------------------------------------------------------------------------------


def fails(tmp_path, capsys, *arguments):
    """The one line of a command that must fail and write nothing."""
    before = {path.name for path in tmp_path.iterdir()}
    assert main(["merge", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert {path.name for path in tmp_path.iterdir()} == before
    return err.removeprefix("pyengine: ")


def test_models_that_are_not_alike(tmp_path, capsys, odd_model, parents):
    for model in (odd_model, GOLDEN / "dense.gguf"):
        path = write_configuration(tmp_path / "m.yaml", "ties", [model])
        line = fails(tmp_path, capsys, path, tmp_path / "out")
        assert line.startswith(f"{model}: ") and f"as {BASE} has, got" in line, line


def test_another_number_of_experts(tmp_path, capsys):
    tensors = hf_tensors(BASE)
    fewer = {
        name: (kind, array[:5] if ".mlp.experts." in name or name.endswith("mlp.gate.weight") else array)
        for name, (kind, array) in tensors.items()
    }
    write_single(tmp_path / "p", BASE, fewer, num_experts=5)
    path = write_configuration(tmp_path / "m.yaml", "ties", [tmp_path / "p"])
    line = fails(tmp_path, capsys, path, tmp_path / "out")
    assert line.startswith(f"{tmp_path / 'p'}: num_experts: want 6 as {BASE} has, got 5")


def test_another_vocabulary(tmp_path, capsys, parents):
    tokens = list(GGUF.open(BASE).metadata["tokenizer.ggml.tokens"])
    parent = write_child(tmp_path / "p", 1)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    swapped = vocabulary | {tokens[7]: 9, tokens[9]: 7}
    for words, fault in (
        (vocabulary, None),
        (swapped, f"vocabulary: token 7: want {tokens[7]!r} as {BASE} has"),
    ):
        (parent / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
        path = write_configuration(tmp_path / "m.yaml", "ties", [parent])
        if fault is None:
            merge(path, tmp_path / "out")
        else:
            assert f"{parent}: {fault}" in fails(tmp_path, capsys, path, tmp_path / "o2")


@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", EACH)
def test_a_value_that_is_not_finite_names_model_and_tensor(tmp_path, capsys, parents, method, bad):
    tensors = hf_tensors(BASE)
    kind, array = tensors["model.layers.1.mlp.experts.down_proj"]
    array = array.copy()
    array[3, 2, 5] = bad
    spoilt = write_single(
        tmp_path / "p", BASE, tensors | {"model.layers.1.mlp.experts.down_proj": (kind, array)}
    )
    path = write_configuration(tmp_path / "m.yaml", method, [parents[0], spoilt])
    line = fails(tmp_path, capsys, path, tmp_path / "out")
    where = "model.layers.1.mlp.experts.down_proj: expert 3, row 2, column 5: want a finite value"
    assert line.startswith(f"{spoilt}: {where}")


def test_a_vector_and_a_base_that_are_not_finite(tmp_path, capsys, parents):
    name = "blk.1.attn_norm.weight"
    vector = GGUF.open(BASE).tensors[name].data.copy()
    vector[3] = np.nan
    base = rewrite(BASE, tmp_path / "bad.gguf", tensors={name: (vector, T.F32)})
    path = write_configuration(tmp_path / "m.yaml", "ties", parents, base=base)
    line = fails(tmp_path, capsys, path, tmp_path / "out")
    assert line.startswith(f"{base}: {name}: row 0, column 3: want a finite value")


def test_a_merge_beyond_the_outputs_range(tmp_path, capsys, parents):
    path = write_configuration(tmp_path / "m.yaml", "task_arithmetic", parents, own={"weight": 3e38})
    line = fails(tmp_path, capsys, path, tmp_path / "out")
    assert "model.embed_tokens.weight: row " in line and "want a merged value in the range" in line


def test_bad_commands_are_one_line(tmp_path, capsys, parents):
    path = write_configuration(tmp_path / "m.yaml", "ties", parents)
    out = tmp_path / "out"
    assert "destination: want a directory, or --int8" in fails(tmp_path, capsys, path)
    assert "destination: want a directory, or --int8" in fails(tmp_path, capsys, path, out, "--int8", out)
    assert "want a directory that does not exist yet" in fails(tmp_path, capsys, path, tmp_path)
    assert "got one twice" in fails(tmp_path, capsys, path, "--int8", out, "--int4", out)
    assert "seed: want an integer from 0" in fails(tmp_path, capsys, path, out, "-s", "-1")
    assert "group size: want an even number" in fails(
        tmp_path, capsys, path, "--int8", out, "--group-size", 3
    )
    assert "want a file that can be read" in fails(tmp_path, capsys, tmp_path / "no.yaml", out)
    path = write_configuration(tmp_path / "m.yaml", "ties", ["org/model"])
    assert "org/model: want a GGUF file or a checkpoint directory" in fails(tmp_path, capsys, path, out)


def test_pyyaml_is_an_extra(tmp_path, monkeypatch, capsys, parents):
    path = write_configuration(tmp_path / "m.yaml", "ties", parents)
    monkeypatch.setitem(sys.modules, "yaml", None)
    line = fails(tmp_path, capsys, path, tmp_path / "out")
    assert "pyengine merge: want the package PyYAML: pip install 'pyengine-lm[merge]'" in line


def test_a_source_that_changes_meanwhile(tmp_path, monkeypatch, parents):
    parent = write_child(tmp_path / "p", 1)
    path = write_configuration(tmp_path / "m.yaml", "ties", [parent])
    original = Tensor.rows_float32

    def grow(self, *arguments):
        with open(parent / "model.safetensors", "ab") as file:
            file.write(b"x")
        monkeypatch.setattr(Tensor, "rows_float32", original)
        return original(self, *arguments)

    monkeypatch.setattr(Tensor, "rows_float32", grow)
    with pytest.raises(PyengineError, match="it has changed since"):
        merge(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_more_than_one_error_in_threads_is_one(tmp_path, parents, monkeypatch):
    """The first one in the order of the tensors."""

    def fail(self, *arguments):
        raise CheckpointError(self.name)

    monkeypatch.setattr(tensor_merge.TensorMerge, "merged", fail)
    path = write_configuration(tmp_path / "m.yaml", "ties", parents)
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight"):
        merge(path, tmp_path / "out", threads=4)
    assert [p.name for p in tmp_path.iterdir()] == ["m.yaml"]


# ---- transformers --------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["pattern31", "dense", "tied", "next"])
def test_transformers_loads_it(tmp_path, name, dtype):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    base = GOLDEN / f"{name}.gguf"
    parent = write_child(tmp_path / "p", 1, source=base)
    more = {"other_tensors": [{"filter": "blk.4.", "leave_out": True}]} if name == "next" else {}
    path = write_configuration(tmp_path / "m.yaml", "dare_ties", [parent], base=base, dtype=dtype, **more)
    merge(path, tmp_path / "out")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    ours, theirs = values(tmp_path / "out"), model.state_dict()
    for key, tensor in theirs.items():
        stem = key.removesuffix("gate_up_proj")
        wanted = (
            np.concatenate([ours[f"{stem}gate_proj"], ours[f"{stem}up_proj"]], axis=1)
            if stem != key
            else ours[key]
        )
        assert tensor.dtype in (getattr(torch, dtype), torch.float32)
        assert np.array_equal(tensor.to(torch.float64).numpy(), wanted), key
