"""Budgets, verdicts and their reports."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from paths import GOLDEN
from peer import Peer

import pyengine
from pyengine import reference as ref
from pyengine.cli import main
from pyengine.errors import FileFormatError, InputError
from pyengine.files.safetensors_writer import SafetensorsWriter
from pyengine.oracle.budget import Budget, Error, measure
from pyengine.oracle.formats import to_bfloat16, to_float16, to_int8_and_back
from pyengine.oracle.judge import judge
from pyengine.oracle.mistakes.catalogue import MISTAKES
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.junit import as_junit
from pyengine.oracle.report.markdown import as_markdown
from pyengine.oracle.report.plot import layer_ticks, places_of, plot, short_name
from pyengine.oracle.report.summary import ROWS
from pyengine.oracle.report.text import as_text
from pyengine.oracle.rounding import _sums_backward, _sums_forward, chunked_delta_rule, rounded_model
from pyengine.oracle.trace import Trace, record_trace
from pyengine.plots import check_plot

MODEL = GOLDEN / "pattern31.gguf"
TOKENS = 12


@pytest.fixture(scope="module")
def oracle():
    return Oracle(None, MODEL)


@pytest.fixture(scope="module")
def ids(oracle):
    return np.random.default_rng(1729).integers(0, oracle.model.config.vocab_size, TOKENS)


@pytest.fixture(scope="module")
def truth(oracle, ids):
    return oracle.trace(ids)


@pytest.fixture(scope="module")
def budget(oracle, truth):
    return oracle.budget("float32", truth)


def changed(trace, name, change):
    tensors = dict(trace.tensors)
    tensors[name] = change(tensors[name].copy())
    return Trace(trace.ids, tensors)


# ---- rounding --------------------------------------------------------------------------------


def test_bfloat16_is_the_nearest_and_even():
    x = np.random.default_rng(1729).standard_normal(1000).astype(np.float32) * np.float32(1e3)
    down = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # towards zero
    away = ((x.view(np.uint32) | 0xFFFF).astype(np.uint64) + 1).astype(np.uint32).view(np.float32)
    nearest = np.where(np.abs(x - down) <= np.abs(away - x), down, away)
    assert np.array_equal(to_bfloat16(x), nearest)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0, np.inf], np.float32)
    assert to_bfloat16(ties).tolist() == [1, 1 + 2**-6, -1, 0, np.inf]
    assert np.isnan(to_bfloat16(np.array([np.nan])))


def test_int8_keeps_the_largest_of_a_block_and_zeros():
    x = np.random.default_rng(1729).standard_normal((3, 80)).astype(np.float32)
    x[1] = 0
    y = to_int8_and_back(x)
    assert y.shape == x.shape and not y[1].any()
    steps = np.abs(x[:, :32]).max(axis=1) / 127
    assert np.all(np.abs(y - x)[:, :32] <= steps[:, None] * (0.5 + 127 * 2.0**-10))


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 130])
@pytest.mark.parametrize("sums", [_sums_forward, _sums_backward])
def test_chunks_are_the_recurrence(tokens, sums):
    random = np.random.default_rng(1729)
    q, k = (ref.l2_norm(random.standard_normal((tokens, 3, 8)), 1.0) for _ in range(2))
    v, beta = random.standard_normal((tokens, 3, 5)), random.random((tokens, 3))
    log_decay = -np.exp(random.uniform(-12, 3, (tokens, 3)))
    states = [random.standard_normal((3, 8, 5))]
    states.append(states[0].copy())
    want = ref.delta_rule(q, k, v, beta, log_decay, states[0])
    got = chunked_delta_rule(q, k, v, beta, log_decay, states[1], sums)
    np.testing.assert_allclose(got, want, atol=1e-11)
    np.testing.assert_allclose(states[1], states[0], atol=1e-11)


@pytest.mark.parametrize("dtype, least", [("float32", 0), ("bfloat16", 16), ("float16", 13)])
def test_a_rounded_run_holds_values_of_its_dtype(oracle, ids, dtype, least):
    run = record_trace(rounded_model(oracle.model, dtype, 3), ids)
    for name, value in run.tensors.items():
        if value.dtype == np.float32 and least:
            rounded = to_bfloat16(value) if dtype == "bfloat16" else to_float16(value)
            assert np.array_equal(rounded, value), name
    again = record_trace(rounded_model(oracle.model, dtype, 3), ids)
    assert all(np.array_equal(value, again.tensors[name]) for name, value in run.tensors.items())


# ---- budgets ---------------------------------------------------------------------------------


def test_budgets_grow_with_the_dtype(oracle, truth, budget):
    coarse = oracle.budget("bfloat16", truth)
    for name in budget.total:
        assert coarse.total[name].rms >= budget.total[name].rms > 0
        assert coarse.own[name].largest >= budget.own[name].largest > 0
    assert coarse.total["lm_head"].rms > 1000 * budget.total["lm_head"].rms
    assert "model.layers.0.mlp.gate.2" not in budget.total
    twice = measure(oracle.model, truth.ids, "float32", truth.tensors, factor=8)
    assert twice.total["lm_head"].rms == 2 * budget.total["lm_head"].rms


def test_a_budget_written_and_read_again(budget, truth, tmp_path):
    budget.save(tmp_path / "b.json")
    assert Budget.load(tmp_path / "b.json") == budget
    other = Trace(truth.ids[::-1], truth.tensors)
    with pytest.raises(InputError, match="want one for the candidate's ids"):
        budget.check(other)
    part = Trace(truth.ids, {"lm_head": truth.tensors["lm_head"]})
    with pytest.raises(InputError, match="want one for the candidate's tensors, got .* lm_head|model"):
        budget.check(part)
    budget.check(truth, pyengine.load(MODEL, "float64"))
    with pytest.raises(InputError, match="want one for this model, got one for another"):
        budget.check(truth, pyengine.load(GOLDEN / "tied.gguf", "float64"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "file: want JSON"),
        ("{}", "format: want 'pyengine-budget-2'"),
        ('{"format": "pyengine-budget-2"}', "budget: want what Budget.save writes"),
        ('{"format": "pyengine-budget-2", "total": [], "own": {}}', "budget: want what"),
    ],
)
def test_a_file_that_is_no_budget(tmp_path, text, message):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        Budget.load(tmp_path / "b.json")


def test_shares_of_a_budget():
    budget = Error(1.0, 2.0)
    assert Error(0.5, 1.0).share_of(budget) == 0.5 and Error(0.1, 3.0).share_of(budget) == 1.5
    assert Error(0.0, 0.0).share_of(Error(0.0, 0.0)) == 0
    assert Error(1.0, 1.0).share_of(Error(0.0, 0.0)) == np.inf
    nan = np.array([[1.0, np.nan]])
    assert Error.between(nan, np.ones((1, 2))).rms == np.inf
    assert Error.between(np.array([[np.inf]]), np.array([[np.inf]])).rms == 0


# ---- verdicts --------------------------------------------------------------------------------


def test_the_guilty_is_told_from_those_that_inherit(oracle, truth, budget):
    wrong = Peer(MODEL, ["norm_plus_one_twice"]).run(truth.ids)
    verdict = oracle.verify(wrong, "float32")
    guilty = {row.name for row in verdict.guilty}
    assert guilty == {
        name for name in truth.tensors if name.endswith(("layernorm", "q_norm", "k_norm", "model.norm"))
    }
    inherited = [row for row in verdict.rows if row.status == "inherited"]
    assert len(inherited) > 40 and all(
        row.own_share <= 1 < row.total_share for row in inherited if row.own_share is not None
    )


def test_one_wrong_value_is_found_with_its_token(oracle, truth):
    def change(value):
        value[7, 3] += np.float32(0.01)
        return value

    verdict = oracle.verify(changed(truth, "model.layers.2.linear_attn.in_proj_z", change), "float32")
    assert [row.name for row in verdict.guilty] == [
        "model.layers.2.linear_attn.in_proj_z",
        "model.layers.2.linear_attn.norm",
    ]
    assert verdict.first.token == 7 and not verdict.mistakes


def test_nan_and_another_shape_are_guilty(oracle, truth):
    def nan(value):
        value[2] = np.nan
        return value

    verdict = oracle.verify(changed(truth, "lm_head", nan), "bfloat16")
    assert [row.name for row in verdict.guilty] == ["lm_head"] and verdict.first.token == 2
    verdict = oracle.verify(changed(truth, "lm_head", lambda v: v[:, 1:]), "bfloat16")
    assert [row.name for row in verdict.guilty] == ["lm_head"]
    assert json.dumps(verdict.as_dict(), allow_nan=False)


def test_values_that_are_scaled_or_shifted(oracle, truth):
    name = "model.layers.1.mlp.gate"
    scaled = oracle.verify(changed(truth, name, lambda v: v * 2), "float32")
    assert "the values are 2 times what they should be" in [m.name for m in scaled.mistakes]
    shifted = oracle.verify(changed(truth, name, lambda v: np.roll(v, 1, axis=0)), "float32")
    assert "each row is that of the token before" in [m.name for m in shifted.mistakes]


def with_experts(truth, token, experts, name="model.layers.3.mlp.gate"):
    """The trace of an implementation that chose these experts for a token: of the last layer."""

    def choose(value):
        value[token] = experts
        return value

    return changed(truth, f"{name}.2", choose)


def test_a_wrong_choice_of_experts(oracle, truth, budget):
    chosen = truth.tensors["model.layers.3.mlp.gate.2"][5].tolist()
    other = next(e for e in range(6) if e not in chosen)
    verdict = oracle.verify(with_experts(truth, 5, [chosen[0], other]), "float32")
    (flip,) = verdict.flips
    assert (flip.token, flip.kind) == (5, "wrong") and flip.margin > flip.allowed > 0
    assert verdict.first.name == "model.layers.3.mlp.gate.2" and verdict.first.status == "guilty"
    same = oracle.verify(
        Trace(
            truth.ids,
            {
                "model.layers.3.mlp.gate.2": with_experts(truth, 5, chosen[::-1]).tensors[
                    "model.layers.3.mlp.gate.2"
                ]
            },
        ),
        "float32",
    )
    assert same.ok and not same.flips  # the order among the chosen has no meaning


def test_a_near_tie_is_followed(oracle, truth):
    """With a budget as wide as the margin, the reference goes on with the candidate's choice."""
    name = "model.layers.3.mlp.gate"
    logits, chosen = truth.tensors[name], truth.tensors[f"{name}.2"]
    ranked = np.argsort(-logits, axis=-1)
    margins = logits[np.arange(TOKENS), ranked[:, 1]] - logits[np.arange(TOKENS), ranked[:, 2]]
    token = int(margins.argmin())
    experts = ranked[token, [0, 2]]
    forced = {}

    def record(reached, value):
        if reached == f"{name}.2":
            value = value.copy()
            value[token] = experts
        forced[reached] = value
        return value

    oracle.model.forward(truth.ids, record=record)
    candidate = Trace(
        truth.ids, {n: v if v.dtype == np.int64 else v.astype(np.float32) for n, v in forced.items()}
    )
    assert chosen[token].tolist() != experts.tolist()
    tight = oracle.budget("float32", candidate)
    assert not judge(oracle.model, candidate, tight).ok
    wide = dataclasses.replace(tight, total={**tight.total, name: Error(1.0, float(margins[token]))})
    verdict = judge(oracle.model, candidate, wide)
    assert verdict.ok and [flip.kind for flip in verdict.flips] == ["near-tie"]
    assert verdict.flips[0].margin == pytest.approx(margins[token], rel=1e-5)


