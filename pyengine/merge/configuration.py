"""A merge's configuration: mergekit's YAML, and what goes beyond it.  README.md shows all of it.

Every key is understood or refused by name.  What a configuration says is kept as it stands; `settings.py`
applies it to tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..checks import is_integer, is_number
from ..errors import FileFormatError, nearest, quote
from ..optional import require
from ..seed import SEED
from .arithmetic import METHODS, RESCALES
from .census_file import BELOW

Where = str | Path
Scalar = bool | float | str

PER_MODEL = ("weight", "density")
OF_CENSUS = ("dead", "living", "per_living")
SHARED = ("normalize", "rescale", "lambda", "int8_mask")
OF_METHOD = {
    "linear": ("weight", "normalize"),
    "task_arithmetic": ("weight", "normalize", "lambda", "int8_mask"),
    **dict.fromkeys(
        ("ties", "dare_linear", "dare_ties"),
        ("weight", "density", "normalize", "rescale", "lambda", "int8_mask"),
    ),
}
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
MOST_SEED = (1 << 63) - 1

_KEYS = (
    "models",
    "base_model",
    "merge_method",
    "dtype",
    "out_dtype",
    "parameters",
    "tokenizer_source",
    "tokenizer",
    "seed",
    "transplants",
    "other_tensors",
)
_REFUSED = {
    "slices": "want `models`: layers are chosen by a rule's `layers`, and no layer is repeated or left out",
    "modules": "want `models`: the merge is of the text model",
    "chat_template": "want none: the template comes with the tokenizer (tokenizer_source)",
    "name": "want none: the directory's name is given on the command line",
}


@dataclass(frozen=True)
class Condition:
    """Which tensors a rule is for; None: all.

    filter   a part of the tensor's name
    layers   numbers of layers
    experts  numbers of experts
    census   (path or counts as they stand, below): experts that are dead there; `place` names the key
    """

    place: str
    filter: str | None = None
    layers: frozenset[int] | None = None
    experts: frozenset[int] | None = None
    census: Any = None
    below: float = BELOW

    @property
    def is_open(self) -> bool:
        return self.filter is None and self.layers is None and self.experts is None and self.census is None


@dataclass(frozen=True)
class Rule:
    """One entry of a parameter: a condition and its value, in one of these forms.

    value       a scalar, or a gradient over the layers (a tuple)
    per_expert  a number per expert
    dead, living   numbers for experts that are dead or not in the condition's census; None: no value
    per_living  a number that is multiplied by the living experts' part of the layer's experts
    """

    condition: Condition
    value: Scalar | tuple[Scalar, ...] | None = None
    per_expert: tuple[float, ...] | None = None
    dead: float | None = None
    living: float | None = None
    per_living: float | None = None


Parameters = dict[str, tuple[Rule, ...]]


@dataclass(frozen=True)
class Transplant:
    condition: Condition
    model: str


@dataclass(frozen=True)
class Other:
    """Tensors that are no part of the text model: copied from a model, or left out (None)."""

    filter: str
    copy: str | None


@dataclass(frozen=True)
class Configuration:
    """models   as the configuration names them, in its order; a base model that is not listed is the last
    own      the parameters of each model
    """

    where: str
    method: str
    models: tuple[str, ...]
    base: str | None
    own: tuple[Parameters, ...]
    shared: Parameters
    dtype: str  # of safetensors
    tokenizer: str
    seed: int
    transplants: tuple[Transplant, ...]
    others: tuple[Other, ...]
    document: dict[str, Any]


def read_configuration(path: str | Path) -> Configuration:
    """A YAML file.  FileFormatError: path, key, wanted, got; InputError without PyYAML."""
    return parse_configuration(_load_yaml(Path(path)), path)


def _load_yaml(path: Path) -> dict[str, Any]:
    yaml = require("yaml", extra="merge", what="pyengine merge", package="PyYAML")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """A key twice is a fault; PyYAML keeps the last one."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if not isinstance(name, str) or name in seen:
                    problem = (
                        f"the key {name!r:.200} twice" if isinstance(name, str) else f"a key {name!r:.200}"
                    )
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {problem}")
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.load(text, Loader)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise FileFormatError(path, "file", f"want YAML, got {' '.join(str(error).split())}") from None
    except OSError as error:
        raise FileFormatError(path, "file", f"want a file that can be read, got: {error.strerror}") from None
    if not isinstance(document, dict):
        raise FileFormatError(path, "file", f"want keys and values, got {quote(document)}")
    return document


