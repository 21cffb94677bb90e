"""The commands vocabulary and relabel."""

import json

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from vocabularies import tokenizer_of

from pyengine.cli import main
from pyengine.demo import CHECKPOINT
from pyengine.distill.vocabulary import VocabularyMap, open_vocabulary

TEXT = "In the beginning God created the heaven and the earth.\nAnd the earth was without form, and void.\n"


@pytest.fixture
def student(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer_of(["th", "the", " t", " th", "an", "and", "in", "ea"], ["</s>"]).write_tokenizer_json(path)
    return str(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run(capsys, *arguments):
    code = main(list(map(str, arguments)))
    return code, capsys.readouterr()


def test_vocabulary(capsys, student, text):
    code, out = run(capsys, "vocabulary", CHECKPOINT, student, "-f", text, "--json")
    found = json.loads(out.out)
    assert code == 0 and found["teacher"] == {"name": "default.gguf", "ids": 2048}
    vocabularies = VocabularyMap(open_vocabulary(CHECKPOINT), open_vocabulary(student))
    assert found["ids"] == vocabularies.counts and sum(found["ids"].values()) == 2048
    rows = found["text"]["rows"]
    assert sum(rows.values()) == found["text"]["student_tokens"] and rows["placed"] > 0
    assert sum(found["text"]["kinds"].values()) == found["text"]["teacher_tokens"]
    code, out = run(capsys, "vocabulary", CHECKPOINT, student, "-f", text)
    assert code == 0 and ["exact", f"{found['ids']['exact']:,}"] == out.out.splitlines()[4].split()[:2]
    assert "two vocabularies: " in out.out and f"rows with labels: {rows['placed']:,} (" in out.out


def test_probabilities(capsys, student, text):
    code, out = run(
        capsys, "vocabulary", CHECKPOINT, student, "-f", text, "--probabilities", "-n", "20", "--json"
    )
    found = json.loads(out.out)["text"]["probabilities"]
    assert code == 0 and abs(sum(found.values()) - 1) < 1e-9
    import pyengine

    ids = open_vocabulary(CHECKPOINT).encode(TEXT)[:20]
    logits = pyengine.load(CHECKPOINT).forward(ids).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    vocabularies = VocabularyMap(open_vocabulary(CHECKPOINT), open_vocabulary(student))
    assert abs(p[:, vocabularies.kinds == 0].sum() / 20 - found["exact"]) < 1e-9


def test_pairs(capsys, student):
    code, out = run(capsys, "vocabulary", CHECKPOINT, student, "--pair", "<|im_end|>=</s>", "--json")
    _, plain = run(capsys, "vocabulary", CHECKPOINT, student, "--json")
    found, before = json.loads(out.out)["ids"], json.loads(plain.out)["ids"]
    assert code == 0 and (found["exact"], found["lost"]) == (before["exact"] + 1, before["lost"] - 1)


def test_one_vocabulary(capsys):
    code, out = run(capsys, "vocabulary", CHECKPOINT, CHECKPOINT)
    assert (
        code == 0 and "sizes of one vocabulary: 2,048 ids mean the same, 0 of the student's do not" in out.out
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["S", "T"], "student: want no more than the teacher's 265 tokens, got 2,048, of which "),
        (["T", "S", "--probabilities"], "--probabilities: want -f TEXT, which the teacher reads"),
        (["T", "S", "--pair", "a"], "--pair: want T=S, got 'a'"),
        (["T", "S", "--pair", "and if=</s>"], "--pair: want one token of the teacher, got "),
        (["T", "S", "--student-size", "9"], "student_size: want at least the tokenizer's 265 ids, got 9"),
        (["T", "nowhere.gguf"], "nowhere.gguf: want a GGUF file or a checkpoint directory, got no such path"),
        (["T", "nowhere.json"], "nowhere.json: file: want a file that can be read, got: No such file"),
    ],
)
def test_bad_input(capsys, student, arguments, message):
    names = {"S": student, "T": str(CHECKPOINT)}
    code, out = run(capsys, "vocabulary", *(names.get(a, a) for a in arguments))
    assert (
        code == 2 and not out.out and out.err.startswith(f"pyengine: {message}") and out.err.count("\n") == 1
    )


