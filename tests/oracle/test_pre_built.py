"""A reference made beforehand, and the budgets that are measured layer by layer."""

import functools

import numpy as np
import pytest
from other_names import FORMS
from partial import part
from paths import GOLDEN, TESTS
from peer import Peer

import pyengine
from pyengine.cli import main
from pyengine.errors import FileFormatError, InputError
from pyengine.oracle.budget import Error, measure
from pyengine.oracle.layerwise import measure_by_layer
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.pre_built import PreBuilt, judge_pre_built, make_reference, save_reference
from pyengine.oracle.report.text import as_text
from pyengine.oracle.rounding import rounded_model
from pyengine.oracle.trace import Trace, record_trace

MODEL = GOLDEN / "pattern31.gguf"
IDS = np.random.default_rng(1729).integers(0, 288, 14)


@functools.cache
def model(path=MODEL):
    return pyengine.load(path, "float64")


@functools.cache
def reference():
    return make_reference(model(), IDS, ["float32", "bfloat16"], rows=6, features=24)


@pytest.fixture
def file(tmp_path):
    save_reference(tmp_path / "ref.safetensors", *reference())
    return tmp_path / "ref.safetensors"


def test_budgets_by_layer_are_those_of_the_whole_model():
    """In every bit: nothing but the order of the work differs."""
    dtype = "q4_k+bfloat16-state"
    whole, layers = measure(model(), IDS, dtype), measure_by_layer(model(), IDS, [dtype])[dtype]
    assert whole.total == layers.total and whole.own == layers.own
    assert set(whole.recorded) == set(layers.recorded) and whole.model_sha256 == layers.model_sha256


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [GOLDEN / "next.gguf", GOLDEN / "dense.gguf", TESTS / "converter" / "A-Q8_0.gguf"]
)
def test_budgets_by_layer_of_other_models(path):
    dtypes = ["bfloat16", "int8-activations"]
    ids = IDS % model(path).config.vocab_size
    layers = measure_by_layer(model(path), ids, dtypes)
    for dtype in dtypes:
        whole = measure(model(path), ids, dtype)
        assert whole.total == layers[dtype].total and whole.own == layers[dtype].own


@pytest.mark.slow
def test_the_sample_is_small_and_always_the_same(file, tmp_path):
    save_reference(
        tmp_path / "again", *make_reference(model(), IDS, ["float32", "bfloat16"], rows=6, features=24)
    )
    assert file.read_bytes() == (tmp_path / "again").read_bytes()
    trace, truth = Trace.load(file), record_trace(model(), IDS)
    for name, array in truth.tensors.items():
        assert np.array_equal(trace.tensors[name], trace.part(name, array)), name
    assert trace.tensors["lm_head"].shape == (6, 288) and len(IDS) - 1 in trace.rows["lm_head"]
    assert trace.tensors["model.layers.0"].shape == (6, 24)
    assert trace.is_whole("model.layers.0.mlp.gate") and trace.is_whole("model.layers.0.mlp.gate.2")


