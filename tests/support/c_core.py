"""The sources of the C core and a compiler, for tests that compile them."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from paths import TESTS

CSRC = TESTS.parent / "csrc"
COMPILER = shlex.split(os.environ.get("CC", "cc"))
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C compiler")


def compilations(machine, root=TESTS.parent):
    """[(source below root, its flags)] of the whole core, as csrc/build.py prints them."""
    command = [sys.executable, "csrc/build.py", machine]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [(line.split()[0], line.split()[1:]) for line in printed.splitlines()]
