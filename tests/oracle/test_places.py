"""Where a tensor is wrong: NaN and infinity by name, the first element beyond the budget, the worst one."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partial import changed, part
from paths import GOLDEN

from pyengine.oracle.bits import compare_tensors
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.junit import as_junit
from pyengine.oracle.report.markdown import as_markdown
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import Trace

MODEL = GOLDEN / "pattern31.gguf"
TOKENS = 24


@pytest.fixture(scope="module")
def oracle():
    return Oracle(None, MODEL)


@pytest.fixture(scope="module")
def truth(oracle):
    ids = np.random.default_rng(1729).integers(0, oracle.model.config.vocab_size, TOKENS)
    return oracle.trace(ids)


def put(at, value):
    def change(array):
        array[at] = value
        return array

    return change


@pytest.mark.parametrize("budget", ["exact", "float32", "bfloat16"])
@pytest.mark.parametrize("value, kind", [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_a_nan_is_named_with_its_place(oracle, truth, budget, value, kind):
    verdict = oracle.verify(changed(truth, "model.layers.2", put((5, 7), value)), budget)
    text = as_text(verdict)
    assert f"{kind} at [5, 7], the first of 1" in text
    row = next(row for row in verdict.rows if row.name == "model.layers.2")
    table = next(line for line in text.splitlines() if line.startswith("model.layers.2 "))
    assert f" {kind} " in table and (budget == "exact" or table.endswith("GUILTY"))
    found = (row.place or row.difference).not_finite
    assert (found.kind, found.index, found.count) == (kind, (5, 7), 1)
    assert f"{kind} at \\[5, 7\\], the first of 1" in as_markdown(verdict)
    failure = next(
        case.find("failure")
        for case in ElementTree.fromstring(as_junit(verdict)).findall("testcase")
        if case.get("name") == "model.layers.2"
    )
    assert f"{kind} at [5, 7], the first of 1" in failure.text
    json.dumps(verdict.as_dict(), allow_nan=False)


def test_nans_are_counted(oracle, truth):
    def change(array):
        array[3:, ::2] = np.nan
        return array

    verdict = oracle.verify(part(changed(truth, "lm_head", change), "logits"), "float32")
    count = (TOKENS - 3) * 144
    assert f"lm_head: from token 3; NaN at [3, 0], the first of {count}" in as_text(verdict)


def test_what_follows_a_nan_is_not_guilty(oracle, truth):
    """A port goes on with the NaN: everything after it is NaN too, as it should be."""
    model = oracle.model
    tensors = {}

    def record(name, value):
        if name == "model.layers.1.linear_attn.in_proj_z":
            value = value.copy()
            value[6, 2] = np.nan
        tensors[name] = value if value.dtype == np.int64 else value.astype(np.float32)
        return value

    with np.errstate(all="ignore"):
        model.forward(truth.ids, record=record)
    verdict = oracle.verify(Trace(truth.ids, tensors), "float32")
    assert [row.name for row in verdict.guilty] == ["model.layers.1.linear_attn.in_proj_z"], as_text(verdict)
    assert "model.layers.1.linear_attn.in_proj_z: from token 6; NaN at [6, 2], the first of 1" in as_text(
        verdict
    )


def test_the_first_and_the_worst_element(oracle, truth):
    """Wrong from token 17 on; what is right within the budget before it is not shown."""

    def change(array):
        array += np.float32(1e-7) * array  # within the budget
        array[17:] *= 1.01
        array[20, 9] = -array[20, 9] - 3
        return array

    name = "model.layers.1.linear_attn.in_proj_qkv"
    verdict = oracle.verify(changed(truth, name, change), "float32")
    row = verdict.first
    assert (row.name, row.token, row.place.first[0], row.place.worst) == (name, 17, 17, (20, 9))
    line = next(line for line in as_text(verdict).splitlines() if line.startswith(f"{name}: "))
    want, got = truth.tensors[name][20, 9], change(truth.tensors[name].copy())[20, 9]
    assert line.startswith(f"{name}: from token 17; worst at [20, 9]: want ")
    assert f", got {got:.9g}, " in line and line.endswith(" times the budget")
    assert row.place.want == pytest.approx(want, rel=1e-5) and row.place.got == got
    budget = oracle.budget("float32", truth).own[name].largest
    assert row.place.share == pytest.approx(abs(got - row.place.want) / budget, rel=1e-2)
    assert "ulp" not in as_text(verdict)
    place = next(t for t in verdict.as_dict()["tensors"] if t["name"] == name)["place"]
    assert place["worst"] == [20, 9] and place["first"][0] == 17


@settings(max_examples=15, deadline=None)
@given(st.integers(0, TOKENS - 1), st.integers(0, 287), st.floats(-1e30, 1e30).filter(lambda x: abs(x) > 1))
def test_any_single_wrong_element_is_the_first_and_the_worst(oracle, truth, token, feature, value):
    tensors = changed(truth, "lm_head", lambda v: v)
    tensors.tensors["lm_head"][token, feature] += np.float32(value)
    verdict = oracle.verify(tensors, "float32", seconds=0)
    place = verdict.first.place
    assert verdict.first.name == "lm_head" and place.first == place.worst == (token, feature)
    assert verdict.first.token == token


def test_ulp_across_a_sign_is_not_a_distance():
    x = np.array([[1.0, -2.0, 3.0]], np.float32)
    y = np.array([[-1.0, -2.0, np.nextafter(np.float32(3), np.float32(4))]], np.float32)
    found = compare_tensors("x", x, y)
    assert (found.count, found.signs, found.ulp) == (2, 1, 1)
    assert str(found) == (
        "x: 2 of 3 values differ, largest distance 1 ulp; first at [0, 0]: want 1.0, got -1.0; "
        "1 differ in sign, left out of the distance"
    )
    found = compare_tensors("x", x, -x)
    assert found.ulp is None and "ulp" not in str(found) and "3 differ in sign" in str(found)
    found = compare_tensors("x", x, x + np.array([[0, 1, 5]], np.float32))
    assert str(found).endswith("; first at [0, 1]: want -2.0, got -1.0; worst at [0, 2]: want 3.0, got 8.0")
