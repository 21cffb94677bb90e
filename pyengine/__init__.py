"""Reference inference for Qwen3.5-35B-A3B-class models: exact, fast, on a CPU.

model = pyengine.load("model.gguf")
logits = model.forward([1, 2, 3])          # float32 [3, vocab]
answer = model.generate("Once upon a time", 100).text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import CheckpointError, FileFormatError, InputError, PyengineError
from .load import ARITHMETICS, load

if TYPE_CHECKING:
    from .checkpoint.open import open_checkpoint

__all__ = [
    "ARITHMETICS",
    "CheckpointError",
    "FileFormatError",
    "InputError",
    "PyengineError",
    "__version__",
    "load",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    """What takes time to import is imported when it is used."""
    if name == "open_checkpoint":
        from .checkpoint.open import open_checkpoint

        return open_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
