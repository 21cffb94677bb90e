"""GGUFs as people have them: other converters' names, projectors in the file, mixed types, splits."""

import itertools

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from gguf.quants import quantize as quantize_blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import GOLDEN
from rewrite import rewrite, split_gguf

import pyengine
from pyengine.checkpoint.open import open_checkpoint
from pyengine.errors import PyengineError
from pyengine.files.ggml_blocks import BY_NAME
from pyengine.files.gguf import GGUF, dequantize

PLAIN, FLOATS, TIED = GOLDEN / "pattern31.gguf", GOLDEN / "bfloat16.gguf", GOLDEN / "tied.gguf"
IDS = [3, 1, 4, 1, 5, 9]
EXTRA = np.ones((2, 32), np.float32), T.F32


def logits(path, arithmetic="locked"):
    return pyengine.load(path, arithmetic).forward(IDS)


@pytest.fixture(scope="module")
def want():
    return logits(PLAIN)


def fault(path):
    with pytest.raises(PyengineError) as caught:
        open_checkpoint(path)
    return str(caught.value).removeprefix(f"{path}: ")


def renamed(path, changes, source=PLAIN, **extras):
    """The file with tensors under other names."""
    tensors = GGUF.open(source).tensors
    moved = {new: (tensors[old].data.copy(), tensors[old].type) for old, new in changes.items()}
    return rewrite(source, path, tensors=moved | extras.get("tensors", {}), drop=list(changes))


# ---- other converters --------------------------------------------------------------------------

DT = {f"blk.{i}.ssm_dt.bias": f"blk.{i}.ssm_dt" for i in range(3)}
UNNEEDED = [
    "v.patch_embd.weight",
    "v.blk.0.attn_q.weight",
    "mm.0.weight",
    "mm.model.mlp.0.bias",
    "a.conv1d.weight",
    "mtp.fc.weight",
]


def test_a_file_of_ollamas(tmp_path, want):
    path = renamed(tmp_path / "x.gguf", DT, tensors=dict.fromkeys(UNNEEDED, EXTRA))
    assert np.array_equal(logits(path), want)
    assert np.array_equal(logits(path, "float64"), logits(PLAIN, "float64"))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extras=st.sets(st.sampled_from(UNNEEDED)),
    dt=st.sets(st.sampled_from(sorted(DT))),
    kind=st.sampled_from([T.F32, T.Q8_0, T.Q6_K, T.IQ2_XXS]),
)
def test_no_unneeded_tensor_changes_a_logit(tmp_path_factory, want, extras, dt, kind):
    """Of whatever type, one that is not read too."""
    path = tmp_path_factory.mktemp("x") / "x.gguf"
    data = (
        EXTRA
        if kind == T.F32
        else (np.zeros((2, {"Q8_0": 34, "Q6_K": 210, "IQ2_XXS": 66}[kind.name]), np.uint8), kind)
    )
    renamed(path, {name: DT[name] for name in dt}, tensors=dict.fromkeys(extras, data))
    assert np.array_equal(logits(path), want)


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_q.bias", "rope_freqs.weight", "blk.1.ffn_gate_inp.scale", "x.weight", "vv.blk.0.weight"],
)
def test_other_tensors_are_refused(tmp_path, name):
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={name: EXTRA})
    assert fault(path).startswith(
        f"{name}: want only tensors that the architecture qwen35moe has, got this one"
    )


def test_both_names_of_one_tensor_are_refused(tmp_path):
    data = GGUF.open(PLAIN).tensors["blk.0.ssm_dt.bias"].data.copy(), T.F32
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={"blk.0.ssm_dt": data})
    assert fault(path) == "blk.0.ssm_dt: want this tensor in one form, got it in another as well"


