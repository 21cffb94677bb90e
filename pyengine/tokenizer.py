"""The name under which other projects import the tokenizer; its home is `pyengine.text.tokenizer`."""

from .text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
