"""Documents from text files, JSON lines and Parquet; what is refused, in one line."""

import json

import numpy as np
import pytest

from pyengine.distill.documents import Documents
from pyengine.errors import InputError

pytest.importorskip("tokenizers", reason="needs the extra text")
pytest.importorskip("jinja2", reason="needs the extra text")

FIELDS = "want messages, conversations, prompt and completion, or text (token ids: --ids), got the fields"


@pytest.fixture
def documents(model, tmp_path):
    def made(*paths, context=1024, **options):
        paths = tuple(str(p) for p in paths or (tmp_path,))
        return Documents(paths, model, model.config.vocab_size, context, **options).check()

    return made


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = records[0] if isinstance(records[0], str) else "\n".join(json.dumps(r) for r in records) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def names(rows):
    return [(row.document, row.start) for row in rows]


def test_a_folder(documents, tmp_path, model):
    write(tmp_path / "b.txt", "And God said")
    write(tmp_path / "a" / "z.md", "the end")
    write(tmp_path / "c.jsonl", {"text": "one"}, {"text": "two", "id": "second"}, {"text": "three", "id": 3})
    write(tmp_path / "ignored.csv", "no")
    rows = list(documents())
    assert names(rows) == [("a/z.md", 0), ("b.txt", 0), ("c.jsonl:1", 0), ("second", 0), ("3", 0)]
    assert rows[1].ids.tolist() == model.tokenizer.encode("And God said")
    assert rows[1].ids.dtype == np.int32 and rows[1].mask.dtype == np.int8 and rows[1].following is None
    assert [r.ids.tolist() for r in documents()] == [r.ids.tolist() for r in rows]


def test_fields_of_an_object(documents, tmp_path, model):
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am."}]
    older = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I am."}]
    path = write(
        tmp_path / "x.jsonl",
        {"messages": talk},
        {"messages": json.dumps(talk)},
        {"conversations": older},
        {"prompt": talk[:1], "completion": talk[1:]},
        {"prompt": "In the ", "completion": "beginning"},
    )
    rows = list(documents(path))
    spoken = [model.tokenizer.decode(row.ids[row.mask == 1]) for row in rows]
    assert spoken[:4] == ["I am.<|im_end|>"] * 4 and spoken[4].lstrip() == "beginning"
    assert len({row.ids.tobytes() for row in rows[:4]}) == 1


def test_ids(documents, tmp_path):
    path = write(
        tmp_path / "x.jsonl", {"tokens": [1, 2]}, {"tokens": [3, 4, 5], "assistant_masks": [0, 1, 1]}
    )
    rows = list(documents(path, ids_column="tokens"))
    assert [row.ids.tolist() for row in rows] == [[1, 2], [3, 4, 5]]
    assert [row.mask.tolist() for row in rows] == [[1, 1], [0, 1, 1]]


def test_a_long_document(documents, tmp_path):
    path = write(tmp_path / "x.jsonl", {"input_ids": list(range(10, 17))})
    rows = list(documents(path, context=3, too_long="split", ids_column="input_ids"))
    assert [(r.start, r.ids.tolist(), r.following) for r in rows] == [
        (0, [10, 11, 12], 13),
        (3, [13, 14, 15], 16),
        (6, [16], None),
    ]
    rows = list(documents(path, context=3, too_long="truncate", ids_column="input_ids"))
    assert [(r.start, r.ids.tolist(), r.following) for r in rows] == [(0, [10, 11, 12], 13)]
    (row,) = documents(path, context=7, ids_column="input_ids")
    assert row.following is None