def parse_configuration(document: dict[str, Any], where: Where) -> Configuration:
    """The parsed YAML, checked."""
    return _Parser(document, where).configuration()


class _Parser:
    def __init__(self, document: dict[str, Any], where: Where):
        self.document, self.where = document, where

    def fail(self, field: str, problem: str) -> NoReturn:
        raise FileFormatError(self.where, field, problem)

    # ---- the whole --------------------------------------------------------------------------

    def configuration(self) -> Configuration:
        said = self.document
        for key in said:
            if key in _REFUSED:
                self.fail(key, f"{_REFUSED[key]}, got one")
        self.keys("", said, _KEYS)
        self.method = self.choice("merge_method", said.get("merge_method"), tuple(METHODS))
        models, own = self.models()
        base = self.base(models)
        if base is not None and base not in models:
            models, own = [*models, base], [*own, {}]
        elif base is not None and METHODS[self.method].base and own[models.index(base)]:
            place = f"models[{models.index(base)}].parameters"
            self.fail(place, f"want none of the base model, which {self.method} changes, got some")
        if len(models) < 2:
            self.fail("models", f"want two models or more, the base among them, got {len(models)}")
        return Configuration(
            where=str(self.where),
            method=self.method,
            models=tuple(models),
            base=base,
            own=tuple(own),
            shared=self.parameters("parameters", said.get("parameters"), (*PER_MODEL, *SHARED)),
            dtype=self.dtype(),
            tokenizer=self.tokenizer(models, base),
            seed=self.seed(),
            transplants=self.transplants(models),
            others=self.others(models),
            document=said,
        )

    def models(self) -> tuple[list[str], list[Parameters]]:
        names: list[str] = []
        own: list[Parameters] = []
        for i, entry in enumerate(self.list_("models", self.document.get("models"))):
            place = f"models[{i}]"
            self.keys(place, entry, ("model", "parameters"))
            name = self.path(f"{place}.model", entry.get("model"))
            if name in names:
                self.fail(f"{place}.model", f"want each model once, got {name} twice")
            names.append(name)
            own.append(self.parameters(f"{place}.parameters", entry.get("parameters"), PER_MODEL))
        return names, own

    def base(self, models: list[str]) -> str | None:
        if "base_model" in self.document:
            return self.path("base_model", self.document["base_model"])
        if METHODS[self.method].base:
            self.fail("base_model", f"want a model, for {self.method} merges differences from it, got none")
        return None

    def dtype(self) -> str:
        names = [
            self.choice(key, self.document[key], tuple(DTYPES))
            for key in ("dtype", "out_dtype")
            if key in self.document
        ]
        return DTYPES[names[-1]] if names else "BF16"

    def tokenizer(self, models: list[str], base: str | None) -> str:
        first = models[0] if base is None else base
        source = self.document.get("tokenizer_source")
        if "tokenizer" in self.document:
            if source is not None:
                self.fail("tokenizer", "want it or tokenizer_source, got both")
            self.keys("tokenizer", self.document["tokenizer"], ("source",))
            source = self.document["tokenizer"].get("source")
        if source is None or source == "base":
            return first
        if source == "union":
            self.fail("tokenizer_source", "want base or a model: the models have one vocabulary, got union")
        return self.one_of_models("tokenizer_source", source, models)

    def seed(self) -> int:
        seed = self.document.get("seed", SEED)
        if not is_integer(seed) or not 0 <= seed <= MOST_SEED:
            self.fail("seed", f"want an integer from 0 to {MOST_SEED}, got {quote(seed)}")
        return int(seed)

    def transplants(self, models: list[str]) -> tuple[Transplant, ...]:
        found = []
        for i, entry in enumerate(self.list_("transplants", self.document.get("transplants", []))):
            place = f"transplants[{i}]"
            self.keys(place, entry, ("model", "filter", "layers", "experts", "census", "below"))
            condition = self.condition(place, entry)
            found.append(
                Transplant(condition, self.one_of_models(f"{place}.model", entry.get("model"), models))
            )
        return tuple(found)

    def others(self, models: list[str]) -> tuple[Other, ...]:
        found = []
        for i, entry in enumerate(self.list_("other_tensors", self.document.get("other_tensors", []))):
            place = f"other_tensors[{i}]"
            self.keys(place, entry, ("filter", "copy", "leave_out"))
            copy = entry.get("copy")
            if (copy is None) != (entry.get("leave_out") is True):
                self.fail(place, "want `copy: MODEL` or `leave_out: true`, one of them")
            if copy is not None:
                copy = self.one_of_models(f"{place}.copy", copy, models)
            found.append(Other(self.text(f"{place}.filter", entry.get("filter")), copy))
        return tuple(found)

    # ---- parameters -------------------------------------------------------------------------

    def parameters(self, place: str, said: Any, known: tuple[str, ...]) -> Parameters:
        if said is None:
            return {}
        if isinstance(said, dict):
            for name in said:
                if name in SHARED and name not in known:
                    self.fail(
                        f"{place}.{name}", "want it in the parameters of the whole, got it for one model"
                    )
                if name in (*PER_MODEL, *SHARED) and name not in OF_METHOD[self.method]:
                    self.fail(f"{place}.{name}", f"want none, for {self.method} does not have it, got one")
        self.keys(place, said, tuple(name for name in known if name in OF_METHOD[self.method]))
        return {name: self.setting(f"{place}.{name}", name, value) for name, value in said.items()}

    def setting(self, place: str, name: str, said: Any) -> tuple[Rule, ...]:
        """A scalar, a gradient, one rule or a list of rules."""
        if isinstance(said, dict):
            return (self.rule(place, name, said),)
        if isinstance(said, list) and any(isinstance(entry, dict) for entry in said):
            return tuple(self.rule(f"{place}[{i}]", name, entry) for i, entry in enumerate(said))
        return (Rule(Condition(place), self.value(place, name, said)),)

    def rule(self, place: str, name: str, said: Any) -> Rule:
        forms = ("value", "per_expert", "census")
        known: tuple[str, ...] = ("filter", "layers", "experts", *forms)
        if name in PER_MODEL:
            known = (*known, "below", *OF_CENSUS)
        self.keys(place, said, known)
        if sum(form in said for form in forms) != 1 or (name in SHARED and "value" not in said):
            wanted = "value" if name in SHARED else "one of value, per_expert, census"
            self.fail(place, f"want {wanted}, got {quote(sorted(said))}")
        census = said.get("census")
        condition = self.condition(place, said)

        def number(key: str, value: Any) -> float:
            return float(self.scalar(f"{place}.{key}", name, value))

        of_census = {key: number(key, said[key]) for key in OF_CENSUS if key in said}
        if (census is None) == bool(of_census) or ("per_living" in of_census and len(of_census) > 1):
            self.fail(place, "want dead, living or both with a census, or per_living alone")
        if "per_expert" in said:
            numbers = self.list_(f"{place}.per_expert", said["per_expert"])
            return Rule(
                condition, per_expert=tuple(number(f"per_expert[{i}]", n) for i, n in enumerate(numbers))
            )
        if census is not None:
            dead, living, per_living = (of_census.get(key) for key in OF_CENSUS)
            return Rule(condition, dead=dead, living=living, per_living=per_living)
        return Rule(condition, self.value(f"{place}.value", name, said["value"]))

    def condition(self, place: str, said: dict[str, Any]) -> Condition:
        part = said.get("filter")
        if part is not None:
            part = self.text(f"{place}.filter", part)
        below = said.get("below", BELOW)
        if "below" in said and "census" not in said:
            self.fail(f"{place}.below", "want it with a census, got it alone")
        if not is_number(below) or not 0 < below <= 1:
            self.fail(
                f"{place}.below", f"want a part of the even share, above 0 and up to 1, got {quote(below)}"
            )
        census = said.get("census")
        if census is not None and not isinstance(census, (str, list)):
            self.fail(f"{place}.census", f"want the path of a census, got {quote(census)}")
        return Condition(
            place,
            None if part == "*" else part,
            self.numbers(f"{place}.layers", said.get("layers")),
            self.numbers(f"{place}.experts", said.get("experts")),
            census,
            float(below),
        )

    def numbers(self, place: str, said: Any) -> frozenset[int] | None:
        """A number, or a list of numbers and of ranges such as "4-7"."""
        if said is None:
            return None
        found: set[int] = set()
        for entry in said if isinstance(said, list) else [said]:
            first, dash, last = str(entry).partition("-")
            bounds = [part for part in (first, last) if part.isascii() and part.isdigit() and len(part) < 7]
            if (
                isinstance(entry, bool)
                or len(bounds) != (2 if dash else 1)
                or int(bounds[-1]) < int(bounds[0])
            ):
                self.fail(place, f'want numbers, or ranges as "4-7", got {quote(entry)}')
            found |= set(range(int(bounds[0]), int(bounds[-1]) + 1))
        if not found:
            self.fail(place, "want one number or more, got none")
        return frozenset(found)

    def value(self, place: str, name: str, said: Any) -> Scalar | tuple[Scalar, ...]:
        if isinstance(said, list):
            if not said:
                self.fail(place, "want a value or several, got an empty list")
            return tuple(self.scalar(f"{place}[{i}]", name, entry) for i, entry in enumerate(said))
        return self.scalar(place, name, said)

    def scalar(self, place: str, name: str, said: Any) -> Scalar:
        if name in ("normalize", "int8_mask") or (name == "rescale" and isinstance(said, bool)):
            if not isinstance(said, bool):
                self.fail(place, f"want true or false, got {quote(said)}")
            return said
        if name == "rescale":
            if said not in RESCALES:
                self.fail(place, f"want true, false, {' or '.join(RESCALES)}, got {quote(said)}")
            rule = str(said)
            if rule == "density" and self.method == "ties":
                self.fail(
                    place, "want l1, for ties keeps no random part whose density would divide, got density"
                )
            return rule
        number = self.number(said)
        if number is None or not math.isfinite(number):
            self.fail(place, f"want a number, got {quote(said)}")
        if name == "density" and not 0 <= number <= 1:
            self.fail(place, f"want a density from 0 to 1, got {said}")
        if abs(number) > 3e38:
            self.fail(place, f"want a number that float32 holds, got {said}")
        return number

    @staticmethod
    def number(said: Any) -> float | None:
        """YAML 1.1 reads 1e-3 as a text; mergekit takes it for the number."""
        if isinstance(said, str) or is_number(said):
            try:
                return float(said)
            except (ValueError, OverflowError):
                return None
        return None

    # ---- plain values -----------------------------------------------------------------------

    def keys(self, place: str, said: Any, known: tuple[str, ...]) -> None:
        if not isinstance(said, dict):
            self.fail(place or "file", f"want {', '.join(known)}, got {quote(said)}")
        for key in said:
            if key not in known:
                near = nearest(str(key), known)
                hint = f" (did you mean {near}?)" if near else ""
                field = f"{place}.{key}" if place else str(key)
                self.fail(field, f"want one of {', '.join(known)}, got a key that is not understood{hint}")

    def list_(self, place: str, said: Any) -> list[Any]:
        if not isinstance(said, list):
            self.fail(place, f"want a list, got {quote(said)}")
        return said

    def text(self, place: str, said: Any) -> str:
        if not isinstance(said, str) or not said:
            self.fail(place, f"want a text, got {quote(said)}")
        return said

    def path(self, place: str, said: Any) -> str:
        return self.text(place, said)

    def choice(self, place: str, said: Any, known: tuple[str, ...]) -> str:
        if not isinstance(said, str) or said not in known:
            self.fail(place, f"want {' or '.join(known)}, got {quote(said)}")
        return said

    def one_of_models(self, place: str, said: Any, models: list[str]) -> str:
        return self.choice(place, said, tuple(models))
