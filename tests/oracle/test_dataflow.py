"""The graph of module outputs is that of the reference."""

import numpy as np
import pytest
from paths import GOLDEN

import pyengine
from pyengine.oracle.dataflow import covered, is_within, listed, module_inputs, next_to_dump, unknown_before
from pyengine.oracle.rerun import is_choice, own_values
from pyengine.oracle.trace import Trace, record_trace

IDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module", params=["pattern31", "nextn"])
def model(request):
    return pyengine.load(GOLDEN / f"{request.param}.gguf", "float64")


def test_the_names_are_those_of_a_trace(model):
    assert list(module_inputs(model.config)) == list(record_trace(model, IDS).tensors)


def test_an_input_is_a_tensor_that_changes_the_operation(model):
    """Each tensor in turn is exchanged for noise: the operations that see it are those that read it."""
    graph, trace = module_inputs(model.config), record_trace(model, IDS)
    right: dict = {}
    own_values(model, trace, right.__setitem__)
    random = np.random.default_rng(1729)
    for name in graph:
        value = trace.tensors[name]
        if is_choice(name):
            noise = (value + 1) % model.config.num_experts
        else:
            noise = (20 * random.standard_normal(value.shape)).astype(np.float32)
        own: dict = {}
        own_values(model, Trace(trace.ids, {**trace.tensors, name: noise}), own.__setitem__)
        found = {other for other in graph if not np.array_equal(own[other], right[other])}
        assert found == {other for other in graph if name in graph[other]}, name


def test_unknown_before():
    graph = module_inputs(pyengine.load(GOLDEN / "pattern31.gguf", "float64").config)
    assert len(unknown_before("lm_head", {"lm_head"}, graph)) == len(graph) - 1 == 82
    assert unknown_before("lm_head", {"model.norm"}, graph) == []
    assert unknown_before("lm_head", {"model.layers.3"}, graph) == ["model.norm"]
    inside = unknown_before("model.layers.2", {"model.layers.1"}, graph)
    assert len(inside) == 19 and is_within(inside, "model.layers.2")
    assert not is_within(unknown_before("model.layers.2", set(), graph), "model.layers.2")
    assert not is_within(unknown_before("model.layers.1", {"model.layers.10"}, graph), "model.layers.1")
    assert is_within([], "anything")


def test_covered_is_all_that_a_comparison_checks():
    graph = module_inputs(pyengine.load(GOLDEN / "pattern31.gguf", "float64").config)
    assert covered(["lm_head"], graph) == set(graph)
    assert covered(["model.embed_tokens"], graph) == {"model.embed_tokens"}
    assert "model.layers.1" not in covered(["model.layers.0"], graph)
    assert len(covered(["model.layers.0"], graph)) == 21


@pytest.mark.parametrize(
    "name, known, text",
    [
        ("lm_head", [], "model.layers.0 .. 3"),
        ("lm_head", ["model.layers.1"], "model.layers.2 .. 3"),
        ("lm_head", ["model.layers.2"], "model.layers.3"),
        ("lm_head", ["model.layers.3"], "model.norm"),
        ("model.layers.3", [], "model.layers.0 .. 2"),
        (
            "model.layers.3",
            ["model.layers.2"],
            "model.layers.3.input_layernorm, model.layers.3.self_attn, "
            "model.layers.3.post_attention_layernorm, model.layers.3.mlp",
        ),
        (
            "model.layers.0.linear_attn.out_proj",
            ["model.layers.0.input_layernorm"],
            "model.layers.0.linear_attn.in_proj_qkv, model.layers.0.linear_attn.in_proj_z, "
            "model.layers.0.linear_attn.in_proj_b, model.layers.0.linear_attn.in_proj_a, "
            "model.layers.0.linear_attn.norm",
        ),
    ],
)
def test_what_to_dump_next(name, known, text):
    graph = module_inputs(pyengine.load(GOLDEN / "pattern31.gguf", "float64").config)
    assert listed(next_to_dump(name, unknown_before(name, {name, *known}, graph))) == text
