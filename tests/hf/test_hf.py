"""Both twins in transformers: every key, the float64 logits, generation, devices and dtypes."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN

import pyengine
from pyengine import hf
from pyengine.checkpoint.open import open_checkpoint
from pyengine.quantizer.quantize import quantize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_float64 import Float64Mode  # noqa: E402

pytestmark = pytest.mark.golden

MODELING = Path(hf.__file__).parent / "modeling_pyengine.py"
TWINS = [
    (name, bits)
    for name in ("pattern31", "nextn", "odd", "yarn", "dense", "next", "legacy")
    for bits in (8, 4)
] + [("tied", 8), ("pattern31", "mixed"), ("next", "mixed")]
# Layers that differ, an expert's matrices that differ, and q_proj, k_proj that differ.
MIX = "*.layers.0.*=int8,*.experts.down_proj=int4,*.k_proj=int4,*.layers.[13].*=int8"
DTYPES = ["auto", torch.float32, torch.float64, torch.bfloat16, torch.float16]
STAY_FLOAT32 = ("A_log", "dt_bias", "norm.weight")
MARKS = ("_i8", "_i4", "_q8", "_q4")
IDS = np.random.default_rng(1729).integers(0, 100, 20)


@pytest.fixture(scope="module")
def twins(tmp_path_factory, odd_model):
    """{(model, bits): directory}"""
    root = tmp_path_factory.mktemp("twins")
    for name in {name for name, _ in TWINS}:
        source = odd_model if name == "odd" else GOLDEN / f"{name}.gguf"
        mixed = root / f"{name}-mixed" if (name, "mixed") in TWINS else None
        quantize(source, root / f"{name}-8", root / f"{name}-4", mixed, mix=MIX)
    return {(name, bits): root / f"{name}-{bits}" for name, bits in TWINS}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of so small a model only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """transformers copies a checkpoint's code before it runs it: not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
        )
        patch.syspath_prepend(transformers.dynamic_module_utils.HF_MODULES_CACHE)
        yield


def load(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, attn_implementation="eager", **options
    )


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)[None]).logits[0]


def stored_tensors(directory):
    return open_checkpoint(directory).file.tensors


# ---- keys and values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "twin, dtype", [*((twin, "auto") for twin in TWINS), *((TWINS[0], dtype) for dtype in DTYPES[1:])]
)
def test_no_key_is_missing_and_stored_tensors_stay_as_they_are(twins, twin, dtype):
    model, info = load(twins[twin], dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    state, stored = model.state_dict(), stored_tensors(twins[twin])
    assert set(state) - {"lm_head.weight"} == set(stored) - {"lm_head.weight"}
    quantized = [name for name in stored if name.endswith(MARKS)]
    assert quantized
    for name in quantized:
        assert np.array_equal(state[name].numpy(), stored[name].data), name
        assert state[name].numpy().dtype == stored[name].data.dtype
        assert not model.get_parameter(name).requires_grad, name
        assert state[name].ndim == (3 if ".experts." in name else 2)
    asked = torch.bfloat16 if dtype == "auto" else dtype
    for name in set(state) - set(quantized):
        kept = asked.itemsize < 4 and name.endswith(STAY_FLOAT32)
        assert state[name].dtype == (torch.float32 if kept else asked), name


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}])
@pytest.mark.parametrize("twin", TWINS)
def test_decay_and_norms_stay_float32_and_equal_the_file(twins, twin, options):
    """Of a model that computes in half precision, and does compute."""
    model, stored = load(twins[twin], **options), stored_tensors(twins[twin])
    state = model.state_dict()
    names = [name for name in stored if name.endswith(STAY_FLOAT32)]
    assert any("A_log" in name for name in names) and any("linear_attn.norm" in name for name in names)
    for name in names:
        assert state[name].dtype == torch.float32 and stored[name].dtype == "F32", name
        assert np.array_equal(state[name].numpy(), stored[name].data), name
    got = logits(model)
    assert got.dtype == options.get("dtype", torch.bfloat16) and torch.isfinite(got).all()


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("rounding, to", [("exact", torch.float64), ("bfloat16", torch.bfloat16)])
def test_every_weight_is_code_times_scale(twins, twin, rounding, to):
    model = load(twins[twin], dtype=torch.float32, pyengine_dequantize=rounding)
    for name, tensor in open_checkpoint(twins[twin]).tensors.items():
        if tensor.type not in ("INT8", "INT4"):
            continue
        want = torch.from_numpy(tensor.float64()).to(to)
        got = weight_in(model, name, want)
        assert torch.equal(got.double(), want.double()), name


