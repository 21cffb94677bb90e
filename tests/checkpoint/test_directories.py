"""Directories as people have them: shards, extras, prefixes, tied heads, caches of Hugging Face's hub."""

import numpy as np
import pytest
from hf_directory import halves, hf_tensors, stored, write_file, write_shards, write_single
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import GOLDEN

import pyengine
from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.unneeded import is_unneeded
from pyengine.errors import CheckpointError, FileFormatError, PyengineError
from pyengine.files.numbers import bfloat16_to_float32
from pyengine.files.safetensors import INDEX_NAME

PLAIN, TIED = GOLDEN / "bfloat16.gguf", GOLDEN / "tied.gguf"
IDS = [3, 1, 4, 1, 5, 9]
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EXTRA = ("F32", np.ones((2, 2), np.float32))
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def logits(path, arithmetic="locked"):
    return pyengine.load(path, arithmetic).forward(IDS)


@pytest.fixture(scope="module")
def tensors():
    return hf_tensors(PLAIN)


@pytest.fixture(scope="module")
def want(tmp_path_factory, tensors):
    """{arithmetic: logits} of the plain directory: one file, float32."""
    directory = write_single(tmp_path_factory.mktemp("plain") / "a", PLAIN, tensors)
    return {name: logits(directory, name) for name in ("locked", "float64")}


def fault(path):
    with pytest.raises(PyengineError) as caught:
        open_checkpoint(path)
    return str(caught.value).removeprefix(f"{path}/").removeprefix(f"{path}: ")


# ---- what the model does not need ------------------------------------------------------------

UNNEEDED = [
    "mtp.fc.weight",
    "mtp.layers.0.self_attn.q_proj.weight",
    "model.mtp.fc.weight",
    "model.language_model.mtp.fc.weight",
    "model.visual.blocks.0.attn.qkv.weight",
    "visual.merger.mlp.0.bias",
    "vision_tower.patch_embed.weight",
    "model.vision_tower.x",
    "audio_tower.conv1.weight",
    "multi_modal_projector.linear_1.weight",
]
NEEDED = ["model.layers.0.mlp.gate.bias", "mtpx.weight", "model.layers.0.visual.weight", "lm_head.bias", "x"]


def test_what_is_unneeded():
    assert all(map(is_unneeded, UNNEEDED)) and not any(map(is_unneeded, NEEDED))
    assert not any(is_unneeded(name) for name in hf_tensors(PLAIN))


def test_an_unindexed_tensor_in_a_shard(tmp_path, tensors, want):
    shards = halves(tensors)
    shards[TWO]["mtp.fc.weight"] = EXTRA
    write_shards(tmp_path / "a", PLAIN, shards, {"mtp.fc.weight": None})
    assert np.array_equal(logits(tmp_path / "a"), want["locked"])


def test_the_index_chooses_between_two_tensors_of_one_name(tmp_path, tensors, want):
    shards = halves(tensors)
    shards[TWO][EMBEDDINGS] = stored(np.zeros(tensors[EMBEDDINGS][1].shape), "F32")
    write_shards(tmp_path / "a", PLAIN, shards, {EMBEDDINGS: ONE})
    assert np.array_equal(logits(tmp_path / "a"), want["locked"])


@pytest.mark.parametrize("name", UNNEEDED)
@pytest.mark.parametrize("file", [TWO, "model-00003-of-00003.safetensors"])
def test_the_index_names_what_is_absent(tmp_path, tensors, want, name, file):
    write_shards(tmp_path / "a", PLAIN, halves(tensors), {name: file})
    assert np.array_equal(logits(tmp_path / "a"), want["locked"])


@pytest.mark.parametrize("name", [*NEEDED, EMBEDDINGS])
def test_the_index_names_what_is_absent_and_not_unneeded(tmp_path, tensors, name):
    write_shards(tmp_path / "a", PLAIN, halves(tensors), {name: TWO})
    got = f"got it in {ONE}" if name == EMBEDDINGS else "got none"
    assert fault(tmp_path / "a") == f"{INDEX_NAME}: tensor {name}: want it in {TWO}, {got}"


