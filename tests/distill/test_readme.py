"""The commands and the code of pyengine/distill/README.md, as they stand there, with the embedded model."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from vocabularies import tokenizer_of

from pyengine import distill
from pyengine.cli import main

pytest.importorskip("tokenizers", reason="needs the extra text")
pytest.importorskip("jinja2", reason="needs the extra text")
pytest.importorskip("pyarrow", reason="needs the extra distill")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of Ray's own code
]

README = (Path(distill.__file__).parent / "README.md").read_text()
VERSES = (
    "In the beginning God created the heaven and the earth.\n\nAnd the earth was without form, and void.\n"
)


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture
def folder(tmp_path, gguf, monkeypatch):
    """As the reader's: a folder of text and a GGUF."""
    (tmp_path / "teacher.gguf").symlink_to(gguf)
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "genesis.txt").write_text(VERSES * 40)  # longer than the context
    (tmp_path / "texts" / "more" / "note.md").write_text(VERSES)
    (json_block,) = blocks("json")
    (tmp_path / "texts" / "talks.jsonl").write_text(json_block)
    (tmp_path / "student").mkdir()
    student = tokenizer_of(["th", "the", " t", " th", "an", "and"], ["<|im_end|>"])
    student.write_tokenizer_json(tmp_path / "student" / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme(folder, capsys):
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pyengine")]
    assert len(commands) == 9
    for command in commands:
        if "--ray" in command:
            pytest.importorskip("ray", reason="needs the extra ray")
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        words = shlex.split(command)
        assert main(words[1:]) == 0, capsys.readouterr().err
        if words[1] != "labels":
            assert capsys.readouterr().out.startswith(
                ("teacher  teacher.gguf, 2,048 ids", "labels-student: ")
            )
            continue
        directory = words[words.index("-o") + 1]
        assert capsys.readouterr().out.startswith(f"{directory}: 5 documents, ")
        assert (folder / directory / "data" / "train-00000.parquet").exists()
    same = [(folder / d / "data" / "train-00000.parquet").read_bytes() for d in ("labels", "labels-ray")]
    assert same[0] == same[1]
    for code in blocks("python"):
        if "torch" in code:
            pytest.importorskip("torch", reason="needs the extra train")
        exec(compile(code, "README.md", "exec"), {})


def test_what_the_readme_says_of_the_rows(folder):
    from pyengine.distill.parquet import read_rows

    assert main(shlex.split("labels -m teacher.gguf -f texts -o labels --too-long split")) == 0
    rows = list(read_rows("labels"))
    names = [(row.document, row.start) for row in rows]
    assert names[-3:] == [("talks.jsonl:1", 0), ("talks.jsonl:2", 0), ("talks.jsonl:3", 0)]
    assert ("genesis.txt", 0) in names and ("genesis.txt", 1024) in names and ("more/note.md", 0) in names
    for row in rows:
        labels = row.labels
        assert labels.ids.shape == labels.logprobs.shape == (len(row.input_ids), 50)
        assert labels.ids.dtype == np.int32 and labels.logprobs.dtype == np.float32
        mass = np.exp(labels.logprobs.astype(np.float64)).sum(axis=1) + labels.outside
        assert np.abs(mass - 1).max() < 0.01  # log-probabilities are rounded
        for j, following in enumerate(row.input_ids[1:]):
            place = np.flatnonzero(labels.ids[j] == following)
            if place.size:
                assert labels.logprobs[j, place[0]] == pytest.approx(
                    labels.true_logprob[j], rel=1 / 512, abs=1e-6
                )
    assert np.isnan(rows[-1].labels.true_logprob[-1])
