import pytest

import pyengine
from pyengine.demo import CHECKPOINT


@pytest.fixture(scope="session")
def gguf():
    """The path of the embedded model."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def model(gguf):
    """The embedded model."""
    return pyengine.load(gguf, threads=2)
