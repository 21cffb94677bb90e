"""A data set on disk: what it holds, who can read it; a run that was ended continues to the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import pyengine
from pyengine.distill import parquet
from pyengine.distill.documents import Documents
from pyengine.distill.extract import Job, alone
from pyengine.distill.labels import Labeller, LabelOptions
from pyengine.distill.layout import DESCRIPTION, METADATA_KEY
from pyengine.distill.parquet import Place, read_rows
from pyengine.errors import FileFormatError, InputError

pytest.importorskip("tokenizers", reason="needs the extra text")
pytest.importorskip("jinja2", reason="needs the extra text")
pa = pytest.importorskip("pyarrow", reason="needs the extra distill")
pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra distill")
fs = pytest.importorskip("pyarrow.fs", reason="needs the extra distill")

pytestmark = pytest.mark.slow  # a run hashes the model and reads the documents: tens of them take a minute

TOP, SAMPLED = LabelOptions(top_k=5), LabelOptions(top_k=None, draws=7, proposal_temperature=1.2)
LINES = [{"text": f"And God said unto them {i}"} for i in range(6)] + [
    {
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am."}],
        "id": "talk",
    },
    {"text": "the end of all things and the beginning of the other ones"},
]


class Ended(BaseException):
    """As an interrupt: nothing of ours catches it."""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def prepare(model, source, tmp_path):
    def made(output=tmp_path / "out", options=TOP, layout="packed", part_tokens=20, context=8, **named):
        documents = Documents((str(source),), model, model.config.vocab_size, context, too_long="split")
        return Job.prepare(model, documents, options, layout, output=output, part_tokens=part_tokens, **named)

    return made


def contents(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---- what is there -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, layout",
    [(TOP, "packed"), (TOP, "lists"), (TOP, "distillkit"), (SAMPLED, "packed"), (SAMPLED, "lists")],
)
def test_rows_are_the_labels_of_the_documents(model, prepare, tmp_path, options, layout):
    job = prepare(options=options, layout=layout)
    assert job.run(model) == job.plan.tokens and len(job.plan.parts) > 2
    labeller, found = Labeller(model, options), list(read_rows(tmp_path / "out"))
    wanted = list(job.documents)
    assert len(found) == len(wanted) == job.plan.rows
    assert any(row.start for row in wanted) and any(not row.mask.all() for row in wanted)
    for row, want in zip(found, wanted):
        assert (row.document, row.start) == (want.document, want.start)
        np.testing.assert_array_equal(row.input_ids, want.ids)
        np.testing.assert_array_equal(row.assistant_masks, want.mask)
        labels = labeller.label(want.ids, want.document, want.start, want.following)
        for name in ("ids", "weights", "true_logprob", "logsumexp", "outside"):
            np.testing.assert_array_equal(getattr(row.labels, name), getattr(labels, name), name)
        there = labels.ids >= 0
        error = np.abs(row.labels.logprobs[there] - labels.logprobs[there])
        assert (error <= 2**-9 * np.abs(labels.logprobs[there]) + 2**-22).all()
        assert layout != "lists" or not error.any()


def test_the_description(model, prepare, tmp_path, gguf):
    job = prepare()
    job.run(model)
    said = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert said["complete"] is True and said["format"] == "pyengine-labels-1" and "token j + 1" in said["row"]
    assert said["labels"] == {"kind": "top-k", "k": 5} and said["arithmetic"] == "locked"
    assert said["temperature"] == 1.0 and len(said["tokenizer"]["digest"]) == 64
    assert said["input"]["tokens"] == sum(len(row.ids) for row in job.documents)
    names = sorted(path.name for path in (tmp_path / "out" / "data").glob("*.parquet"))
    assert names == [f"train-{i:05d}.parquet" for i in range(said["parts"])]
    for name in names:
        schema = pq.read_schema(tmp_path / "out" / "data" / name)
        assert json.loads(schema.metadata[METADATA_KEY.encode()]) | {"complete": True} == said


def test_the_model_digest_is_of_the_bytes(model, prepare, tmp_path, gguf):
    """A model with another byte somewhere is another model."""
    from pyengine.distill.plan import model_digest

    other = tmp_path / "other.gguf"
    data = bytearray(gguf.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    assert model_digest(pyengine.load(other).checkpoint) != model_digest(model.checkpoint)


def test_small_row_groups_and_a_page_index(model, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP_TOKENS", 10)
    prepare(part_tokens=10**6).run(model)
    with pq.ParquetFile(tmp_path / "out" / "data" / "train-00000.parquet") as file:
        assert file.num_row_groups > 3
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        assert all(group.column(c).has_offset_index for group in groups for c in range(group.num_columns))
        tokens = [
            sum(map(len, file.read_row_group(i).column("input_ids").to_pylist())) for i in range(len(groups))
        ]
    assert all(10 <= n < 10 + 8 for n in tokens[:-1])


def test_lists_are_read_as_they_are(model, prepare, tmp_path):
    """By pyarrow alone: row j holds the probabilities of what comes after token j."""
    prepare(layout="lists", options=LabelOptions(top_k=2048)).run(model)
    for row in pq.read_table(tmp_path / "out" / "data").to_pylist():
        ids = row["input_ids"]
        for j, (labels, logprobs) in enumerate(zip(row["label_ids"], row["label_logprobs"])):
            assert sum(map(np.exp, logprobs)) == pytest.approx(1, abs=1e-5) and row["outside"][j] == 0
            if j + 1 < len(ids):
                assert logprobs[labels.index(ids[j + 1])] == pytest.approx(row["true_logprob"][j], abs=1e-6)


def test_distillkit_has_its_configuration_beside_it(model, prepare, tmp_path):
    prepare(layout="distillkit").run(model)
    said = json.loads((tmp_path / "out" / "compression_config.yaml").read_text())
    assert said["k"] == 5 and said["d"] == 2048
    schema = pq.read_schema(tmp_path / "out" / "data" / "train-00000.parquet")
    assert str(schema.field("input_ids").type) == "list<element: uint64>"
    assert str(schema.field("compressed_logprobs").type) == "list<element: list<element: uint8>>"


def test_threads_change_no_byte(model, prepare, tmp_path, gguf):
    prepare().run(model)
    prepare(output=tmp_path / "other").run(pyengine.load(gguf, threads=1))
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_the_specification_labels_too(prepare, tmp_path, gguf):
    reference = pyengine.load(gguf, "float64")
    documents = Documents((str(tmp_path / "source.jsonl"),), reference, 2048, 1024)
    job = Job.prepare(reference, documents, TOP, output=tmp_path / "out")
    job.run(reference)
    assert job.description["arithmetic"] == "float64"
    assert len(list(read_rows(tmp_path / "out"))) == len(LINES)


def test_datasets_reads_it(model, prepare, tmp_path):
    datasets = pytest.importorskip("datasets", reason="not installed")
    prepare(layout="lists").run(model)
    for files in (
        {"path": str(tmp_path / "out")},
        {"path": "parquet", "data_files": str(tmp_path / "out" / "data" / "*.parquet")},
    ):
        found = datasets.load_dataset(**files, split="train", cache_dir=str(tmp_path / "cache"))
        assert found[0]["input_ids"] == next(read_rows(tmp_path / "out")).input_ids.tolist()
        assert len(found) == len(list(read_rows(tmp_path / "out")))


# ---- ended and continued -----------------------------------------------------------------------


def ended_after(model, rows):
    """A labeller that ends the run when it is asked for one more sequence."""

    class Ending(Labeller):
        def label_many(self, sequences):
            nonlocal rows
            for labels in super().label_many(sequences):
                if rows == 0:
                    raise Ended
                rows -= 1
                yield labels

    return Ending


def test_ended_after_any_row(model, prepare, tmp_path, monkeypatch):
    job = prepare()
    job.run(model)
    want, rows = contents(tmp_path / "out"), job.plan.rows
    for count in range(rows):
        shutil.rmtree(tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr("pyengine.distill.extract.Labeller", ended_after(model, count))
            with pytest.raises(Ended):
                prepare().run(model)
        left = contents(tmp_path / "out")
        assert json.loads(left["labels.json"]).get("complete") is None
        assert all(data == want[name] for name, data in left.items() if name.endswith(".parquet"))
        lost = prepare().run(model)
        assert contents(tmp_path / "out") == want, count
        assert lost == sum(len(row.ids) for row in list(job.documents)[count:])  # nothing is computed twice


def test_half_a_row_in_the_journal(model, prepare, tmp_path, monkeypatch):
    prepare(part_tokens=10**6).run(model)
    want = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("pyengine.distill.extract.Labeller", ended_after(model, 3))
    with pytest.raises(Ended):
        prepare(part_tokens=10**6).run(model)
    monkeypatch.undo()
    journal = tmp_path / "out" / ".train-00000.rows"
    data = journal.read_bytes()
    for length in [*range(0, len(data), 397), len(data) - 1]:
        (tmp_path / "out" / "data" / "train-00000.parquet").unlink(missing_ok=True)
        journal.write_bytes(data[:length])
        prepare(part_tokens=10**6).run(model)
        assert contents(tmp_path / "out") == want, length


def test_ended_while_a_part_is_written(model, prepare, tmp_path, monkeypatch):
    prepare().run(model)
    want = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    def ends(batches):
        yield next(groups(batches))
        raise Ended

    groups = parquet._groups
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_groups", ends)
        with pytest.raises(Ended):
            prepare().run(model)
    assert not list((tmp_path / "out" / "data").glob("*"))
    (tmp_path / "out" / "data" / "train-00001.parquet.partial").write_bytes(b"of a run that was killed")
    prepare().run(model)
    assert contents(tmp_path / "out") == want


def test_a_part_that_was_lost(model, prepare, tmp_path):
    prepare().run(model)
    want = contents(tmp_path / "out")
    (tmp_path / "out" / "data" / "train-00001.parquet").unlink()
    assert prepare().run(model) == prepare().plan.parts[1].tokens
    assert contents(tmp_path / "out") == want


def test_killed(gguf, tmp_path):
    """The command, killed by the system again and again."""
    text = "And it came to pass in those days, that there went out a decree. "
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": text * 8 + str(i)}) + "\n" for i in range(150))
    )

    def command(output):
        words = "labels -m {} -f {} -o {} -k 9 --part-tokens 3000 -t 1"
        arguments = words.format(gguf, tmp_path / "in.jsonl", output).split()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(
            [sys.executable, "-m", "pyengine", *arguments], env=environment, stdout=subprocess.PIPE
        )

    def written():
        return {path: path.stat().st_size for path in (tmp_path / "out").rglob("*.rows") if path.exists()}

    finished = command(tmp_path / "want")
    finished.communicate(timeout=300)
    assert finished.returncode == 0
    kills = 0
    while kills < 60:
        before, running = written(), command(tmp_path / "out")
        while running.poll() is None and written() == before:
            time.sleep(0.01)
        time.sleep(0.03 * (kills % 10))
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
        if running.returncode == 0:
            break
        assert running.returncode == -signal.SIGKILL
        kills += 1
    else:
        running = command(tmp_path / "out")
        running.communicate(timeout=300)
        assert running.returncode == 0
    assert kills > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


# ---- another data set is there -----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"options": LabelOptions(top_k=4)}, "labels.k: want 4, as asked for, got 5"),
        ({"options": SAMPLED}, "labels.kind: want 'sample', as asked for, got 'top-k'"),
        ({"options": LabelOptions(top_k=5, temperature=2.0)}, "temperature: want 2.0, as asked for, got 1.0"),
        ({"layout": "lists"}, "layout.name: want 'lists', as asked for, got 'packed'"),
        ({"fraction_bits": 9}, "layout.fraction_bits: want 9, as asked for, got 8"),
        ({"part_tokens": 21}, "part_tokens: want 21, as asked for, got 20"),
        ({"context": 9}, "input.digest: want "),
    ],
)
def test_the_directory_of_another_run(model, prepare, tmp_path, changes, message):
    prepare().run(model)
    before = contents(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        prepare(**changes)
    assert str(caught.value).startswith(f"{tmp_path}/out/labels.json: {message}")
    assert contents(tmp_path / "out") == before


def test_the_directory_of_another_model(model, prepare, tmp_path):
    prepare().run(model)
    path = tmp_path / "out" / "labels.json"
    said = json.loads(path.read_text())
    said["model"]["digest"] = "0" * 64
    path.write_text(json.dumps(said))
    with pytest.raises(InputError, match="labels.json: model.digest: want '.*', as asked for, got '000"):
        prepare()


def test_other_places_that_are_refused(model, prepare, tmp_path):
    for name, data, error, message in [
        (
            "notes.txt",
            "mine",
            InputError,
            "want a new directory, or one with a labels.json of an earlier run",
        ),
        ("labels.json", "{", FileFormatError, "labels.json: file: want JSON"),
        (
            "labels.json",
            '{"format": "x"}',
            FileFormatError,
            "labels.json: format: want 'pyengine-labels-1', got 'x'",
        ),
        ("labels.json", "[1]", FileFormatError, "labels.json: format: want 'pyengine-labels-1', got \\[1\\]"),
    ]:
        directory = tmp_path / "theirs"
        directory.mkdir()
        (directory / name).write_text(data)
        with pytest.raises(error, match=message):
            prepare(output=directory)
        assert contents(directory) == {name: data.encode()}
        shutil.rmtree(directory)
    with pytest.raises(InputError, match="want a URI that pyarrow can open"):
        prepare(output="nowhere://there")
    (tmp_path / "file").write_text("mine")
    with pytest.raises((InputError, OSError)):
        prepare(output=tmp_path / "file").run(model)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(InputError, match="want a data set of labels, got no labels.json"):
        list(read_rows(tmp_path / "none"))


def test_a_fault_is_found_before_anything_is_written(model, prepare, source, tmp_path):
    source.write_text(source.read_text() + '{"text": ""}\n')
    with pytest.raises(InputError, match="source.jsonl:9: want at least one token"):
        prepare()
    assert not (tmp_path / "out").exists()


def test_an_input_that_changes_meanwhile(model, prepare, source):
    job = prepare()
    source.write_text(json.dumps(LINES[0]) + "\n")
    with pytest.raises(InputError, match="input: want the documents that were there at the start"):
        job.run(model)


def test_another_run_that_writes_there(model, prepare, tmp_path):
    job = prepare()
    job.begin()
    with alone(job.place), pytest.raises(InputError, match="out: want one run at a time, got another"):
        prepare().run(model)
    prepare().run(model)


def test_no_documents(prepare, source):
    source.write_text("\n")
    with pytest.raises(InputError, match="want at least one document with a token, got none"):
        prepare()


def test_a_part_with_other_columns(model, prepare, tmp_path):
    prepare().run(model)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "out" / "data" / "train-00001.parquet")
    with pytest.raises(FileFormatError, match="train-00001.parquet: rows: want those of labels.json"):
        list(read_rows(tmp_path / "out"))


# ---- other file systems ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uri", "subtree", "memory"])
def test_through_a_filesystem(model, prepare, tmp_path, kind):
    """An object store is one more of pyarrow's filesystems; in memory nothing of this machine's is used."""
    prepare().run(model)
    if kind == "uri":
        place = {"output": f"file://{tmp_path}/other"}
    elif kind == "subtree":
        place = {"output": "other", "filesystem": fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())}
    else:
        place = {"output": "bucket/other", "filesystem": fs._MockFileSystem()}
    prepare(**place).run(model)
    where = Place.open(place["output"], place.get("filesystem"))
    assert {name: where.read(name) for name in (DESCRIPTION, *where.parts())} == contents(tmp_path / "out")
    assert prepare(**place).run(model) == 0
    rows = [row.document for row in read_rows(place["output"], place.get("filesystem"))]
    assert rows == [row.document for row in read_rows(tmp_path / "out")]
