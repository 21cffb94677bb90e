"""A known mistake beside the reference: the source of each step that it changes.

The reference is written as equations, and a mistake replaces some of its functions: so the two sources are
the difference.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from dataclasses import dataclass
from types import SimpleNamespace

from ... import reference
from ..mistakes.catalogue import MISTAKES

_MISTAKES = MISTAKES[0].__module__.rpartition(".")[0]


@dataclass(frozen=True)
class Equation:
    """A step: its name, the reference's source, and the mistake's."""

    step: str
    right: str
    wrong: str


def equations_of(name: str) -> list[Equation]:
    """Of a Match's name; nothing for what is seen in the values alone."""
    known = [
        mistake for mistake in MISTAKES if name == mistake.name or name.startswith(f"{mistake.name} at ")
    ]
    if not known:
        return []
    mistake = max(known, key=lambda mistake: len(mistake.name))
    right = {function.__name__: function for function in reference.OPERATIONS}
    model = SimpleNamespace(op=SimpleNamespace(**right), weight=_stored, inv_freq=None, rope_scale=1.0)
    try:
        mistake.change(model, 1)
    except (AttributeError, TypeError):  # it looks at the model's own sizes
        return [Equation("the model", "", _source(mistake.change))]
    found = [
        Equation(step, _source(right[step]), _source(function))
        for step, function in vars(model.op).items()
        if function is not right[step]
    ]
    if model.weight is not _stored:
        found.append(Equation("parameters", "as they are stored", _source(_inner(mistake.change))))
    return found or [Equation("the model", "", _source(mistake.change))]


def _stored(name, expert=None):
    raise AttributeError(name)


def _inner(change):
    """What a change of parameters does to their values."""
    return _closure(change).get("changed", change)


def _closure(function) -> dict[str, object]:
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    return {} if code is None else {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells)}


def _source(function) -> str:
    """With what its free names stand for, where these belong to the mistake."""
    lines = [_text(function)]
    for name, value in _closure(function).items():
        if isinstance(value, (bool, int, float, str)):
            lines.append(f"# {name} = {value!r}")
        elif getattr(value, "__module__", "").startswith(_MISTAKES) and _text(value) != lines[0]:
            lines += [f"# {name}:", _text(value)]
    return "\n".join(dict.fromkeys(lines))


def _text(function) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    try:
        lines = textwrap.dedent(inspect.getsource(function)).rstrip().split("\n")
    except (OSError, TypeError):
        return str(getattr(function, "__name__", function))
    return "\n".join(line.rstrip() for line in lines)