def weight_in(model, name, like):
    """The dequantised weight of pyengine's name, in float32; gate and up lie in one tensor here."""
    path, part = name.rsplit(".", 1)
    module = model.get_submodule(path)
    if like.ndim == 2:
        return module.weight_of(part, torch.float32)
    stored = "down_proj" if part == "down_proj" else "gate_up_proj"
    whole = torch.stack([module.weight_of(stored, torch.float32, e) for e in range(len(like))])
    if stored == "down_proj":
        return whole
    return whole.chunk(2, dim=1)[part == "up_proj"]


@pytest.mark.parametrize("twin", TWINS)
def test_float64_logits_are_pyengines(twins, twin):
    model = load(twins[twin], dtype=torch.float64)
    with Float64Mode():
        got = logits(model).numpy()
    recorded = {}
    want = pyengine.load(twins[twin], "float64").forward(IDS, record=recorded.__setitem__)
    assert got.dtype == np.float64
    assert np.abs(got - recorded["lm_head"]).max() < 1e-11
    # Sums in another order, on another processor, may put one value across a float32's boundary.
    assert (got.astype(np.float32) != want).sum() <= 1


@pytest.mark.parametrize("name, group, bits", [("pattern31", 32, 8), ("tied", 20, 4)])
def test_groups_of_another_size(tmp_path, name, group, bits):
    quantize(GOLDEN / f"{name}.gguf", **{f"int{bits}": tmp_path / "out"}, group_size=group)
    model, info = load(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    with Float64Mode():
        got = logits(model).numpy().astype(np.float32)
    assert (got != pyengine.load(tmp_path / "out", "float64").forward(IDS)).sum() <= 1


def test_an_unknown_option_is_refused(twins):
    for option in ({"pyengine_dequantize": "best"}, {"pyengine_bits": 5}, {"pyengine_mix": [["*", 5]]}):
        with pytest.raises(ValueError, match="want"):
            load(twins["pattern31", 8], **option)


# ---- running ---------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [("pattern31", 8), ("nextn", 4), ("odd", 8), ("next", 8)])
def test_generate_takes_the_same_tokens_as_the_reference(twins, twin):
    model = load(twins[twin], dtype=torch.float64)
    model.generation_config.eos_token_id = None
    with Float64Mode():
        got = model.generate(torch.as_tensor(IDS)[None], max_new_tokens=6, do_sample=False)[0]
    reference = pyengine.load(twins[twin], "float64")
    state, chunk, want = reference.new_state(), IDS, list(IDS)
    for _ in range(6):
        want.append(int(reference.forward(chunk, state, last_only=True).argmax()))
        chunk = want[-1:]
    assert got.tolist() == want


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.float16, 0.2)])
def test_float_logits_are_near(twins, dtype, error):
    twin = twins["pattern31", 8]
    want = pyengine.load(twin, "float64").forward(IDS)
    assert np.abs(logits(load(twin, dtype=dtype)).float().numpy() - want).max() < error


def test_bfloat16_runs(twins):
    assert torch.isfinite(logits(load(twins["pattern31", 4], dtype=torch.bfloat16))).all()


