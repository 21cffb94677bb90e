"""Builds the C core; everything else about the package is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class WholeCore(sdist):
    """All of csrc travels, not only what the machine that packs it compiles."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, sorted({*files, *map(str, Path("csrc").glob("*.*"))}))


setup(
    cffi_modules=["csrc/build.py:ffibuilder"],
    libraries=runpy.run_path("csrc/build.py")["libraries"],
    cmdclass={"sdist": WholeCore},
)