def test_a_shard_that_the_model_needs_is_absent(tmp_path, tensors):
    write_shards(tmp_path / "a", PLAIN, halves(tensors))
    (tmp_path / "a" / TWO).unlink()
    assert (
        fault(tmp_path / "a") == f"{TWO}: file: want a file that can be read, got: No such file or directory"
    )


def test_a_needed_tensor_that_the_index_forgets(tmp_path, tensors):
    write_shards(tmp_path / "a", PLAIN, halves(tensors), {"model.norm.weight": None})
    shard = next(file for file, part in halves(tensors).items() if "model.norm.weight" in part)
    assert fault(tmp_path / "a") == (
        f"model.norm.weight: want this tensor, got none; {shard} has it, and {INDEX_NAME} does not name it"
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extras=st.dictionaries(
        st.sampled_from(UNNEEDED), st.sampled_from(["stored", "unindexed", "absent", "lost"])
    ),
    single=st.booleans(),
)
def test_no_unneeded_tensor_changes_a_logit(tmp_path_factory, tensors, want, extras, single):
    """stored: in a shard and the index; unindexed: in a shard; absent: in the index; lost: with its shard."""
    directory = tmp_path_factory.mktemp("x") / "a"
    if single:
        more = dict.fromkeys(extras, EXTRA)
        write_single(directory, PLAIN, tensors | more)
    else:
        shards, index = halves(tensors), {}
        for name, how in extras.items():
            if how in ("stored", "unindexed"):
                shards[TWO][name] = EXTRA
            index[name] = {"stored": TWO, "unindexed": None, "absent": ONE, "lost": "lost.safetensors"}[how]
        write_shards(directory, PLAIN, shards, index)
    assert np.array_equal(logits(directory), want["locked"])


# ---- a single file beside an index -------------------------------------------------------------


def test_a_single_file_that_agrees_with_the_index(tmp_path, tensors, want):
    write_shards(tmp_path / "a", PLAIN, halves(tensors), {"mtp.fc.weight": TWO})
    write_file(tmp_path / "a" / "model.safetensors", tensors | {"model.visual.x": EXTRA})
    assert np.array_equal(logits(tmp_path / "a"), want["locked"])


def test_a_single_file_that_is_stale(tmp_path, tensors):
    write_shards(tmp_path / "a", PLAIN, halves(tensors))
    other = np.array(tensors["model.norm.weight"][1])
    other[3] += 1
    stale = tensors | {"model.norm.weight": ("F32", other)}
    write_file(tmp_path / "a" / "model.safetensors", stale)
    shard = next(file for file, part in halves(tensors).items() if "model.norm.weight" in part)
    assert fault(tmp_path / "a") == (
        f"model.safetensors: tensor model.norm.weight: want the bits of {shard}, which {INDEX_NAME} names, "
        f"got others; remove model.safetensors, or {INDEX_NAME} and its files"
    )


@pytest.mark.parametrize(
    "name",
    ["consolidated.safetensors", "pytorch_model.bin", ".DS_Store", "._model.safetensors", ".gitattributes"],
)
def test_files_beside_that_are_not_read(tmp_path, tensors, want, name):
    write_single(tmp_path / "a", PLAIN, tensors)
    (tmp_path / "a" / name).write_bytes(b"anything")
    (tmp_path / "a" / ".cache" / "huggingface").mkdir(parents=True)
    assert np.array_equal(logits(tmp_path / "a"), want["locked"])


def test_a_snapshot_of_the_hubs_cache(tmp_path, tensors, want):
    """blobs/HASH, and snapshots/REVISION with links to them."""
    write_shards(tmp_path / "a", PLAIN, halves(tensors))
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted((tmp_path / "a").iterdir())):
        path.rename(blobs / f"hash{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{i}")
    (tmp_path / "link").symlink_to(snapshot)
    assert np.array_equal(logits(snapshot), want["locked"])
    assert np.array_equal(logits(tmp_path / "link"), want["locked"])
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to("../../blobs/none")
    assert fault(snapshot).startswith(f"{TWO}: file: want a file that can be read, got: No such file")


