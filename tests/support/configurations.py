"""A model's configuration as its file gives it, and the message where the file gives none."""

import pytest

from pyengine.checkpoint.config import Config
from pyengine.errors import CheckpointError, FileFormatError
from pyengine.files.gguf import GGUF


def config_of(path):
    return Config.from_gguf(GGUF.open(path))


def gguf_fault(path):
    """The message after the path."""
    with pytest.raises((FileFormatError, CheckpointError)) as caught:
        config_of(path)
    return str(caught.value).removeprefix(f"{path}: ")


def hf_fault(config):
    """The message after the file's name."""
    with pytest.raises((FileFormatError, CheckpointError)) as caught:
        Config.from_hf(config)
    return str(caught.value).removeprefix("config.json: ")
