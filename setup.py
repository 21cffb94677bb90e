"""Builds the C core; everything else about the package is in pyproject.toml."""

import runpy

from setuptools import setup

setup(
    cffi_modules=["csrc/build.py:ffibuilder"],
    libraries=runpy.run_path("csrc/build.py")["libraries"],
)
