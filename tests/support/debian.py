"""Debian's packages, which some tools read their text from."""

import shutil
import subprocess


def has_package(name):
    """Whether apt knows the package: without `apt-get update` it knows none."""
    if not shutil.which("apt-cache"):
        return False
    return bool(subprocess.run(["apt-cache", "show", name], capture_output=True).stdout)
