"""Names that the reference does not know are unusable input; a partial trace is not."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partial import part, renamed
from paths import GOLDEN
from peer import Peer

from pyengine.cli import main
from pyengine.errors import InputError
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.junit import as_junit
from pyengine.oracle.report.markdown import as_markdown
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import Trace
from pyengine.testing import assert_trace_equal

MODEL = GOLDEN / "pattern31.gguf"
TOKENS = 8


@pytest.fixture(scope="module")
def oracle():
    return Oracle(None, MODEL)


@pytest.fixture(scope="module")
def ids(oracle):
    return np.random.default_rng(1729).integers(0, oracle.model.config.vocab_size, TOKENS)


@pytest.fixture(scope="module")
def truth(oracle, ids):
    return oracle.trace(ids)


def misnamed(name):
    return name.replace("model.layers.", "model.layer.")


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("budget", ["exact", "float32"])
def test_a_misnamed_trace_of_a_broken_port_does_not_pass(oracle, ids, budget):
    broken = renamed(Peer(MODEL, ["heads"]).run(ids), misnamed)
    for name in ("lm_head", "model.norm"):
        del broken.tensors[name]
    with pytest.raises(InputError) as caught:
        oracle.verify(broken, budget)
    assert str(caught.value) == (
        "tensors: want names that the reference knows, got 80 others: model.layer.0.input_layernorm (did you "
        "mean model.layers.0.input_layernorm?), model.layer.0.linear_attn.in_proj_qkv (did you mean "
        "model.layers.0.linear_attn.in_proj_qkv?), model.layer.0.linear_attn.in_proj_z (did you mean "
        "model.layers.0.linear_attn.in_proj_z?) and 77 more; --allow-unknown (allow_unknown=True) leaves "
        "them out"
    )


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("model.layers.2.mpl", "model.layers.2.mlp"),
        ("layers.2.mlp", "model.layers.2.mlp"),
        ("model.language_model.layers.2.mlp", None),
        ("embed_tokens", "model.embed_tokens"),
        ("norm", "model.norm"),
        ("model.lm_head", "lm_head"),
        ("lm_head.weight", "lm_head"),
        ("model.layer.2", "model.layers.2"),
        ("model.layers.02.mlp", "model.layers.2.mlp"),
        ("LM_HEAD", None),
        ("something else altogether", None),
    ],
)
def test_the_nearest_name(oracle, truth, wrong, nearest):
    odd = Trace(truth.ids, {**truth.tensors, wrong: truth.tensors["lm_head"]})
    with pytest.raises(InputError) as caught:
        oracle.verify(odd)
    assert "got 1 other: " in str(caught.value)
    if nearest:
        assert f"{wrong} (did you mean {nearest}?)" in str(caught.value)
    assert oracle.verify(odd, allow_unknown=True).unknown == [wrong]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_single_change_of_a_name_is_found(oracle, truth, data):
    name = data.draw(st.sampled_from(sorted(truth.tensors)))
    at = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from(["", "x", "_", "9", "."]))
    wrong = name[:at] + letter + name[at + 1 :]
    if wrong in truth.tensors:
        return
    tensors = {wrong if n == name else n: v for n, v in truth.tensors.items()}
    with pytest.raises(InputError, match="want names that the reference knows, got 1 other"):
        oracle.verify(Trace(truth.ids, tensors))


def test_against_a_trace_too(truth):
    odd = renamed(truth, misnamed)
    with pytest.raises(InputError, match="did you mean model.layers.0.input_layernorm"):
        Oracle(truth).verify(odd)
    with pytest.raises(InputError, match="did you mean"):
        assert_trace_equal(odd, truth)
    with pytest.raises(InputError, match="did you mean"):
        assert_trace_equal(odd, model=MODEL)
    verdict = assert_trace_equal(odd, truth, allow_unknown=True)
    assert len(verdict.unknown) == 80 and len(verdict.rows) == 3


def test_a_layer_too_many_is_said(oracle, truth):
    more = {**truth.tensors, "model.layers.4.mlp": truth.tensors["model.layers.3.mlp"]}
    with pytest.raises(InputError, match=r"model.layers.0 .. 3: one layer too many, as if the next-token"):
        oracle.verify(Trace(truth.ids, more))
    shifted = renamed(truth, lambda n: n.replace(".layers.", ".layers.1"))  # 10 to 13
    with pytest.raises(InputError) as caught:
        oracle.verify(shifted)
    assert "; the reference has model.layers.0 .. 3; --allow" in str(caught.value)


def test_from_the_command_line(tmp_path, truth, capsys):
    path = tmp_path / "odd.safetensors"
    renamed(truth, misnamed).save(path)
    for budget in ("exact", "float32"):
        assert run("verify", MODEL, path, "--budget", budget) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert f"{path}: tensors: want names that the reference knows, got 80 others" in err
    assert run("verify", MODEL, path, "--allow-unknown", "--arithmetic", "float64") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "equal: 3 of 83 tensors, every bit"
    assert "not compared: 80 tensors that the candidate does not have" in lines
    assert any(
        line.startswith(
            "left out: 80 tensors that the reference does not know: model.layer.0.input_layernorm,"
        )
        for line in lines
    )


# ---- partial traces --------------------------------------------------------------------------


def test_how_many_of_how_many_were_compared(oracle, truth):
    verdict = oracle.verify(part(truth, "layers"), "float32")
    assert as_text(verdict).startswith("within the float32 budget: 5 of 83 tensors")
    assert as_markdown(verdict).startswith("### pyengine verify: passed (5 of 83 tensors compared)\n")
    facts = verdict.as_dict()
    assert (facts["compared"], facts["of"], len(facts["missing"])) == (5, 83, 78)
    suite = ElementTree.fromstring(as_junit(verdict))
    assert (suite.get("tests"), suite.get("skipped"), suite.get("failures")) == ("83", "78", "0")
    assert len(suite.findall("testcase")) == 83
    assert "5 of 83 tensors" in suite.find("system-out").text


@pytest.mark.parametrize("budget", ["exact", "float32"])
def test_the_embedding_alone_is_hardly_a_check(oracle, truth, budget):
    verdict = oracle.verify(
        Trace(truth.ids, {"model.embed_tokens": truth.tensors["model.embed_tokens"]}), budget
    )
    assert verdict.ok and len(verdict.unchecked) == 82
    text = as_text(verdict)
    assert "1 of 83 tensors" in text.splitlines()[0]
    assert "only model.embed_tokens was compared, which is hardly a check" in text.splitlines()[0]
    assert "not checked: 82 of them, from model.layers.0.input_layernorm on" in text
    assert "hardly a check" in as_markdown(verdict)
    assert "hardly a check" in ElementTree.fromstring(as_junit(verdict)).find("system-out").text
    assert len(json.loads(json.dumps(verdict.as_dict()))["unchecked"]) == 82


def test_what_no_compared_tensor_depends_on(oracle, truth):
    first = Trace(truth.ids, {"model.layers.0": truth.tensors["model.layers.0"]})
    verdict = oracle.verify(first, "float32")
    assert verdict.ok and verdict.unchecked[0] == "model.layers.1.input_layernorm"
    assert "not checked: 62 of them" in as_text(verdict)
    assert not oracle.verify(part(truth, "logits"), "float32").unchecked
