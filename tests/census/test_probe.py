"""The distance of two models: what is equal is 0, and a change shows where it was made."""

import json

import numpy as np
import pytest
from hf_directory import hf_tensors, stored, write_single
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN

import pyengine
from pyengine.census import probe as rooms
from pyengine.census.probe import cosine_distance, describe, measure
from pyengine.census.texts import Text, encode, split_probes
from pyengine.cli import main
from pyengine.errors import InputError
from pyengine.text.gguf_vocabulary import export_tokenizer

MODEL = GOLDEN / "pattern31.gguf"
PROBES = ["In the beginning God created the heaven and the earth.", "And God said,", "Let there be light."]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A model, and the same with layer 2's matrices changed: directories in BF16."""
    folder, paths = tmp_path_factory.mktemp("parents"), []
    tensors = {name: array for name, (_, array) in hf_tensors(MODEL).items()}
    rng = np.random.default_rng(1729)
    for name in ("father", "mother"):
        if name == "mother":
            for key, array in tensors.items():
                if key.startswith("model.layers.2.") and array.ndim > 1:
                    tensors[key] = array * (1 + rng.standard_normal(array.shape)).astype(np.float32)
        written = {key: stored(array, "BF16") for key, array in tensors.items()}
        paths.append(write_single(folder / name, MODEL, written))
        export_tokenizer(MODEL, paths[-1])
    return paths


@pytest.fixture(scope="module")
def models(parents):
    return [pyengine.load(path, threads=1) for path in parents]


@pytest.fixture(scope="module")
def probes(models):
    return [encode(models[0], f"probes:{i}", text) for i, text in enumerate(PROBES, 1)]


