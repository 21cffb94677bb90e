"""A checkpoint from a directory of safetensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, FileFormatError
from ..files.ggml_blocks import BY_NAME, DENSE_TYPES
from ..files.safetensors import INDEX_NAME, SafetensorsDirectory, what_else
from .checkpoint import Checkpoint
from .config import read_group_size, read_hf_config
from .did_you_mean import TWICE, hint
from .families import Spec, model_specs
from .layout import BITS, StoredForm, stored_form
from .tensor import Tensor, first_differing_row, without_unit_axes
from .unneeded import is_unneeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .config import Config

MAX_KNOWN_EXPERTS = 100_000  # of all layers together


# ---- a directory of safetensors --------------------------------------------------------------


def open_directory(path: Path) -> Checkpoint:
    _check_is_a_model(path)
    config, group = read_hf_config(path), read_group_size(path)

    def optional(name: str) -> bool:
        tied_head = config.tie_word_embeddings and name.endswith(HEAD)
        return tied_head or is_unneeded(name)

    file = SafetensorsDirectory.open(path, optional)
    _check_has_layers(file)
    reader = _DirectoryTensors(file, config, group)
    tensors = {spec.name: reader.read(spec) for spec in model_specs(config)}
    if config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDINGS]
        reader.check_tied_head(tensors[EMBEDDINGS])
    reader.check_all_used()
    return Checkpoint(path, "directory", config, tensors, "grouped", reader.file)


def _check_is_a_model(path: Path) -> None:
    """FileFormatError: no config.json, or an adapter of PEFT, which transformers adds to the weights."""
    adapter = path / ADAPTER
    if os.path.lexists(adapter):
        problem = "want no adapter, for it changes the model and is not computed, got one: merge it first"
        raise FileFormatError(adapter, "file", problem)
    if not os.path.lexists(path / "config.json"):
        raise FileFormatError(path, "directory", f"want config.json, got none{what_else(path)}")


def _check_has_layers(file: SafetensorsDirectory) -> None:
    """CheckpointError: next-token prediction, and nothing of the model's layers."""
    block = next((name for name in file.tensors if name.startswith("mtp.")), None)
    if block is not None and not any(".layers." in name for name in file.tensors if not is_unneeded(name)):
        raise CheckpointError(
            f"{file.path}: {block}: want a model with its layers, got next-token-prediction blocks alone"
        )


ADAPTER = "adapter_config.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What stands before the text model's names in a multi-modal one: (instead of "model.", before "lm_head.").
_PREFIXES = (("model.language_model.", ""), ("language_model.model.", "language_model."))


def _forms(spec: Spec, name: str, group: int) -> dict[str, StoredForm]:
    """{type: the names and shapes of the codes and scales}"""
    return {kind: stored_form(name, spec.shape, kind, group) for kind in BITS}