def test_an_empty_text(capsys, student, tmp_path):
    (tmp_path / "empty").touch()
    code, out = run(capsys, "vocabulary", CHECKPOINT, student, "-f", tmp_path / "empty")
    assert code == 2 and out.err.endswith("empty: want a text, got an empty one\n")


# ---- relabel -----------------------------------------------------------------------------------------


@pytest.fixture
def relabel(capsys, student, text, tmp_path):
    """relabel(*more) of the labels of the text, in files of a row of 12 tokens."""
    pytest.importorskip("pyarrow")
    arguments = ["-f", text, "-o", tmp_path / "labels", "-k", "20", "--part-tokens", "12", "-c", "12"]
    code, out = run(capsys, "labels", "-m", CHECKPOINT, *arguments, "--too-long", "split")
    assert code == 0, out.err

    def call(*more, source="labels", output="new", teacher=CHECKPOINT, to=student):
        places = [tmp_path / source, "-m", teacher, "--student", to, "-o", tmp_path / output]
        return run(capsys, "relabel", *places, *more)

    return call


@pytest.mark.slow
def test_relabel(relabel, student, tmp_path):
    from pyengine.distill.alignment import align
    from pyengine.distill.parquet import read_rows

    code, out = relabel()
    assert code == 0 and out.out.startswith(f"{tmp_path / 'new'}: "), out.err
    vocabularies = VocabularyMap(open_vocabulary(CHECKPOINT), open_vocabulary(student))
    sources, rows = list(read_rows(tmp_path / "labels")), list(read_rows(tmp_path / "new"))
    assert len(sources) == len(rows) > 1
    start = 0
    for source, row in zip(sources, rows):
        alignment = align(source.input_ids, vocabularies)
        assert row.input_ids.tolist() == alignment.student_ids.tolist() and row.document == source.document
        assert row.start == start and row.assistant_masks.all()
        start += len(row.input_ids)
        labelled = row.labels.ids[:, 0] >= 0
        assert labelled.tolist() == (alignment.rows >= 0).tolist() and labelled.any()
        p = np.exp(row.labels.logprobs[labelled].astype(np.float64)).sum(1) + row.labels.outside[labelled]
        assert np.abs(p - 1).max() < 0.01  # log-probabilities of the source have 8 bits of fraction
    assert vocabularies.student.decode([i for row in rows for i in row.input_ids]) == TEXT
    said = json.loads((tmp_path / "new" / "labels.json").read_text())
    assert said["complete"] and said["student"]["vocab_size"] == 265 and said["layout"]["name"] == "lists"


@pytest.mark.slow
def test_relabelling_continues(relabel, tmp_path):
    relabel()
    folder = tmp_path / "new"
    names = sorted(f"data/{path.name}" for path in (folder / "data").glob("*.parquet"))
    assert len(names) > 2
    whole = {name: (folder / name).read_bytes() for name in [*names, "labels.json"]}
    (folder / names[1]).unlink()
    description = json.loads(whole["labels.json"]) | {"complete": False}
    (folder / "labels.json").write_text(json.dumps(description))
    code, _ = relabel()
    assert code == 0 and {name: (folder / name).read_bytes() for name in whole} == whole
    code, out = relabel()
    assert code == 0 and out.out.endswith("new: complete already\n")


@pytest.mark.slow
def test_relabel_bad_input(relabel, tmp_path, student):
    code, out = relabel(source="nothing")
    assert code == 2 and "want a data set of labels, got no labels.json" in out.err
    code, out = relabel(teacher=student)
    assert code == 2 and "labels.json: model.vocab_size: want the teacher's 265, got 2,048" in out.err
    assert relabel()[0] == 0
    code, out = relabel(source="new", output="again")
    assert code == 2 and "want the labels of the teacher's vocabulary, got those of a student's" in out.err
    code, out = relabel("--pair", "<|im_end|>=</s>")
    assert (
        code == 2 and "labels.json: student." in out.err and "the directory has another data set" in out.err
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    code, out = relabel(output="full")
    assert code == 2 and "full: want a new directory, got one with a" in out.err
    description = json.loads((tmp_path / "labels" / "labels.json").read_text())
    (tmp_path / "labels" / "labels.json").write_text(json.dumps(description | {"complete": False}))
    code, out = relabel(output="more")
    assert code == 2 and "want a complete data set" in out.err and not (tmp_path / "more").exists()