def test_mistakes_have_names_of_their_own(oracle, ids, budget):
    assert len({m.name for m in MISTAKES}) == len(MISTAKES) > 80
    for mistake in MISTAKES[::9]:  # the model itself is left as it was
        mistake.made(oracle.model, 3)
    assert record_trace(oracle.model, ids).tensors["lm_head"].tobytes() == (
        oracle.trace(ids).tensors["lm_head"].tobytes()
    )


# ---- reports ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed(oracle, ids):
    return oracle.verify(Peer(MODEL, ["gate_up_swapped"]).run(ids), "float32")


def test_text(failed, oracle, truth):
    lines = as_text(failed).splitlines()
    assert lines[0].startswith("different: ") and lines[0].endswith(
        "the first is model.layers.0.mlp.shared_expert.down_proj"
    )
    assert "looks like: gate and up are swapped" in lines
    table = lines[lines.index("") + 1 :]
    assert table[0].split() == "tensor error end to end own inputs from token".split()
    assert table[ROWS + 1].startswith("... and ") and table[ROWS + 1].endswith(" more (--all shows them)")
    assert len(as_text(failed, every=True).splitlines()) > 83
    assert as_text(oracle.verify(truth, "float32")).startswith("within the float32 budget: 83 of 83 tensors")


def test_markdown_does_not_trust_names(failed, truth):
    text = as_markdown(failed)
    assert text.startswith("### pyengine verify: FAILED") and "| GUILTY |" in text
    hostile = "x|<b>`\n[a](b)"
    verdict = Oracle(Trace(truth.ids, {hostile: truth.tensors["lm_head"]})).verify(
        Trace(truth.ids, {hostile: truth.tensors["lm_head"] + 1})
    )
    text = as_markdown(verdict)
    assert "x\\|\\<b\\>\\`?\\[a\\](b)" in text and "<b>" not in text.replace("\\<b", "")
    case = ElementTree.fromstring(as_junit(verdict)).find("testcase")
    assert case.get("name") == "x|<b>`?[a](b)"


