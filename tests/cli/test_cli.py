"""The command line: what it prints, its exit codes, and one line for whatever is wrong."""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from paths import GOLDEN, QUANTIZED
from rewrite import rewrite

import pyengine
from pyengine.cli import _parser, main
from pyengine.cli.examples import EXAMPLES
from pyengine.errors import PyengineWarning

MODEL = str(GOLDEN / "pattern31.gguf")


def run(*arguments):
    return main([str(a) for a in arguments])


def fails(capsys, *arguments):
    """The one line on stderr of a command that must end with exit code 2 and print nothing else."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("pyengine: ")
    return err


def test_info(capsys):
    assert run("info", MODEL) == 0
    assert "hidden_size              64" in capsys.readouterr().out
    assert run("info", MODEL, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["experts"] == 6 and facts["full_attention_indices"] == [3]
    assert (facts["layers"], facts["full_attention_layers"], facts["linear_attention_layers"]) == (4, 1, 3)
    assert facts["parameters"] > 100_000 and facts["isa"] in facts["isas_available"]
    assert run("info") == 0


def test_logits(tmp_path, capsys):
    assert run("logits", "-m", MODEL, "--ids", "1 2,3", "-o", tmp_path / "a.npy") == 0
    logits = np.load(tmp_path / "a.npy")
    assert logits.dtype == np.float32 and logits.shape == (3, 288)
    assert np.array_equal(logits, pyengine.load(MODEL).forward([1, 2, 3]))
    (tmp_path / "ids.txt").write_text("1 2\n3\n")
    assert (
        run(
            "logits",
            "-m",
            MODEL,
            "--ids-file",
            tmp_path / "ids.txt",
            "--arithmetic",
            "float64",
            "-o",
            tmp_path / "b.npy",
            "--chunk",
            "2",
            "-t",
            "2",
            "--pin",
        )
        == 0
    )
    assert np.array_equal(np.load(tmp_path / "b.npy"), pyengine.load(MODEL, "float64").forward([1, 2, 3]))
    np.save(tmp_path / "ids.npy", np.array([1, 2, 3]))
    assert run("logits", "-m", MODEL, "--ids-file", tmp_path / "ids.npy", "-o", tmp_path / "c.npy") == 0
    assert np.array_equal(np.load(tmp_path / "c.npy"), logits)


def test_trace_and_verify(tmp_path, capsys):
    (tmp_path / "ids").write_text("5 6 7")
    for name, arithmetic in [("a", "locked"), ("b", "locked"), ("c", "float64")]:
        assert (
            run(
                "trace",
                "-m",
                MODEL,
                "--ids-file",
                tmp_path / "ids",
                "--arithmetic",
                arithmetic,
                "-o",
                tmp_path / name,
            )
            == 0
        )
    capsys.readouterr()
    assert run("verify", tmp_path / "a", tmp_path / "b") == 0
    assert capsys.readouterr().out == "equal: 83 of 83 tensors, every bit\n"
    assert run("verify", tmp_path / "a", tmp_path / "c") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("different: ") and " ulp; first at [" in out[1]
    assert run("verify", tmp_path / "a", tmp_path / "c", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["equal"] is False and report["differences"][0]["name"] == "model.layers.0.input_layernorm"


def test_quantize(tmp_path, capsys):
    assert run("quantize", MODEL, "--int8", tmp_path / "int8") == 0
    assert run("info", tmp_path / "int8", "--json") == 0
    assert json.loads(capsys.readouterr().out.split("written\n")[1])["tensor_types"]["INT8"] > 30
    assert "does not exist yet" in fails(capsys, "quantize", MODEL, "--int8", tmp_path / "int8")


def test_generate(capsys):
    assert run("generate", "-m", MODEL, "--ids", "1 2 3", "-n", "5") == 0
    ids = [int(i) for i in capsys.readouterr().out.split()]
    logits = pyengine.load(MODEL).forward([1, 2, 3])
    assert 1 <= len(ids) <= 5 and ids[0] == logits[-1].argmax()
    for _ in range(2):
        assert run("generate", "-m", MODEL, "--ids", "1 2 3", "-n", "8", "--temp", "1.5", "-s", "7") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_generate_text(capsys):
    pytest.importorskip("tokenizers")
    assert run("generate", "-m", MODEL, "-p", "the", "-n", "4") == 0
    assert capsys.readouterr().out.startswith("the")


def test_sampling_flags_arrive(capsys):
    """Each flag, by its llama.cpp name, is a keyword of model.generate."""
    model = pyengine.load(MODEL)
    flags = [
        "--temp",
        "1.2",
        "--top-k",
        "40",
        "--top-p",
        "0.9",
        "--min-p",
        "0.01",
        "-s",
        "5",
        "--presence-penalty",
        "0.5",
        "--frequency-penalty",
        "0.2",
        "--repeat-penalty",
        "1.1",
        "--repeat-last-n",
        "16",
        "--logit-bias",
        "7+1.5",
        "--logit-bias",
        "8-inf",
    ]
    keywords = dict(
        temperature=1.2,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        seed=5,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        penalty_last_n=16,
        logit_bias={7: 1.5, 8: -float("inf")},
    )
    assert run("generate", "-m", MODEL, "--ids", "1 2 3", "-n", "20", *flags) == 0
    got = [int(i) for i in capsys.readouterr().out.split()]
    assert got == model.generate([1, 2, 3], 20, **keywords).ids.tolist()


def test_defaults_are_the_checkpoints(tmp_path, capsys):
    path = rewrite(
        MODEL,
        tmp_path / "m.gguf",
        metadata={
            "general.sampling.temp": (1.5, GGUFValueType.FLOAT32),
            "general.sampling.top_k": (50, GGUFValueType.INT32),
        },
    )
    asked = ["--ids", "1 2 3", "-n", "16"]
    run("generate", "-m", path, *asked)
    run("generate", "-m", MODEL, *asked, "--temp", "1.5", "--top-k", "50")
    run("generate", "-m", path, *asked, "--temp", "0")
    run("generate", "-m", MODEL, *asked)
    sampled, named, greedy, plain = capsys.readouterr().out.splitlines()
    assert sampled == named != greedy == plain


def test_context_and_reverse_prompt(capsys):
    pytest.importorskip("tokenizers")
    model = pyengine.load(MODEL)
    assert run("generate", "-m", MODEL, "--ids", "1 2 3", "-c", "9", "-n", "-1", "--ignore-eos") == 0
    assert len(capsys.readouterr().out.split()) == 6
    text = model.generate("the", 16, ignore_end=True).text
    stop = text[len(text) // 2]
    assert (
        run(
            "generate",
            "-m",
            MODEL,
            "-p",
            "the",
            "-n",
            "16",
            "--ignore-eos",
            "-r",
            stop,
            "-r",
            "zz",
            "--verbose",
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out == "the" + text[: text.index(stop)] + "\n" and "; stop" in err and "prompt 2 tokens" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["info", "/no/such"], "/no/such: want a GGUF file or a checkpoint directory"),
        (["info", __file__], "magic"),
        (["info", "--frobnicate"], "unrecognized arguments: --frobnicate (see pyengine info --help)"),
        (["--frobnicate"], "(see pyengine --help)"),
        (
            ["tokenize", "-m", MODEL, "-p", "a", "b"],
            "unrecognized arguments: b (see pyengine tokenize --help)",
        ),
        (["logits", "-m", MODEL, "--ids", "1"], "are required: -o/--output (see pyengine logits --help)"),
        (["info", "-c", "5", MODEL], "-c: want it with --memory"),
        (["bench", "-m", MODEL, "-pg", "128,16"], "argument -pg: a prompt and a generation in one test"),
        (["bench", "-m", MODEL, "-p", "1,,2"], "-p/--n-prompt: want a list of integers of at least 0"),
        (["bench", "-m", MODEL, "-t", "1,0"], "-t/--threads: want a list of integers of at least 1"),
        (["bench", "-m", MODEL, "-d", "-1"], "-d/--n-depth/--depth: want a list of integers of at least 0"),
        (
            ["generate", "-m", MODEL, "--ids", "1", "-n", "1_0"],
            "-n/--predict: want a number of tokens, or -1",
        ),
        (["generate", "-m", MODEL, "--ids", "1", "-s", "x"], "argument -s/--seed: want an integer, got 'x'"),
        (["generate", "-m", MODEL, "--ids", "1", "-s", "-2"], "seed: want an integer of at least -1, got -2"),
        (["generate", "-m", MODEL, "--ids", "1", "--top-k", "-2"], "top_k: want an integer of at least -1"),
        (["generate", "-m", MODEL, "-f", "/no/such"], "/no/such: No such file"),
        (["perplexity", "-m", MODEL, "--ids-file", "/no/ids"], "/no/ids: want token ids"),
        (["perplexity", "-m", MODEL, "-f", MODEL, "--chunks", "0"], "argument --chunks: want an integer"),
        (["logits", "-m", MODEL, "--ids", "1 x", "-o", "/tmp/never.npy"], "--ids: want integers, got 'x'"),
        (["logits", "-m", MODEL, "--ids", "288", "-o", "/tmp/never.npy"], "ids: want 0 to 287, got 288"),
        (["logits", "-m", MODEL, "--ids", "", "-o", "/tmp/never.npy"], "ids: want at least one id"),
        (["logits", "-m", MODEL, "--ids", "1", "-o", "/no/such/out.npy"], "want a file in a directory"),
        (["logits", "-m", MODEL, "--ids-file", "/no/ids", "-o", "/tmp/never.npy"], "/no/ids: want token ids"),
        (["logits", "-m", MODEL, "--ids", "1", "-t", "0", "-o", "/tmp/never.npy"], "argument -t/--threads"),
        (["logits", "-m", MODEL, "--ids", "1", "--chunk", "0", "-o", "/tmp/never.npy"], "argument --chunk"),
        (["generate", "-m", MODEL, "--ids", "1", "--temp", "-1"], "temperature"),
        (["generate", "-m", MODEL, "--ids", "1", "--logit-bias", "x"], "argument --logit-bias"),
        (
            ["generate", "-m", MODEL, "--ids", "1", "--logit-bias", "288+1"],
            "logit_bias: want an id below 288",
        ),
        (["generate", "-m", MODEL, "--ids", "1", "-n", "-2"], "argument -n/--predict"),
        (
            ["generate", "-m", MODEL, "--ids", "1 2 3", "-c", "2"],
            "prompt: want at most 1 of the context's 2 tokens, got 3",
        ),
        (["generate", "-m", MODEL, "-p", ""], "prompt: want at least one token"),
        (["verify", MODEL, MODEL], "trace: want a safetensors file, got a GGUF"),
        (["verify", "/no/a", "/no/b"], "/no/a"),
        (["quantize", "/no/such.gguf", "--int8", "/tmp/never-written"], "/no/such.gguf: want a GGUF"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def hostile_files(folder):
    """One file of each kind that means harm -> {kind: path}."""
    quantized = folder / "int8"
    assert run("quantize", MODEL, "--int8", quantized) == 0
    for name in ("config", "generation", "index", "data", "tokenizer"):
        shutil.copytree(quantized, folder / name)
    (folder / "config" / "config.json").write_text('{"hidden_size": ' + "[" * 10**5)
    (folder / "generation" / "generation_config.json").write_text('{"eos_token_id": 1e999}')
    (folder / "index" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    (folder / "data" / "model.safetensors").write_bytes(b"\xff" * 100)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {"type": "BPE", "dropout": 1}}')
    (folder / "43.gguf").write_bytes(b"GGUF\3" + bytes(11) + b"\1" + bytes(7) + b"\xff" * 19)
    (folder / "the-trace").write_bytes(b"\2" + bytes(7) + b"{}")
    np.save(folder / "objects.npy", np.array([{}]), allow_pickle=True)
    (folder / "ids").write_text("1 \x1b[2J")


def test_hostile_files_are_one_line_each(tmp_path, capsys):
    hostile_files(tmp_path)
    out, before = tmp_path / "out", sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for arguments, message in [
        (["info", "config"], "config/config.json: file: want a JSON object, got one nested too deeply"),
        (["info", "generation"], "generation/generation_config.json: eos_token_id: want token ids, got inf"),
        (
            ["info", "index"],
            "index/model.safetensors.index.json: weight_map a: want the name of a file in "
            "this folder, got '../x'",
        ),
        (["info", "data"], f"data/model.safetensors: header length: want 2 to 92 bytes, got {2**64 - 1}"),
        (["info", "43.gguf"], f"43.gguf: key 0: want a length of 1 to 65535 bytes, got {2**64 - 1}"),
        (
            ["generate", "-m", "tokenizer", "-p", "x"],
            "tokenizer/tokenizer.json: model.dropout: want none, got 1",
        ),
        (["verify", "the-trace", "the-trace"], "the-trace: input_ids: want I64 or I32 [T], got none"),
        (
            ["logits", "-m", MODEL, "--ids-file", "objects.npy", "-o", out],
            "objects.npy: want token ids as "
            "text or .npy, got: Array can't be memory-mapped: Python objects in dtype.",
        ),
        (["logits", "-m", MODEL, "--ids-file", "ids", "-o", out], "ids: want integers, got '\\x1b[2J'"),
        (
            ["trace", "-m", "data", "--ids", "1", "-o", out],
            f"data/model.safetensors: header length: want 2 to 92 bytes, got {2**64 - 1}",
        ),
        (
            ["quantize", "43.gguf", "--int8", out],
            f"43.gguf: key 0: want a length of 1 to 65535 bytes, got {2**64 - 1}",
        ),
        (
            ["verify-files", "data"],
            f"data/model.safetensors: header length: want 2 to 92 bytes, got {2**64 - 1}",
        ),
    ]:
        paths = [
            tmp_path / word if (tmp_path / str(word)).exists() and word != MODEL else word
            for word in arguments
        ]
        assert fails(capsys, *paths) == f"pyengine: {tmp_path}/{message}\n", arguments
    assert sorted(tmp_path.rglob("*")) == before


# ---- help --------------------------------------------------------------------------------------


def commands():
    action = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def test_no_command_is_the_help(capsys):
    assert run() == 2
    out, err = capsys.readouterr()
    assert out == "" and all(name in err for name in commands()) and "--help" in err


@pytest.mark.parametrize("name", commands())
def test_help_has_examples_that_parse(capsys, name):
    assert run(name, "--help") == 0
    out, err = capsys.readouterr()
    assert err == "" and "examples:\n" in out
    examples = [line.strip() for line in out.partition("examples:\n")[2].splitlines() if line.strip()]
    assert len(examples) == len(EXAMPLES[name].split("\n")) - 2
    for example in examples:
        words = shlex.split(example.rpartition("| ")[2].partition(" < ")[0])
        assert words[:2] == ["pyengine", name]
        options, unknown = _parser().parse_known_args(words[1:])
        assert options.command == name and not unknown


@pytest.mark.parametrize("name", sorted(commands().keys() - {"verify", "verify-files"}))
def test_every_option_says_what_it_does_and_its_default(name):
    parser = commands()[name]
    chosen = {id(action) for group in parser._mutually_exclusive_groups for action in group._group_actions}
    for action in parser._actions:
        label = action.option_strings or action.dest
        assert action.help, f"{label} has no help"
        takes_value = action.option_strings and action.nargs != 0
        if (
            takes_value
            and not action.required
            and id(action) not in chosen
            and action.help != argparse.SUPPRESS
        ):
            assert "default: " in action.help, f"{label}: {action.help}"
        if not takes_value or action.default in (None, [None], []):  # the help says it in words
            continue
        default = action.default[0] if isinstance(action.default, list) else action.default
        if said := re.search(r"\(default: ([-+.\w]+)\)", action.help):
            assert said[1] == str(default), f"{label}: {action.help}"


@pytest.mark.parametrize("name", ["chat", "generate", "serve"])
def test_help_says_the_seed(capsys, name):
    assert run(name, "--help") == 0
    assert "default: 1729" in " ".join(capsys.readouterr().out.split())


# ---- ids and texts, wherever they come from -----------------------------------------------------


def stdin(monkeypatch, data):
    data = data if isinstance(data, bytes) else data.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))


@pytest.mark.parametrize("text", ["1 2 3", "1,2,3", "[1, 2, 3]", " [1 2 3]\n", "\ufeff1\n2\n3\n"])
def test_ids_in_any_form(monkeypatch, tmp_path, capsys, text):
    (tmp_path / "ids").write_text(text, encoding="utf-8")
    generate = "generate", "-m", MODEL, "-n", "4", "-t", "1"
    assert run(*generate, "--ids", "1 2 3") == 0
    want = capsys.readouterr().out
    forms = [["--ids-file", tmp_path / "ids"]]
    if not text.startswith("\ufeff"):
        forms += [["--ids", text], ["--ids-file", "-"]]
    for form in forms:
        stdin(monkeypatch, text)
        assert run(*generate, *form) == 0
        assert capsys.readouterr().out == want, form


def test_a_text_where_ids_are_wanted(monkeypatch, tmp_path):
    """The ids are those of `tokenize`, and of `generate`."""
    tokenizers = pytest.importorskip("pyengine.text.tokenizer", exc_type=ImportError)
    text = "the é<|im_end|>"
    tokenizer = tokenizers.Tokenizer.open(MODEL)
    ids = {special: " ".join(map(str, tokenizer.encode(text, special))) for special in (False, True)}
    assert ids[True] != ids[False]
    (tmp_path / "prompt").write_text(text + "\n", encoding="utf-8")
    for command in ("logits", "trace"):
        for special in (False, True):
            more = ["--parse-special"] * special
            forms = [
                ["--ids", ids[special]],
                ["-p", text],
                ["-p", "-"],
                ["-f", tmp_path / "prompt"],
                ["-f", "-"],
            ]
            outputs = []
            for form in forms:
                stdin(monkeypatch, text + "\n")
                run(command, "-m", MODEL, "-t", "1", *form, *more, "-o", tmp_path / "out")
                outputs.append((tmp_path / "out").read_bytes())
            assert outputs == outputs[:1] * 5


def test_ids_from_standard_input(monkeypatch, tmp_path, capsys):
    for command in ("logits", "trace"):
        stdin(monkeypatch, "[1, 2]")
        assert run(command, "-m", MODEL, "-t", "1", "--ids-file", "-", "-o", tmp_path / command) == 0
    assert np.load(tmp_path / "logits").shape == (2, 288)
    stdin(monkeypatch, " ".join(["1 2 3"] * 20))
    assert run("perplexity", "-m", MODEL, "-t", "1", "--ids-file", "-", "-c", "16") == 0
    assert "Final estimate: PPL = " in capsys.readouterr().out
    stdin(monkeypatch, "1 x")
    assert "standard input: want integers, got 'x'" in fails(
        capsys, "generate", "-m", MODEL, "--ids-file", "-"
    )


def test_decode_takes_the_form_of_llama_tokenize(monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    for ids in ("[70, 71]", "70,71", "70 71", "-"):
        stdin(monkeypatch, "[70, 71]\n")
        assert run("tokenize", "-m", MODEL, "--decode", ids) == 0
    assert len(set(capsys.readouterr().out.splitlines())) == 1


def test_a_prompt_from_a_file_or_standard_input(monkeypatch, tmp_path, capsys):
    """The newline at the end of a file is not a part of the prompt."""
    pytest.importorskip("tokenizers")
    generate = "generate", "-m", MODEL, "-n", "4", "-t", "1"
    assert run(*generate, "-p", "the é\n") == 0
    with_newline = capsys.readouterr().out
    assert run(*generate, "-p", "the é") == 0
    want = capsys.readouterr().out
    assert want != with_newline
    (tmp_path / "prompt").write_text("the é\n", encoding="utf-8")
    (tmp_path / "-").write_text("another", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for form in (["-f", "prompt"], ["-f", "-"], ["-p", "-"]):
        stdin(monkeypatch, "the é\n")
        assert run(*generate, *form) == 0
        assert capsys.readouterr().out == want, form
    for text, newline in [("the é\r\n", want), ("the é", want), ("the é\n\n", with_newline)]:
        stdin(monkeypatch, text)
        assert run(*generate, "-p", "-") == 0
        assert capsys.readouterr().out == newline, text


def test_a_prompt_that_is_no_text(monkeypatch, tmp_path, capsys):
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    error = "want UTF-8, got byte 0xe9 at offset 3"
    assert f"{tmp_path}/prompt: {error}" in fails(capsys, "generate", "-m", MODEL, "-f", tmp_path / "prompt")
    stdin(monkeypatch, b"caf\xe9")
    assert f"standard input: {error}" in fails(capsys, "generate", "-m", MODEL, "-p", "-")


# ---- generate ----------------------------------------------------------------------------------


def test_generate_as_json(capsys):
    pytest.importorskip("tokenizers")
    model = pyengine.load(MODEL, threads=1)
    want = model.generate("the", 5, temperature=2.0, seed=3, logprobs=0)
    assert (
        run("generate", "-m", MODEL, "-t", "1", "-p", "the", "-n", "5", "--temp", "2", "-s", "3", "--json")
        == 0
    )
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert err == "" and (said["prompt"], said["text"], said["seed"]) == ("the", want.text, 3)
    assert said["ids"] == want.ids.tolist() and said["logprobs"] == want.logprobs.tolist()
    assert said["finish_reason"] == want.finish_reason and said["prompt_tokens"] == want.prompt_tokens
    assert run("generate", "-m", MODEL, "--ids", "1 2", "-n", "2", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["prompt"] == [1, 2] and said["seed"] == 1729 and said["completion_tokens"] == len(said["ids"])


def test_a_fresh_seed_is_said(capsys):
    flags = "generate", "-m", MODEL, "-t", "1", "--ids", "1 2 3", "-n", "12", "--temp", "3"
    assert run(*flags, "-s", "-1") == 0
    out, err = capsys.readouterr()
    seed = re.fullmatch(r"seed (\d+)\n", err)[1]
    assert run(*flags, "-s", seed) == 0
    assert capsys.readouterr() == (out, "")
    assert run(*flags, "-s", "-1", "--json") == 0
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out)["seed"] != int(seed)


def test_minus_one_is_off(capsys):
    flags = "generate", "-m", MODEL, "-t", "1", "--ids", "1 2 3", "--temp", "2", "-c", "20", "--ignore-eos"
    for more in (["-n", "17"], ["-n", "-1"], ["-n", "-1", "--top-k", "-1"], ["-n", "-1", "--top-k", "0"]):
        assert run(*flags, *more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and len(set(lines)) == 1 and len(lines[0].split()) == 17


@pytest.mark.parametrize("context", ["3", "4"])
def test_a_context_without_room_for_an_answer(capsys, context):
    """The prompt alone is no answer."""
    ids = "--ids", "1 2 3 4"
    error = fails(capsys, "generate", "-m", MODEL, *ids, "-c", context)
    assert "prompt: want" in error and context in error and "got 4" in error
    assert run("generate", "-m", MODEL, *ids, "-c", "5") == 0
    assert run("generate", "-m", MODEL, *ids, "-c", "4", "-n", "0") == 0


@pytest.fixture
def quick_bench(monkeypatch):
    """Without the machine's read bandwidth, which takes a second per test."""
    monkeypatch.setattr("pyengine.evaluation.bench.read_bandwidth", lambda threads: 1.0)


