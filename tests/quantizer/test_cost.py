"""What quantizing costs on text: the figures against a plain recomputation, routing, floor, report, card."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN

import pyengine
from pyengine.census.texts import Text
from pyengine.checkpoint import provenance
from pyengine.cli import main
from pyengine.errors import CheckpointError, InputError
from pyengine.ids import as_ids
from pyengine.quantizer.cost import card, compare, figures, measure, page, tables
from pyengine.quantizer.cost.routing import Followed, Noted, changed
from pyengine.quantizer.cost.swap import OUTSIDE, with_part
from pyengine.quantizer.quantize import quantize

MODEL = GOLDEN / "nextn.gguf"
N_CTX = 24
IDS = np.random.default_rng(1729).integers(0, 100, 5 * N_CTX)
TEXT = Text("some ids", "0" * 64, 8 * len(IDS), as_ids(IDS, 100))
OTHER = Text("others", "1" * 64, 8 * len(IDS), as_ids(IDS[::-1].copy(), 100))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("cost")
    quantize(MODEL, root / "int8", root / "int4", root / "mixed")
    return {kind: root / kind for kind in ("int8", "int4", "mixed")}


def options(**given):
    return measure.Options(n_ctx=N_CTX, threads=1, **given)


@pytest.fixture(scope="module")
def report(made):
    return measure.measure(
        MODEL, [made["int4"], made["mixed"]], [TEXT, OTHER], options(by_layer=True, n_chunks=4)
    )


# ---- a plain recomputation -------------------------------------------------------------------


def probabilities(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True).astype(np.float64))
    return e / e.sum(axis=1, keepdims=True)


def by_hand(base, candidate, choose=None):
    """KL divergence, -ln of both probabilities of what follows, agreement: [scored tokens]."""
    columns = []
    for start in range(0, 4 * N_CTX, N_CTX):
        chunk = IDS[start : start + N_CTX]
        rows = slice(N_CTX // 2, N_CTX - 1)
        noted = {}

        def note(name, value, noted=noted):
            noted[name] = np.array(value)

        def record(name, own, noted=noted):
            return choose(noted[name], own) if choose and name.endswith("gate.2") else None

        p = probabilities(base.forward(chunk[:-1], record=note)[rows])
        q = probabilities(candidate.forward(chunk[:-1], record=record)[rows])
        following = chunk[N_CTX // 2 + 1 :]
        at = np.arange(len(following)), following
        columns.append(
            [(p * np.log(p / q)).sum(axis=1), -np.log(q[at]), -np.log(p[at]), p.argmax(1) == q.argmax(1)]
        )
    return [np.concatenate(column) for column in zip(*columns)]


def theirs_where_they_differ(theirs, own):
    same = np.sort(theirs, axis=1) == np.sort(own, axis=1)
    return np.where(same.all(axis=1, keepdims=True), own, theirs)


@pytest.mark.parametrize("arithmetic", ["locked", "float64"])
def test_the_figures_of_a_small_case(made, arithmetic):
    base, candidate = (pyengine.load(path, arithmetic, 1) for path in (MODEL, made["int4"]))
    kld, nll, nll_base, same = by_hand(base, candidate)
    rest, *_ = by_hand(base, candidate, theirs_where_they_differ)
    chunks = IDS[: 4 * N_CTX].reshape(4, N_CTX)
    (run,), use = compare.run(base, [candidate], chunks)
    said = figures.of_run(run, N_CTX)
    close = {"rtol": 1e-9, "atol": 1e-15}
    np.testing.assert_allclose(said["kld"]["value"], kld.mean(), **close)
    np.testing.assert_allclose(said["kld"]["error"], kld.std() / np.sqrt(len(kld) - 1), **close)
    np.testing.assert_allclose(said["kld"]["median"], np.median(kld), **close)
    np.testing.assert_allclose(said["kld"]["p99"], np.percentile(kld, 99), **close)
    np.testing.assert_allclose(said["kld"]["max"], kld.max(), **close)
    np.testing.assert_allclose(said["perplexity"]["value"], np.exp(nll.mean()), **close)
    ratio = np.exp((nll - nll_base).mean())
    np.testing.assert_allclose(said["increase_percent"]["value"], 100 * (ratio - 1), rtol=1e-6, atol=1e-12)
    paired = ratio * (nll - nll_base).std() / np.sqrt(len(nll) - 1)
    np.testing.assert_allclose(said["increase_percent"]["error"], 100 * paired, rtol=1e-6)
    assert said["same_top"]["value"] == same.mean()
    term = kld - rest
    assert abs(term).max() > 1e-6
    np.testing.assert_allclose(said["routing"]["term"]["value"], term.mean(), rtol=1e-6, atol=1e-15)
    np.testing.assert_allclose(said["routing"]["rest"]["value"], rest.mean(), **close)
    by_chunk = kld.reshape(4, -1)
    assert said["weakest"]["chunk"] == by_chunk.mean(axis=1).argmax()
    weights = [part["to"] - part["from"] + 1 for part in said["by_position"]]
    means = [part["kld"]["value"] for part in said["by_position"]]
    np.testing.assert_allclose(np.average(means, weights=weights), kld.mean(), **close)
    groups = figures.by_expert_group(use, 0)
    assert sum(group["share_of_choices"] for group in groups) == pytest.approx(1)
    mean = sum(group["share_of_choices"] * group["kld"] for group in groups if group["kld"] is not None)
    assert mean == pytest.approx(kld.mean())


def test_pieces_change_nothing(made, monkeypatch):
    base, candidate = (pyengine.load(path, threads=1) for path in (MODEL, made["int4"]))
    chunks = IDS[: 2 * N_CTX].reshape(2, N_CTX)
    (whole,), use = compare.run(base, [candidate], chunks)
    monkeypatch.setattr(compare, "PIECE_BYTES", 3 * 4 * base.config.vocab_size)
    (pieces,), again = compare.run(base, [candidate], chunks)
    assert np.array_equal(whole.scores.kld, pieces.scores.kld)
    assert np.array_equal(whole.followed, pieces.followed) and np.array_equal(whole.changed, pieces.changed)
    assert np.array_equal(use.tokens, again.tokens)
    (plain,) = compare.divergences(base, [candidate], chunks)
    assert np.array_equal(plain.kld, whole.scores.kld)


# ---- routing ---------------------------------------------------------------------------------


EXPERTS = st.permutations(range(6)).map(lambda order: order[:3])


@given(st.lists(st.tuples(EXPERTS, EXPERTS), min_size=1, max_size=5))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_changed_counts_sets(pairs):
    theirs, own = (np.array(column) for column in zip(*pairs))
    assert changed(theirs, own).tolist() == [len(set(a) - set(b)) for a, b in zip(theirs, own)]
    followed = Followed({"x.mlp.gate.2": theirs})("x.mlp.gate.2", own)
    want = [b if set(a) == set(b) else a for a, b in zip(theirs.tolist(), own.tolist())]
    assert followed.tolist() == want


def test_a_long_forward_is_followed_piece_by_piece():
    theirs = np.arange(12).reshape(6, 2)
    followed = Followed({"x.mlp.gate.2": theirs})
    own = np.zeros((2, 2), np.int64)
    got = [followed("x.mlp.gate.2", own) for _ in range(3)]
    assert np.array_equal(np.concatenate(got), theirs) and followed("x.mlp", own) is None


@pytest.mark.parametrize("arithmetic", ["locked", "float64"])
def test_no_routing_term_where_the_routes_agree(arithmetic):
    """Exactly 0: of a model beside itself, and of one whose routers see the same and whose head differs."""
    base = pyengine.load(MODEL, arithmetic, 1)
    other = pyengine.load(MODEL, arithmetic, 1)
    head = other.checkpoint.tensors["lm_head.weight"]
    scaled = dataclasses.replace(
        head, type="F32", data=head.stored_float32() * np.float32(1.5), factor=None, file_name="scaled"
    )
    if arithmetic == "locked":
        other.lm_head = type(other.lm_head)(other.pool, scaled)
    else:
        tensors = other.checkpoint.tensors | {"lm_head.weight": scaled}
        other.checkpoint = dataclasses.replace(other.checkpoint, tensors=tensors)
    chunks = IDS[: 2 * N_CTX].reshape(2, N_CTX)
    (same, different), _ = compare.run(base, [base, other], chunks)
    assert not same.scores.kld.any() or abs(same.scores.kld).max() < 1e-15
    assert different.scores.kld.mean() > 1e-4
    for run in (same, different):
        assert not run.changed.any() and np.array_equal(run.followed, run.scores.kld)
        assert figures.of_run(run, N_CTX)["routing"]["term"] == {"value": 0.0, "error": 0.0}


def test_locked_goes_on_with_the_experts_that_it_is_given():
    """As the reference does; with its own experts it is the same model to the bit."""
    locked, exact = pyengine.load(MODEL, threads=1), pyengine.load(MODEL, "float64")
    rng = np.random.default_rng(1729)
    config = locked.config
    given = {
        f"model.layers.{i}.mlp.gate.2": np.stack(
            [rng.permutation(config.num_experts)[: config.num_experts_per_tok] for _ in range(N_CTX)]
        )
        for i in range(config.num_hidden_layers)
    }
    forced, wanted = (model.forward(IDS[:N_CTX], record=given.get) for model in (locked, exact))
    own = locked.forward(IDS[:N_CTX])
    assert np.abs(forced - wanted).max() < 0.02 * np.abs(wanted).max() < np.abs(own - wanted).max()
    noted = Noted()
    locked.forward(IDS[:N_CTX], record=noted)
    assert locked.forward(IDS[:N_CTX], record=noted.choices.get).tobytes() == own.tobytes()


def test_locked_refuses_experts_that_it_does_not_have():
    model = pyengine.load(MODEL, threads=1)
    with pytest.raises(InputError, match="experts from outside"):
        model.forward(IDS[:3], record=lambda n, v: np.full_like(v, 99) if n.endswith("gate.2") else None)


@pytest.mark.golden
def test_the_weights_of_given_experts_equal_the_pytorch_restatement():
    torch = pytest.importorskip("torch")
    import locked_torch

    from pyengine.core import ops
    from pyengine.core.threads import Pool

    rng = np.random.default_rng(1729)
    for experts, top_k in ((6, 2), (40, 8), (256, 8)):
        logits = (3 * rng.standard_normal((9, experts))).astype(np.float32)
        selected = np.stack([rng.permutation(experts)[:top_k] for _ in range(9)]).astype(np.int32)
        want = locked_torch.routing_weights(torch.from_numpy(logits), torch.from_numpy(selected).long())
        assert ops.routing_weights(Pool(2), logits, selected).tobytes() == want.numpy().tobytes()


# ---- one layer at a time, the floor ----------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["locked", "float64"])
def test_all_parts_swapped_is_the_other_model(made, arithmetic):
    base, other = (pyengine.load(path, arithmetic, 1) for path in (MODEL, made["int4"]))
    model = base
    for part in (*range(base.config.num_hidden_layers), OUTSIDE):
        before = model.forward(IDS[:8])
        model = with_part(model, other, part)
        assert (model.forward(IDS[:8]) != before).any()
    assert model.forward(IDS[:8]).tobytes() == other.forward(IDS[:8]).tobytes()
    assert base.forward(IDS[:8]).tobytes() == pyengine.load(MODEL, arithmetic, 1).forward(IDS[:8]).tobytes()


def test_the_floor_is_the_arithmetics_own(report, made):
    for one in report["candidates"]:
        floor = one["floor"]
        assert (
            0 < floor["value"] < one["texts"][0]["kld"]["value"] / 100 and floor["tokens"] == N_CTX // 2 - 1
        )
        for text in one["texts"]:
            assert text["kld_above_floor"] == text["kld"]["value"] - floor["value"]
    said = measure.measure(MODEL, [made["int4"]], [TEXT], options(n_chunks=2, floor_chunks=0))
    assert said["candidates"][0]["floor"] is None and "floor" not in tables.as_text(said)
    said = measure.measure(MODEL, [made["int4"]], [TEXT], options(n_chunks=2, arithmetic="float64"))
    assert said["candidates"][0]["floor"] == {"value": 0.0, "error": 0.0, "tokens": 0}


def test_the_report_has_every_part(report):
    assert [text["name"] for text in report["texts"]] == ["some ids", "others"]
    int4, mixed = report["candidates"]
    assert (
        int4["bytes"] < mixed["bytes"]
        and int4["texts"][0]["kld"]["value"] > mixed["texts"][0]["kld"]["value"]
    )
    assert [layer["layer"] for layer in int4["by_layer"]] == [
        *(f"model.layers.{i}" for i in range(len(int4["by_layer"]) - 1)),
        "outside the layers",
    ]
    assert all(layer["kld"]["value"] > 0 for layer in int4["by_layer"])
    shown = [table.title for table in tables.tables(report)]
    assert len(shown) == 7 and shown[0] == "What it costs"
    for form in (tables.as_text, tables.as_markdown, page.as_html):
        made = form(report)
        for word in ("routing term", "One layer quantized at a time", f"{int4['bytes']:,}", "least used"):
            assert word in made
    assert json.loads(tables.as_json(report)) == json.loads(json.dumps(report))


def test_a_text_that_calibration_has_seen_is_marked(made, tmp_path):
    shutil.copytree(made["int4"], tmp_path / "int4")
    path = tmp_path / "int4" / provenance.FILE_NAME
    calibration = {"sha256": "2" * 64, "texts": [{"name": "seen", "sha256": OTHER.sha256}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": calibration}))
    said = measure.measure(MODEL, [tmp_path / "int4"], [TEXT, OTHER], options(n_chunks=1, floor_chunks=0))
    marks = [text["calibrated_on"] for text in said["candidates"][0]["texts"]]
    assert marks == [False, True]
    assert tables.as_text(said).count("others (CALIBRATED ON IT)") == 1
    assert "Calibrated on: seen (sha256 1111" in card.as_markdown(
        tmp_path / "int4", card.Origin(None, None), *card.costs_on_texts(said)
    )


def test_a_dense_model_has_no_routing(tmp_path):
    quantize(GOLDEN / "dense.gguf", int4=tmp_path / "int4")
    said = measure.measure(GOLDEN / "dense.gguf", [tmp_path / "int4"], [TEXT], options(n_chunks=2))
    (text,) = said["candidates"][0]["texts"]
    assert text["routing"] is None and "expert_groups" not in text
    assert "experts" not in " ".join(table.title for table in tables.tables(said)).lower()


# ---- the command, the card -------------------------------------------------------------------


class Parsed(HTMLParser):
    """Tags that are closed in order, and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text):
    parsed = Parsed(text)
    assert parsed.open == [] and {"table", "svg", "rect"} <= set(parsed.tags)
    assert not {"script", "link", "img", "iframe", "a", "object"} & set(parsed.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in parsed.attributes}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)