def test_junit_counts_the_guilty(failed):
    suite = ElementTree.fromstring(as_junit(failed))
    assert int(suite.get("tests")) == len(suite.findall("testcase")) == 83
    failures = suite.findall("testcase/failure")
    assert len(failures) == int(suite.get("failures")) == len(failed.guilty) > 0
    assert "looks like: gate and up are swapped" in failures[0].get("message")
    assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped")) > 10


def test_the_table_explains_itself(failed):
    text = as_text(failed)
    assert "error: root mean square of the difference, as a part of the reference's" in text
    assert "end to end, own inputs: the error in units of the float32 budget (1 x is allowed)" in text
    assert "GUILTY: the operation is beyond its budget on inputs that are in the trace" in text
    assert "inherits: beyond the budget end to end, within it on the candidate's own inputs" in text
    assert "SUSPECT" not in text
    beyond = sum(row.status != "ok" for row in failed.rows)
    assert f"... and {beyond - ROWS} more (--all shows them)" in text.splitlines()
    assert "--all" not in as_text(failed, every=True)
    assert "(`pyengine verify --all` shows them)" in as_markdown(failed)
    assert "GUILTY: the operation is beyond its budget" in as_markdown(failed)


def test_plot(failed, tmp_path):
    pytest.importorskip("matplotlib")
    plot(failed, tmp_path / "e.svg")
    assert "<svg" in (tmp_path / "e.svg").read_text()
    with pytest.raises(InputError, match="want a file name that ends in"):
        check_plot("e.bmp")