# ---- heads -----------------------------------------------------------------------------------


def test_a_tied_head_that_is_stored(tmp_path):
    tensors = hf_tensors(TIED)
    want = logits(write_single(tmp_path / "plain", TIED, tensors))
    embeddings = tensors[EMBEDDINGS]
    same = write_single(tmp_path / "same", TIED, tensors | {HEAD: embeddings})
    assert np.array_equal(logits(same), want)
    bf16 = {EMBEDDINGS: stored(embeddings[1], "BF16")}
    wide = bfloat16_to_float32(bf16[EMBEDDINGS][1])
    values = write_single(tmp_path / "values", TIED, tensors | bf16 | {HEAD: ("F32", wide)})
    assert open_checkpoint(values).tensors[HEAD].type == "BF16"  # equal values in another dtype
    other = np.array(embeddings[1])
    other[5, 7] = -other[5, 7]
    differs = write_single(tmp_path / "differs", TIED, tensors | {HEAD: ("F32", other)})
    assert fault(differs) == (
        f"{HEAD}: want the values of {EMBEDDINGS}, for config.json has tie_word_embeddings true, "
        "got others in row 5"
    )


def test_a_tied_head_that_the_index_names_and_no_shard_has(tmp_path):
    tensors = hf_tensors(TIED)
    want = logits(write_single(tmp_path / "plain", TIED, tensors))
    write_shards(tmp_path / "a", TIED, halves(tensors), {HEAD: TWO})
    assert np.array_equal(logits(tmp_path / "a"), want)


def test_a_head_that_is_not_tied_and_not_stored(tmp_path, tensors):
    without = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    write_single(tmp_path / "a", PLAIN, without)
    assert fault(tmp_path / "a") == (
        f"{HEAD}, .weight_i8 or .weight_i4: want one of these tensors, for config.json does not have "
        "tie_word_embeddings true, got none"
    )


# ---- names and dtypes --------------------------------------------------------------------------

PREFIXES = [("model.language_model.", ""), ("language_model.model.", "language_model.")]


@pytest.mark.parametrize("prefix, of_head", PREFIXES)
@pytest.mark.parametrize("apart", [False, True])
def test_the_text_model_in_a_multi_modal_one(tmp_path, want, prefix, of_head, apart):
    inside = {
        prefix + name.removeprefix("model.") if name.startswith("model.") else of_head + name: tensor
        for name, tensor in hf_tensors(PLAIN, apart=apart).items()
    }
    write_single(tmp_path / "a", PLAIN, inside | {"model.visual.blocks.0.x": EXTRA, "mtp.fc.weight": EXTRA})
    assert np.array_equal(logits(tmp_path / "a"), want["locked"])
    name = f"{prefix}layers.0.mlp.gate.bias"
    write_single(tmp_path / "b", PLAIN, inside | {name: EXTRA})
    assert fault(tmp_path / "b").startswith(f"{name}: want only tensors that the model has, got this one")


@pytest.mark.parametrize("arithmetic", ["locked", "float64"])
@pytest.mark.parametrize("apart", [False, True])
def test_dtypes_of_all_kinds_in_one_model(tmp_path, tensors, arithmetic, apart):
    """Values that all dtypes hold: whatever each tensor's is, experts of one layer too, the model is one."""

    def rounded(dtype_of, name):
        made = hf_tensors(PLAIN, apart=apart)
        coarse = {n: np.clip(np.round(a * 64) / 64, -1, 1).astype(np.float32) for n, (_, a) in made.items()}
        tensors = {n: stored(a, dtype_of(n)) for n, a in coarse.items()}
        return logits(write_single(tmp_path / name, PLAIN, tensors), arithmetic)

    draw = np.random.default_rng(1729)
    mixed = rounded(lambda name: ("F32", "F16", "BF16")[draw.integers(3)], "mixed")
    assert np.array_equal(mixed, rounded(lambda name: "F32", "plain"))