# ---- warnings ------------------------------------------------------------------------------------


def test_a_context_above_the_models_is_said_once(capsys):
    assert run("generate", "-m", MODEL, "--ids", "1 2 3", "-c", "4097", "-n", "2") == 0
    err = capsys.readouterr().err
    assert err.startswith("pyengine: warning: ") and "4097" in err and "4096" in err and err.count("\n") == 1
    assert run("generate", "-m", MODEL, "--ids", "1 2 3", "-c", "4096", "-n", "2") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-m", MODEL, "--ids", "1", "-n", "1", "-t"],
        ["info", MODEL, "--memory", "-t"],
        ["bench", "-m", MODEL, "-p", "1", "-n", "0", "-r", "1", "-t"],
    ],
)
def test_more_threads_than_processors_are_said(capsys, monkeypatch, quick_bench, arguments):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert run(*arguments, "4") == 0
    err = capsys.readouterr().err
    assert err == "pyengine: warning: -t: 4 threads on 3 processors are slower than fewer\n"
    assert run(*arguments, "3") == 0
    assert capsys.readouterr().err == ""


def test_warnings_are_one_plain_line_each(capsys, monkeypatch):
    def command(options):
        for text in ("a\nb", "c", "a\nb"):
            warnings.warn(text, PyengineWarning, stacklevel=1)

    monkeypatch.setattr("pyengine.cli.info._info", command)
    for _ in range(2):  # once in each run
        assert run("info") == 0
        assert capsys.readouterr().err == "pyengine: warning: a b\npyengine: warning: c\n"


