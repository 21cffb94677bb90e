"""Answers of a given form: the tokens that cannot lead to it are not drawn.

A form is one of {"json": schema}, {"regex": text}, {"choice": [texts]} and {"grammar": text}, a Lark grammar
as llguidance reads it or llama.cpp's GBNF.  llguidance (the extra `grammar`) says which tokens are allowed;
the engine gives the others the logit -inf.  Where there is no form, no logit is touched.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, quote
from ..optional import require
from .tokenizer import Tokenizer

FORMS = ("json", "regex", "choice", "grammar")


def check_form(name: str, value: Any) -> dict[str, Any] | None:
    """One of the forms above, or None.  Errors: InputError."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in FORMS:
        raise InputError(f"{name}: want an object with one of {', '.join(FORMS)}, got {quote(value)}")
    kind, form = next(iter(value.items()))
    if kind == "choice":
        if not isinstance(form, (list, tuple)) or not form or not all(isinstance(one, str) for one in form):
            raise InputError(f"{name}: want choice to be a list of texts, got {quote(form)}")
    elif kind == "json":
        if not isinstance(form, dict):
            raise InputError(f"{name}: want json to be a JSON schema, got {quote(form)}")
    elif not isinstance(form, str) or not form:
        raise InputError(f"{name}: want {kind} to be a text, got {quote(form)}")
    return value


def lark_of(form: dict[str, Any]) -> str:
    """The form as a Lark grammar whose rule `answer` is the whole answer."""
    kind, value = next(iter(form.items()))
    if kind == "json":
        return f"answer: %json {json_rule(value)}\n"
    if kind == "choice":
        return f"answer: {' | '.join(json.dumps(one) for one in value)}\n"
    if kind == "regex":
        return f"answer: /{value.replace('/', chr(92) + '/')}/\n"
    if "::=" in value:
        convert = require("llguidance.gbnf_to_lark", extra="grammar", what="grammar").gbnf_to_lark
        try:
            value = convert(value)
        except Exception as error:  # the converter's own kinds
            raise InputError(f"grammar: want GBNF, got {error}") from None
    return _renamed(value)


def json_rule(schema: dict[str, Any]) -> str:
    """A schema for a rule.  White space is where Python's json puts it, so that no answer is all blanks."""
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps({"x-guidance": spaces, **schema})


def _renamed(lark: str) -> str:
    """Its rule `start` under the name `answer`."""
    lines = lark.split("\n")
    if not any(line.startswith(("start:", "start ", "start[")) for line in lines):
        raise InputError("grammar: want a rule start (Lark) or root (GBNF), got none")
    return "\n".join(lines) + "\nanswer: start\n"


class Vocabulary:
    """A tokenizer as llguidance reads it: made once per model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        guidance = require("llguidance", extra="grammar", what="grammar")
        self.size, self._matcher = vocab_size, guidance.LLMatcher
        self._tokenizer = guidance.LLTokenizer(
            tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(tokenizer.end_ids)
        )

    def constraint(self, lark: str, after_thinking: bool = False) -> Constraint:
        """lark: a grammar with a rule `answer`.  after_thinking: two line ends may come before it.

        Errors: InputError: what llguidance does not compile.
        """
        begin = r"/\n{0,2}/ answer" if after_thinking else "answer"
        name = "start" if "\nstart" not in f"\n{lark}" else "whole"
        source = f"{name}: {begin}\n{lark}"
        if name == "whole":  # the grammar has a start of its own
            source = source.replace("start", "start_of_grammar").replace("whole", "start", 1)
        matcher = self._matcher(self._tokenizer, self._matcher.grammar_from_lark(source))
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0]
            raise InputError(f"grammar: want one that llguidance compiles, got {reason}")
        return Constraint(matcher, self.size)


class Constraint:
    """What may come next in one answer."""

    def __init__(self, matcher: Any, size: int):
        self._matcher, self._size = matcher, size
        self._mask = np.zeros((size + 31) // 32, np.uint32)

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of logits [vocab], -inf where the token cannot come.  The end ids can where all is said."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._size].view(bool)
        return np.where(allowed, logits, np.float32(-np.inf)).astype(np.float32, copy=False)

    def accept(self, token: int) -> None:
        """Note the token that came."""
        if not self._matcher.consume_token(token):
            reason = self._matcher.get_error().strip().splitlines()
            raise InputError(f"grammar: {reason[0] if reason else 'it became too large'}")
