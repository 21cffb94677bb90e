"""Which tensors a quantized checkpoint has."""

from __future__ import annotations

from typing import NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.families import Spec, model_specs
from ..checkpoint.layout import GROUP, float_dtype, stored_form
from ..checkpoint.tensor import Tensor
from ..checkpoint.writer import TensorEntry
from ..errors import CheckpointError
from .mix import Mix


class PlannedParameter(NamedTuple):
    """One parameter of the output.

    entries   its codes and its scales; or one plain tensor
    sources   the parameters it is made from; more than one: stacked along the rows of each expert
    bits      of a code, 8 or 4; None: it stays floats
    """

    entries: tuple[TensorEntry, ...]
    sources: tuple[Tensor, ...]
    bits: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def plan(checkpoint: Checkpoint, bits: int | Mix, group: int = GROUP) -> list[PlannedParameter]:
    """Every parameter of the output, in the order of the forward pass.

    bits: of every quantized parameter, or which has how many.  Errors: CheckpointError, INT4 of an odd number
    of columns; InputError, a mix with a pattern that decides nothing.
    """
    specs = [
        _as_written(spec)
        for spec in model_specs(checkpoint.config)
        if not spec.name.endswith("mlp.experts.up_proj")
    ]  # written with gate_proj
    if isinstance(bits, Mix):
        quantized = [spec.name for spec in specs if _is_quantized(spec)]
        bits.check(quantized, [spec.name for spec in specs if not _is_quantized(spec)])
    return [_planned(spec, checkpoint.tensors, bits, group) for spec in specs]


def written_name(name: str) -> str:
    """Of the parameter that a parameter of a checkpoint is written in: the routed experts' gate and up are
    one."""
    stem, _, part = name.rpartition(".")
    return f"{stem}.gate_up_proj" if stem.endswith(".experts") and part in ("gate_proj", "up_proj") else name


def _as_written(spec: Spec) -> Spec:
    if not spec.name.endswith("mlp.experts.gate_proj"):
        return spec
    experts, rows, cols = spec.shape
    return spec._replace(name=written_name(spec.name), shape=(experts, 2 * rows, cols))


def _is_quantized(spec: Spec) -> bool:
    return spec.linear and float_dtype(spec.name) is None


def _planned(spec: Spec, tensors: dict[str, Tensor], bits: int | Mix, group: int) -> PlannedParameter:
    name, shape = spec.name, spec.shape
    if not _is_quantized(spec):
        dtype = (float_dtype(name) if spec.linear else None) or "F32"
        return PlannedParameter((TensorEntry(name, dtype, shape),), (tensors[name],))
    own = bits.bits_of(name) if isinstance(bits, Mix) else bits
    stem = name.removesuffix("gate_up_proj")
    parts = [name] if stem == name else [f"{stem}gate_proj", f"{stem}up_proj"]
    sources = tuple(tensors[part] for part in parts)
    if own == 4 and shape[-1] % 2:
        raise CheckpointError(f"{sources[0].file_name}: want an even number of columns, got {shape[-1]}")
    form = stored_form(name, shape, f"INT{own}", group)
    return PlannedParameter(tuple(TensorEntry(*stored) for stored in form), sources, own)