# ---- info --------------------------------------------------------------------------------------


def test_memory_adds_up(capsys):
    assert run("info", MODEL, "--memory", "--json") == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["context"] == 4096  # the model's
    parts = set(memory) - {"context", "weights_mapped", "total"}
    assert memory["total"] == sum(memory[part] for part in parts)
    assert run("info", MODEL, "--memory", "-c", "100") == 0
    out = capsys.readouterr().out
    assert "memory of a sequence of 100 tokens" in out
    rows = dict(re.findall(r"^(\w+) +([\d,]+) bytes", out, re.MULTILINE))
    sizes = {name: int(size.replace(",", "")) for name, size in rows.items()}
    total, mapped = sizes.pop("total"), sizes.pop("weights_mapped")
    assert total == sum(sizes.values()) and mapped == os.path.getsize(MODEL)
    assert set(sizes) == parts and "not in the total" in out


def test_types_by_layer(capsys):
    """Layers of the same types together, whatever lies between; experts, embeddings and head too."""
    assert run("info", GOLDEN / "pattern31.gguf") == 0
    rows = capsys.readouterr().out.split("types of the matrices\n")[1].splitlines()
    assert [row[:32].split() for row in rows] == [
        "in no layer Q8_0".split(),
        "layers 0-2 Q8_0".split(),
        ["F32"],
        "layers 3 Q8_0".split(),
        ["F32"],
    ]
    assert rows[0].split()[4:] == ["token_embd,", "output"]
    assert run("info", QUANTIZED / "UD.gguf", "--json") == 0
    outside, layer = json.loads(capsys.readouterr().out)["types_by_layer"]
    assert outside == {"layers": [], "types": {"Q5_0": ["token_embd"], "Q6_K": ["output"]}}
    assert layer["layers"] == [0] and layer["types"]["Q4_K"] == ["ffn_gate_exps"]
    assert (layer["types"]["IQ4_XS"], layer["types"]["Q5_1"]) == (["ffn_up_exps"], ["ffn_down_exps"])


