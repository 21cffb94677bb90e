"""The census: counts against a trace's, sums against the equations, the same bits however it runs."""

import json

import numpy as np
import pytest
from merge_models import write_child
from paths import GOLDEN, TESTS

import pyengine
from pyengine.census.census import check_alike, compare, describe, take_census
from pyengine.census.counts import Counts, norm
from pyengine.census.texts import Text, encode, windows
from pyengine.cli import main
from pyengine.errors import CheckpointError, InputError, PyengineWarning
from pyengine.merge.census_file import read_census
from pyengine.reference import silu

MODEL = GOLDEN / "pattern31.gguf"  # 4 layers, 6 experts of which a token has 2
TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void; "

pytestmark = pytest.mark.filterwarnings("ignore:census. .* tokens are:pyengine.errors.PyengineWarning")


@pytest.fixture(scope="module")
def model():
    return pyengine.load(MODEL, threads=1)


@pytest.fixture(scope="module")
def texts(model):
    return [encode(model, "first", TEXT), encode(model, "second", "And God said, Let there be light.")]


@pytest.fixture(scope="module")
def counts(model, texts):
    return take_census(model, texts, context=64)


def figures(counts):
    return {name: value.tobytes() for name, value in vars(counts).items()}


def trace(model, texts, context=64):
    """{module: [tokens, features]} over all windows."""
    found = {}
    for ids in windows(texts, context):
        model.forward(ids, record=lambda name, value: found.setdefault(name, []).append(value.copy()))
    return {name: np.concatenate(values) for name, values in found.items()}


# ---- counts ------------------------------------------------------------------------------------


def test_counts_are_those_of_a_trace(model, texts, counts):
    """Counted token by token in plain Python."""
    outputs = trace(model, texts)
    for layer in range(4):
        chosen = outputs[f"model.layers.{layer}.mlp.gate.2"]
        weights = outputs[f"model.layers.{layer}.mlp.gate.1"]
        tokens, pairs, sums = np.zeros(6, int), np.zeros((6, 6), int), np.zeros(6)
        for own, weight in zip(chosen.tolist(), weights.tolist()):
            for i, (a, w) in enumerate(zip(own, weight)):
                tokens[a] += 1
                sums[a] += w
                for b in own[i + 1 :]:
                    pairs[min(a, b), max(a, b)] += 1
        assert (counts.tokens[layer] == tokens).all() and (counts.pairs[layer] == pairs).all()
        assert counts.weight[layer].tobytes() == sums.tobytes()
    assert counts.tokens.sum(axis=1).tolist() == [sum(len(text.ids) for text in texts) * 2] * 4


@pytest.mark.parametrize("threads, chunk", [(2, None), (2, 7), (1, 1)])
def test_threads_and_chunks_change_no_bit(texts, counts, threads, chunk):
    other = take_census(pyengine.load(MODEL, threads=threads), texts, context=64, chunk=chunk)
    assert figures(other) == figures(counts)


def test_an_experts_output_has_the_bits_that_the_model_adds_up(model, texts):
    """pe_experts' statement: by ascending expert, routed = routed + output * weight, in float32."""
    outputs = trace(model, texts[1:])
    for layer in range(4):
        name = f"model.layers.{layer}"
        chosen, weights = outputs[f"{name}.mlp.gate.2"], outputs[f"{name}.mlp.gate.1"]
        x = outputs[f"{name}.post_attention_layernorm"]
        routed = np.zeros_like(x)
        for expert in range(6):
            token, place = np.nonzero(chosen == expert)
            if len(token):
                y = model.expert_output(layer, expert, x[token])
                routed[token] += y * weights[token, place, None]
        assert routed.tobytes() == outputs[f"{name}.mlp.experts"].tobytes()


def test_sums_are_the_equations(texts):
    """The float64 model's census against REAP's equation over its trace; each expert has every token."""
    reference = pyengine.load(MODEL, "float64")
    counts, outputs = take_census(reference, texts[1:]), trace(reference, texts[1:])
    tensors = reference.checkpoint.tensors
    for layer in range(4):
        name = f"model.layers.{layer}.mlp"
        x = outputs[f"model.layers.{layer}.post_attention_layernorm"]
        gate, up, down = (tensors[f"{name}.experts.{part}_proj"].float64() for part in ("gate", "up", "down"))
        inner = silu(np.einsum("th,efh->tef", x, gate)) * np.einsum("th,efh->tef", x, up)
        y = np.einsum("tef,ehf->teh", inner, down)
        p = np.exp(outputs[f"{name}.gate"])
        p /= p.sum(axis=1, keepdims=True)
        kept = np.where(p >= np.sort(p, axis=1)[:, [-2]], p, 0)
        weights = kept / kept.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(counts.weight[layer], weights.sum(axis=0), rtol=1e-12)
        saliency = (weights * np.linalg.norm(y, axis=2)).sum(axis=0)
        np.testing.assert_allclose(counts.saliency[layer], saliency, rtol=1e-11)
        norms = (np.linalg.norm(y, axis=2) * (kept > 0)).sum(axis=0)
        np.testing.assert_allclose(counts.norm[layer], norms, rtol=1e-11)
        np.testing.assert_allclose(counts.router_entropy[layer], -(p * np.log2(p)).sum(), rtol=1e-12)