class _DirectoryTensors:
    """Reads parameters by Spec, quantized ones of our own layout or plain floats; remembers which tensors of
    the file were used."""

    def __init__(self, file: SafetensorsDirectory, config: Config, group: int):
        self.file, self.config, self.group = file, config, group
        self.used: set[str] = set()
        self.prefix, self.head_prefix = "model.", ""
        for prefix, head_prefix in _PREFIXES:
            if any(name.startswith(prefix) and not is_unneeded(name) for name in file.tensors):
                self.prefix, self.head_prefix = prefix, head_prefix
                break

    def read(self, spec: Spec) -> Tensor:
        name = self._name_in_file(spec.name)
        if len(spec.shape) == 3 and spec.linear:
            apart = self._expert_by_expert(spec, name)
            if apart:
                return apart
        for part in ("gate_proj", "up_proj"):
            if name.endswith(f"mlp.experts.{part}"):
                return self._expert_part(spec, name, part)
        return self._quantized(spec, name) or self._plain(spec, name)

    def check_all_used(self) -> None:
        for name in self.file.tensors:
            if name in self.used or is_unneeded(name):
                continue
            known = self._known()
            if name in known:
                raise CheckpointError(f"{self.file.path}: {name}: {TWICE}")
            raise CheckpointError(
                f"{self.file.path}: {name}: want only tensors that the model has, got this one"
                f"{hint(name, known, 'nearest known name')}"
            )

    def check_tied_head(self, embeddings: Tensor) -> None:
        """A head that is stored although config.json ties it must be the embeddings."""
        name = self._name_in_file(HEAD)
        if name not in self.file.tensors:
            return
        head = self._plain(Spec(HEAD, "", embeddings.shape), name)
        row = first_differing_row(head, embeddings)
        if row is not None:
            raise CheckpointError(
                f"{self.file.path}: {name}: want the values of {embeddings.file_name}, for config.json has "
                f"tie_word_embeddings true, got others in row {row}"
            )

    def _known(self) -> set[str]:
        """Every name that this model's tensors can have: as floats, INT8 or INT4, experts fused or
        apart.  Empty when config.json claims an implausible number of experts."""
        names: set[str] = set()
        if self.config.num_hidden_layers * self.config.num_experts > MAX_KNOWN_EXPERTS:
            return names
        for spec in model_specs(self.config):
            name = self._name_in_file(spec.name)
            if not spec.linear:
                names.add(name)
                continue
            if len(spec.shape) == 3:
                stem, part = name.rsplit(".", 1)
                names |= {f"{stem}.{expert}.{part}.weight" for expert in range(spec.shape[0])}
                name = name if part == "down_proj" else f"{stem}.gate_up_proj"
            forms = _forms(spec, name, self.group).values()
            names |= {name, *(stored.name for form in forms for stored in form)}
        return names

    def _name_in_file(self, name: str) -> str:
        if name.startswith("model."):
            return self.prefix + name.removeprefix("model.")
        return self.head_prefix + name

    def _expert_by_expert(self, spec: Spec, name: str) -> Tensor | None:
        """A stack that is stored as `mlp.experts.7.gate_proj.weight` and its like, or None."""
        stem, part = name.rsplit(".", 1)
        names = [f"{stem}.{expert}.{part}.weight" for expert in range(spec.shape[0])]
        if all(n not in self.file.tensors for n in names):
            return None
        data = tuple(self._take(n, spec.shape[1:], DENSE_TYPES) for n in names)
        kinds = [self.file.tensors[n].dtype for n in names]
        if len(set(kinds)) > 1:  # float32 holds the values of all three dtypes
            data, kinds = tuple(BY_NAME[k].to_float32(d) for k, d in zip(kinds, data)), ["F32"]
        return Tensor(spec.name, kinds[0], spec.shape, data, file_name=names[0])

    def _expert_part(self, spec: Spec, name: str, part: str) -> Tensor:
        ff = self.config.moe_intermediate_size
        fused = spec._replace(shape=(spec.shape[0], 2 * ff, spec.shape[2]))
        fused_name = name.removesuffix(part) + "gate_up_proj"
        whole = self._quantized(fused, fused_name) or self._plain(fused, fused_name)
        start = 0 if part == "gate_proj" else ff
        return whole.rows(start, start + ff, spec.name)

    def _quantized(self, spec: Spec, name: str) -> Tensor | None:
        if not spec.linear:
            return None
        for kind, form in _forms(spec, name, self.group).items():
            if form.codes.name in self.file.tensors:
                codes, scales = (self._take(name, shape, (dtype,)) for name, dtype, shape in form)
                return Tensor(
                    spec.name, kind, spec.shape, codes, scales, self.group, file_name=form.codes.name
                )
        return None

    def _plain(self, spec: Spec, name: str) -> Tensor:
        if spec.linear and name not in self.file.tensors:
            raise self._no_form_of(spec, name)
        data = self._take(name, spec.shape, DENSE_TYPES)
        if not spec.linear:
            data = data.reshape(without_unit_axes(spec.shape) or (1,))
        kind = self.file.tensors[name].dtype
        return Tensor(spec.name, kind, spec.shape, data, file_name=name)

    def _no_form_of(self, spec: Spec, name: str) -> CheckpointError:
        """Neither floats nor codes of a matrix."""
        last = name.rsplit(".", 1)[1]
        forms = " or ".join(f".{form.codes.name}" for form in _forms(spec, last, self.group).values())
        because = ", for config.json does not have tie_word_embeddings true" if spec.name == HEAD else ""
        return CheckpointError(
            f"{self.file.path}: {name}, {forms}: want one of these tensors{because}, got none"
            f"{self._hint(name)}"
        )

    def _hint(self, name: str) -> str:
        for view in self.file.unindexed:
            if view.name == name:
                return f"; {view.path.name} has it, and {INDEX_NAME} does not name it"
        unknown = {name for name in set(self.file.tensors) - self._known() if not is_unneeded(name)}
        return hint(name, unknown, "nearest unknown name in the file")

    def _take(self, name: str, shape: tuple[int, ...], dtypes: Sequence[str]) -> NDArray[Any]:
        view = self.file.tensors.get(name)
        if view is None:
            raise CheckpointError(f"{self.file.path}: {name}: want this tensor, got none{self._hint(name)}")
        if tuple(view.shape) != tuple(shape) or view.dtype not in dtypes:
            raise CheckpointError(
                f"{self.file.path}: {name}: want {tuple(shape)} "
                f"{' or '.join(dtypes)}, got {tuple(view.shape)} {view.dtype}"
            )
        self.used.add(name)
        # The data may begin at any byte of the file; C needs aligned floats.
        return np.require(view.data, requirements="A")
