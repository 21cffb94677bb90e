"""Builds the C core; everything else about the package is in pyproject.toml."""

import runpy
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class WholeCore(sdist):
    """All of csrc travels, not only what the machine that packs it compiles."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, sorted({*files, *map(str, Path("csrc").glob("*.*"))}))


# cffi builds the extension against the stable ABI, which free-threaded Pythons do not have.
ABI3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}}

setup(
    cffi_modules=["csrc/build.py:ffibuilder"],
    libraries=runpy.run_path("csrc/build.py")["libraries"],
    cmdclass={"sdist": WholeCore},
    options=ABI3,
)
