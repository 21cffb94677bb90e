"""Another engine's names and fused tensors, turned into Hugging Face's by a map that a file states.

A map is a JSON object.  In its names, `*` stands for the number of a layer:

    format     "pyengine-names-1"
    of         which engine, in words; may be left out
    prefixes   {THEIRS: OURS}        beginnings of names that are exchanged first; of several, the longest
    axes       {THEIRS: [AXIS, ..]}  the order of a tensor's axes: "tokens" once, the others in any words;
                                     tokens are moved to the front, the others keep their order
    rename     {THEIRS: OURS}        or a list of OURS, for modules that have the same output
    split      {THEIRS: [OURS, ..]}  a fused tensor: its features are those of each module, one after another
    join       {OURS: [THEIRS, ..]}  features of several tensors, one after another
    sum        {OURS: [THEIRS, ..]}  the sum of tensors of one shape: hidden states and their residual
    leave_out  [THEIRS, ..]          tensors that no module of the model has

All but `format` may be left out.  A name of which the map says nothing stays as it is.  A rule is used
where the model has its modules: one map serves several families.  The maps in name_maps/ are examples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..checkpoint.did_you_mean import hint
from ..errors import FileFormatError, InputError, quote
from ..files.strict_json import read_object
from .trace import NAMES, Trace

FORMAT = "pyengine-names-1"
SHIPPED = Path(__file__).with_name("name_maps")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class NameMap:
    """What a map's file says, checked; `path` is for messages."""

    path: str
    prefixes: dict[str, str] = field(default_factory=dict)
    axes: dict[str, list[str]] = field(default_factory=dict)
    rename: dict[str, list[str]] = field(default_factory=dict)
    split: dict[str, list[str]] = field(default_factory=dict)
    join: dict[str, list[str]] = field(default_factory=dict)
    sum: dict[str, list[str]] = field(default_factory=dict)
    leave_out: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path) -> NameMap:
        """Of a file.  Errors: FileFormatError."""
        fields = read_object(path)
        if fields.get("format") != FORMAT:
            raise FileFormatError(path, "format", f"want {FORMAT!r}, got {quote(fields.get('format'))}")
        for key in fields.keys() - {"format", "of"} - cls.__dataclass_fields__.keys() | fields.keys() & {
            "path"
        }:
            raise FileFormatError(path, key, f"want no such key{hint(key, sorted(_READERS), 'nearest')}")
        return cls(
            str(path),
            **{key: read(path, key, fields[key]) for key, read in _READERS.items() if key in fields},
        )

    @classmethod
    def shipped(cls, name: str) -> NameMap:
        """One of NAMES."""
        return cls.load(SHIPPED / f"{name}.json")

    # ---- using it ----

    def check(self, sizes) -> None:
        """FileFormatError for a module that no model has, with the nearest name of this one."""
        known = {_starred(name) for name in sizes}
        every = known | _OTHER_FAMILIES
        for key in ("rename", "split", "join", "sum"):
            rules = getattr(self, key)
            ours = rules if key in ("join", "sum") else [name for names in rules.values() for name in names]
            for name in ours:
                if name not in every:
                    problem = f"want modules of the model, got {quote(name)}{hint(name, known, 'nearest')}"
                    raise FileFormatError(self.path, key, problem)

    def apply(self, trace: Trace, sizes: dict[str, int]) -> tuple[Trace, list[str]]:
        """-> the trace with Hugging Face's names; the tensors that are left out.

        sizes: the features of each tensor that the reference has, in the order of execution.
        Errors: FileFormatError: of the map; InputError: a tensor of another size.
        """
        self.check(sizes)
        rows = self._common_rows(trace)
        tokens = len(trace.ids) if rows is None else len(rows)
        theirs = {}
        for name, array in trace.tensors.items():
            name = self._with_our_prefix(name)
            theirs[name] = self._with_tokens_first(name, np.asarray(array))
        found, left_out = self._made(theirs, sizes, tokens)
        order = {name: at for at, name in enumerate(sizes)}
        tensors = dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
        parts = {} if rows is None else dict.fromkeys(tensors, rows)
        return replace(trace, tensors=tensors, names="", rows=parts).with_rows(), left_out

    def _common_rows(self, trace):
        """The tokens of a trace that holds a part of them, the same of each tensor."""
        if trace.columns:
            name = next(iter(trace.columns))
            raise InputError(f"{name}@columns: want whole features under names of {self.path}, got a part")
        if not trace.rows:
            return None
        first = next(iter(trace.rows.values()))
        other = [n for n in trace.tensors if n not in trace.rows or not np.array_equal(trace.rows[n], first)]
        if other:
            raise InputError(
                f"{other[0]}: want the same rows of each tensor under names of {self.path}, got others"
            )
        return first

    def _with_our_prefix(self, name: str) -> str:
        theirs = max((p for p in self.prefixes if name.startswith(p)), key=len, default=None)
        return name if theirs is None else self.prefixes[theirs] + name[len(theirs) :]

    def _with_tokens_first(self, name, array):
        axes = self.axes.get(_starred(name))
        if axes is None:
            return array
        while array.ndim > len(axes) and array.shape[0] == 1:
            array = array[0]
        if array.ndim != len(axes):
            raise InputError(f"{name}: want axes {', '.join(axes)}, got shape {list(array.shape)}")
        array = np.moveaxis(array, axes.index("tokens"), 0)
        return array.reshape(len(array), -1)

    def _made(self, theirs, sizes, tokens):
        left, found, used = [], {}, set()

        def put(name, array):
            found[name] = _as_rows(name, array, tokens, sizes[name])

        for kind, combined in (("sum", _total), ("join", lambda parts: np.concatenate(parts, axis=-1))):
            for ours, sources in getattr(self, kind).items():
                for name in _numbered(ours, sizes):
                    names = [_like(source, name) for source in sources]
                    if all(n in theirs for n in names):
                        put(name, combined([_flat(theirs[n], tokens) for n in names]))
                        used.update(names)
        for name, array in theirs.items():
            star = _starred(name)
            split = [_like(ours, name) for ours in self.split.get(star, ())]
            renamed = [n for n in (_like(ours, name) for ours in self.rename.get(star, ())) if n in sizes]
            if split and all(n in sizes for n in split):
                for part, value in zip(split, _cut(name, array, split, sizes, tokens)):
                    put(part, value)
            elif renamed:
                for ours in renamed:
                    put(ours, array)
            elif star in self.leave_out:
                left.append(name)
            elif name not in used:
                theirs_or_ours = found.setdefault(name, array)
                if theirs_or_ours is not array:
                    left.append(name)  # a rule made this module's output of another tensor
                elif name in sizes:
                    put(name, array)
        return found, left


