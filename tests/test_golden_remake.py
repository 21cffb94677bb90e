"""The goldens made again with PyTorch and transformers, byte for byte."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.golden


def test_goldens_made_again_are_equal():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    tool = Path(__file__).parents[1] / "tools" / "golden" / "make_golden.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("equal: "), done.stderr
