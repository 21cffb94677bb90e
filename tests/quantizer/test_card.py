"""`quantize --card`: a model card of each checkpoint, its figures, what is refused, a killed run."""

import json
import re
import shutil

import numpy as np
import pytest
from calibrating import calibrate
from paths import GOLDEN

from pyengine.checkpoint import provenance
from pyengine.cli import main
from pyengine.quantizer import quality
from pyengine.quantizer.cost import measure
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.verify_files import check_files

MODEL = GOLDEN / "nextn.gguf"
IDS = np.random.default_rng(1729).integers(0, 100, 96)
TEXT = ["-c", "24", "--chunks", "2", "-t", "1"]


@pytest.fixture
def ids(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, IDS)
    return ["--ids-file", str(path), *TEXT]


def run(tmp_path, *given, kinds=("int4",), source=MODEL):
    """`quantize` of these kinds to tmp_path -> exit code"""
    destinations = [word for kind in kinds for word in (f"--{kind}", str(tmp_path / kind))]
    return main(["quantize", str(source), *destinations, *map(str, given)])


def tree(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- what is written -------------------------------------------------------------------------


def test_each_directory_gets_a_card_of_its_own(tmp_path, capsys, ids):
    """Both of one measurement, and each what `quality --card` writes."""
    kinds = ("int8", "int4", "mixed")
    assert run(tmp_path, "--card", *ids, "--license", "mit", "--base-model", "a/b", kinds=kinds) == 0
    out, err = capsys.readouterr()
    assert not err and [line for line in out.splitlines() if "README" in line] == [
        f"{tmp_path / kind / 'README.md'}: written" for kind in kinds
    ]
    for kind in kinds:
        made = (tmp_path / kind / "README.md").read_text()
        assert made.startswith('---\nlicense: "mit"\nbase_model: "a/b"\n')
        assert f"# {kind}" in made and f'from_pretrained("{kind}", trust_remote_code=True)' in made
        others = [other for other in kinds if other != kind]
        assert not any(f"| {other} |" in made for other in others)
        again = ["quality", str(tmp_path / kind), "--source", str(MODEL), *ids]
        again += ["--card", str(tmp_path / "card.md"), "--license", "mit", "--base-model", "a/b", "--json"]
        assert main(again) == 0
        assert (tmp_path / "card.md").read_text() == made
        (figures,) = json.loads(capsys.readouterr().out)["candidates"]
        assert f"{figures['texts'][0]['kld']['value']:.2e}" in made
        result = check_files(tmp_path / kind)
        assert not result.faults and str(tmp_path / kind / "README.md") in result.not_checked


def test_without_a_text_it_has_the_weights_figures(tmp_path, capsys):
    assert run(tmp_path, "--card") == 0
    made = (tmp_path / "int4" / "README.md").read_text()
    measured = quality.measure(tmp_path / "int4", MODEL)
    for word in (
        "Base model: nextn",
        "Licence: not stated",
        f"{measured.quantized.relative_error:.2e}",
        f"{measured.quantized.snr_db:.1f} dB",
        "not measured on a text",
        "### The error by layer",
        *(
            f"| {layer.name.removeprefix('model.')} | {layer.relative_error:.3e} |"
            for layer in measured.layers
        ),
    ):
        assert word in made, word
    assert "perplexity" not in made and "q_proj" not in made
    capsys.readouterr()
    command = ["quality", str(tmp_path / "int4"), "--source", str(MODEL), "--card", str(tmp_path / "card.md")]
    assert main(command) == 0
    assert (tmp_path / "card.md").read_text() == made and "worst group" in capsys.readouterr().out


@pytest.mark.parametrize("inside", [True, False])
def test_a_file_of_ones_own(tmp_path, inside):
    """In the directory that is still to be made, or elsewhere; as one page."""
    path = tmp_path / "int4" / "card.html" if inside else tmp_path / "card.HTML"
    assert run(tmp_path, "--card", path) == 0
    made = path.read_text()
    assert made.startswith("<!DOCTYPE html>") and "<h2>The error by layer</h2>" in made
    assert not re.search(r"https?:|src=|href=", made)
    assert not (tmp_path / "int4" / "README.md").exists()


@pytest.mark.slow
def test_a_scaled_checkpoint_on_a_text(tmp_path, ids):
    stats = calibrate("nextn", tmp_path / "stats.gguf", 120, 90)
    assert run(tmp_path, "--calibration", stats, "--scale", "awq", "--card", *ids) == 0
    made = (tmp_path / "int4" / "README.md").read_text()
    assert "Method: awq: " in made and "Calibrated on: 0.txt (sha256 " in made and "routing term" in made


# ---- what is refused, before anything is written ---------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        (["--card", "card.txt"], "card.txt: want a file name that ends in .md or .html"),
        (["--card", "/no/such/card.md"], "want a file in a directory that exists"),
        (["--card", "IDS", "-c", "4096"], "want at least 8192 tokens"),
        (["--card", "-f", "/no/such.txt"], "tokenizer.ggml.model: want str, got no such key"),
        (["--card", "--scale", "awq", "--calibration", "x"], "--card: want -f TEXT with --scale awq"),
        (["--card", "IDS", "--group-size", "64"], "--group-size: want 128"),
        (["--card", "IDS", "-f", "x"], "--ids-file: want it without -f"),
        (["--card", "--chunks", "2"], "--chunks: want -f TEXT"),
        (["-f", "x"], "-f: want --card"),
        (["IDS"], "--ids-file: want --card"),
        (["--license", "mit"], "--license: want --card"),
        (["--card", "--export", "compressed-tensors"], "--card: want it without --export"),
    ],
)
def test_what_is_refused(tmp_path, capsys, ids, given, message):
    source = MODEL
    if "--export" in given:
        source = tmp_path / "made"
        quantize(MODEL, int4=source)
    before = sorted(tmp_path.rglob("*"))
    given = [word for one in given for word in (ids[:2] if one == "IDS" else [one])]
    assert run(tmp_path, *given, source=source) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert sorted(tmp_path.rglob("*")) == before