@pytest.mark.parametrize("kind", ["full", "layers", "logits"])
def test_a_right_port_passes_without_the_model(file, kind):
    verdict = Oracle(file).verify(part(Peer(MODEL).run(IDS), kind), "float32")
    assert verdict.ok, as_text(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("engine", FORMS)
def test_another_engines_names_are_turned_without_the_model(file, engine):
    truth = Peer(MODEL).run(IDS)
    candidate = Trace(IDS, FORMS[engine](truth, model().config), "float32", engine)
    verdict = Oracle(file).verify(candidate, "float32")
    assert verdict.ok and len(verdict.rows) > 70, as_text(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_no_rounding_and_no_near_tie_is_called_a_mistake(seed):
    """Other ids, runs in bfloat16 that choose their own experts: whole, layers and logits alone."""
    ids = np.random.default_rng(seed).integers(0, 288, 24)
    trace, budgets = make_reference(model(), ids, ["bfloat16"], rows=12)
    for order in range(3):
        candidate = record_trace(rounded_model(model(), "bfloat16", order), ids)
        for kind in ("full", "layers", "logits"):
            try:
                verdict = judge_pre_built(trace, part(candidate, kind), budgets["bfloat16"])
            except InputError as error:
                assert "behind a near-tie" in str(error) and kind != "full"
                continue
            assert verdict.ok, as_text(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("fault, first", [("heads", "linear_attn.norm"), ("not_renormalised", "mlp.gate.1")])
def test_a_planted_mistake_is_found_where_it_begins(file, fault, first):
    verdict = Oracle(file).verify(Peer(MODEL, [fault]).run(IDS), "float32")
    assert not verdict.ok and verdict.first.name == f"model.layers.0.{first}" and not verdict.guilty


@pytest.mark.slow
def test_what_lies_behind_a_near_tie_is_not_judged():
    """A choice that rounding explains changes the experts at its token, and every later token after."""
    trace, budgets = reference()
    name = "model.layers.1.mlp.gate.2"
    ours = trace.tensors[name]
    candidate = Trace(IDS, dict(record_trace(model(), IDS).tensors))
    flipped = ours.copy()
    others = np.setdiff1d(np.arange(trace.tensors[name.removesuffix(".2")].shape[1]), ours[5])
    flipped[5, -1] = others[0]
    candidate.tensors[name] = flipped
    for after in ("model.layers.1.mlp.experts", "model.layers.2", "lm_head"):
        candidate.tensors[after] = candidate.tensors[after].copy()
        candidate.tensors[after][5 if after.endswith("experts") else slice(5, None)] += 1
    strict = judge_pre_built(trace, candidate, budgets["float32"])
    assert not strict.ok and strict.flips[0].kind == "wrong"  # the margin is large
    total = budgets["float32"].total | {name.removesuffix(".2"): Error(1e9, 1e9)}
    loose = PreBuilt("float32", 4.0, total, budgets["float32"].sizes)
    verdict = judge_pre_built(trace, candidate, loose)
    assert verdict.ok and verdict.flips[0].kind == "near-tie", as_text(verdict)
    assert "not judged: " in as_text(verdict)
    candidate.tensors["model.layers.2"][0] += 1  # before the near-tie
    if 0 in trace.rows["model.layers.2"]:
        assert judge_pre_built(trace, candidate, loose).first.name == "model.layers.2"
    hidden = Trace(IDS, {"lm_head": candidate.tensors["lm_head"]})
    with pytest.raises(InputError, match="want elements that can be judged, got none"):
        judge_pre_built(trace, hidden, loose)


@pytest.mark.slow
def test_the_commands(tmp_path, capsys):
    ref, mine = str(tmp_path / "ref"), str(tmp_path / "mine")
    ids = " ".join(map(str, IDS))
    options = ["--budget", "float32", "--budget", "bfloat16", "--rows", "4", "-o", ref]
    assert main(["reference", str(MODEL), "--ids", ids, *options]) == 0
    assert "83 tensors, 14 tokens, float32, bfloat16, " in capsys.readouterr().out
    Peer(MODEL).run(IDS).save(mine)
    assert main(["verify", ref, mine]) == 0
    assert "within the float32 budget: 83 of 83" in capsys.readouterr().out
    assert main(["verify", ref, mine, "--budget", "bfloat16", "--html", str(tmp_path / "page")]) == 0
    assert main(["verify", ref, mine, "--budget", "float16"]) == 2
    assert (
        "budget: want one that the reference has, float32, bfloat16, got float16" in capsys.readouterr().err
    )
    assert main(["verify", ref, mine, "--budget", "exact"]) == 1
    assert main(["verify", ref, mine, "--budget", "float32", "--factor", "8"]) == 2
    assert "--factor: want a model to measure the budget with, got a reference" in capsys.readouterr().err
    assert main(["reference", str(MODEL), "--ids", "999", "-o", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"float32": {}}', '{"float32": {"factor": 1, "total": {"x": [1]}}}']
)
def test_budgets_that_cannot_be(tmp_path, text):
    Trace(IDS, {"lm_head": np.ones((len(IDS), 2), np.float32)}).save(tmp_path / "ref", {"budgets": text})
    with pytest.raises(FileFormatError, match="metadata budgets: want what `pyengine reference` writes"):
        Oracle(tmp_path / "ref")
