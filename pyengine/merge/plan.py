"""Which tensors the output has, and what each is made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.families import Spec, model_specs
from ..checkpoint.names import layer_of
from ..checkpoint.tensor import Tensor
from ..checkpoint.writer import TensorEntry
from ..errors import InputError
from ..files.safetensors import SafetensorsDirectory, TensorView
from .arithmetic import METHODS
from .configuration import Configuration
from .settings import Place, Settings
from .tensor_merge import Source, TensorMerge, new_keys, shape_of

EMBEDDINGS = "model.embed_tokens.weight"
# The greatest magnitude's bits that rounding to the dtype leaves finite.
MOST = {"F32": 0x7F7FFFFF, "BF16": 0x7F7F7FFF}


@dataclass(frozen=True, eq=False)
class Merged:
    """One tensor of a directory of floats: its parts one behind the other."""

    entry: TensorEntry
    parts: tuple[TensorMerge, ...]


@dataclass(frozen=True, eq=False)
class Copied:
    """A tensor that is no part of the text model, copied as it is stored."""

    entry: TensorEntry
    view: TensorView


class MergePlan:
    """What a configuration makes of models.

    models   {name: checkpoint}
    first    the model that the output's configuration comes from: the base, or the first one
    parts    {Hugging Face's name of a parameter: its tensors: one, or one per expert}
    Errors: FileFormatError, CheckpointError, InputError, naming key, model and tensor.
    """

    def __init__(self, configuration: Configuration, models: dict[str, Checkpoint]):
        self.configuration, self.models = configuration, models
        self.first = models[configuration.base or configuration.models[0]]
        self.settings = Settings(configuration, self.first.config)
        self.method = METHODS[configuration.method]
        self.inputs = [
            i
            for i, m in enumerate(configuration.models)
            if not (self.method.base and m == configuration.base)
        ]
        self.most = MOST[configuration.dtype]
        self.parts = {spec.name: self._parts(spec) for spec in model_specs(self.first.config)}
        self.settings.check_all_used()
        self.copied = self._copied()

    # ---- the text model ---------------------------------------------------------------------

    def _parts(self, spec: Spec) -> tuple[TensorMerge, ...]:
        layer = layer_of(spec.name)
        if len(spec.shape) == 3 and spec.linear:
            stem, part = spec.name.rsplit(".", 1)
            places = [Place(f"{stem}.{e}.{part}.weight", layer, e) for e in range(spec.shape[0])]
        else:
            places = [Place(spec.name, layer)]
        return tuple(self._part(spec, place) for place in places)

    def _part(self, spec: Spec, place: Place) -> TensorMerge:
        said = self.configuration
        rows, cols = shape_of(self.first.tensors[spec.name])
        transplant = self.settings.transplant(place)
        if transplant is not None:
            sources, base, recipe, keys = (self._source(transplant, spec, place),), None, None, ()
            return TensorMerge(place.name, rows, cols, sources, base, recipe, keys, self.most)
        return TensorMerge(
            place.name,
            rows,
            cols,
            tuple(self._source(said.models[i], spec, place) for i in self.inputs),
            self._source(said.base, spec, place) if self.method.base and said.base else None,
            self.settings.recipe(place),
            new_keys(said.seed, self.inputs, place.name) if self.method.sparsify == "random" else (),
            self.most,
        )

    def _source(self, model: str, spec: Spec, place: Place) -> Source:
        return Source(model, self.models[model].tensors[spec.name], place.expert)

    # ---- the other tensors ------------------------------------------------------------------

    def _copied(self) -> list[Copied]:
        """Errors: InputError: a tensor that no rule of other_tensors covers, or a rule that covers none."""
        said, used, copied = self.configuration, set(), []
        for model, checkpoint in self.models.items():
            for name in checkpoint.other_tensors:
                rule = next((i for i, rule in enumerate(said.others) if rule.filter in name), None)
                if rule is None:
                    raise InputError(
                        f"{said.where}: other_tensors: want a rule for {name} of {model}, which is no part "
                        "of the text model: `copy: MODEL` or `leave_out: true`, got none"
                    )
                used.add(rule)
                if said.others[rule].copy == model:
                    copied.append(self._copy(model, checkpoint, name))
        for i, other in enumerate(said.others):
            if i not in used or (
                other.copy is not None and not any(other.filter in c.entry.name for c in copied)
            ):
                wanted = f"want tensors with {other.filter!r} in their names in {other.copy or 'a model'}"
                raise InputError(f"{said.where}: other_tensors[{i}]: {wanted}, got none")
        if len({other.copy for other in said.others if other.copy is not None}) > 1:
            raise InputError(f"{said.where}: other_tensors: want copies from one model, got several")
        return copied

    def _copy(self, model: str, checkpoint: Checkpoint, name: str) -> Copied:
        if not isinstance(checkpoint.file, SafetensorsDirectory):
            raise InputError(
                f"{self.configuration.where}: other_tensors: want copies from a directory, for Hugging Face "
                f"has other names than a GGUF, got {name} of {model}"
            )
        view = checkpoint.file.tensors[name]
        return Copied(TensorEntry(name, view.dtype, view.shape), view)

    # ---- the output -------------------------------------------------------------------------

    @property
    def original(self) -> Checkpoint | None:
        """The directory whose names and config.json the output has, with the tensors that are copied."""
        copies = [other.copy for other in self.configuration.others if other.copy is not None]
        return self.models[copies[0]] if copies else None

    def floats(self) -> list[Merged | Copied]:
        """Every tensor of a directory of floats, in the order of its files."""
        return [*self._merged(), *self.copied]

    def _merged(self) -> Iterator[Merged]:
        for spec in model_specs(self.first.config):
            name, shape, parts = spec.name, spec.shape, self.parts[spec.name]
            if name.endswith("mlp.experts.up_proj"):
                continue  # written with gate_proj
            if name.endswith("mlp.experts.gate_proj"):
                stem = name.removesuffix("gate_proj")
                experts, rows, cols = shape
                name, shape = f"{stem}gate_up_proj", (experts, 2 * rows, cols)
                parts = tuple(p for pair in zip(parts, self.parts[f"{stem}up_proj"]) for p in pair)
            yield Merged(TensorEntry(self._name_in_file(name), self.configuration.dtype, shape), parts)

    def _name_in_file(self, name: str) -> str:
        """With the prefixes of the directory that the copied tensors come from."""
        if self.original is None:
            return name
        tensors: dict[str, Tensor] = self.original.tensors
        prefix = tensors[EMBEDDINGS].file_name.removesuffix("embed_tokens.weight")
        if name.startswith("model."):
            return prefix + name.removeprefix("model.")
        return tensors[name].file_name if name in tensors else name

    def check_text_only(self) -> None:
        """InputError: a copied tensor, for which INT8 and INT4 checkpoints have no place."""
        if self.copied:
            raise InputError(
                f"{self.configuration.where}: other_tensors: want `leave_out: true` for an INT8 or INT4 "
                f"checkpoint, which has the text model alone, got a copy of {self.copied[0].entry.name}"
            )


def nbytes_of(tensors: list[Merged | Copied]) -> int:
    return sum(tensor.entry.nbytes for tensor in tensors)
