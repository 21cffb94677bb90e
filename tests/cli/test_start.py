"""The start: what a command imports and reads before it can answer, and Ctrl-C meanwhile."""

import ctypes
import json
import mmap
import subprocess
import sys
from pathlib import Path

import gguf
import make_slice
import numpy as np
import pytest
from paths import GOLDEN

import pyengine
from pyengine import cli
from pyengine.decoder.model import CACHE_DTYPES, LOCKED_ARITHMETICS

MODEL = str(GOLDEN / "pattern31.gguf")


def modules_after(program):
    """Names of the modules that a process of its own has imported at the end of a program."""
    program += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return set(json.loads(done.stderr))


def command(*arguments):
    return f"from pyengine.cli import main\nassert main({list(arguments)!r}) == 0"


@pytest.mark.parametrize(
    "program, without",
    [
        ("import pyengine", "numpy gguf cffi pyengine._core"),
        (command("info"), "numpy gguf"),
        (command("info", MODEL), "tokenizers jinja2 pyengine.text pyengine.reference pyengine.decoder.model"),
        (command("--version"), "numpy gguf cffi pyengine._core"),
    ],
)
def test_what_is_not_imported(program, without):
    found = modules_after(program)
    assert not found & set(without.split()), "a quick command waits for these imports"
    assert "pyengine" in found


def test_what_is_imported_late_is_there():
    assert callable(pyengine.load) and set(pyengine.__all__) <= {*vars(pyengine), "open_checkpoint"}
    assert pyengine.open_checkpoint(MODEL).kind == "gguf"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pyengine.nothing
    assert (
        tuple(CACHE_DTYPES) == LOCKED_ARITHMETICS and (*LOCKED_ARITHMETICS, "float64") == pyengine.ARITHMETICS
    )


def test_a_command_alone_has_the_help_that_it_has_among_all():
    def helps(arguments):
        parser = cli._parser(arguments)
        choices = next(action.choices for action in parser._actions if action.choices)
        return {name: command.format_help() for name, command in choices.items()}

    everything = helps(["--help"])
    assert list(everything) == list(cli.COMMANDS)
    for name in cli.COMMANDS:
        assert helps([name])[name] == everything[name]
    rooms = {
        path.stem for path in Path(cli.__file__).parent.glob("*.py") if "def add_commands" in path.read_text()
    }
    assert set(cli._wanted(["nothing"])) == set(cli._wanted([])) == rooms


# ---- bytes ---------------------------------------------------------------------------------------


def write_sparse(path):
    """A slice of the 35B-A3B, 7 GB: its header, and a hole where the weights would be."""
    config = make_slice.slice_config(8, 1000)
    types = make_slice.slice_types(config, "Q8_0")
    writer = gguf.GGUFWriter(path, config.architecture)
    make_slice.add_metadata(writer, config, "Q8_0")
    make_slice.add_tokenizer(writer, config.vocab_size)
    for spec, kind in types.items():
        make_slice.add_tensor_info(writer, spec, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.stat().st_size
    weights = sum(-(-make_slice.file_bytes(spec, kind) // 32) * 32 for spec, kind in types.items())
    with path.open("r+b") as file:
        file.truncate(-(-header // 32) * 32 + weights)
    return header


def bytes_in_memory(path):
    """Of the file's pages, those in the page cache."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
    start = np.frombuffer(mapped, np.uint8).ctypes.data
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), pages) == 0
    return sum(page & 1 for page in bytes(pages)) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="mincore")
def test_info_reads_the_header_alone(tmp_path, capsys):
    header = write_sparse(tmp_path / "whole.gguf")
    assert cli.main(["info", str(tmp_path / "whole.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 6e9
    # The system reads some pages ahead, a few MB.
    assert bytes_in_memory(tmp_path / "whole.gguf") <= header + (64 << 20)


# ---- Ctrl-C --------------------------------------------------------------------------------------

INTERRUPTED = """
import runpy, sys

class Interrupt:
    def find_spec(name, *rest):
        if name == WHERE:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt)
sys.argv = ["pyengine", "info", MODEL]
START
"""
AS_MODULE = 'runpy.run_module("pyengine", run_name="__main__")'
AS_SCRIPT = "from pyengine.cli import main\nsys.exit(main())"  # what pip installs


@pytest.mark.parametrize(
    "where, start", [("pyengine.cli", AS_MODULE), ("numpy", AS_MODULE), ("pyengine.cli.info", AS_SCRIPT)]
)
def test_ctrl_c_while_modules_are_imported(where, start):
    program = INTERRUPTED.replace("WHERE", repr(where)).replace("MODEL", repr(MODEL)).replace("START", start)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
