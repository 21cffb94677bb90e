"""A configuration applied to tensors: which value each parameter has for each of them.

As in mergekit, the parameters of a model come before those of the whole, and of a list of rules the first
one that is for the tensor gives the value.  A rule with a condition that is for no tensor is a fault.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..checkpoint.config import Config
from ..errors import FileFormatError, InputError
from .arithmetic import LEAST_DIVISOR, METHODS, Recipe, sum_in_order
from .census_file import Counts, check_counts, dead_experts, read_census
from .configuration import Condition, Configuration, Parameters, Rule, Scalar


@dataclass(frozen=True)
class Place:
    """A tensor, to rules: its name, and its layer and expert, if it has one."""

    name: str
    layer: int | None = None
    expert: int | None = None


class Settings:
    """What a configuration says for tensors of models of this Config.

    Errors: FileFormatError, of a census or of a rule that does not fit the model.
    """

    def __init__(self, configuration: Configuration, config: Config):
        self.configuration, self.config = configuration, config
        self.used: set[str] = set()
        self.censuses: dict[str, Counts] = {}  # by path, of those that were read
        self._dead: dict[str, tuple[frozenset[int], ...]] = {}
        for condition in self._conditions():
            self._check(condition)
        for rule in self._rules():
            self._check_per_expert(rule)

    # ---- checks -----------------------------------------------------------------------------

    def _rules(self) -> Iterable[Rule]:
        for parameters in (*self.configuration.own, self.configuration.shared):
            for rules in parameters.values():
                yield from rules

    def _conditions(self) -> Iterable[Condition]:
        yield from (rule.condition for rule in self._rules())
        yield from (transplant.condition for transplant in self.configuration.transplants)

    def _check(self, condition: Condition) -> None:
        layers, experts = self.config.num_hidden_layers, self.config.num_experts
        for what, numbers, count in (
            ("layers", condition.layers, layers),
            ("experts", condition.experts, experts),
        ):
            if numbers is not None and max(numbers) >= count:
                wanted = f"want {what} below {count}, as the models have, got {max(numbers)}"
                raise FileFormatError(self.configuration.where, f"{condition.place}.{what}", wanted)
        if condition.census is not None:
            counts = self._census(condition)
            self._dead[condition.place] = dead_experts(self._census_name(condition), counts, condition.below)

    def _check_per_expert(self, rule: Rule) -> None:
        experts = self.config.num_experts
        if rule.per_expert is not None and len(rule.per_expert) != experts:
            raise FileFormatError(
                self.configuration.where,
                f"{rule.condition.place}.per_expert",
                f"want {experts} numbers, one per expert, got {len(rule.per_expert)}",
            )

    def _census_name(self, condition: Condition) -> str:
        return condition.census if isinstance(condition.census, str) else self.configuration.where

    def _census(self, condition: Condition) -> Counts:
        layers, experts = self.config.num_hidden_layers, self.config.num_experts
        if not isinstance(condition.census, str):
            field = f"{condition.place}.census"
            return check_counts(self.configuration.where, field, condition.census, layers, experts)
        if condition.census not in self.censuses:
            self.censuses[condition.census] = read_census(condition.census, layers, experts)
        return self.censuses[condition.census]

    def check_all_used(self) -> None:
        """FileFormatError: a rule with a condition that gave no tensor a value."""
        for condition in self._conditions():
            if not condition.is_open and condition.place not in self.used:
                problem = "want a rule that is for some tensor and that no rule before it covers, got none"
                raise FileFormatError(self.configuration.where, condition.place, problem)

    # ---- values -----------------------------------------------------------------------------

    def transplant(self, place: Place) -> str | None:
        """The model whose tensor is taken as it is; None: the tensor is merged."""
        for transplant in self.configuration.transplants:
            condition = transplant.condition
            dead = condition.census is None or self._is_dead(condition, place)
            if dead and self._is_for(condition, place):
                self.used.add(condition.place)
                return transplant.model
        return None

    def recipe(self, place: Place) -> Recipe:
        """How the tensor is merged.  FileFormatError: a parameter has no value for it; InputError: weights
        that add up to zero where they divide."""
        said = self.configuration
        method = METHODS[said.method]
        inputs = [i for i, model in enumerate(said.models) if not (method.base and model == said.base)]
        weights = tuple(float(self._required("weight", place, i)) for i in inputs)
        normalize = bool(self._shared("normalize", place, method.normalize))
        self._shared("int8_mask", place, False)
        if normalize and abs(float(sum_in_order(_float32(weights)))) < LEAST_DIVISOR:
            raise InputError(
                f"{said.where}: {said.models[inputs[0]]}: {place.name}: want weights that do not add up to "
                f"zero, for normalize divides by their sum, got {', '.join(map(str, weights))}"
            )
        if said.method == "linear":
            return Recipe(said.method, weights, normalize=normalize)
        sparse = method.sparsify is not None
        rescale = self._shared("rescale", place, method.rescale) if sparse else None
        return Recipe(
            said.method,
            weights,
            tuple(float(self._value("density", place, i, 1.0)) for i in inputs) if sparse else (),
            normalize,
            "l1" if rescale is True else rescale or None,
            float(self._shared("lambda", place, 1.0)),
        )

    def _required(self, name: str, place: Place, model: int) -> Any:
        value = self._value(name, place, model, None)
        if value is None:
            said = self.configuration
            problem = f"want a {name} for {place.name}, got none: no rule is for it"
            raise FileFormatError(said.where, f"{said.models[model]}: {place.name}", problem)
        return value

    def _shared(self, name: str, place: Place, default: Any) -> Any:
        return self._first([self.configuration.shared], name, place, default)

    def _value(self, name: str, place: Place, model: int, default: Any) -> Any:
        return self._first([self.configuration.own[model], self.configuration.shared], name, place, default)

    def _first(self, scopes: list[Parameters], name: str, place: Place, default: Any) -> Any:
        for parameters in scopes:
            for rule in parameters.get(name, ()):
                value = self._of_rule(rule, place) if self._is_for(rule.condition, place) else None
                if value is not None:
                    self.used.add(rule.condition.place)
                    return value
        return default

    def _of_rule(self, rule: Rule, place: Place) -> Scalar | None:
        if rule.value is not None:
            return self._gradient(rule.value, place) if isinstance(rule.value, tuple) else rule.value
        if rule.per_living is not None:
            return self._of_living(rule, place)
        if place.expert is None:
            return None
        if rule.per_expert is not None:
            return rule.per_expert[place.expert]
        return rule.dead if self._is_dead(rule.condition, place) else rule.living

    def _of_living(self, rule: Rule, place: Place) -> float | None:
        if place.layer is None or rule.per_living is None:
            return None
        experts = self.config.num_experts
        return rule.per_living * ((experts - len(self._dead[rule.condition.place][place.layer])) / experts)

    def _gradient(self, values: tuple[Scalar, ...], place: Place) -> Scalar:
        """mergekit's `evaluate_setting`: between numbers, a straight line; of others, the nearest below."""
        t = self._position(place.layer)
        numbers = [value for value in values if isinstance(value, float)]
        if len(numbers) < len(values):
            return values[int(t * (len(values) - 1))]
        scaled = t * (len(numbers) - 1)
        low = int(scaled)
        part = scaled - low
        return (1 - part) * numbers[low] + part * numbers[min(len(numbers) - 1, low + 1)]

    def _position(self, layer: int | None) -> float:
        """0 for what lies before and behind the layers, and for the first layer; 1 for the last one."""
        if layer is None:
            return 0.0
        layers = self.config.num_hidden_layers
        return layer / (layers - 1) if layers > 1 else 1.0

    def _is_for(self, condition: Condition, place: Place) -> bool:
        return (
            (condition.filter is None or condition.filter in place.name)
            and (condition.layers is None or place.layer in condition.layers)
            and (condition.experts is None or place.expert in condition.experts)
        )

    def _is_dead(self, condition: Condition, place: Place) -> bool:
        if place.layer is None or place.expert is None:
            return False
        return place.expert in self._dead[condition.place][place.layer]


@functools.lru_cache(maxsize=1024)
def _float32(weights: tuple[float, ...]) -> Any:
    import numpy as np

    return np.array(weights, np.float32)
