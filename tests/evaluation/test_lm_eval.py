"""lm-evaluation-harness, the real one, on the engine and as a client of the server: the same numbers."""

import json

import pytest
from paths import TESTS
from serving import serving

import pyengine
from pyengine.cli import main

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

NAME = "small"
BF16 = TESTS / "trained" / "bf16.gguf"
VERSES = [
    ("In the beginning God created the", ["heaven and the earth", "bread and the wine", "sea"], 0),
    ("And God said, Let there be light: and there was", ["darkness", "light", "a man of the sons"], 1),
    ("The LORD is my", ["shepherd", "servants", "people of the city"], 0),
    ("Thou shalt not", ["steal", "go up", "in the house of the"], 0),
    ("And it came to", ["pass", "men", "the LORD, and the king"], 0),
    ("Blessed are the", ["poor", "cities", "of them"], 0),
]
CHOICE = """
task: verses
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/verses.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: chapters
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/chapters.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/verses.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{ends[right]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"start": start, "ends": [" " + end for end in ends], "right": right} for start, ends, right in VERSES
    ]
    (folder / "verses.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [" ".join(f"{start} {ends[right]}." for start, ends, right in VERSES[i:]) for i in range(4)]
    (folder / "chapters.jsonl").write_text("\n".join(json.dumps({"text": text * 3}) for text in texts))
    for name, yaml in (("verses", CHOICE), ("chapters", ROLLING), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(yaml.replace("DIR", str(folder)))
    return folder


@pytest.fixture(scope="module")
def model():
    return pyengine.load("default", threads=1)


@pytest.fixture(scope="module")
def address(model):
    server = pytest.importorskip("pyengine.server", reason="needs the extra serve")
    for module in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
        pytest.importorskip(module, reason="needs the extra serve")
    with serving(server.create_app(model, NAME, parallel=4)) as address:
        yield address


def figures(results):
    """{task: {metric: value}} without standard errors and names."""
    return {
        task: {name: value for name, value in row.items() if "," in name and "stderr" not in name}
        for task, row in results["results"].items()
    }


def on_the_server(address, tasks, names, kind="local-completions", path="completions", **options):
    arguments = {
        "model": NAME,
        "base_url": f"{address}/v1/{path}",
        "max_length": 100,
        "num_concurrent": 4,
        "max_retries": 1,
        "eos_string": "<|im_end|>",
    }
    return lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments | options.pop("arguments", {}),
        tasks=names,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)),
        **options,
    )


def test_the_command_gives_the_numbers_of_the_harness_own_client(address, tasks, capsys):
    """A multiple choice and a rolling perplexity, whose texts are longer than the context."""
    names = "verses,chapters,answers"
    command = ["lm-eval", "-m", "default", "--tasks", names, "--include-path", str(tasks)]
    assert main([*command, "--limit", "2"]) == 0
    assert "|verses" in capsys.readouterr().out
    assert main([*command, "--max-length", "100", "--json", "-t", "1"]) == 0
    ours = figures(json.loads(capsys.readouterr().out))
    theirs = figures(on_the_server(address, tasks, names.split(",")))
    assert set(ours) == {"verses", "chapters", "answers"} and ours == theirs
    assert 0.3 < ours["verses"]["acc,none"] <= 1 and 1 < ours["chapters"]["word_perplexity,none"] < 1000


def test_chat_completions_run_a_task_to_the_end(address, tasks):
    results = on_the_server(
        address, tasks, ["answers"], "local-chat-completions", "chat/completions", apply_chat_template=True
    )
    assert set(figures(results)["answers"]) == {"exact_match,none"}


def test_int8_keeps_the_figures_of_its_original(tasks, tmp_path, capsys):
    """As a model card reports retention: BF16 against INT8 and INT4."""
    from pyengine.quantizer.quantize import quantize

    quantize(BF16, tmp_path / "int8", tmp_path / "int4")
    found = {}
    for name, path in (("bf16", BF16), ("int8", tmp_path / "int8"), ("int4", tmp_path / "int4")):
        command = ["lm-eval", "-m", str(path), "--tasks", "verses,chapters", "--include-path", str(tasks)]
        assert main([*command, "--json"]) == 0
        found[name] = figures(json.loads(capsys.readouterr().out))
    base = found["bf16"]["chapters"]["word_perplexity,none"]
    assert abs(found["int8"]["chapters"]["word_perplexity,none"] / base - 1) < 0.01
    assert found["int8"]["verses"] == found["bf16"]["verses"]
    assert found["int4"]["chapters"]["word_perplexity,none"] / base < 1.25


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--tasks", "no_such_task"],
            "--tasks: want tasks of lm-evaluation-harness or YAML files, got no_such_task",
        ),
        (["--tasks", "verses", "--limit", "0"], "--limit"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tasks, capsys):
    assert main(["lm-eval", "-m", "default", "--include-path", str(tasks), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
