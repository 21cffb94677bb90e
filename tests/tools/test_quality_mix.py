"""tools/bench/quality_mix.py: the search on a small model."""

import re

import pytest
import quality_mix
from paths import GOLDEN

import pyengine
from pyengine.evaluation import perplexity
from pyengine.quantizer.cost import compare
from pyengine.quantizer.mix import Mix
from pyengine.quantizer.quantize import quantize

MODEL = GOLDEN / "pattern31.gguf"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("a b c " * 60)
    return path


def run(capsys, text, *given):
    common = ["-f", str(text), "-c", "32", "--chunks", "2", "-t", "1", "--scale", "absmax"]
    assert quality_mix.main([str(MODEL), *common, *given]) == 0
    return capsys.readouterr().out


def rows_of(out):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"]
    return [(what, int(nbytes.replace(",", "")), float(kld.split()[0])) for what, nbytes, kld, _ in rows[2:]]


@pytest.mark.slow
def test_the_mix_that_is_named_has_the_goal_and_the_bytes(capsys, text, tmp_path):
    none = run(capsys, text, "--same", "0")
    assert "INT4 alone" in none
    (first,) = rows_of(none)
    goal = first[2] / 3
    out = run(capsys, text, "--same", "0", "--kld", f"{goal:g}")
    (mix,) = re.findall(r"--mix '(.*)'", out)
    rows = rows_of(out)
    assert rows[0] == first and len(rows) > 1
    nbytes = int(re.search(r"([\d,]+) bytes", out)[1].replace(",", ""))
    assert nbytes == rows[-1][1] == min(row[1] for row in rows if row[2] <= goal)
    quantize(MODEL, mixed=tmp_path / "mixed", mix=mix)
    base, model = (pyengine.load(path, threads=1) for path in (MODEL, tmp_path / "mixed"))
    assert model.checkpoint.summary.weight_bytes == nbytes
    ids = perplexity.text_ids(base.checkpoint, perplexity.read_text(text))
    chunks = perplexity.as_chunks(ids, 32, 2)
    (scores,) = compare.divergences(base, [model], chunks, perplexity.bos_id(base.checkpoint))
    assert f"{scores.kld.mean():.2e}" == f"{rows[-1][2]:.2e}" and scores.kld.mean() <= goal


@pytest.mark.slow
def test_quantizing_anew_gives_the_same_where_rounding_sees_nothing_else(capsys, text, tmp_path):
    quantize(MODEL, tmp_path / "int8", tmp_path / "int4")
    goal = ["--same", "0", "--kld", f"{rows_of(run(capsys, text, '--same', '0'))[0][2] / 2:g}"]
    want = run(capsys, text, *goal)
    assert run(capsys, text, *goal, "--from", str(tmp_path / "int8"), str(tmp_path / "int4")) == want
    assert run(capsys, text, *goal, "--anew") == want


@pytest.mark.slow
def test_a_goal_out_of_reach_is_said(capsys, text):
    out = run(capsys, text, "--same", "0", "--kld", "1e-12", "--rank-on", str(text))
    assert "not reached" in out and "--mix" not in out


def test_a_part_of_every_layer_is_one_pattern():
    every = [f"*.layers.{i}.{part}" for i in range(3) for part in ("mlp.gate", "mlp.experts.down_proj")]
    chosen = [every[0], every[2], every[4], every[3]]
    assert quality_mix.as_list(chosen, every) == "*.mlp.gate=int8,*.layers.1.mlp.experts.down_proj=int8"
    assert Mix.parse(quality_mix.as_list(chosen, every)).bits_of("model.layers.2.mlp.gate.weight") == 8


def test_bad_input_is_one_line(capsys, text):
    assert quality_mix.main(["/no/such.gguf", "-f", str(text)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("quality_mix: ") and err.count("\n") == 1
