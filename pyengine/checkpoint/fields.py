"""Typed access to a GGUF's metadata and to a config.json: a value of another type is named."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FileFormatError, quote
from . import keys
from .families import FAMILIES, MODEL_TYPES, Family
from .families.qwen35moe import QWEN35MOE

if TYPE_CHECKING:
    from ..files.gguf import GGUF
    from .keys import Where


def gguf_lists(family: Family) -> keys.Lists:
    """What the keys of a GGUF of this family mean."""
    return keys.GGUF | family.gguf_keys | keys.Lists(read=frozenset(family.sizes.values()))


def hf_lists(family: Family) -> keys.Lists:
    """What the fields of a config.json of this family mean."""
    return keys.HF | family.hf_keys | keys.Lists(read=frozenset(family.sizes))


# Of gguf-py's GGUFType: files that go with a model of the same architecture.
NO_MODELS = ("adapter", "imatrix", "mmproj", "vocab")


class Metadata:
    """The architecture's keys of a GGUF, by short name.  Errors: FileFormatError, naming the key."""

    def __init__(self, gguf: GGUF):
        self.gguf, self.path = gguf, gguf.path
        architecture = gguf.metadata.require("general.architecture", str)
        kind = gguf.metadata.get("general.type")
        if isinstance(kind, str) and kind in NO_MODELS:
            raise FileFormatError(gguf.path, "general.type", f"want 'model' or no such key, got {kind!r}")
        if architecture not in FAMILIES:
            wanted = " or ".join(map(repr, FAMILIES))
            raise FileFormatError(gguf.path, "general.architecture", f"want {wanted}, got {architecture!r}")
        self.family = FAMILIES[architecture]
        self.lists = gguf_lists(self.family)

    def check_keys(self) -> None:
        """Every key of the architecture: see `keys`."""
        start, metadata = f"{self.family.architecture}.", self.gguf.metadata
        names = [key.removeprefix(start) for key in metadata if key.startswith(start)]
        values = {name: metadata[start + name] if name in self.lists.neutral else None for name in names}
        keys.check(values, self.lists, self.path, start)

    def label(self, key: str) -> str:
        assert key in self.lists.read, f"{key}: not among the keys that are read"
        return f"{self.family.architecture}.{key}"

    def has(self, key: str) -> bool:
        return self.label(key) in self.gguf.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        if default is not None and not self.has(key):
            return default
        return int(self.gguf.metadata.require(self.label(key), int))

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 field as the decimal that was meant: 1e-06, not 9.99999997e-07.

        The converter narrows config.json's number to float32; Hugging Face computes with the
        number itself, and the difference shows in the norms' last bits.
        """
        if default is not None and not self.has(key):
            return default
        value = self.gguf.metadata.require(self.label(key), float)
        with np.errstate(over="ignore"):  # a float64 beyond float32: infinite, and refused as such
            return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        return str(self.gguf.metadata.require(self.label(key), str)) if self.has(key) else default

    def array(self, key: str, of: type) -> Any:
        return self.gguf.metadata.require(self.label(key), list, of)

    def is_array(self, key: str) -> bool:
        return self.has(key) and self.gguf.metadata.type_of(self.label(key)).python_type() is list

    def error(self, key: str, problem: str) -> FileFormatError:
        return FileFormatError(self.path, self.label(key), problem)


class Fields:
    """A JSON object's values by name; null is no value.  Errors: FileFormatError, naming the field.

    labels  what a message calls a field, where that is not its name
    """

    def __init__(
        self,
        values: dict[str, Any],
        where: Where,
        labels: dict[str, str] | None = None,
        family: Family = QWEN35MOE,
    ):
        self.values, self.where, self.labels, self.family = values, where, labels or {}, family

    def integer(self, key: str, default: int | None = None) -> int:
        value: int = self._typed(key, int, default)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._typed(key, (int, float), default)
        try:
            value = float(value)
        except OverflowError:  # an integer of 400 digits
            value = math.inf
        if not math.isfinite(value):
            raise self.error(key, f"want a finite number, got {value}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value: bool = self._typed(key, bool, default)
        return value

    def text(self, key: str, default: str) -> str:
        value: str = self._typed(key, str, default)
        return value

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def label(self, key: str) -> str:
        return self.labels.get(key, key)

    def error(self, key: str, problem: str) -> FileFormatError:
        return FileFormatError(self.where, self.label(key), problem)

    def _typed(self, key: str, kind: Any, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = {int: "an integer", bool: "true or false", str: "a text"}.get(kind, "a number")
            raise self.error(key, f"want {wanted}, got {quote(value)}")
        return value


# ---- a config.json: the text model's fields may stand at the top, in `text_config`, or in both -----

OF_EACH = {"text_config", "model_type", "eos_token_id", "pad_token_id"}  # may differ
OF_ROPE = {
    "rope_parameters",
    "rope_scaling",
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "mrope_section",
}


def scopes(config: dict[str, Any], where: Where) -> list[tuple[str, dict[str, Any]]]:
    """[(prefix of labels, object)]: the text model's own first."""
    text = config.get("text_config")
    if text is None:
        return [("", config)]
    if not isinstance(text, dict):
        raise FileFormatError(where, "text_config", f"want an object, got {quote(text)}")
    return [("text_config.", text), ("", config)]


def without_nulls(scope: dict[str, Any]) -> dict[str, Any]:
    """A null counts as no field."""
    return {key: value for key, value in scope.items() if value is not None}


def read_fields(config: dict[str, Any], where: Where) -> Fields:
    """The text model's fields.  FileFormatError: a field that `keys` refuses, or one that stands in both
    objects with two values.  UnknownKeyWarning for fields of no list."""
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    family = _family(config, where)
    lists = hf_lists(family)
    for prefix, scope in scopes(config, where):
        scope = without_nulls(scope)
        keys.check(scope, lists, where, prefix)
        for key, value in scope.items():
            if key not in lists.read:
                continue
            if key in values and values[key] != value and key not in OF_EACH | OF_ROPE:
                problem = f"want {quote(value)} as {prefix}{key}, got {quote(values[key])}"
                raise FileFormatError(where, labels[key], problem)
            if key not in values:
                values[key], labels[key] = value, prefix + key
    _check_sliding_window(Fields(values, where, labels))
    return Fields(values, where, labels, family)


def _family(config: dict[str, Any], where: Where) -> Family:
    """By model_type: the text model's and the whole's must be of one family.  Without one: with experts."""
    found: Family | None = None
    for prefix, scope in scopes(config, where):
        kind = scope.get("model_type")
        if kind is None:
            continue
        known = MODEL_TYPES if found is None else (*found.model_types, found.quantized_type)
        if not isinstance(kind, str) or kind not in known:
            wanted = " or ".join(map(repr, known))
            raise FileFormatError(where, f"{prefix}model_type", f"want {wanted}, got {quote(kind)}")
        found = MODEL_TYPES[kind]
    return found or QWEN35MOE


def _check_sliding_window(fields: Fields) -> None:
    """A window counts unless `use_sliding_window` says no, as configurations of Qwen's do."""
    if fields.boolean("use_sliding_window", False):
        raise fields.error("use_sliding_window", "want false or no such key, got true")
    if not fields.has("use_sliding_window"):
        keys.check_neutral(fields.get("sliding_window"), (0,), fields.where, fields.label("sliding_window"))