def test_both_arithmetics_agree(model, texts):
    """What differs is rounding: float32 activations and 16-bit products against float64."""
    locked, exact = take_census(model, texts[1:]), take_census(pyengine.load(MODEL, "float64"), texts[1:])
    assert (locked.tokens == exact.tokens).all() and (locked.pairs == exact.pairs).all()
    np.testing.assert_allclose(locked.saliency, exact.saliency, rtol=1e-3)


def test_a_norm_is_added_in_one_order():
    y = np.random.default_rng(1729).standard_normal((5, 300)).astype(np.float32)
    expected = []
    for row in y.astype(np.float64):
        total = 0.0
        for value in row:
            total += value * value
        expected.append(np.sqrt(total))
    assert norm(y).tolist() == expected == [norm(row[None])[0] for row in y]


# ---- figures -----------------------------------------------------------------------------------


class OneLayer:
    """A model of one layer and four experts, two for each token, that was counted by hand."""

    class config:
        num_hidden_layers, num_experts, num_experts_per_tok = 1, 4, 2

    class checkpoint:
        path = "by hand"

    arithmetic = "locked"


def counted_by_hand():
    """40 tokens chose 0 and 1, 39 chose 0 and 2, one 1 and 2; nobody chose 3."""
    counts = Counts(1, 4)
    selected = np.array([[1, 0]] * 40 + [[0, 2]] * 39 + [[1, 2]])
    weights = np.array([[0.75, 0.25]] * 79 + [[0.5, 0.5]], np.float32)
    counts.add(0, np.zeros((80, 4)), weights, selected, np.full((80, 2), 2.0))
    return counts