def test_types_by_layer_of_a_directory(tmp_path, capsys):
    assert run("quantize", MODEL, "--int8", tmp_path / "int8") == 0
    capsys.readouterr()
    assert run("info", tmp_path / "int8", "--json") == 0
    outside, first, last = json.loads(capsys.readouterr().out)["types_by_layer"]
    assert outside["types"] == {"BF16": ["embed_tokens", "lm_head"]}
    assert (first["layers"], last["layers"]) == ([0, 1, 2], [3])
    assert "self_attn.q_proj" in last["types"]["INT8"]


def test_provenance_of_what_has_none(tmp_path, capsys):
    want = "--provenance: want a directory that `quantize` or `merge` wrote, got"
    for path, got in [(MODEL, "a file"), (tmp_path / "no", "no such path"), (tmp_path, "one without")]:
        assert f"pyengine: {path}: {want} {got}" in fails(capsys, "info", path, "--provenance")
    assert f"{want} none" in fails(capsys, "info", "--provenance")


# ---- bench -------------------------------------------------------------------------------------


def test_bench_depths_and_json_lines(capsys, quick_bench):
    tests = "bench", "-m", MODEL, "-p", "4", "-n", "2", "-r", "1", "-t", "1"
    assert run(*tests, "-d", "0,8", "-o", "jsonl") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [
        (4, 0, 0),
        (0, 2, 0),
        (4, 0, 8),
        (0, 2, 8),
    ]
    assert run(*tests, "-d", "8") == 0
    assert "pp4 @ d8" in capsys.readouterr().out


