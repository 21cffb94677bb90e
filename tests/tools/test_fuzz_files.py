"""tools/check/fuzz_files.py: every file of the corpus, some changed ones, and planted faults."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz_files
import pytest

from pyengine.files import gguf, safetensors, strict_json

READERS = ["gguf", "safetensors", "trace", "json", "ids", "model", "blocks"]


@pytest.fixture(autouse=True)
def readers_get_their_own_files_back(monkeypatch):
    for module in (gguf, safetensors, strict_json):
        monkeypatch.setattr(module, "map_file", module.map_file)


@pytest.fixture
def watched(tmp_path):
    """name -> a Watch."""

    def make(name):
        return fuzz_files.Watch(name, fuzz_files.TARGETS[name](), tmp_path)

    return make


@pytest.mark.parametrize("name", READERS)
def test_no_fault_in_the_corpus_and_near_it(watched, name):
    watch = watched(name)
    runs = 40 if name in ("model", "blocks") else 1000
    fuzz_files.run_mutator(watch, watch.target, runs, 60, fuzz_files.SEED)
    assert watch.faults == 0, watch.report(1)
    assert watch.inputs == runs and watch.accepted >= 1


@pytest.mark.parametrize("name", ["gguf", "safetensors", "trace", "json"])
def test_the_corpus_itself_is_accepted(watched, name):
    watch = watched(name)
    for data in watch.target.seeds:
        watch(data)
    assert watch.accepted == len(watch.target.seeds) and watch.faults == 0


def test_chat_templates_stay_in_their_sandbox(tmp_path):
    """In a process of its own: an audit hook stays for good."""
    pytest.importorskip("jinja2")
    done = subprocess.run(
        [sys.executable, fuzz_files.__file__, "template", "--runs", "150", "--findings", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " 150 inputs" in done.stdout, done.stdout + done.stderr


def test_one_target_leaves_nothing_behind_for_the_next(tmp_path):
    """The readers' targets replace the mapped file and limit the process's memory."""
    done = subprocess.run(
        [
            sys.executable,
            fuzz_files.__file__,
            "gguf",
            "safetensors",
            "model",
            "--runs",
            "64",
            "--findings",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("64 inputs") == 3, done.stdout + done.stderr


@pytest.mark.parametrize(
    "work, code",
    [
        (lambda: 0, 0),
        (lambda: 1, 1),
        (lambda: 1 // 0, 1),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    ],
)
def test_what_happens_in_a_target_s_process_is_its_exit_code(work, code):
    assert fuzz_files.apart(work) == code


def test_a_target_ends_with_its_parent(tmp_path):
    command = [sys.executable, fuzz_files.__file__, "json", "--seconds", "60", "--findings", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        last = tmp_path / "json.last"
        deadline = time.monotonic() + 30
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        process.communicate(timeout=20)  # the pipes are closed when the last process that has them is gone
        assert process.returncode == 128 + signal.SIGTERM


def test_a_replay_wants_a_target(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fuzz_files.py", "--replay", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        fuzz_files.main()
    assert stop.value.code == 2 and "--replay: want one TARGET" in capsys.readouterr().err


def test_taken_apart_and_put_together_is_the_same():
    for name in READERS[:5]:
        target = fuzz_files.TARGETS[name]()
        for seed, fields in zip(target.seeds, target.pool):
            assert b"".join(content for _, content in fields) == seed
            assert len(fields) >= 4


def raises(data):
    raise KeyError("planted")


FAULTS = {
    "exception": (raises, "KeyError: 'planted'"),
    "memory": (lambda data: bytes(50 << 20), "bytes for"),
    "hang": (lambda data: _spin(1.1), " s"),
}


def _spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_kept(watched, monkeypatch, capsys, fault):
    run, message = FAULTS[fault]
    monkeypatch.setattr(fuzz_files, "SAMPLE", 1)
    watch = watched("gguf")
    watch.target.run = run
    watch(b"input")
    assert watch.faults == 1 and message in capsys.readouterr().out
    assert (Path(watch.findings) / "gguf-1").read_bytes() == b"input"
    assert watch.last[8:13] == b"input"  # should the process die