def test_figures_of_a_layer():
    text = Text("a", "0" * 64, 80, np.zeros(80, np.int64))
    said = describe(OneLayer, [text], counted_by_hand(), context=8, dead=0.05)
    (layer,) = said["layers"]
    assert said["mean_tokens"] == 40 and said["tokens"] == 80 and layer["dead"] == [3]
    assert [expert["tokens"] for expert in layer["experts"]] == [79, 41, 40, 0]
    assert [expert["share"] for expert in layer["experts"]] == [79 / 160, 41 / 160, 0.25, 0]
    assert [expert["dead"] for expert in layer["experts"]] == [False, False, False, True]
    never, second = layer["experts"][3], layer["experts"][1]
    assert never["mean_weight"] is never["saliency"] is never["mean_norm"] is None
    assert second["mean_weight"] == pytest.approx((40 * 0.75 + 0.5) / 41)
    assert second["saliency"] == pytest.approx(2 * (40 * 0.75 + 0.5) / 41) and second["mean_norm"] == 2
    assert layer["router_entropy_bits"] == pytest.approx(2)
    shares = np.array([79, 41, 40]) / 160
    assert layer["entropy_bits"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert layer["effective_experts"] == pytest.approx(2 ** layer["entropy_bits"])
    assert [(pair["experts"], pair["tokens"]) for pair in layer["pairs"]] == [
        ([0, 1], 40),
        ([0, 2], 39),
        ([1, 2], 1),
    ]
    assert layer["pairs"][0]["lift"] == pytest.approx((40 / 80) / (79 / 80 * 41 / 80))


@pytest.mark.parametrize("tokens, dead", [(1, True), (2, False), (3, False)])
def test_dead_is_below_the_threshold_and_not_at_it(tokens, dead):
    """80 choices of 4 experts: a tenth of the mean is 2."""
    counts = Counts(1, 4)
    counts.tokens[0] = [50 - tokens, 30, 0, tokens]
    text = Text("a", "0" * 64, 40, np.zeros(40, np.int64))
    (layer,) = describe(OneLayer, [text], counts, context=8, dead=0.1)["layers"]
    assert (3 in layer["dead"]) == dead and 2 in layer["dead"]


def test_few_tokens_are_a_warning(model, texts, counts):
    short = [texts[1]]
    with pytest.warns(
        PyengineWarning, match="per expert of a layer: on so few, dead is what was not chosen once"
    ):
        describe(model, short, take_census(model, short), context=64, dead=0.05)


def test_two_models_side_by_side(model, texts, counts):
    said = describe(model, texts, counts, context=64, dead=0.05)
    assert all(layer["distance"] == 0 and not layer["dead_in_first"] for layer in compare(said, said))
    other = json.loads(json.dumps(said))
    layer = other["layers"][2]
    moved = layer["experts"][0]["share"]
    layer["experts"][0]["share"], layer["experts"][1]["share"] = 0.0, layer["experts"][1]["share"] + moved
    layer["dead"] = [0]
    compared = compare(said, other)[2]
    assert compared["distance"] == pytest.approx(moved) and compared["dead_in_second"] == [0]


# ---- the command -------------------------------------------------------------------------------


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


def test_json_is_what_a_merge_reads(text_file, tmp_path, capsys):
    assert run("census", "-m", MODEL, "-f", text_file, "-f", text_file, "-c", 64, "--json") == 0
    written = capsys.readouterr().out
    (tmp_path / "census.json").write_text(written)
    said = json.loads(written)
    read = read_census(tmp_path / "census.json", 4, 6)
    assert read == tuple(tuple(e["tokens"] for e in layer["experts"]) for layer in said["layers"])
    assert [text["tokens"] for text in said["texts"]] == [said["tokens"] // 2] * 2
    assert said["texts"][0]["name"] == str(text_file) and len(said["texts"][0]["sha256"]) == 64


def test_tables(text_file, capsys):
    assert run("census", "-m", MODEL, "-f", text_file) == 0
    out = capsys.readouterr().out
    assert "may be a specialist of other texts" in out and "sha256" in out
    assert [line.split()[0] for line in out.splitlines()[-5:]] == ["layer", "0", "1", "2", "3"]
    assert run("census", "-m", MODEL, "-m2", MODEL, "-f", text_file, "--layer", "3") == 0
    rows = capsys.readouterr().out.splitlines()[-6:]
    for row in rows:  # a model beside itself
        cells = [cell for cell in row.split()[1:] if cell != "dead"]
        assert cells[:5] == cells[5:] and len(cells) == 10


@pytest.mark.slow
def test_plot(text_file, tmp_path):
    pytest.importorskip("matplotlib")
    for name, more in (("one.png", ()), ("two.svg", ("--other", MODEL))):
        assert run("census", "-m", MODEL, "-f", text_file, "--plot", tmp_path / name, *more) == 0
        assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("-m", GOLDEN / "dense.gguf", "-f", "TEXT"), "want a model with experts, got a dense one"),
        (("-m", MODEL, "-f", "EMPTY"), "want a text of at least one token, got none"),
        (("-m", MODEL, "-f", "TEXT", "-f", "EMPTY"), "want a text of at least one token, got none"),
        (("-m", MODEL, "-f", "TEXT", "--layer", "4"), "--layer: want 0 to 3, got 4"),
        (("-m", MODEL, "-f", "TEXT", "--dead", "0"), "want a number above 0, at most 1, got '0'"),
        (("-m", MODEL, "-f", "TEXT", "--dead", "nan"), "want a number above 0, at most 1, got 'nan'"),
        (("-m", MODEL, "-f", "TEXT", "--other", "default"), "default.gguf: vocab_size: want 288 as "),
        (("-m", MODEL, "-f", "TEXT", "--other", TESTS / "no such"), "got no such path"),
        (("-m", MODEL, "-f", "TEXT", "--plot", "a.pdf"), "ends in .png or .svg"),
    ],
)
def test_bad_input_is_one_line(arguments, message, text_file, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    files = {"TEXT": text_file, "EMPTY": tmp_path / "empty.txt"}
    assert run("census", *(files.get(argument, argument) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err, err


def test_no_text_and_no_experts(model):
    with pytest.raises(InputError, match="^texts: want at least one, got none$"):
        take_census(model, [])
    with pytest.raises(CheckpointError, match="got a dense one"):
        take_census(pyengine.load(GOLDEN / "dense.gguf"), [])


def test_another_vocabulary(model, tmp_path):
    """Of the same size: its token 5 is another."""
    from pyengine.text.gguf_vocabulary import export_tokenizer

    other = write_child(tmp_path / "other", 1)
    export_tokenizer(MODEL, other)
    check_alike(model, pyengine.load(other))
    said = json.loads((other / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    vocabulary[names[5]], vocabulary[names[6]] = 6, 5
    (other / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="vocabulary: token 5: want "):
        check_alike(model, pyengine.load(other))