def test_the_page_parses_and_links_nowhere(report):
    check_page(page.as_html(report))
    nasty = json.loads(json.dumps(report).replace("some ids", "<b>&amp; x</b>"))
    made = page.as_html(nasty)
    check_page(made)
    assert "<b>" not in made and "&lt;b&gt;" in made


@pytest.fixture
def ids_file(tmp_path):
    np.save(tmp_path / "ids.npy", IDS)
    return tmp_path / "ids.npy"


def test_the_command_writes_a_card(made, tmp_path, capsys, ids_file):
    command = ["quality", str(made["mixed"]), "--source", str(MODEL), "--ids-file", str(ids_file)]
    command += ["-c", str(N_CTX), "--chunks", "2", "-t", "1", "--floor-chunks", "0"]
    path = tmp_path / "README.md"
    assert (
        main([*command, "--json", "--card", str(path), "--license", "apache-2.0", "--base-model", "a/b"]) == 0
    )
    said = json.loads(capsys.readouterr().out)
    text = path.read_text()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    assert front.splitlines() == [
        'license: "apache-2.0"',
        'base_model: "a/b"',
        "base_model_relation: quantized",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "  - pyengine",
        "  - int4",
        "  - int8",
    ]
    (one,) = said["candidates"]
    for word in (
        "# mixed",
        f"{one['bytes']:,} bytes",
        'from_pretrained("mixed", trust_remote_code=True)',
        "pyengine chat -m mixed",
        "*.mlp.experts.* has 4 bits; * has 8 bits",
        f"{one['texts'][0]['kld']['value']:.2e}",
    ):
        assert word in body, word
    assert main([*command, "--card", str(tmp_path / "card.html")]) == 0
    assert "What it costs" in capsys.readouterr().out
    made_page = (tmp_path / "card.html").read_text()
    check_page(made_page)
    assert "Licence: not stated" in made_page and "Base model: nextn" in made_page