def test_a_dtype_that_is_not_read(tmp_path, tensors):
    name = "model.layers.0.mlp.gate.weight"
    wide = tensors | {name: ("F64", tensors[name][1].astype(np.float64))}
    write_single(tmp_path / "a", PLAIN, wide)
    shape = tensors[name][1].shape
    assert fault(tmp_path / "a") == f"{name}: want {shape} F32 or F16 or BF16, got {shape} F64"


def test_a_directory_without_a_tokenizer_computes(tmp_path, tensors, want):
    write_single(tmp_path / "a", PLAIN, tensors)
    model = pyengine.load(tmp_path / "a")
    assert np.array_equal(model.forward(IDS), want["locked"])
    with pytest.raises(PyengineError) as caught:
        model.generate("text", 1)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_is_refused(tmp_path, tensors, weights):
    """transformers adds it to the weights beside it; without, its file has no weights of a model."""
    write_single(tmp_path / "a", PLAIN, tensors)
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not weights:
        (tmp_path / "a" / "model.safetensors").unlink()
        (tmp_path / "a" / "config.json").unlink()
    assert fault(tmp_path / "a") == (
        "adapter_config.json: file: want no adapter, for it changes the model and is not computed, got one: "
        "merge it first"
    )


@pytest.mark.parametrize(
    "names, found",
    [
        ((), ""),
        (("x.gguf",), ", but x.gguf: give the path of x.gguf"),
        (("model.safetensors",), ", but model.safetensors"),
    ],
)
def test_a_directory_without_a_config(tmp_path, names, found):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert fault(tmp_path) == f"directory: want config.json, got none{found}"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "x.gguf"])
def test_a_clone_without_its_large_files(tmp_path, tensors, name):
    path = write_single(tmp_path / "a", PLAIN, tensors) if name != "x.gguf" else tmp_path / name
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    file = path if path.suffix == ".gguf" else path / name
    file.write_text(pointer)
    message = "file: want the file itself, got a pointer of Git LFS to it (git lfs pull fetches it)"
    assert fault(path) in (message, f"{name}: {message}")


@pytest.mark.parametrize("pad", [-1, None])
def test_a_model_without_a_padding_token(tmp_path, tensors, want, pad):
    write_single(tmp_path / "a", PLAIN, tensors, pad_token_id=pad)
    assert open_checkpoint(tmp_path / "a").config.pad_token_id is None
    assert np.array_equal(logits(tmp_path / "a"), want["locked"])


def test_experts_fused_and_apart(tmp_path):
    whole, apart = hf_tensors(PLAIN), hf_tensors(PLAIN, apart=True)
    name = next(name for name in whole if name.endswith("experts.down_proj"))
    parts = {
        other: value for other, value in apart.items() if other.startswith(name.removesuffix("down_proj"))
    }
    write_single(tmp_path / "a", PLAIN, whole | parts)
    assert "want this tensor in one form, got it in another as well" in fault(tmp_path / "a")


@pytest.mark.parametrize("expert", [0, 1])
def test_an_expert_that_is_not_there_is_named(tmp_path, expert):
    apart = hf_tensors(PLAIN, apart=True)
    name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
    write_single(tmp_path / "a", PLAIN, {other: apart[other] for other in apart if other != name})
    assert fault(tmp_path / "a").startswith(f"{name}: want this tensor, got none")


def test_a_directory_of_a_gguf_says_so(tmp_path, tensors):
    write_single(tmp_path / "a", PLAIN, tensors)
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "model-Q8_0.gguf")
    with pytest.raises(
        FileFormatError, match="got neither, but model-Q8_0.gguf: give the path of model-Q8_0.gguf$"
    ):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("name", [*NEEDED[:1], "model.layers.9.mlp.gate.weight", "x"])
def test_other_tensors_are_refused(tmp_path, tensors, name):
    write_single(tmp_path / "a", PLAIN, tensors | {name: EXTRA})
    with pytest.raises(CheckpointError, match=f"{name}: want only tensors that the model has, got this one"):
        open_checkpoint(tmp_path / "a")
