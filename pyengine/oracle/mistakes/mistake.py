"""What a known mistake is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from ...reference import ReferenceModel


@dataclass(frozen=True)
class Mistake:
    """change(model, token) alters a copy of the model; token is where the candidate goes wrong first.

    at_token: it happens from one token on, looked for among the NEAR before the first wrong one
    looks_ahead: a token's values depend on later tokens
    history: it leaves the first token as it is, in every tensor: only what came before can make a token wrong
    """

    name: str
    change: Callable[[ReferenceModel, int], None]
    at_token: bool = False
    looks_ahead: bool = False
    history: bool = False

    @property
    def needs_history(self) -> bool:
        """Whether the first token stays as it is."""
        return self.history or self.at_token

    def made(self, model: ReferenceModel, token: int = 0) -> ReferenceModel:
        """The model with the mistake."""
        twin = copy.copy(model)
        twin.op = SimpleNamespace(**vars(model.op))
        self.change(twin, token)
        return twin


# ---- changes ---------------------------------------------------------------------------------


def with_operation(**functions):
    """Other operations in place of the model's."""

    def change(model, token):
        vars(model.op).update(functions)

    return change


def with_parameter(suffixes, changed):
    """changed(values, model) in place of every parameter whose name ends so."""

    def change(model, token):
        stored, of = model.weight, model
        model.weight = lambda name, expert=None: (
            changed(stored(name, expert), of) if name.endswith(suffixes) else stored(name, expert)
        )

    return change


def with_result(suffix, changed):
    """changed(values, input, model) in place of the output of every linear map whose name ends so."""

    def change(model, token):
        linear = type(model).linear
        model.linear = lambda x, name, record: (
            record(name, changed(model.op.linear(x, model.weight(f"{name}.weight")), x, model))
            if name.endswith(suffix)
            else linear(model, x, name, record)
        )

    return change


def with_residual(function):
    """function(hidden, its norm, y) in place of hidden + y, at both residuals of every layer."""

    def change(model, token):
        norm, add, last = type(model).norm, model.op.add, [None, None]

        def noted(x, name, record):
            last[:] = x, norm(model, x, name, record)
            return last[1]

        model.norm = noted
        model.op.add = lambda x, y: function(x, last[1], y) if x is last[0] else add(x, y)

    return change


def with_replacement(**others):
    """The parameter of the other name in place of each."""

    def change(model, token):
        stored = model.weight

        def weight(name, expert=None):
            for mine, other in others.items():
                if name.endswith((f"{mine}.weight", f".experts.{mine}")):
                    return stored(name.replace(mine, other), expert)
            return stored(name, expert)

        model.weight = weight

    return change