def test_the_origin_of_a_directory(tmp_path, made):
    assert card.origin_of(made["int8"]) == card.Origin("int8", None)
    (made["int8"] / "README.md").write_text("---\nlicense: mit\nbase_model: 'x/y'\ntags:\n- z\n---\n# t\n")
    assert card.origin_of(made["int8"]) == card.Origin("x/y", "mit")
    assert card.origin_of(made["int8"], "q", "r") == card.Origin("q", "r")
    (made["int8"] / "README.md").unlink()


@pytest.mark.parametrize(
    "given, message",
    [
        (["--by-layer"], "--by-layer: want -f TEXT"),
        (["--chunks", "2"], "--chunks: want -f TEXT"),
        (["--base-model", "a/b"], "--base-model: want --card"),
        (["--ids-file", "IDS", "--card", "card.txt"], "want a file name that ends in .md or .html"),
        (["--ids-file", "IDS", "--card", "/no/such/card.md"], "want a file in a directory that exists"),
        (["--ids-file", "IDS", "-f", "x"], "--ids-file: want it without -f"),
        (["--ids-file", "IDS", "-c", "4096"], "want at least 8192 tokens"),
        (["--ids-file", "IDS", "--plot", "x.png"], "--plot: want it without -f"),
        (["-f", "/no/such.txt"], "tokenizer.ggml.model: want str, got no such key"),
        (["--mix", "*=int8"], "--mix: want it without --source"),
    ],
)
def test_what_is_refused(made, capsys, ids_file, given, message):
    given = [str(ids_file) if word == "IDS" else word for word in given]
    assert main(["quality", str(made["int4"]), "--source", str(MODEL), *given]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_more_that_is_refused(made, capsys, ids_file):
    ids = ["--ids-file", str(ids_file)]
    assert main(["quality", str(made["int4"]), *ids]) == 2
    assert "-f: want --source SRC" in capsys.readouterr().err
    assert main(["quality", str(made["int4"]), "--card", "x.md"]) == 2
    assert "--card: want --source SRC" in capsys.readouterr().err
    two = ["quality", str(made["int4"]), str(made["int8"]), "--source", str(MODEL), *ids]
    assert main([*two, "--card", "x.md"]) == 2
    assert "--card: want one MODEL, got 2" in capsys.readouterr().err


def test_another_architecture_is_refused(made):
    with pytest.raises(CheckpointError, match="int4: .*: want .* as .*pattern31"):
        measure.measure(GOLDEN / "pattern31.gguf", [made["int4"]], [TEXT], options())


def test_a_forecast_of_a_mix_is_what_quantize_gives(made):
    from pyengine.quantizer import quality
    from pyengine.quantizer.mix import ACTIVE, Mix

    (forecast,) = quality.forecast(MODEL, [Mix.parse(ACTIVE)], ["absmax"], threads=1)
    assert forecast.label == "mixed absmax"
    assert forecast.tensors == quality.measure(made["mixed"], MODEL).tensors
