"""Reference inference for Qwen3.5-35B-A3B-class models: exact, fast, on a CPU.

    model = pyengine.load("model.gguf")
    logits = model.forward([1, 2, 3])          # float32 [3, vocab]
    answer = model.generate("Once upon a time", 100).text
"""

from .checkpoint import open_checkpoint
from .errors import CheckpointError, FileFormatError, InputError, PyengineError
from .model import ARITHMETICS, load

__all__ = ["ARITHMETICS", "CheckpointError", "FileFormatError", "InputError", "PyengineError",
           "load", "open_checkpoint"]
__version__ = "0.1.0"
