"""Both models with text in and text out, as `load` returns them."""

from __future__ import annotations

from ..decoder.model import LockedModel
from ..reference import ReferenceModel
from .model import TextModel


class LockedTextModel(TextModel, LockedModel):
    """The engine, with text in and text out."""


class ReferenceTextModel(TextModel, ReferenceModel):
    """The specification, with text in and text out."""
