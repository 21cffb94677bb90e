"""The command line: what it prints, its exit codes, and one line for whatever is wrong."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from rewrite import GOLDEN, rewrite

import pyengine
from pyengine.cli import main

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
    assert facts["experts"] == 6 and facts["full_attention_layers"] == [3]
    assert facts["parameters"] > 100_000 and facts["isa"] in facts["isas_available"]
    assert run("info") == 0


def test_logits(tmp_path, capsys):
    assert run("logits", "-m", MODEL, "--ids", "1 2,3", "-o", tmp_path / "a.npy") == 0
    logits = np.load(tmp_path / "a.npy")
    assert logits.dtype == np.float32 and logits.shape == (3, 288)
    assert np.array_equal(logits, pyengine.load(MODEL).forward([1, 2, 3]))
    (tmp_path / "ids.txt").write_text("1 2\n3\n")
    assert run("logits", "-m", MODEL, "--ids-file", tmp_path / "ids.txt", "--arithmetic", "float64",
               "-o", tmp_path / "b.npy", "--chunk", "2", "-t", "2", "--pin") == 0
    assert np.array_equal(np.load(tmp_path / "b.npy"), pyengine.load(MODEL, "float64").forward([1, 2, 3]))
    np.save(tmp_path / "ids.npy", np.array([1, 2, 3]))
    assert run("logits", "-m", MODEL, "--ids-file", tmp_path / "ids.npy", "-o", tmp_path / "c.npy") == 0
    assert np.array_equal(np.load(tmp_path / "c.npy"), logits)


def test_trace_and_verify(tmp_path, capsys):
    (tmp_path / "ids").write_text("5 6 7")
    for name, arithmetic in [("a", "locked"), ("b", "locked"), ("c", "float64")]:
        assert run("trace", "-m", MODEL, "--ids-file", tmp_path / "ids", "--arithmetic", arithmetic,
                   "-o", tmp_path / name) == 0
    capsys.readouterr()
    assert run("verify", tmp_path / "a", tmp_path / "b") == 0
    assert capsys.readouterr().out == "equal: 83 tensors, every bit\n"
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
    flags = ["--temp", "1.2", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.01", "-s", "5",
             "--presence-penalty", "0.5", "--frequency-penalty", "0.2", "--repeat-penalty", "1.1",
             "--repeat-last-n", "16", "--logit-bias", "7+1.5", "--logit-bias", "8-inf"]
    keywords = dict(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01, seed=5, presence_penalty=0.5,
                    frequency_penalty=0.2, repetition_penalty=1.1, penalty_last_n=16,
                    logit_bias={7: 1.5, 8: -float("inf")})
    assert run("generate", "-m", MODEL, "--ids", "1 2 3", "-n", "20", *flags) == 0
    got = [int(i) for i in capsys.readouterr().out.split()]
    assert got == model.generate([1, 2, 3], 20, **keywords).ids.tolist()


def test_defaults_are_the_checkpoints(tmp_path, capsys):
    path = rewrite(MODEL, tmp_path / "m.gguf", metadata={
        "general.sampling.temp": (1.5, GGUFValueType.FLOAT32), "general.sampling.top_k": (50, GGUFValueType.INT32)})
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
    assert run("generate", "-m", MODEL, "-p", "the", "-n", "16", "--ignore-eos", "-r", stop, "-r", "zz",
               "--verbose") == 0
    out, err = capsys.readouterr()
    assert out == "the" + text[:text.index(stop)] + "\n" and "; stop" in err and "prompt 2 tokens" in err


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: COMMAND"),
    (["nonsense"], "invalid choice: 'nonsense'"),
    (["info", "/no/such"], "/no/such: want a GGUF file or a checkpoint directory"),
    (["info", __file__], "magic"),
    (["info", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["logits", "-m", MODEL, "--ids", "1 x", "-o", "/tmp/never.npy"], "--ids: want integers, got 'x'"),
    (["logits", "-m", MODEL, "--ids", "288", "-o", "/tmp/never.npy"], "ids: want 0 to 287, got 288"),
    (["logits", "-m", MODEL, "--ids", "", "-o", "/tmp/never.npy"], "ids: want at least one id"),
    (["logits", "-m", MODEL, "--ids", "1", "-o", "/no/such/out.npy"], "want a file in a directory"),
    (["logits", "-m", MODEL, "--ids-file", "/no/ids", "-o", "/tmp/never.npy"], "/no/ids: want token ids"),
    (["logits", "-m", MODEL, "--ids", "1", "-t", "0", "-o", "/tmp/never.npy"], "argument -t/--threads"),
    (["logits", "-m", MODEL, "--ids", "1", "--chunk", "0", "-o", "/tmp/never.npy"], "argument --chunk"),
    (["generate", "-m", MODEL, "--ids", "1", "--temp", "-1"], "temperature"),
    (["generate", "-m", MODEL, "--ids", "1", "--logit-bias", "x"], "argument --logit-bias"),
    (["generate", "-m", MODEL, "--ids", "1", "--logit-bias", "288+1"], "logit_bias: want an id below 288"),
    (["generate", "-m", MODEL, "--ids", "1", "-n", "-2"], "argument -n/--predict"),
    (["generate", "-m", MODEL, "--ids", "1 2 3", "-c", "2"], "prompt: want at most 2 tokens"),
    (["generate", "-m", MODEL, "-p", ""], "prompt: want at least one token"),
    (["verify", MODEL, MODEL], "header"),
    (["verify", "/no/a", "/no/b"], "/no/a"),
    (["quantize", "/no/such.gguf", "--int8", "/tmp/never-written"], "/no/such.gguf: want a GGUF"),
])
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
        (["info", "index"], "index/model.safetensors.index.json: weight_map a: want the name of a file in "
         "this folder, got '../x'"),
        (["info", "data"], f"data/model.safetensors: header length: want 2 to 92 bytes, got {2**64 - 1}"),
        (["info", "43.gguf"], f"43.gguf: key 0: want a length of 1 to 65535 bytes, got {2**64 - 1}"),
        (["generate", "-m", "tokenizer", "-p", "x"], "tokenizer/tokenizer.json: model.dropout: want none, got 1"),
        (["verify", "the-trace", "the-trace"], "the-trace: input_ids: want I64 or I32 [T], got none"),
        (["logits", "-m", MODEL, "--ids-file", "objects.npy", "-o", out], "objects.npy: want token ids as "
         "text or .npy, got: Array can't be memory-mapped: Python objects in dtype."),
        (["logits", "-m", MODEL, "--ids-file", "ids", "-o", out], "ids: want integers, got '\\x1b[2J'"),
        (["trace", "-m", "data", "--ids", "1", "-o", out], "data/model.safetensors: header length: want 2 to "
         f"92 bytes, got {2**64 - 1}"),
        (["quantize", "43.gguf", "--int8", out], "43.gguf: key 0: want a length of 1 to 65535 bytes, "
         f"got {2**64 - 1}"),
        (["verify-files", "data"], f"data/model.safetensors: header length: want 2 to 92 bytes, got {2**64 - 1}"),
    ]:
        paths = [tmp_path / word if (tmp_path / str(word)).exists() and word != MODEL else word
                 for word in arguments]
        assert fails(capsys, *paths) == f"pyengine: {tmp_path}/{message}\n", arguments
    assert sorted(tmp_path.rglob("*")) == before


# In a directory of its own, so that the installed package is what runs.
def test_as_a_process(tmp_path):
    done = subprocess.run([sys.executable, "-m", "pyengine", "info", "/no/such"], capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_traceback(tmp_path):
    done = subprocess.run(f"{sys.executable} -m pyengine info {MODEL} | true", shell=True,
                          capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stderr
