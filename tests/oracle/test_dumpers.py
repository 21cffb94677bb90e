"""The files to copy, compiled and run: each writes a trace that this package reads."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN, SUPPORT, TESTS

from pyengine.cli import main
from pyengine.oracle.dumpers import DUMPERS, dumper
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import Trace

MAINS = SUPPORT / "dumpers"
CONVERTER = TESTS / "converter" / "A-Q8_0.gguf"
STATE = "model.layers.0.linear_attn.conv_state"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-fsanitize=address,undefined"]
C = [
    ("gcc", "-std=c99"),
    ("g++", "-xc++", "-std=c++11"),
    ("clang", "-std=c99"),
    ("clang++", "-xc++", "-std=c++20"),
]


@pytest.mark.parametrize("language", DUMPERS)
def test_the_command_prints_each(language, capsys):
    assert main(["dumper", language]) == 0
    assert capsys.readouterr().out == dumper(language)


def test_the_command_names_the_languages(capsys):
    assert main(["dumper", "cobol"]) == 2
    assert "'c', 'rust', 'torch', 'llama.cpp'" in capsys.readouterr().err


def check(path):
    trace = Trace.load(path)
    assert trace.ids.tolist() == [1, 2, 3, 4] and trace.steps == (3, 1)
    assert trace.arithmetic == "float32, by hand"
    assert trace.tensors["model.layers.0"].tolist() == [[0.5, 1], [2, 3], [4, 5], [0.5, 1]]
    assert trace.tensors["lm_head"].tolist() == [[0.5, 1]] * 2 and trace.rows["lm_head"].tolist() == [2, 3]
    part = "model.layers.1"
    assert trace.tensors[part].tolist() == [[0.5, 1], [2, 3]]
    assert trace.rows[part].tolist() == [0, 2] and trace.columns[part].tolist() == [1, 7]
    assert trace.tensors["model.layers.0.mlp.gate.2"].tolist() == [[3, 1], [2, 0], [1, 2]]
    assert trace.tensors["model.layers.2"].tolist() == [[0.5], [1], [2]]
    assert trace.tensors["model.layers.2"].dtype == np.float16
    assert trace.tensors[STATE].tolist() == [[9, 1, 2, 3, 4, 5]] and STATE not in trace.rows


def compiled(command, out):
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    subprocess.run([*command, "-o", str(out)], check=True, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", C, ids=lambda c: c[0])
def test_c_and_cpp(compiler, tmp_path):
    header = MAINS / "dump_main.c"
    (tmp_path / "pyengine_trace.h").write_text(dumper("c"))
    compiled([*compiler, *STRICT, f"-I{tmp_path}", str(header)], tmp_path / "program")
    run = subprocess.run([tmp_path / "program", tmp_path / "t"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "pyengine_trace: want a tensor once a step, got it twice: lm_head\n"
    check(tmp_path / "t")
    assert not (tmp_path / "t.partial").exists()
    lost = tmp_path / "no" / "t"
    run = subprocess.run([tmp_path / "program", lost], capture_output=True, text=True)
    assert run.returncode == 1 and "pyengine_trace: cannot be written" in run.stdout


def rustc():
    found = shutil.which("rustc") or Path.home() / ".cargo" / "bin" / "rustc"
    return found if os.access(found, os.X_OK) else None


@pytest.mark.slow
def test_rust(tmp_path):
    if rustc() is None:
        pytest.skip("needs rustc")
    shutil.copy(MAINS / "dump_main.rs", tmp_path)
    (tmp_path / "pyengine_trace.rs").write_text(dumper("rust"))
    command = [rustc(), "--edition", "2021", "-D", "warnings", str(tmp_path / "dump_main.rs")]
    compiled([str(word) for word in command], tmp_path / "program")
    run = subprocess.run([tmp_path / "program", tmp_path / "t"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "pyengine_trace: lm_head: want a tensor once a step, got it twice\n"
    check(tmp_path / "t")


# ---- PyTorch ---------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_hooks_on_transformers(dtype, tmp_path, monkeypatch):
    """A prompt and four decode steps on forced tokens, in the model's dtype; then part of it."""
    torch = pytest.importorskip("torch")
    from transformers_models import transformers_model

    monkeypatch.syspath_prepend(Path(dumper.__code__.co_filename).parent)
    hooks = pytest.importorskip("pyengine_trace_torch")
    model = transformers_model(GOLDEN / "pattern31.gguf", dtype)
    oracle = Oracle(None, GOLDEN / "pattern31.gguf")
    ids = torch.tensor(np.random.default_rng(1729).integers(0, 288, (1, 20)))
    with torch.no_grad(), hooks.Hooks(model) as recorded:
        out = model(input_ids=ids[:, :16], use_cache=True)
        for at in range(16, 20):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
    recorded.save(tmp_path / "t")
    header = (tmp_path / "t").read_bytes()[8:30_000]
    kinds = {"bfloat16": b"BF16", "float16": b"F16"}
    assert header.count(b'"dtype": "%s"' % kinds[dtype]) > 70
    trace = Trace.load(tmp_path / "t")
    assert trace.steps == (16, 1, 1, 1, 1) and trace.arithmetic.endswith(dtype)
    verdict = oracle.verify(trace, dtype)
    assert verdict.ok and not verdict.missing and not verdict.unknown, as_text(verdict)
    with torch.no_grad(), hooks.Hooks(model, tokens=[0, 7, 19], channels=range(4)) as recorded:
        model(input_ids=ids)
    recorded.save(tmp_path / "t")
    trace = Trace.load(tmp_path / "t")
    assert trace.tensors["lm_head"].shape == (3, 4) and not trace.known() & {"lm_head"}
    verdict = oracle.verify(trace, dtype)
    assert verdict.ok, as_text(verdict)