def test_empty_documents_left_out(documents, tmp_path):
    path = write(tmp_path / "x.jsonl", {"text": ""}, {"text": "one"})
    assert names(documents(path, empty="skip")) == [("x.jsonl:2", 0)]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": ""}, "x.jsonl:1: want at least one token, got none (--empty skip leaves it out)"),
        ({"text": 3}, "x.jsonl:1: text: want a text, got 3"),
        ({"txt": "a"}, f"x.jsonl:1: {FIELDS} txt"),
        ({"prompt": "a"}, f"x.jsonl:1: {FIELDS} prompt"),
        (
            {"prompt": "a", "completion": []},
            "x.jsonl:1: prompt, completion: want two texts or two lists of messages, got str and list",
        ),
        ({"messages": []}, "x.jsonl:1: messages: want "),
        ({"messages": "[1"}, "x.jsonl:1: messages: want JSON, got: "),
        (
            {"messages": [{"role": "judge", "content": "a"}]},
            "x.jsonl:1: messages: the chat template refuses them",
        ),
        ({"conversations": [1]}, "x.jsonl:1: conversations: want a list of {from, value}, got [1]"),
        ({"text": "a " * 3000}, "x.jsonl:1: want at most 1024 tokens, the context, got "),
        ([1], "x.jsonl:1: want a JSON object, got [1]"),
    ],
)
def test_records_that_are_refused(documents, tmp_path, record, message):
    path = write(tmp_path / "x.jsonl", record)
    with pytest.raises(InputError) as caught:
        list(documents(path))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "a"}, "input_ids: want token ids, got none"),
        ({"input_ids": []}, "want at least one token, got none"),
        ({"input_ids": [1, 2048]}, "input_ids: want 0 to 2047, got 2048 at index 1"),
        ({"input_ids": [1, "a"]}, "input_ids: want integers"),
        ({"input_ids": [1, 2], "assistant_masks": [1]}, "assistant_masks: want 2 values of 0 or 1, got [1]"),
        ({"input_ids": [1], "assistant_masks": [2]}, "assistant_masks: want 1 values of 0 or 1, got [2]"),
    ],
)
def test_ids_that_are_refused(documents, tmp_path, record, message):
    path = write(tmp_path / "x.jsonl", record)
    with pytest.raises(InputError) as caught:
        list(documents(path, ids_column="input_ids"))
    assert str(caught.value).startswith(f"{path}:1: {message}")


def test_files_that_are_refused(documents, tmp_path):
    text = write(tmp_path / "a.txt", "a")
    for paths, options, message in [
        ([tmp_path / "none"], {}, "none: want a file or a folder"),
        ([write(tmp_path / "e" / "x.csv", "1").parent], {}, "e: want .txt, .md, .jsonl"),
        ([text], {"ids_column": "input_ids"}, "a.txt: want .jsonl or .parquet files with --ids, got .txt"),
        ([write(tmp_path / "b.jsonl", "{1")], {}, "b.jsonl:1: want a JSON object, got: "),
        ([text], {"too_long": "cut"}, "too_long: want fail or split or truncate, got 'cut'"),
        ([text], {"empty": "no"}, "empty: want fail or skip, got 'no'"),
        ([text], {"context": 0}, "context: want at least 1 token, got 0"),
    ]:
        with pytest.raises(InputError) as caught:
            list(documents(*paths, **options))
        assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message)
    (tmp_path / "latin.txt").write_bytes(b"ab\xe4")
    with pytest.raises(InputError, match="latin.txt: want UTF-8, got byte 0xe4 at offset 2"):
        list(documents(tmp_path / "latin.txt"))


def test_parquet(documents, tmp_path, model):
    pa = pytest.importorskip("pyarrow", reason="needs the extra distill")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra distill")
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am."}]
    odd = [{"role": "user", "content": "Who?", "name": "x"}]
    table = pa.table({"messages": [talk, odd], "id": ["a", None]})
    parquet.write_table(table, tmp_path / "x.parquet")
    rows = list(documents(tmp_path / "x.parquet"))
    assert names(rows) == [("a", 0), ("x.parquet:1", 0)]
    assert model.tokenizer.decode(rows[0].ids[rows[0].mask == 1]) == "I am.<|im_end|>"
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="bad.parquet: want a Parquet file, got: "):
        list(documents(tmp_path / "bad.parquet"))
