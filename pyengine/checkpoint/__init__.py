"""Names, shapes, dtypes and head order of a model's parameters, whatever file they come from."""

from .checkpoint import Checkpoint
from .open import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
