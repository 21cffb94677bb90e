"""What a GGUF or a config.json says about rotary positions: plain ones, or YaRN; all else is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..errors import FileFormatError, quote
from . import keys
from .fields import OF_ROPE, Fields, Metadata, scopes, without_nulls
from .rope import Yarn, attention_factor

if TYPE_CHECKING:
    from collections.abc import Callable

    from .keys import Where

MAX_CONTEXT = 2**31 - 1


class Rope(NamedTuple):
    theta: float
    rotary_dim: int  # entries of a head that turn
    mrope_section: tuple[int, ...]
    yarn: Yarn | None


# ---- GGUF ------------------------------------------------------------------------------------------


def rope_of_gguf(meta: Metadata) -> Rope:
    sections = meta.array("rope.dimension_sections", int) if meta.has("rope.dimension_sections") else ()
    return Rope(
        theta=meta.number("rope.freq_base"),
        rotary_dim=meta.integer("rope.dimension_count"),
        mrope_section=tuple(int(n) for n in sections[:3]),
        yarn=_yarn_of_gguf(meta),
    )


def _yarn_of_gguf(meta: Metadata) -> Yarn | None:
    """YaRN, or None.  llama.cpp's converter writes transformers' attention_factor as yarn_attn_factor."""
    kind, key = meta.text("rope.scaling.type", "none"), "rope.scaling.factor"
    if meta.number("rope.scale_linear", 1.0) not in (0, 1):
        raise meta.error("rope.scale_linear", f"want 1, got {meta.number('rope.scale_linear')}")
    if kind == "yarn":
        given = (
            meta.number("rope.scaling.yarn_attn_factor")
            if meta.has("rope.scaling.yarn_attn_factor")
            else None
        )
        yarn = Yarn(
            factor=meta.number(key),
            original_max_position_embeddings=meta.integer(
                "rope.scaling.original_context_length", meta.integer("context_length")
            ),
            attention_factor=given if given is not None else attention_factor(max(meta.number(key), 1.0)),
            beta_fast=meta.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=meta.number("rope.scaling.yarn_beta_slow", 1.0),
        )
        return _checked(yarn, meta.error, _GGUF_NAMES)
    if kind not in ("none", "linear"):
        raise meta.error("rope.scaling.type", f"want 'none' or 'yarn', got {quote(kind)}")
    # llama.cpp takes a factor without a type for linear scaling, and a factor of 0 for none.
    for name in (key, "rope.scaling.yarn_attn_factor"):
        if meta.number(name, 1.0) not in (0, 1):
            linear = "no such key (linear)" if not meta.has("rope.scaling.type") else repr(kind)
            raise meta.error(
                "rope.scaling.type", f"want 'yarn' as {meta.label(name)} is {meta.number(name)}, got {linear}"
            )
    return None


_GGUF_NAMES = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}

# ---- config.json -----------------------------------------------------------------------------------


def rope_of_hf(config: dict[str, Any], fields: Fields, head_dim: int) -> Rope:
    """From `rope_parameters`, `rope_scaling` and the fields beside them, at the top and in `text_config`.

    FileFormatError: two places that contradict each other, a type that is not computed, a value out of
    its range.
    """
    said = _said(config, fields.where)
    share = said.number("partial_rotary_factor", 0.25)
    if not 0 < share <= 1:
        raise said.error("partial_rotary_factor", f"want a share of head_dim, 0 to 1, got {share}")
    section = said.get("mrope_section") or []
    if not isinstance(section, list) or not all(type(n) is int for n in section):
        raise said.error("mrope_section", f"want a list of integers, got {quote(section)}")
    return Rope(said.number("rope_theta"), int(head_dim * share), tuple(section), _yarn_of_hf(said, fields))


def _said(config: dict[str, Any], where: Where) -> Fields:
    """The rotary fields of all places as one object; each is labeled with its place."""
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}

    def note(place: str, given: dict[str, Any]) -> None:
        for key, value in given.items():
            name = "rope_type" if key == "type" else key
            if value is None and name == "truncate":  # transformers takes a null for false
                raise FileFormatError(where, place + key, "want true or false, got None")
            if value is None and name != "factor":  # a null factor is one that follows from the contexts
                continue
            if name not in values or values[name] is None:
                values[name], labels[name] = value, place + key
            elif value is not None and value != values[name]:
                problem = f"want {quote(value)} as {place}{key}, got {quote(values[name])}"
                raise FileFormatError(where, labels[name], problem)

    for prefix, scope in scopes(config, where):
        for place in ("rope_parameters", "rope_scaling"):
            given = scope.get(place) or {}
            if not isinstance(given, dict):
                raise FileFormatError(where, prefix + place, f"want an object, got {quote(given)}")
            keys.check(without_nulls(given), keys.ROPE, where, f"{prefix}{place}.")
            note(f"{prefix}{place}.", {key: given[key] for key in given if key in keys.ROPE.read})
        note(prefix, {key: scope[key] for key in scope if key in OF_ROPE & keys.ROPE.read})
    return Fields(values, where, labels)


def _yarn_of_hf(said: Fields, fields: Fields) -> Yarn | None:
    kind = said.text("rope_type", "default")
    if kind == "default":
        for name in ("factor", "attention_factor"):
            if said.has(name) and said.number(name) != 1:
                at = said.label("rope_type") if said.has("rope_type") else "rope_type"
                got = "'default'" if said.has("rope_type") else "no such key"
                raise FileFormatError(
                    said.where, at, f"want 'yarn' as {said.label(name)} is {said.number(name)}, got {got}"
                )
        return None
    if kind != "yarn":
        raise said.error("rope_type", f"want 'default' or 'yarn', got {quote(kind)}")
    trained = said if said.has("original_max_position_embeddings") else fields
    original = trained.integer(
        "original_max_position_embeddings" if trained is said else "max_position_embeddings"
    )
    if said.has("factor") or "factor" not in said.values:
        factor = said.number("factor")
    else:
        factor = fields.integer("max_position_embeddings") / max(original, 1)
    mscale, mscale_all_dim = (_positive(said, name) for name in ("mscale", "mscale_all_dim"))
    yarn = Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=said.number("attention_factor")
        if said.has("attention_factor")
        else attention_factor(max(factor, 1.0), mscale, mscale_all_dim),
        beta_fast=said.number("beta_fast", 32.0),
        beta_slow=said.number("beta_slow", 1.0),
        truncate=said.boolean("truncate", True),
    )
    return _checked(yarn, said.error, {})


def _positive(said: Fields, name: str) -> float | None:
    value = said.number(name, 1.0)
    if not 0 <= value <= 1e6:
        raise said.error(name, f"want a number from 0 to 1e6, got {value}")
    return value if said.has(name) else None


def _checked(yarn: Yarn, error: Callable[[str, str], FileFormatError], names: dict[str, str]) -> Yarn:
    """The same; `error(name, problem)` of its file for a value that no model has."""

    def fail(field: str, wanted: str) -> NoReturn:
        raise error(names.get(field, field), f"want {wanted}, got {getattr(yarn, field)}")

    if not 1 <= yarn.factor < math.inf:
        fail("factor", "a finite number from 1 on")
    if not 1 <= yarn.original_max_position_embeddings <= MAX_CONTEXT:
        fail("original_max_position_embeddings", f"1 to {MAX_CONTEXT}")
    if not 1e-6 <= yarn.attention_factor <= 1e6:
        fail("attention_factor", "a number from 1e-6 to 1e6")
    if not 1e-6 <= yarn.beta_slow <= 1e6:
        fail("beta_slow", "a number from 1e-6 to 1e6")
    if not yarn.beta_slow < yarn.beta_fast <= 1e6:
        fail("beta_fast", f"a number above beta_slow {yarn.beta_slow}, up to 1e6")
    return yarn