# ---- the distance ------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.1, 100))
@settings(deadline=None, derandomize=True, max_examples=15)
def test_distance(tokens, n, seed, scale):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, tokens, n))
    cos = (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    np.testing.assert_allclose(cosine_distance(x, y), 1 - cos, atol=1e-12)
    assert (cosine_distance(x, x.copy()) == 0).all()
    np.testing.assert_allclose(cosine_distance(x, scale * x), 0, atol=1e-15)
    np.testing.assert_allclose(cosine_distance(x, -x), 2)


def test_distance_of_zero_vectors():
    zero, one = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    assert cosine_distance(zero, zero) == 0 and cosine_distance(zero, one) == 1 == cosine_distance(one, zero)


# ---- two models --------------------------------------------------------------------------------


def test_a_model_is_at_no_distance_from_itself(models, probes):
    said = describe(models[0], models[0], probes, measure(models[0], models[0], probes))
    assert set(said["modules"].values()) == {0.0} and said["core"] is None
    assert all(layer["experts_in_common"] == 1 for layer in said["layers"])


def test_a_changed_layer_is_the_core(models, probes):
    said = describe(*models, probes, measure(*models, probes))
    layers = said["layers"]
    assert said["core"] == 2 and said["embedding"] == layers[0]["distance"] == layers[1]["distance"] == 0
    assert layers[0]["experts_in_common"] == 1 > layers[2]["experts_in_common"]
    assert said["modules"]["model.layers.2.input_layernorm"] == 0 < layers[2]["mixer"]
    assert layers[2]["increase"] == layers[2]["distance"] > layers[3]["increase"]
    by_probe = sum(one["layers"][2] * one["tokens"] for one in said["probes"]) / said["tokens"]
    assert by_probe == pytest.approx(layers[2]["distance"])


def test_it_is_the_mean_over_two_traces(models, probes, monkeypatch):
    """In one piece and in pieces of 4 tokens."""
    total, count = {}, 0
    for probe in probes:
        one, other = {}, {}
        for model, found in zip(models, (one, other)):
            model.forward(
                probe.ids, record=lambda name, value, found=found: found.update({name: value.copy()})
            )
        count += len(probe.ids)
        for name, x in one.items():
            x, y = x.astype(np.float64), other[name].astype(np.float64)
            cos = (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
            total[name] = total.get(name, 0) + (1 - cos).sum()
    for piece in (64, 4):
        monkeypatch.setattr(rooms, "PIECE", piece)
        modules = describe(*models, probes, measure(*models, probes))["modules"]
        assert {*modules} == {name for name in total if not name.endswith((".gate.1", ".gate.2"))}
        for name, distance in modules.items():
            assert distance == pytest.approx(total[name] / count, abs=1e-12), name


def test_a_dense_model_has_no_experts_in_common():
    model = pyengine.load(GOLDEN / "dense.gguf", threads=1)
    probes = [Text("a", "0" * 64, 3, np.arange(3))]
    assert (
        "experts_in_common" not in describe(model, model, probes, measure(model, model, probes))["layers"][0]
    )


# ---- probes and the command --------------------------------------------------------------------


def test_probes_of_a_file():
    assert split_probes("a.txt", "one\n\n two\n") == [("a.txt:1", "one"), ("a.txt:3", " two")]
    lines = '"one"\n{"text": "two\\nlines", "id": 3}\n'
    assert split_probes("a.jsonl", lines) == [("a.jsonl:1", "one"), ("a.jsonl:2", "two\nlines")]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "\n \n", "^a.txt: want a probe per line, got none$"),
        ("a.jsonl", '"one"\n{"text"', "^a.jsonl:2: want JSON, got "),
        ("a.jsonl", '{"prompt": "a"}', "^a.jsonl:1: want a string, or an object whose"),
        ("a.jsonl", "3", "^a.jsonl:1: want a string, or an object whose"),
        ("a.jsonl", r'"\ud800"', "^a.jsonl:1: want characters of Unicode"),
        ("a.jsonl", "[" * 100_000, "^a.jsonl:1: want JSON, got "),
    ],
)
def test_probes_that_are_refused(name, text, message):
    with pytest.raises(InputError, match=message):
        split_probes(name, text)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_command(parents, models, probes, tmp_path, capsys):
    (tmp_path / "probes.txt").write_text("\n".join(PROBES))
    arguments = ("probe", "-m", parents[0], "-m", parents[1], "-f", tmp_path / "probes.txt")
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "core       layer 2" and [line for line in lines if line.endswith("core")] == [
        lines[-2]
    ]
    assert run(*arguments, "--json", "-t", "2") == 0
    said = json.loads(capsys.readouterr().out)
    assert [probe["tokens"] for probe in said["probes"]] == [len(probe.ids) for probe in probes]
    alone = describe(*models, probes, measure(*models, probes))  # on one thread
    assert said["modules"] == alone["modules"] and said["layers"] == alone["layers"]
    assert run(*arguments, "--modules") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(said["modules"]) + 4


@pytest.mark.parametrize(
    "names, text, message",
    [
        ([MODEL], "a", "-m: want it twice, got it 1 times"),
        ([MODEL] * 3, "a", "-m: want it twice, got it 3 times"),
        ([MODEL, "default"], "a", "default.gguf: vocab_size: want 288 as "),
        ([MODEL, GOLDEN / "dense.gguf"], "a", "dense.gguf: "),
        ([MODEL, MODEL], "", "want a probe per line, got none"),
    ],
)
def test_bad_input_is_one_line(names, text, message, tmp_path, capsys):
    (tmp_path / "probes.txt").write_text(text)
    models = [part for name in names for part in ("-m", name)]
    assert run("probe", *models, "-f", tmp_path / "probes.txt") == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err, err


@pytest.mark.slow
def test_plot(parents, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "probes.txt").write_text(PROBES[0])
    models = ("-m", parents[0], "-m", parents[1])
    assert run("probe", *models, "-f", tmp_path / "probes.txt", "--plot", tmp_path / "a.svg") == 0
    assert (tmp_path / "a.svg").stat().st_size > 5000
