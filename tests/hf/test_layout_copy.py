"""The copy of the layout that travels with a checkpoint, against the layout that pyengine itself uses."""

import ast
import fnmatch
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import hf
from pyengine.checkpoint.layout import FLOAT_LINEARS, stored_form
from pyengine.quantizer.mix import REST, Mix

MODELING = Path(hf.__file__).with_name("modeling_pyengine.py")
TREE = ast.parse(MODELING.read_text())


class Dtype:
    """Stands for a torch dtype, by its safetensors name."""

    int8, uint8, float16 = "I8", "U8", "F16"


def methods_of_quantized():
    """`add_weight` and `_names` of the class `Quantized`, and `bits_of`, run without torch: they count."""
    (quantized,) = (node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "Quantized")
    methods = [node for node in quantized.body if getattr(node, "name", "") in ("add_weight", "_names")]
    assert len(methods) == 2
    for method in methods:
        method.args.defaults, method.returns = [], None
    (bits_of,) = (node for node in TREE.body if getattr(node, "name", "") == "bits_of")
    module = ast.Module([*methods, bits_of], type_ignores=[])
    names = {
        "torch": Dtype,
        "_parameter": lambda shape, dtype: (dtype, tuple(shape)),
        "fnmatchcase": fnmatch.fnmatchcase,
    }
    exec(compile("from __future__ import annotations\n" + ast.unparse(module), str(MODELING), "exec"), names)
    return names["add_weight"], names["_names"], names["bits_of"]


@given(
    st.lists(st.integers(1, 5), max_size=1),
    st.integers(1, 40),
    st.integers(1, 300).map(lambda n: 2 * n),
    st.sampled_from([8, 4]),
    st.sampled_from([2, 32, 64, 128, 256]),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_names_dtypes_and_shapes(stack, rows, cols, bits, group):
    add_weight, names, _ = methods_of_quantized()
    found = {}
    module = types.SimpleNamespace(
        path="model.layers.0",
        mix=[["*weight", bits]],
        rest=12 - bits,
        bits={},
        group_size=group,
        _names=lambda name, stacked: names(module, name, stacked),
        register_parameter=lambda name, parameter: found.update({name: parameter}),
    )
    add_weight(module, "weight", (*stack, rows, cols))
    form = stored_form("weight", (*stack, rows, cols), f"INT{bits}", group)
    assert found == {stored.name: (stored.dtype, stored.shape) for stored in form}


PARTS = (
    "*",
    "model",
    "layers",
    "[01]",
    "0",
    "mlp",
    "experts",
    "down_proj",
    "gate",
    "?_proj",
    "q_proj",
    "weight",
)
PATTERNS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(".".join)


@given(
    st.lists(st.tuples(PATTERNS, st.sampled_from([8, 4])), min_size=1, max_size=5),
    st.sampled_from(
        [
            "model.layers.0.mlp.experts.down_proj",
            "model.layers.1.mlp.gate.weight",
            "model.layers.10.self_attn.q_proj.weight",
        ]
    ),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_mix_gives_the_same_bits(rules, name):
    _, _, bits_of = methods_of_quantized()
    assert bits_of(name, [list(rule) for rule in rules], REST) == Mix(tuple(rules)).bits_of(name)


def test_the_same_linears_stay_floats():
    (kept,) = (
        ast.literal_eval(node.value)
        for node in TREE.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "KEPT"
    )
    assert set(kept) == {name.removesuffix(".weight") for name in FLOAT_LINEARS} - {"embed_tokens"}


@pytest.mark.parametrize("bits", [8, 4])
def test_the_shapes_that_a_checkpoint_has(bits):
    codes, scales = stored_form("experts.down_proj", (4, 6, 130), f"INT{bits}")
    assert codes == (f"experts.down_proj_q{bits}", *[("I8", (4, 6, 130)), ("U8", (4, 6, 65))][bits == 4])
    assert scales == (f"experts.down_proj_scale_q{bits}", "F16", (4, 2, 6))
    codes, scales = stored_form("x.weight", (6, 128), f"INT{bits}", 32)
    assert (codes.name, scales.name) == (f"x.weight_i{bits}", f"x.weight_scale_i{bits}")
    assert scales.shape == (4, 6)
