"""Other engines' names and fused tensors, by maps that are stated in files."""

import json

import numpy as np
import pytest
from other_names import FORMS
from paths import GOLDEN

from pyengine.cli import main
from pyengine.errors import FileFormatError, InputError
from pyengine.oracle.name_map import NameMap, name_map
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import NAMES, Trace
from pyengine.oracle.widths import widths

TOKENS = 6
MODELS = ("pattern31", "next", "dense")


@pytest.fixture(scope="module", params=[m for m in MODELS if (GOLDEN / f"{m}.gguf").exists()])
def oracle(request):
    return Oracle(None, GOLDEN / f"{request.param}.gguf")


@pytest.fixture(scope="module")
def truth(oracle):
    return oracle.trace(np.arange(TOKENS) + 7)


@pytest.mark.slow
@pytest.mark.parametrize("engine", NAMES[2:])
def test_a_right_trace_of_another_engine_is_within_the_budget(oracle, truth, engine, tmp_path):
    tensors = FORMS[engine](truth, oracle.model.config)
    Trace(truth.ids, tensors, "float32", engine).save(tmp_path / "t")
    turned = oracle.candidate(tmp_path / "t")
    for name, array in turned.tensors.items():
        np.testing.assert_allclose(array, truth.tensors[name], rtol=1e-6, atol=1e-6, err_msg=name)
    mixers = sum(name.endswith(("linear_attn", "self_attn")) for name in turned.tensors)
    assert mixers == oracle.model.config.num_hidden_layers and "lm_head" in turned.tensors
    verdict = oracle.verify(tmp_path / "t", "float32", seconds=0)
    assert verdict.ok and len(verdict.rows) >= len(truth.tensors) - 12, as_text(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("engine", NAMES[2:])
def test_a_mistake_in_a_fused_tensor_is_found_in_its_part(oracle, truth, engine):
    tensors = dict(FORMS[engine](truth, oracle.model.config))
    name = next(n for n in tensors if n.endswith(("qkv_proj", "self_attn.v_proj")))
    tensors[name] = tensors[name].copy()
    tensors[name][..., -1] += 1
    verdict = oracle.verify(Trace(truth.ids, tensors, "float32", engine), "float32", seconds=0)
    assert verdict.first.name.endswith("self_attn.v_proj"), as_text(verdict)


def written(tmp_path, **fields):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"format": "pyengine-names-1"} | fields))
    return path


def test_a_map_of_ones_own(oracle, truth, tmp_path):
    """Axes, a join and a prefix; a reference's trace alone is enough to turn by."""
    path = written(
        tmp_path,
        prefixes={"net.": "model."},
        axes={"model.layers.*.input_layernorm": ["features", "tokens"]},
        join={"lm_head": ["head_a", "head_b"]},
        leave_out=["junk"],
    )
    head = truth.tensors["lm_head"]
    tensors = {
        "net.layers.0.input_layernorm": np.ascontiguousarray(
            truth.tensors["model.layers.0.input_layernorm"].T
        ),
        "head_a": head[:, :5],
        "head_b": head[:, 5:],
        "junk": head,
    }
    Trace(truth.ids, tensors).save(tmp_path / "t")
    for judge in (oracle, Oracle(truth)):
        given = Trace.load(tmp_path / "t", str(path))
        verdict = judge.verify(given, "exact")
        assert verdict.ok and {row.name for row in verdict.rows} == {
            "model.layers.0.input_layernorm",
            "lm_head",
        }
        assert verdict.unknown == ["junk"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"format": "x"}, "format: want 'pyengine-names-1', got 'x'"),
        ({"renames": {}}, "renames: want no such key; nearest: rename"),
        ({"rename": {"a": 3}}, "rename a: want a list of names, got 3"),
        ({"split": {"a": "lm_head"}}, "split a: want a list of names"),
        ({"axes": {"a": ["heads"]}}, r"axes a: want tokens once, got \['heads'\]"),
        ({"leave_out": {}}, "leave_out: want a list of names"),
        ({"prefixes": {"a": 1}}, "prefixes: want an object of texts"),
        (
            {"rename": {"a": "model.layers.*.self_attn.q_porj"}},
            r"rename: want modules of the model, got '.*q_porj'; nearest: model.layers.\*.self_attn.q_proj",
        ),
    ],
)
def test_a_map_that_cannot_be(oracle, truth, tmp_path, fields, message):
    with pytest.raises(FileFormatError, match=message):
        NameMap.load(written(tmp_path, **fields)).apply(truth, widths(oracle.model.config))


def test_traces_that_a_map_cannot_turn(oracle, truth):
    sizes = widths(oracle.model.config)
    vllm = NameMap.shipped("vllm")
    layer = next(name for name in sizes if name.endswith(".self_attn.q_proj")).removesuffix("q_proj")
    name = f"{layer}qkv_proj"
    for tensors, message in [
        ({name: np.zeros((TOKENS, 5), np.float32)}, "qkv_proj: want .* features a token .*q_proj .*, got 5"),
        (
            {"model.layers.0": np.zeros((TOKENS, 4)), "model.layers.0.1": np.zeros((TOKENS, 5))},
            "sum: want tensors of one shape",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            vllm.apply(Trace(truth.ids, tensors), sizes)
    with pytest.raises(InputError, match="names: want llama.cpp, vllm, .* or the file of a map, got 'trt'"):
        name_map("trt")
    columns = {name: np.arange(5)}
    with pytest.raises(InputError, match="want whole features under names of"):
        vllm.apply(Trace(truth.ids, {name: np.zeros((TOKENS, 5))}, columns=columns), sizes)
    with pytest.raises(InputError, match="did you mean model.layers.0.input_layernorm"):
        unknown = {"language_model.model.layers.0.input_layernrom": truth.tensors["model.embed_tokens"]}
        oracle.candidate(Trace(truth.ids, unknown, names="vllm"))


@pytest.mark.slow
def test_part_of_the_tokens_under_other_names(oracle, truth):
    rows = np.array([1, 4])
    tensors = {name: array[:, rows] for name, array in FORMS["mlx"](truth, oracle.model.config).items()}
    trace = Trace(truth.ids, tensors, names="mlx", rows=dict.fromkeys(tensors, rows))
    turned = oracle.candidate(trace)
    assert all(turned.rows[name].tolist() == [1, 4] for name in turned.tensors)
    assert oracle.verify(trace, "float32", seconds=0).ok


def test_the_option_says_whose_names_a_trace_has(oracle, truth, tmp_path, capsys):
    path = str(tmp_path / "t")
    layer = "model.layers.0.mlp"
    Trace(truth.ids, {f"language_model.{layer}": truth.tensors[layer]}, "mine").save(path)
    model = str(oracle.path)
    assert main(["verify", model, path]) == 2
    assert f"did you mean {layer}?" in capsys.readouterr().err
    assert main(["verify", model, path, "--names", "mlx"]) == 0
    assert "equal: 1 of " in capsys.readouterr().out
    assert main(["verify", model, path, "--names", "trt"]) == 2
    err = capsys.readouterr().err
    assert "names: want llama.cpp, vllm, sglang, mlx, candle or the file of a map, got 'trt'" in err
    assert err.count("\n") == 1
