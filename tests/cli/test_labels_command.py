"""pyengine labels: options that contradict each other, and what needs a package."""

import sys

import pytest

from pyengine.cli import main
from pyengine.demo import CHECKPOINT

MODEL = str(CHECKPOINT)


def failure(capsys, *arguments):
    assert main(["labels", "-m", MODEL, *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pyengine: ") and err.count("\n") == 1
    return err.removeprefix("pyengine: ").rstrip()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--workers", "2"], "--workers: want it with --ray"),
        (["--proposal-temperature", "2"], "--proposal-temperature: want it with --sample"),
        (["-k", "3", "--sample", "4"], "argument --sample: not allowed with argument -k/--top-k (see "),
        (["--layout", "csv"], "argument --layout: invalid choice: 'csv'"),
        (["--fraction-bits", "11"], "argument --fraction-bits: invalid choice: "),
    ],
)
def test_options_that_are_refused(capsys, tmp_path, options, message):
    (tmp_path / "a.txt").write_text("a")
    assert failure(capsys, "-f", tmp_path / "a.txt", "-o", tmp_path / "out", *options).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["-k", "2049"], "top_k: want at most 2048, the vocabulary's size, got 2049"),
        (["--sample", "3", "--layout", "distillkit"], "layout: want top-k labels with distillkit"),
        (["--temperature", "0"], "temperature: want a number from 1e-06 to 1000000.0, got 0.0"),
        (["-c", "1"], "{}/a.txt: want at most 1 tokens, the context, got 4 (--too-long split or truncate)"),
        (["-f", "{}/none"], "{}/none: want a file or a folder"),
        (
            ["-f", "{}/empty.txt"],
            "{}/empty.txt: want at least one token, got none (--empty skip leaves it out)",
        ),
    ],
)
def test_inputs_that_are_refused(capsys, tmp_path, options, message):
    pytest.importorskip("pyarrow", reason="needs the extra distill")
    pytest.importorskip("tokenizers", reason="needs the extra text")
    (tmp_path / "a.txt").write_text("In the beginning")
    (tmp_path / "empty.txt").write_text("")
    options = [option.format(tmp_path) for option in options]
    found = failure(capsys, "-f", tmp_path / "a.txt", "-o", tmp_path / "out", *options)
    assert found.startswith(message.format(tmp_path))
    assert not (tmp_path / "out").exists()


def test_without_pyarrow(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.fs", None)
    (tmp_path / "a.txt").write_text("In the beginning")
    found = failure(capsys, "-f", tmp_path / "a.txt", "-o", tmp_path / "out")
    assert found == "labels: want the package pyarrow: pip install 'pyengine-lm[distill]'"
