"""Text that knows which of its characters the template wrote.

A control token ends a turn or begins one, and only the template may do that.  So the origin of the
characters decides.  A control token is one whose characters are all written: they are in the template's
source, or in a text that the engine vouches for (a special token of the vocabulary, a role of the API).
Every other character belongs to the request, wherever in the request it was and whatever the template
did with it.

Nothing in a request is marked or changed.  A request consists of Python's own strings, and their
characters are never written.  The strings of the template are `TemplateText`.  `TemplateText` is a `str`
and has the same value in every comparison and search, so a template renders the same text as with
Python's strings.  Operations that move characters (joining, slices, strip, split, replace, format, ...)
move the origin with them.  Every other operation gives a plain string.  If an operation loses the origin,
the characters are not written, and cannot become a control token.

The process that renders imports this module without the package, so it imports only Python's own modules.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import SupportsIndex

WRITTEN, FOREIGN = b"\x01", b"\x00"
_ENTITIES = {"&": "&amp;", ">": "&gt;", "<": "&lt;", "'": "&#39;", '"': "&#34;"}
_PERCENT = re.compile(r"%(?:\((?P<key>[^)]*)\))?[-+ #0]*(?:\d+)?(?:\.\d+)?[a-zA-Z%]")


class TemplateText(str):
    """A string, and for each character whether the template wrote it.

    _origin   bytes, one per character: 1 if the character is written.  Templates cannot read a name that
              begins with _.
    """

    _origin: bytes

    def __new__(cls, value: str = "", origin: bytes | None = None) -> TemplateText:
        """origin: as `_origin`; None: no character is written."""
        self = super().__new__(cls, value)
        self._origin = FOREIGN * len(self) if origin is None else origin
        return self

    def _cut(self, start: int, stop: int) -> TemplateText:
        return TemplateText(str.__getitem__(self, slice(start, stop)), self._origin[start:stop])

    # ---- what moves characters ----

    def __str__(self) -> TemplateText:
        return self

    def __getitem__(self, key: Any) -> TemplateText:
        value = super().__getitem__(key)
        if isinstance(key, slice):
            return TemplateText(value, self._origin[key])
        return TemplateText(value, bytes([self._origin[key]]))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Any) -> str:
        # Markup escapes a text before it joins it, so Markup does the joining.
        return concat((self, other)) if _is_text(other) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return concat((other, self)) if _is_text(other) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> TemplateText:
        return TemplateText(super().__mul__(times), self._origin * times)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        value = super().__mod__(values)
        try:
            parts = _percent(self, values)
        except (TypeError, ValueError, LookupError):  # a form of Python's that is not known here
            parts = None
        return checked(value, parts)

    def join(self, parts: Iterable[str]) -> str:
        parts = list(parts)
        value = super().join(parts)
        return checked(value, _between(parts, self))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        value = super().replace(old, new, count)
        if not old:
            return value
        return checked(value, _between(self.split(old, count), new))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(super().split(sep, maxsplit), len(sep) if sep else 0)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(super().rsplit(sep, maxsplit), len(sep) if sep else 0)

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._pieces(super().partition(sep), 0)
        return before, found, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._pieces(super().rpartition(sep), 0)
        return before, found, after

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = self._pieces(super().splitlines(True), 0)
        return whole if keepends else [w[: len(line)] for w, line in zip(whole, super().splitlines())]

    def _pieces(self, values: Iterable[str], between: int) -> list[str]:
        """Values that follow one another in this text, with `between` characters or white space between."""
        pieces: list[str] = []
        end = 0
        for value in values:
            start = self.find(value, end)
            pieces.append(self._cut(start, start + len(value)))
            end = start + len(value) + between
        return pieces

    def lstrip(self, chars: str | None = None) -> TemplateText:
        return self._cut(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> TemplateText:
        return self._cut(0, len(super().rstrip(chars)))

    def strip(self, chars: str | None = None) -> TemplateText:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> TemplateText:
        return self._cut(len(self) - len(super().removeprefix(prefix)), len(self))

    def removesuffix(self, suffix: str) -> TemplateText:
        return self._cut(0, len(super().removesuffix(suffix)))

    def ljust(self, width: SupportsIndex, fillchar: str = " ") -> str:
        return self._padded(super().ljust(width, fillchar), 0, fillchar)

    def rjust(self, width: SupportsIndex, fillchar: str = " ") -> str:
        value = super().rjust(width, fillchar)
        return self._padded(value, len(value) - len(self), fillchar)

    def center(self, width: Any, fillchar: str = " ") -> str:
        value = super().center(width, fillchar)
        room = len(value) - len(self)
        return self._padded(value, room // 2 + (room & width & 1), fillchar)  # as CPython has it

    def zfill(self, width: SupportsIndex) -> str:
        value = super().zfill(width)
        return self._padded(value, len(value) - len(self), "0")

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:
        return respaced(super().expandtabs(tabsize), self)

    def _padded(self, value: str, left: int, fill: str) -> str:
        return checked(value, [fill * left, self, fill * (len(value) - len(self) - left)])

    # ---- what changes characters in their places ----

    def lower(self) -> str:
        return in_place(super().lower(), self)

    def upper(self) -> str:
        return in_place(super().upper(), self)

    def capitalize(self) -> str:
        return in_place(super().capitalize(), self)

    def title(self) -> str:
        return in_place(super().title(), self)

    def swapcase(self) -> str:
        return in_place(super().swapcase(), self)

    def casefold(self) -> str:
        return in_place(super().casefold(), self)


def written(text: str) -> TemplateText:
    """A text whose characters are all written."""
    return TemplateText(text, WRITTEN * len(text))


def foreign(text: str) -> TemplateText:
    """A text of the request as `TemplateText`: its operations keep the origin of their arguments."""
    return text if isinstance(text, TemplateText) else TemplateText(text)


def concat(parts: Iterable[str]) -> str:
    """Strings, joined."""
    parts = list(parts)
    value = "".join(parts)
    if not any(isinstance(part, TemplateText) for part in parts):
        return value
    return TemplateText(value, b"".join(map(origin, parts)))


def origin(text: str) -> bytes:
    """One byte per character: 1 if it is written, else 0."""
    return text._origin if isinstance(text, TemplateText) else FOREIGN * len(text)


def written_spans(text: str) -> list[list[int]]:
    """[start, stop] of every run of characters that are written."""
    return [list(run.span()) for run in re.finditer(rb"\x01+", origin(text))]


def in_place(value: str, text: str) -> str:
    """The value of an operation that writes characters otherwise (`upper`).

    A character can become several, and none becomes none: of the same length, each is in its place.
    """
    return TemplateText(value, origin(text)) if len(value) == len(text) else value


def respaced(value: str, text: str) -> str:
    """The value of an operation that changes the white space alone (`wordwrap`)."""
    kept = [(c, one) for c, one in zip(str.__str__(text), origin(text)) if not c.isspace()]
    if "".join(c for c, _ in kept) != "".join(value.split()):
        return value
    origins = iter(kept)
    return TemplateText(value, bytes(0 if c.isspace() else next(origins)[1] for c in value))


def within(value: str, part: Any) -> str:
    """The value of a field: the part itself, or with characters around it that fill its width."""
    if not isinstance(part, str):
        return value
    place = str.find(value, part)
    if place < 0:
        return value
    end = place + len(part)
    return checked(
        value, [str.__getitem__(value, slice(0, place)), part, str.__getitem__(value, slice(end, None))]
    )


def formatted(text: str, value: str, literals: Iterable[str], fields: Iterable[str]) -> str:
    """`value`, which is `text.format(...)`, with origins.  literals: the texts between the fields; fields:
    the texts of the fields."""
    whole = all(origin(text))
    parts: list[str] = []
    for literal, field in zip(literals, [*fields, ""]):
        parts += [written(literal) if whole else literal, field]
    return checked(value, parts)


def escaped(text: str) -> str:
    """The text with HTML's characters as entities, as Markup escapes it."""
    characters = zip(str.__getitem__(text, slice(None)), origin(text))
    pieces = [(_ENTITIES.get(character, character), one) for character, one in characters]
    return TemplateText("".join(p for p, _ in pieces), bytes(one for p, one in pieces for _ in p))