def test_router_logits_can_be_asked_for(twins):
    model = load(twins["pattern31", 8])
    out = model(input_ids=torch.as_tensor(IDS)[None], output_router_logits=True)
    assert [tuple(t.shape) for t in out.router_logits] == [(20, 6)] * 4


def test_casting_the_model_leaves_the_scales(twins):
    model = load(twins["pattern31", 8], dtype=torch.float32)
    model.to(torch.bfloat16).half().double().float().bfloat16()
    for name, view in stored_tensors(twins["pattern31", 8]).items():
        if name.endswith(MARKS):
            assert np.array_equal(model.state_dict()[name].numpy(), view.data), name


def test_saving_gives_the_same_checkpoint(twins, tmp_path):
    load(twins["pattern31", 4], dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / MODELING.name).exists()
    before, after = stored_tensors(twins["pattern31", 4]), stored_tensors(tmp_path / "saved")
    assert set(before) == set(after)
    for name in before:
        if name.endswith(MARKS):
            assert np.array_equal(before[name].data, after[name].data), name
    said = [
        json.loads((directory / "config.json").read_text())
        for directory in (twins["pattern31", 4], tmp_path / "saved")
    ]
    for key in ("model_type", "architectures", "auto_map", "pyengine_bits", "pyengine_group_size"):
        assert said[0][key] == said[1][key], key
    _, info = load(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info


# ---- devices ---------------------------------------------------------------------------------

SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "options, offloads",
    [
        ({"device_map": "auto"}, False),
        ({"device_map": SPLIT}, True),
        ({"device_map": "auto", "max_memory": {"cpu": "300KB"}}, True),
    ],
)
def test_device_map_and_max_memory(twins, tmp_path, bits, options, offloads):
    pytest.importorskip("accelerate")
    if torch.cuda.is_available() and options["device_map"] == "auto":
        options = options | {"max_memory": {"cpu": "300KB" if offloads else "1GB"}}
    want = logits(load(twins["pattern31", bits], dtype=torch.float32))
    model = load(twins["pattern31", bits], dtype=torch.float32, offload_folder=tmp_path, **options)
    offloaded = {name for name, p in model.named_parameters() if p.device.type == "meta"}
    assert any(name.endswith(MARKS) for name in offloaded) == offloads
    assert torch.equal(logits(model), want)
    model.generate(torch.as_tensor(IDS)[None], max_new_tokens=2)
    # What a layer borrowed from the disk is gone again.
    assert {n for n, p in model.named_parameters() if p.device.type == "meta"} == offloaded


@pytest.mark.parametrize("bits", [8, 4])
def test_a_module_makes_tensors_on_its_own_device_only(twins, bits):
    # "meta" stands for a second device: an operation of it and the CPU is an error.
    model = load(twins["pattern31", bits], dtype=torch.float32).to("meta")
    mlp, x = model.model.layers[0].mlp, torch.zeros(3, 64, device="meta")
    assert mlp.shared_expert(x).device.type == "meta"
    assert {y.device.type for y in mlp.gate(x)} == {"meta"}
    assert mlp.experts._expert(1, x).device.type == "meta"


def test_nothing_of_a_meta_model_takes_memory(twins):
    accelerate = pytest.importorskip("accelerate")
    config = transformers.AutoConfig.from_pretrained(twins["pattern31", 8], trust_remote_code=True)
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    stored = {name: view.shape for name, view in stored_tensors(twins["pattern31", 8]).items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == stored


# ---- what a reader may rely on ---------------------------------------------------------------


def test_the_file_needs_torch_and_transformers_only():
    imported = set()
    for node in ast.walk(ast.parse(MODELING.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported == {"__future__", "fnmatch", "torch", "transformers"}


def test_without_trust_it_is_refused_and_not_filled_with_random_weights(twins):
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(twins["pattern31", 8], trust_remote_code=False)


def test_the_tokenizer_loads(twins):
    tokenizer = transformers.AutoTokenizer.from_pretrained(twins["pattern31", 8], trust_remote_code=True)
    assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