def test_one_file_is_of_one_directory(tmp_path, capsys):
    assert run(tmp_path, "--card", tmp_path / "card.md", kinds=("int8", "int4")) == 2
    assert "want one directory, of which it is the card, got 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- a killed run ----------------------------------------------------------------------------


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_a_run_that_was_killed_while_it_measured_continues(tmp_path, capsys, monkeypatch, ids):
    kinds = ("int8", "mixed")
    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure", interrupted)
        assert run(tmp_path, "--card", *ids, kinds=kinds) == 130
    assert not list(tmp_path.rglob("README.md"))
    shutil.rmtree(tmp_path / "mixed")  # as of a run that was killed between the two
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "int8").iterdir()}
    capsys.readouterr()
    assert run(tmp_path, "--card", *ids, kinds=kinds) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'int8'}: written before\n" in out and f"{tmp_path / 'mixed'}: written\n" in out
    (tmp_path / "whole").mkdir()
    assert run(tmp_path / "whole", "--card", *ids, kinds=kinds) == 0
    for kind in kinds:
        assert tree(tmp_path / kind) == tree(tmp_path / "whole" / kind)
    assert kept == {name: (tmp_path / "int8" / name).stat().st_mtime_ns for name in kept}
    capsys.readouterr()
    assert run(tmp_path, "--card", *ids, kinds=kinds) == 2  # it is complete: nothing is left to do
    assert "README.md: want a card that does not exist yet" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["scale", "source", "mix", "no provenance", "no card"])
def test_another_directory_is_not_taken_for_an_earlier_run(tmp_path, capsys, other):
    how = {"scale": "mse"} if other == "scale" else {"mix": "*=int8"} if other == "mix" else {}
    quantize(GOLDEN / "next.gguf" if other == "source" else MODEL, mixed=tmp_path / "mixed", **how)
    if other == "no provenance":
        (tmp_path / "mixed" / provenance.FILE_NAME).unlink()
    before = tree(tmp_path / "mixed")
    assert run(tmp_path, *["--card"] * (other != "no card"), kinds=("mixed",)) == 2
    assert "mixed: want a directory that does not exist yet, got one that does" in capsys.readouterr().err
    assert tree(tmp_path / "mixed") == before