# ---- as a process --------------------------------------------------------------------------------


def test_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pyengine", "info", "/no/such"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_traceback(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m pyengine info {MODEL} | true",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, pipe",
    [
        ("info", "| true"),
        ("generate --help", "| true"),
        ("", "2>&1 >/dev/null | true"),
        ("info /no/such", "2>&1 >/dev/null | true"),
        ("--help", "2>&1 | head -c 1"),
    ],
)
def test_a_closed_pipe_is_quiet(tmp_path, arguments, pipe):
    done = subprocess.run(
        f"{sys.executable} -m pyengine {arguments} {pipe}",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    said = {"": "usage: pyengine ", "info /no/such": "pyengine: /no/such: want "}.get(arguments)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stderr == "" or said and done.stderr.startswith(said)


def process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pyengine", *map(str, arguments)],
        capture_output=True,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    done = subprocess.run(
        f"{sys.executable} -m pyengine info > /dev/full", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == "pyengine: No space left on device\n"


@pytest.mark.parametrize(
    "encoding, printed", [("ascii", b"caf\\xe9"), ("latin1", b"caf\xe9"), ("ascii:replace", b"caf?")]
)
def test_a_character_that_the_terminal_lacks(encoding, printed):
    """It is no traceback; what the user asked for with PYTHONIOENCODING stays."""
    pytest.importorskip("tokenizers")
    done = process("generate", "-m", MODEL, "-p", "café", "-n", "0", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed + b"\n", b"")


def test_two_ways_to_start_it(tmp_path):
    import pyengine.cli

    (tmp_path / "start.py").write_text("import sys\nfrom pyengine.cli import main\nsys.exit(main())\n")
    for arguments in (["info", MODEL], []):
        script = subprocess.run([sys.executable, tmp_path / "start.py", *arguments], capture_output=True)
        module = process(*arguments)
        assert (script.returncode, script.stdout, script.stderr) == (
            module.returncode,
            module.stdout,
            module.stderr,
        )
    assert pyengine.cli.main is main


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-m", MODEL, "--ids", "1 2 3", "-n", "-1", "--ignore-eos", "-c", "4000"],
        ["tokenize", "-m", MODEL, "-f", "-"],
    ],
)
def test_ctrl_c_is_exit_130_without_a_word(arguments):
    with subprocess.Popen(
        [sys.executable, "-m", "pyengine", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as command:
        if arguments[0] == "generate":
            assert command.stdout.read(1)
        else:
            time.sleep(1.5)
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=30)
    assert (command.returncode, err) == (130, b"")