def _total(parts):
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        raise InputError(f"sum: want tensors of one shape, got {sorted(shapes)}")
    return sum(part.astype(np.float32) for part in parts)


def _flat(array, tokens):
    """[1, T, ...] or [T, ...] -> [T, features]."""
    if array.ndim > 2 and array.shape[:2] == (1, tokens):
        array = array[0]
    return array.reshape(len(array), -1) if array.ndim > 1 else array.reshape(1, -1)


def _as_rows(name, array, tokens, width):
    """Also heads as rows, [T * heads, n]; the last tokens alone stay so."""
    if array.size == tokens * width:
        return array.reshape(tokens, width)
    if array.size == width:
        return array.reshape(1, width)
    return _flat(array, tokens)


def _cut(name, array, parts, sizes, tokens):
    wanted = [sizes[part] for part in parts]
    array = _as_rows(name, array, tokens, sum(wanted))
    if array.shape[-1] != sum(wanted):
        modules = ", ".join(f"{part.rpartition('.')[2]} {size}" for part, size in zip(parts, wanted))
        raise InputError(f"{name}: want {sum(wanted)} features a token ({modules}), got {array.shape[-1]}")
    return np.split(array, np.cumsum(wanted)[:-1], axis=-1)


def _starred(name: str) -> str:
    return _NUMBER.sub("*", name, count=1) if ".layers." in name else name


def _like(pattern: str, name: str) -> str:
    """A name of a map, with the number of the layer of another."""
    number = _NUMBER.search(name)
    return pattern if number is None else pattern.replace("*", number.group(), 1)


def _numbered(pattern: str, sizes):
    return [name for name in sizes if name == pattern or _starred(name) == pattern]


# ---- reading one -----------------------------------------------------------------------------

_LAYER = "model.layers.*."
_OTHER_FAMILIES = {
    f"{_LAYER}{part}"
    for part in (
        *(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a", "qkvz", "ba")),
        *(
            f"mlp.{part}"
            for part in ("gate_proj", "up_proj", "down_proj", "gate", "gate.1", "gate.2", "experts")
        ),
        *(f"mlp.shared_expert{part}" for part in ("", ".gate_proj", ".up_proj", ".down_proj")),
        "mlp.shared_expert_gate",
    )
}


def _texts(path, key, value) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FileFormatError(path, key, f"want an object of texts, got {quote(value)}")
    return value


def _list(path, key, value) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise FileFormatError(path, key, f"want a list of names, got {quote(value)}")
    return value


def _lists(path, key, value) -> dict[str, list[str]]:
    if not isinstance(value, dict):
        raise FileFormatError(path, key, f"want an object of lists, got {quote(value)}")
    return {name: _list(path, f"{key} {name}", names) for name, names in value.items()}


def _names(path, key, value) -> dict[str, list[str]]:
    if isinstance(value, dict):
        value = {name: [names] if isinstance(names, str) else names for name, names in value.items()}
    return _lists(path, key, value)


def _axes(path, key, value) -> dict[str, list[str]]:
    for name, axes in _lists(path, key, value).items():
        if axes.count("tokens") != 1:
            raise FileFormatError(path, f"{key} {name}", f"want tokens once, got {quote(axes)}")
    return value


_READERS = {
    "prefixes": _texts,
    "axes": _axes,
    "rename": _names,
    "split": _lists,
    "join": _lists,
    "sum": _lists,
    "leave_out": _list,
}


def name_map(names: str) -> NameMap:
    """A map that is shipped, or of a file.  Errors: InputError, FileFormatError."""
    if names in NAMES[2:]:
        return NameMap.shipped(names)
    if Path(names).is_file():
        return NameMap.load(names)
    raise InputError(f"names: want {', '.join(NAMES[1:])} or the file of a map, got {quote(names)}")