@pytest.fixture
def drawn(failed, tmp_path, monkeypatch):
    """The panel of a plot."""
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(9, 4.5))
    monkeypatch.setattr("pyengine.oracle.report.plot.new_figure", lambda size: figure)
    plot(failed, tmp_path / "e.png")
    return figure.axes[0]


def test_the_plot_draws_modules_within_their_layer(failed, drawn):
    places = places_of(failed)
    assert places.keys() == {row.name for row in failed.rows}
    for name, x in places.items():
        if name.startswith("model.layers."):
            assert round(x) == int(name.split(".")[2]) and abs(x - round(x)) <= 0.4 + 1e-9
    assert places["model.embed_tokens"] == -1 and round(places["lm_head"]) == 4
    order = sorted(places, key=places.get)
    assert order == list(places)


def test_the_plot_has_layers_for_ticks_and_names_the_guilty(failed, drawn):
    assert [t.get_text() for t in drawn.get_xticklabels()] == ["0", "1", "2", "3"]
    assert list(drawn.get_xticks()) == [0, 1, 2, 3]
    named = [text.get_text() for text in drawn.texts]
    assert named and named == [short_name(row) for row in failed.guilty[: len(named)]]
    assert named[0] == "mlp.shared_expert.down_proj"


def test_a_plot_of_many_layers_has_few_ticks(failed):
    rows = [dataclasses.replace(failed.rows[0], name=f"model.layers.{i}") for i in range(64)]
    many = dataclasses.replace(failed, rows=rows)
    ticks = layer_ticks(many)
    assert len(ticks) <= 20 and ticks[0] == 0 and all(isinstance(tick, int) for tick in ticks)
    assert len(places_of(many)) == 64


