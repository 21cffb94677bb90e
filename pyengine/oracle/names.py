"""Names in a candidate that the reference does not know."""

from __future__ import annotations

import re

from ..checkpoint.did_you_mean import nearest_name
from ..checkpoint.names import layer_of
from ..errors import InputError

SHOWN = 3


def check_names(names, known) -> None:
    """InputError with the nearest known name of each, unless all are known."""
    known = list(known)
    unknown = [name for name in names if name not in set(known)]
    if not unknown:
        return
    shown = ", ".join(_with_hint(name, known) for name in unknown[:SHOWN])
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    others = "1 other" if len(unknown) == 1 else f"{len(unknown)} others"
    raise InputError(
        f"tensors: want names that the reference knows, got {others}: {shown}{more}"
        f"{_further_layers(unknown, known)}; --allow-unknown (allow_unknown=True) leaves them out"
    )


def _with_hint(name, known) -> str:
    nearest = _nearest(name, known)
    return name if nearest is None else f"{name} (did you mean {nearest}?)"


def _nearest(name, known) -> str | None:
    """A name with a part too many or too few at its beginning first: that is the commonest mistake."""
    plain = re.sub(r"(?<=\.)0+(?=\d)", "", name)  # layers.02
    if plain in known:
        return plain
    longer = [other for other in known if other.endswith(f".{plain}")]
    shorter = [other for other in known if plain.endswith(f".{other}")]
    if longer or shorter:
        return min(longer, key=len) if longer else max(shorter, key=len)
    return nearest_name(plain, known)


def _further_layers(unknown, known) -> str:
    layers, count = further_layers(unknown, known), len(_layers(known))
    if not layers:
        return ""
    text = f"; the reference has model.layers.0 .. {count - 1}"
    return f"{text}: {MTP_AS_LAYER}" if layers == [count] else text


MTP_AS_LAYER = "one layer too many, as if the next-token-prediction block were a layer"


def further_layers(unknown, known) -> list[int]:
    """Numbers of layers behind the last."""
    last = max(_layers(known), default=None)
    return [] if last is None else sorted(layer for layer in _layers(unknown) if layer > last)


def _layers(names) -> set[int]:
    return {layer for layer in map(layer_of, names) if layer is not None}
