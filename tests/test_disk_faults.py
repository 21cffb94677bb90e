"""What the machine does to us: files that change while mapped, a full disk, no rights, no memory, kill -9."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN, SUPPORT

import pyengine
from pyengine.checkpoint import provenance
from pyengine.errors import FileFormatError
from pyengine.quantizer.quantize import quantize

PLAIN = GOLDEN / "pattern31.gguf"

posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX")


def child(script, *arguments, **options):
    """The script in a process of its own, with no threads before it forks; not in the clone, whose
    sources would stand before the installed package."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=SUPPORT,
        **options,
    )


# ---- a file that changes while it is mapped ------------------------------------------------------


@pytest.fixture(params=["locked", "float64"])
def loaded(tmp_path, request):
    path = tmp_path / "m.gguf"
    shutil.copy(PLAIN, path)
    return path, pyengine.load(path, request.param, threads=1)


def fault(model):
    with pytest.raises(FileFormatError) as caught:
        model.forward([1, 2, 3])
    return str(caught.value)


def test_truncated_while_mapped(loaded):
    path, model = loaded
    size = path.stat().st_size
    os.truncate(path, 1000)
    assert fault(model) == (
        f"{path}: file: want the {size} bytes that were opened, got 1000: it has changed since"
    )


def test_grown_while_mapped(loaded):
    path, model = loaded
    with open(path, "ab") as file:
        file.write(b"x")
    assert "it has changed since" in fault(model)


def test_written_to_while_mapped(loaded):
    path, model = loaded
    os.utime(path, ns=(0, path.stat().st_mtime_ns))  # read times are no change
    model.forward([1])
    with open(path, "r+b") as file:
        file.seek(200_000)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # clocks of file systems are coarse
    assert fault(model) == (
        f"{path}: file: want the bytes that were opened, got a file that was written to since"
    )


def test_a_kernel_without_large_pages(loaded, monkeypatch):
    from pyengine.files.mapped import MappedFile

    def refuse(self, advice):
        raise OSError(22, "Invalid argument")

    path, model = loaded
    monkeypatch.setattr(MappedFile, "madvise", refuse)
    assert np.array_equal(pyengine.load(path, model.arithmetic).forward([1, 2]), model.forward([1, 2]))


def test_removed_or_replaced_while_mapped_is_no_fault(loaded):
    path, model = loaded
    want = model.forward([1, 2, 3])
    path.with_name("new").write_bytes(b"another")
    os.replace(path.with_name("new"), path)
    assert np.array_equal(model.forward([1, 2, 3]), want)
    path.unlink()
    assert np.array_equal(model.forward([1, 2, 3]), want)


def test_a_shard_that_changes(tmp_path):
    quantize(PLAIN, tmp_path / "int8", shard_bytes=60_000)
    model = pyengine.load(tmp_path / "int8")
    shard = sorted((tmp_path / "int8").glob("model-*"))[1]
    os.truncate(shard, 100)
    assert fault(model).startswith(f"{shard}: file: want the ")


def test_a_source_that_changes_while_it_is_quantized(tmp_path, monkeypatch):
    shutil.copy(PLAIN, tmp_path / "m.gguf")
    original = provenance.describe_file

    def changes(path, *arguments):
        os.utime(path, ns=(0, 0))
        return original(path, *arguments)

    monkeypatch.setattr(provenance, "describe_file", changes)
    with pytest.raises(FileFormatError, match="m.gguf: file: want the bytes that were opened"):
        quantize(tmp_path / "m.gguf", tmp_path / "int8")
    assert os.listdir(tmp_path) == ["m.gguf"]


# ---- a full disk -----------------------------------------------------------------------------------

LIMITED = """
    import resource, sys
    from pyengine.cli import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[2:]))
"""


