"""The tool that trains students, on two steps: it runs, it continues, its table is of what it computed."""

import json
import subprocess
import sys

import pytest
from debian import has_package
from paths import TOOLS

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("pyarrow")
    if not has_package("bible-kjv-text"):
        pytest.skip("apt-get knows no bible-kjv-text (apt-get update?)")
    out = tmp_path_factory.mktemp("distilled")

    def run():
        tool = [
            sys.executable,
            TOOLS / "train" / "distill_tiny.py",
            "-o",
            out,
            "--steps",
            "2",
            "--seeds",
            "1",
        ]
        done = subprocess.run(tool, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return out / "steps-2" / "results.json", run(), run()


def test_every_loss_is_in_the_table(ran):
    path, first, again = ran
    (result,) = json.loads(path.read_text()).values()
    rows = [line for line in first.splitlines() if line.startswith("| ") and "labels" not in line[:10]]
    assert len(rows) == len(result) - 1 == 6
    for row in rows:
        name, perplexity = (cell.strip() for cell in row.strip("| ").split("|")[:2])
        assert perplexity == f"{result[name]['perplexity']:.2f}"
    # Two steps after the same beginning, and the losses differ: so do the students.
    assert len({result[name]["perplexity"] for name in result}) == 7
    assert abs(result["teacher"]["kl"]) < 1e-6 and result["teacher"]["perplexity"] < 30
    assert again.splitlines()[-8:] == first.splitlines()[-8:]  # nothing was computed again