# ---- the command -----------------------------------------------------------------------------


def run(*arguments):
    return main([str(a) for a in arguments])


def test_verify_from_the_command_line(tmp_path, ids, truth, capsys):
    good, bad, budget = tmp_path / "good", tmp_path / "bad", tmp_path / "b.json"
    Peer(MODEL).run(ids).save(good)
    Peer(MODEL, ["rope_pairs"]).run(ids).save(bad)
    truth.save(tmp_path / "truth")
    assert run("verify", MODEL, good, "--budget", "float32", "--write-budget", budget) == 0
    assert capsys.readouterr().out.startswith("within the float32 budget: 83 of 83 tensors; nearest to it: ")
    assert run("verify", tmp_path / "truth", good, "--budget", budget) == 0
    assert run("verify", tmp_path / "truth", bad, "--budget", budget) == 1
    assert (
        run(
            "verify",
            tmp_path / "truth",
            bad,
            "--budget",
            budget,
            "-m",
            MODEL,
            "--junit",
            tmp_path / "j.xml",
            "--markdown",
            tmp_path / "m.md",
            "--json",
        )
        == 1
    )
    assert (tmp_path / "j.xml").exists() and (tmp_path / "m.md").exists()
    capsys.readouterr()
    assert run("verify", MODEL, bad) == 1
    out = capsys.readouterr().out
    assert out.startswith("not bit-equal; beyond the float32 budget as well (")
    assert " times it, first in model.layers.3.self_attn.o_proj)" in out.splitlines()[0]
    assert "GUILTY" not in out and "looks like" not in out
    assert run("verify", MODEL, tmp_path / "truth", "--arithmetic", "float64") == 0
    assert not list(tmp_path.glob("*.partial"))