# ---- types -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind, bytes_of_block", [
    ("token_embd.weight", T.Q8_1, 40),
    ("blk.0.ffn_down_exps.weight", T.I8, 32),
    ("output.weight", T.F64, 256),
    ("blk.3.attn_k.weight", T.I32, 128),
])  # fmt: skip
def test_a_type_that_is_not_read(tmp_path, name, kind, bytes_of_block):
    shape = GGUF.open(PLAIN).tensors[name].shape
    stored = np.zeros((*shape[:-1], shape[-1] // 32 * bytes_of_block), np.uint8)
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={name: (stored, kind)})
    assert fault(path) == f"{name}: want type {', '.join(BY_NAME)}, got {kind.name}"


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight"])
def test_a_vector_of_a_type_that_is_not_read(tmp_path, name):
    shape = GGUF.open(PLAIN).tensors[name].shape
    rows = np.zeros((shape[0] // 32 * 34,), np.uint8)
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={name: (rows, T.Q8_0)})
    assert fault(path) == f"{name}: want type F32, F16, BF16, got Q8_0"


def as_type(values, kind):
    """Values that every type holds (codes of a power of two) -> what a file stores of them."""
    if kind == T.F32:
        return values.astype(np.float32), kind
    if kind == T.F16:
        return values.astype(np.float16), kind
    return quantize_blocks(values, kind), kind


MIXED = [
    "token_embd.weight",
    "output.weight",
    "blk.0.ssm_alpha.weight",
    "blk.0.ssm_beta.weight",
    "blk.1.ffn_gate_inp.weight",
    "blk.1.ffn_gate_exps.weight",
    "blk.1.ffn_up_exps.weight",
    "blk.0.ffn_down_exps.weight",
    "blk.1.attn_output.weight",
    "blk.0.ffn_gate_inp_shexp.weight",
]


@pytest.mark.parametrize("seed", range(3))
def test_types_mixed_in_one_file(tmp_path, seed):
    """The float64 model is the same in whatever types its values lie."""
    draw, tensors = np.random.default_rng(seed), GGUF.open(FLOATS).tensors
    coarse, mixed = {}, {}
    for name in MIXED:
        values = np.round(dequantize(tensors[name]) * 64)
        values = np.clip(values, -126, 126)
        values[..., ::32] = 127  # so that a block's Q8_0 scale is 1/64
        values = (values / 64).astype(np.float32)
        coarse[name] = as_type(values, T.F32)
        mixed[name] = as_type(values, [T.F32, T.BF16, T.Q8_0, T.F16][draw.integers(4)])
    paths = [
        rewrite(FLOATS, tmp_path / f"{i}.gguf", tensors=changed) for i, changed in enumerate((coarse, mixed))
    ]
    kinds = {t.type for t in open_checkpoint(paths[1]).tensors.values()}
    assert len(kinds) > 2
    a, b = (logits(path, "float64") for path in paths)
    assert np.array_equal(a, b)


@pytest.mark.parametrize("gate", [T.F32, T.F16, T.BF16, T.Q8_0])
@pytest.mark.parametrize("up", [T.F32, T.F16, T.BF16, T.Q8_0])
def test_experts_whose_gate_and_up_have_two_types(tmp_path, gate, up):
    """The locked arithmetic knows a matrix by its own type: the products are those of each type alone."""
    names = [f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up")]
    tensors = GGUF.open(FLOATS).tensors
    values = {n: np.round(dequantize(tensors[n]) * 64).astype(np.float32) / 64 for n in names}
    stored = {n: as_type(values[n], kind) for n, kind in zip(names, (gate, up))}
    model = pyengine.load(rewrite(FLOATS, tmp_path / "x.gguf", tensors=stored))
    state = model.new_state()
    whole, one_by_one = model.forward(IDS), [model.forward([i], state)[0] for i in IDS]
    assert np.array_equal(whole, one_by_one)
    if T.Q8_0 not in (gate, up):
        plain = {n: as_type(values[n], T.F32) for n in names}  # values that the three float types hold
        assert np.array_equal(whole, logits(rewrite(FLOATS, tmp_path / "y.gguf", tensors=plain)))


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q8_0])
@pytest.mark.parametrize("shape", [(64,), (1, 64)])
def test_the_shared_gate_in_each_shape_and_type(tmp_path, kind, shape):
    name = "blk.0.ffn_gate_inp_shexp.weight"
    values = (np.arange(64, dtype=np.float32) - 32) / 64
    values[::32] = 127 / 64
    stored, kind = as_type(values.reshape(1, 64), kind)
    path = rewrite(PLAIN, tmp_path / "x.gguf", tensors={name: (stored.reshape(*shape[:-1], -1), kind)})
    tensor = open_checkpoint(path).tensors["model.layers.0.mlp.shared_expert_gate.weight"]
    assert tensor.float64().tolist() == [values.tolist()]
    plain = rewrite(PLAIN, tmp_path / "y.gguf", tensors={name: (values, T.F32)})
    assert np.array_equal(logits(path, "float64"), logits(plain, "float64"))


# ---- fused, tied, split ------------------------------------------------------------------------


def fuse(tensors, names, path, source):
    """Tensors joined along their rows, under the last name given."""
    *parts, whole = names
    data = np.concatenate([tensors[name].data for name in parts], axis=-2)
    return rewrite(source, path, tensors={whole: (data, tensors[parts[0]].type)}, drop=parts)


@pytest.mark.parametrize("source, layer", [(PLAIN, 3), (FLOATS, 1)])
@pytest.mark.parametrize("parts, whole", [
    (["attn_q", "attn_k", "attn_v"], "attn_qkv"),
    (["ffn_gate_exps", "ffn_up_exps"], "ffn_gate_up_exps"),
])  # fmt: skip
def test_one_layer_fused_and_the_others_not(tmp_path, source, layer, parts, whole):
    names = [f"blk.{layer}.{part}.weight" for part in (*parts, whole)]
    path = fuse(GGUF.open(source).tensors, names, tmp_path / "x.gguf", source)
    assert np.array_equal(logits(path), logits(source))


@pytest.mark.parametrize("kind", [T.Q8_0, T.F32])
def test_a_tied_head_stored_again(tmp_path, kind):
    embeddings = GGUF.open(TIED).tensors["token_embd.weight"]
    data = embeddings.data.copy() if kind == embeddings.type else dequantize(embeddings)
    path = rewrite(TIED, tmp_path / "x.gguf", tensors={"output.weight": (data, kind)})
    assert np.array_equal(logits(path, "float64"), logits(TIED, "float64"))
    if kind == embeddings.type:
        assert np.array_equal(logits(path), logits(TIED))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_splits_hold_the_tensors_in_any_order(tmp_path, want, order):
    names = list(GGUF.open(PLAIN).tensors)[::-1]
    split_gguf(PLAIN, tmp_path / "m", [names[i::3] for i in order])
    assert np.array_equal(logits(tmp_path / "m-00001-of-00003.gguf"), want)


def test_splits_in_the_hubs_cache(tmp_path, want):
    names = list(GGUF.open(PLAIN).tensors)
    split_gguf(PLAIN, tmp_path / "m", [names[::2], names[1::2]])
    (tmp_path / "snapshots").mkdir()
    for i, path in enumerate(sorted(tmp_path.glob("*.gguf"))):
        path.rename(tmp_path / f"hash{i}")
        (tmp_path / "snapshots" / path.name).symlink_to(f"../hash{i}")
    assert np.array_equal(logits(tmp_path / "snapshots" / "m-00001-of-00002.gguf"), want)


def test_another_split_than_the_first_says_which_to_open(tmp_path):
    names = list(GGUF.open(PLAIN).tensors)
    split_gguf(PLAIN, tmp_path / "m", [names[::2], names[1::2]])
    said = fault(tmp_path / "m-00002-of-00002.gguf")
    assert said == "split.no: want 0, got 1: give the path of m-00001-of-00002.gguf"