def checked(value: str, parts: Iterable[str] | None) -> str:
    """The parts joined, with their origins, if they make the value; else the value, with nothing written."""
    joined = concat(parts) if parts is not None else None
    return joined if joined == value else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not hasattr(value, "__html__")


def _between(pieces: list[str], separator: str) -> list[str]:
    if not pieces:
        return []
    parts = [separator] * (2 * len(pieces) - 1)
    parts[::2] = pieces
    return parts


def _percent(text: TemplateText, values: Any) -> list[str] | None:
    """The parts of `text % values`; None: unknown."""
    if "%" in _PERCENT.sub("", text):
        return None
    parts: list[str] = []
    end, rest = 0, list(values) if isinstance(values, tuple) else [values]
    for found in _PERCENT.finditer(text):
        parts.append(text[end : found.start()])
        end = found.end()
        specification = str.__str__(found[0])
        if specification == "%%":
            parts.append(text[found.start() : found.start() + 1])
        elif found["key"] is not None:
            parts.append(_field(specification, values[found["key"]], values))
        elif rest:
            parts.append(_field(specification, rest[0], (rest[0],)))
            del rest[0]
        else:
            return None
    return [*parts, text[end:]]


def _field(specification: str, value: Any, values: Any) -> str:
    return within(specification % values, value if specification.endswith("s") else None)