def test_json_from_the_command_line(tmp_path, ids, capsys):
    Peer(MODEL, ["rope_pairs"]).run(ids).save(tmp_path / "bad")
    assert run("verify", MODEL, tmp_path / "bad", "--budget", "float32", "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["guilty"] == ["model.layers.3.self_attn.o_proj"] and facts["ok"] is False
    assert facts["mistakes"][0]["name"] == "RoPE turns pairs (2i, 2i + 1), not halves"
    assert facts["budget"] == "float32" and facts["factor"] == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{trace}", "{trace}", "--budget", "float32"], "budget float32: want the model to compute"),
        (
            ["{trace}", "{trace}", "--budget", "/no/such"],
            "--budget: want exact, float32, bfloat16, float16, int8-activations, fp8-activations, q8_0, "
            "q4_k, int4, fp8, bfloat16-state, several joined by +, or the file of one that was saved, got "
            "'/no/such'",
        ),
        (["{trace}", "{trace}", "--write-budget", "/tmp/never.json"], "--write-budget: want --budget"),
        (["{trace}", "{trace}", "--factor", "2"], "--factor: want --budget float32"),
        (["{trace}", "{trace}", "--budget", "float32", "--factor", "0.5"], "argument --factor"),
        ([MODEL, "{trace}", "--budget", "float32", "--arithmetic", "locked"], "--arithmetic: want"),
        (["{trace}", "{trace}", "--junit", "/no/such/j.xml"], "want a file in a directory"),
        (["{trace}", "{trace}", "--plot", "/tmp/never.bmp"], "want a file name that ends in"),
        ([GOLDEN / "nextn.gguf", "{trace}"], "input_ids: ids: want 0 to 127"),
    ],
)
def test_bad_input_is_one_line(tmp_path, truth, capsys, arguments, message):
    truth.save(tmp_path / "t")
    assert run("verify", *(str(a).format(trace=tmp_path / "t") for a in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


# ---- the layout for other languages ----------------------------------------------------------


def test_a_trace_of_another_language(tmp_path, truth, oracle):
    """BF16, F16, I32, further axes: what a C++ or Rust program may write."""
    name, norm = "model.layers.0.input_layernorm", "model.layers.0.linear_attn.norm"
    wide = to_bfloat16(truth.tensors[name])
    metadata = {"format": "pyengine-trace-1", "order": json.dumps([name, norm, "model.layers.0.mlp.gate.2"])}
    with SafetensorsWriter(
        tmp_path / "t",
        [
            ("input_ids", "I32", (TOKENS,)),
            (name, "BF16", wide.shape),
            (norm, "F16", (TOKENS, 4, 32)),
            ("model.layers.0.mlp.gate.2", "U32", (TOKENS, 2)),
        ],
        metadata,
    ) as writer:
        writer.write("input_ids", truth.ids.astype(np.int32))
        writer.write(name, (wide.view(np.uint32) >> 16).astype(np.uint16))
        writer.write(norm, truth.tensors[norm].astype(np.float16))
        name = "model.layers.0.mlp.gate.2"
        writer.write(name, truth.tensors[name].astype("u4"))
    trace = Trace.load(tmp_path / "t")
    assert np.array_equal(trace.tensors["model.layers.0.input_layernorm"], wide)
    assert trace.tensors[norm].shape == (TOKENS, 128)
    assert oracle.verify(tmp_path / "t", "bfloat16").ok


@pytest.mark.parametrize(
    "dtype, field, change, message",
    [
        ("I8", "x", {}, "tensor x: want F32, .*, got I8"),
        ("F32", "x", {"names": "mine"}, "metadata names: want 'llama.cpp', .* or none, got 'mine'"),
    ],
)
def test_a_trace_with_a_fault(tmp_path, dtype, field, change, message):
    metadata = {"format": "pyengine-trace-1", "order": '["x"]'} | change
    with SafetensorsWriter(
        tmp_path / "t", [("input_ids", "I64", (1,)), ("x", dtype, (1, 1))], metadata
    ) as writer:
        writer.write("input_ids", np.zeros(1, np.int64))
        writer.write("x", np.zeros((1, 1), {"I8": np.int8, "F32": np.float32}[dtype]))
    with pytest.raises(FileFormatError, match=message):
        Trace.load(tmp_path / "t")


@pytest.mark.parametrize(
    "name",
    [
        "YaRN is left out",
        pytest.param(
            "YaRN is taken for linear scaling: every frequency is divided by the factor",
            marks=pytest.mark.slow,
        ),
        "YaRN's attention factor is left out",
        pytest.param("YaRN's attention factor is applied twice", marks=pytest.mark.slow),
    ],
)
def test_mistakes_in_yarn_are_named(name):
    oracle = Oracle(None, GOLDEN / "yarn.gguf")
    mistake = next(mistake for mistake in MISTAKES if mistake.name == name)
    ids = np.random.default_rng(1729).integers(0, 128, 24)
    bad, recorded = mistake.made(oracle.model), {}
    bad.forward(ids, record=lambda key, value: recorded.__setitem__(key, value.astype(np.float32)))
    verdict = oracle.verify(Trace(ids, recorded), "float32")
    assert verdict.first.name == "model.layers.0.self_attn.o_proj"
    assert name in [match.name for match in verdict.mistakes]


@pytest.mark.parametrize(
    "name",
    [
        "in_proj_qkvz is read as all queries, keys, values and z, not key head by key head",
        "in_proj_ba is read as all b and all a, not key head by key head",
        "b and a of in_proj_ba are exchanged",
        "A_log: the value heads are un-tiled twice",
        "grouped value heads are paired with key heads as if tiled (g mod n_k)",
    ],
)
@pytest.mark.parametrize("model", [pytest.param("next", marks=pytest.mark.slow), "legacy"])
def test_mistakes_in_qwen3next_are_named(model, name):
    oracle = Oracle(None, GOLDEN / f"{model}.gguf")
    mistake = next(mistake for mistake in MISTAKES if mistake.name == name)
    ids = np.random.default_rng(1729).integers(0, 128, 8)
    wrong = record_trace(mistake.made(oracle.model), ids)
    verdict = oracle.verify(wrong, "float32")
    layer = 0 if model == "next" else 1
    assert verdict.first.name == f"model.layers.{layer}.linear_attn.norm"
    assert name in [match.name for match in verdict.mistakes]


def test_mistakes_in_yarn_are_none_of_a_model_without_it(oracle):
    for mistake in MISTAKES:
        if mistake.name.startswith("YaRN"):
            made = mistake.made(oracle.model)
            assert made.inv_freq is oracle.model.inv_freq and made.rope_scale == 1