def test_torch_hooks_need_torch_alone():
    """The file imports nothing of this package."""
    imports = re.findall(r"^(?:from|import) (\w+)", dumper("torch"), re.MULTILINE)
    assert set(imports) - set(sys.stdlib_module_names) == {"torch"}


# ---- llama.cpp -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_program(tmp_path_factory):
    """A C++ program with the callback, on llama-cpp-python's library and its headers."""
    library = pytest.importorskip("llama_cpp").__file__
    lib, packages = Path(library).parent / "lib", Path(library).parents[1]
    include = next(
        (p for p in (packages / "include", lib.parent / "include") if (p / "llama.h").exists()), None
    )
    if include is None:
        pytest.skip("needs llama.h, which this build of llama-cpp-python did not install")
    folder = tmp_path_factory.mktemp("llama")
    (folder / "pyengine_trace.h").write_text(dumper("c"))
    (folder / "pyengine_cb_eval.h").write_text(dumper("llama.cpp"))
    libraries = [f"-L{lib}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{lib}"]
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", f"-I{include}", f"-I{folder}"]
    compiled(["g++", *flags, str(MAINS / "cb_eval_main.cpp"), *libraries], folder / "program")
    return folder / "program"


@pytest.mark.slow
@pytest.mark.parametrize("last_alone, split", [("0", "12"), ("1", "8")])
def test_llama_cpps_callback(llama_program, last_alone, split, tmp_path):
    """In one piece, and as a prompt and a piece behind it, with the last token's logits alone."""
    ids = [str(i) for i in (5, 9, 33, 2, 1, 7, 88, 3, 4, 4, 10, 11)]
    command = [llama_program, CONVERTER, tmp_path / "t", last_alone, split, *ids]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    trace = Trace.load(tmp_path / "t")
    assert trace.steps == ((12,) if split == "12" else (8, 4))
    verdict = Oracle(None, CONVERTER).verify(tmp_path / "t", "int8-activations", seconds=30)
    assert verdict.ok and not verdict.missing, as_text(verdict)
