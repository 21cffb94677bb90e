"""The list of the properties, and how one is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

from .. import strategies
from ..format import Format
from ..names import Name
from ..subject import Subject


@dataclass(frozen=True)
class Property:
    """number and title; parts: functions Format -> strategy of keyword arguments, drawn apart and
    put together; needs: what the Subject must have; cost: of one example, as a multiple of others'."""

    number: Name
    title: str
    check: Callable
    parts: tuple[Callable, ...]
    needs: tuple[str, ...]
    cost: int

    def cases(self, format: Format):
        """The strategy of all keyword arguments."""
        return st.tuples(*(part(format) for part in self.parts)).map(merged)

    @property
    def equation(self) -> str:
        return " ".join(self.check.__doc__.split("\n\n")[0].split())

    def lacks(self, subject: Subject) -> str | None:
        """Why the property does not apply to this quantizer, or None."""
        missing = [name for name in self.needs if not getattr(subject, name)]
        if missing:
            return "needs " + " and ".join(missing)
        if self.number is Name.GROUP_FOR_ITSELF and subject.format.group_size is None:
            return "needs more than one group in a row"
        return None


def merged(parts) -> dict:
    return {name: value for part in parts for name, value in part.items()}


PROPERTIES: dict[Name, Property] = {}


def a_matrix(format):
    return st.fixed_dictionaries({"x": strategies.matrices(format)})


def matrix_and(**others):
    """Cases of a matrix and whatever each of the strategies gives."""
    return a_matrix, lambda format: st.fixed_dictionaries(others)


def register(number, title, parts=(a_matrix,), needs=(), cost=1):
    """A decorator that adds a property to the list; see `Property`."""

    def add(check):
        PROPERTIES[number] = Property(number, title, check, parts, needs, cost)
        return check

    return add