@posix
@pytest.mark.parametrize("command", ["trace", "logits"])
def test_no_room_for_an_output(tmp_path, command):
    done = child(LIMITED, 2000, command, "-m", PLAIN, "--ids", "1 2 3", "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and os.listdir(tmp_path) == []


@posix
@pytest.mark.parametrize("limit", [1000, 20_000, 100_000])
def test_no_room_for_a_checkpoint_and_then_there_is(tmp_path, limit):
    done = child(LIMITED, limit, "quantize", PLAIN, "--int8", tmp_path / "int8")
    assert (done.returncode, done.stdout) == (2, "") and "File too large" in done.stderr
    assert not (tmp_path / "int8").exists()
    quantize(PLAIN, tmp_path / "int8")
    quantize(PLAIN, tmp_path / "whole")
    assert tree(tmp_path / "int8") == tree(tmp_path / "whole")


# ---- no rights -------------------------------------------------------------------------------------

AS_NOBODY = """
    import locale, os, sys
    import pyengine.text.models, pyengine.quantizer.quantize, pyengine.oracle.trace
    # nobody may not read Python's folder: all that is needed is imported before
    from pyengine.cli import _parser, main
    _parser()
    if os.geteuid() == 0:
        os.seteuid(65534)
    sys.exit(main(sys.argv[1:]))
"""


@posix
def test_files_that_may_not_be_read_or_written(tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        if folder.owner() == "root" and os.geteuid() == 0 and folder != folder.parent:
            folder.chmod(0o755)
    secret, closed = tmp_path / "m.gguf", tmp_path / "closed"
    shutil.copy(PLAIN, secret)
    secret.chmod(0)
    closed.mkdir(mode=0o555)
    shutil.copy(PLAIN, tmp_path / "open.gguf")
    (tmp_path / "open.gguf").chmod(0o644)
    for arguments, message in [
        (["info", secret], f"{secret}: file: want a file that can be read, got: Permission denied"),
        (
            ["trace", "-m", tmp_path / "open.gguf", "--ids", "1", "-o", closed / "t"],
            f"{closed}/t.partial: Permission denied",
        ),
        (
            ["logits", "-m", tmp_path / "open.gguf", "--ids", "1", "-o", closed / "t"],
            f"{closed}/t.partial: Permission denied",
        ),
        (
            ["quantize", tmp_path / "open.gguf", "--int8", closed / "d"],
            f"{closed}/d.partial: Permission denied",
        ),
    ]:
        done = child(AS_NOBODY, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pyengine: {message}\n")
    assert os.listdir(closed) == []


# ---- no memory -------------------------------------------------------------------------------------

# Each step of memory in a child of a process that has imported everything: what is measured is loading.
STARVED = """
    import os, resource, sys
    import numpy.random, pyengine.cli, pyengine.text.models, pyengine.oracle.trace
    import pyengine.quantizer.quantize
    pyengine.cli._parser()  # the commands, which are imported with it
    out, size, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    page = resource.getpagesize()
    for step in range(12):
        pid = os.fork()
        if pid == 0:
            file = os.open(f"{out}.{step}", os.O_CREAT | os.O_WRONLY)
            os.dup2(file, 2)
            used = int(open("/proc/self/statm").read().split()[0]) * page
            resource.setrlimit(resource.RLIMIT_AS, (used + step * size,) * 2)
            os._exit(pyengine.cli.main(command))
        _, status = os.waitpid(pid, 0)
        print(step, os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="of Linux")
@pytest.mark.parametrize("command, size", [("trace", 1 << 18), ("quantize", 4 << 20)])
def test_too_little_memory_is_one_line(tmp_path, command, size):
    (tmp_path / "work").mkdir()
    target = tmp_path / "work" / "out"
    arguments = {
        "trace": ["trace", "-m", PLAIN, "-t", "1", "--ids", "1 2 3", "-o", target],
        "quantize": ["quantize", PLAIN, "-t", "1", "--int8", target],
    }[command]
    done = child(STARVED, tmp_path / "stderr", size, *arguments)
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line[0].isdigit()]
    assert codes[0] == 2 and len(codes) == 12, (codes, done.stderr)
    succeeded = codes.index(0) if 0 in codes else len(codes)
    for step, code in enumerate(codes[:succeeded]):
        said = (tmp_path / f"stderr.{step}").read_text()
        assert code == 2 and said.count("\n") == 1 and said.startswith("pyengine: "), (step, code, said)
    assert succeeded < len(codes) and target.exists()


# ---- kill -9 ---------------------------------------------------------------------------------------

# Killed before the n-th thing that it does to the file system: opening, renaming, removing, making.
KILLED = """
    import os, signal, sys
    from pyengine.quantizer.quantize import quantize
    source, folder, events = sys.argv[1], sys.argv[2], sys.argv[3:]
    for n in map(int, events):
        pid = os.fork()
        if pid == 0:
            left = n
            def hook(event, arguments):
                global left
                if event in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree"):
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            quantize(source, f"{folder}/{n}-8", f"{folder}/{n}-4", shard_bytes=40_000, threads=1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(n, os.waitstatus_to_exitcode(status), flush=True)
"""


def tree(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def check_killed(tmp_path, events):
    """-> how many of the runs were killed; each is continued to the same bytes."""
    quantize(PLAIN, tmp_path / "whole-8", tmp_path / "whole-4", shard_bytes=40_000, threads=1)
    done = child(KILLED, PLAIN, tmp_path, *events)
    codes = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(codes) == len(events) and set(codes) <= {0, -signal.SIGKILL}, done.stderr
    for n in events:
        missing = {}
        for bits in (8, 4):
            directory = tmp_path / f"{n}-{bits}"
            if directory.exists():  # then it is whole
                assert tree(directory) == tree(tmp_path / f"whole-{bits}")
            else:
                missing[f"int{bits}"] = directory
        if missing:
            quantize(PLAIN, **missing, shard_bytes=40_000, threads=1)
        for bits in (8, 4):
            assert tree(tmp_path / f"{n}-{bits}") == tree(tmp_path / f"whole-{bits}"), n
            assert not (tmp_path / f"{n}-{bits}.partial").exists()
    return sum(code != 0 for code in codes)


@posix
def test_killed_quantize_continues_to_the_same_bytes(tmp_path):
    assert check_killed(tmp_path, [1, 2, 9, 30, 55, 80]) >= 5


@posix
@pytest.mark.slow
def test_killed_at_every_stage(tmp_path):
    events = list(range(1, 500, 3))
    killed = check_killed(tmp_path, events)
    print(f"killed at {killed} places")
    assert 50 < killed < len(events)  # the last ones had finished: every stage was reached


@posix
def test_a_log_that_was_damaged_is_none(tmp_path):
    quantize(PLAIN, tmp_path / "whole", shard_bytes=40_000)
    for text in (b"", b"{", b"[1]", b'{"identity": 3}', b"\xff"):
        partial = tmp_path / "int8.partial"
        shutil.copytree(tmp_path / "whole", partial)
        (partial / "complete_files.json").write_bytes(text)
        quantize(PLAIN, tmp_path / "int8", shard_bytes=40_000)
        assert tree(tmp_path / "int8") == tree(tmp_path / "whole")
        shutil.rmtree(tmp_path / "int8")
