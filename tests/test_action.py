"""The composite action's step, run as GitHub runs it: inputs and outputs are variables and files."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from paths import GOLDEN, TESTS
from peer import Peer

ACTION = TESTS.parent / ".github" / "actions" / "verify"
MODEL = GOLDEN / "pattern31.gguf"
IDS = np.arange(8) + 40


@pytest.fixture
def python(tmp_path):
    """An interpreter whose `-m venv` makes an environment that has this package, without an index."""
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\nmkdir -p "$3/bin"\nprintf "#!/bin/sh\\n" > "$3/bin/pip"\n'
        f'printf \'#!/bin/sh\\nexec "{sys.executable}" -m pyengine "$@"\\n\' > "$3/bin/pyengine"\n'
        'chmod +x "$3/bin/pip" "$3/bin/pyengine"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.mark.skipif(not ACTION.exists(), reason="needs the repository's .github")
@pytest.mark.parametrize("fault, code", [("none", 0), ("heads", 1), ("no file", 2)])
@pytest.mark.slow
def test_the_step(python, tmp_path, fault, code):
    Peer(MODEL, [fault]).run(IDS).save(tmp_path / "mine.safetensors")
    if fault == "no file":
        (tmp_path / "mine.safetensors").unlink()
    for name in ("output", "summary"):
        (tmp_path / name).touch()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "REFERENCE": str(MODEL),
        "CANDIDATE": str(tmp_path / "mine.safetensors"),
        "BUDGET": "float32",
        "NAMES": "",
        "PACKAGE": "",
        "PYTHON": str(python),
        "REPORTS": str(tmp_path / "my reports"),
        "ACTION": str(ACTION),
        "RUNNER_TEMP": str(tmp_path),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    run = subprocess.run(["bash", ACTION / "verify.sh"], env=environment, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    reports, output = tmp_path / "my reports", (tmp_path / "output").read_text()
    assert f"reports={reports}\n" in output
    if code == 2:
        assert "ok=" not in output and "No such file" in run.stderr and "Traceback" not in run.stderr
        return
    assert f"ok={'false' if code else 'true'}\n" in output
    assert {path.name for path in reports.iterdir()} == {
        f"verdict.{kind}" for kind in ("html", "json", "md", "xml")
    }
    assert (tmp_path / "summary").read_text() == (reports / "verdict.md").read_text()
    assert ("FAILED" if code else "passed") in run.stdout
