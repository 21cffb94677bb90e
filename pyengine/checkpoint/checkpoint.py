"""A checkpoint's tensors by Hugging Face's parameter names, whatever file they come from.

Nothing is copied: a `Tensor` holds a view of the mapped file and what it takes to read it in Hugging
Face's layout.  llama.cpp's converter lays the delta net's value heads out tiled (value head t uses
key head t mod n_k) where Hugging Face groups them (value head g uses key head g div r); a Tensor
knows its order, and `Checkpoint.value_head_order` tells the decoder which one the file has.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..files import gguf as gguf_file
from ..files.ggml_blocks import BY_NAME, NOT_FINITE
from ..files.refused import first_refused
from ..files.safetensors import SafetensorsDirectory
from .config import Config
from .names import is_routed_expert
from .summary import Summary, summarize
from .tensor import Tensor
from .unneeded import block_of, is_unneeded

# ---- a checkpoint ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """config, tensors {Hugging Face's parameter name: Tensor}, and where they come from.

    The routed experts' gate and up are `mlp.experts.gate_proj` and `.up_proj` here, apart, whether
    the file has them fused (`gate_up_proj`, gate rows first) or not.
    """

    path: Path
    kind: str  # "gguf" or "directory"
    config: Config
    tensors: dict[str, Tensor]
    value_head_order: str  # "tiled" or "grouped"
    file: gguf_file.GGUF | SafetensorsDirectory

    @property
    def source_files(self) -> list[Path]:
        """The files that hold the tensors."""
        if isinstance(self.file, gguf_file.GGUF):
            return list(self.file.paths)
        return [file.path for file in self.file.files]

    @property
    def other_tensors(self) -> list[str]:
        """Names of the tensors that the text model does not read: vision, audio, next-token blocks."""
        names = [name for name in self.file.tensors if is_unneeded(name)]
        if isinstance(self.file, gguf_file.GGUF):
            names += [name for name in self.file.tensors if block_of(name) >= self.config.num_hidden_layers]
        return names

    def key_heads(self) -> np.ndarray:
        """int32 [value heads]: the key head of each value head, in the file's order."""
        heads, keys = self.config.linear_num_value_heads, self.config.linear_num_key_heads
        head = np.arange(heads, dtype=np.int32)
        return head % keys if self.value_head_order == "tiled" else head // (heads // keys)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the configuration and of every parameter's name, type, shape and first row (of a
        stack, the first expert's): it distinguishes models and reads little; equal fingerprints do not
        prove equality."""
        digest = hashlib.sha256(json.dumps(self.config.to_hf(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.type} {tensor.shape} ".encode())
            expert = 0 if ".mlp.experts." in name else None
            rows = slice(1) if len(tensor.shape) > 1 else slice(None)
            digest.update(np.ascontiguousarray(tensor.stored_float32(expert, rows), "<f4").data)
        return digest.hexdigest()

    @functools.cached_property
    def summary(self) -> Summary:
        """Types, parameters, bytes."""
        return summarize(self)

    def check_finite(self, experts: bool = True) -> None:
        """CheckpointError naming the tensor and the place of the first NaN or infinity.

        Reads every weight scale once: the whole file, when its blocks carry their scales.  experts: of the
        routed ones too.
        """
        for name, whole in self.tensors.items():
            if experts or not is_routed_expert(name):
                for tensor in whole.stored:
                    self.check_tensor_finite(tensor)

    def check_tensor_finite(self, tensor: Tensor) -> None:
        """The same for one stored tensor."""
        place = _first_nonfinite(tensor, self.file)
        if place:
            got = BY_NAME[tensor.type].refused if tensor.type in BY_NAME else NOT_FINITE
            raise CheckpointError(f"{self.path}: {tensor.file_name}: {place}: want a finite value, got {got}")
        if tensor.decode is not None:
            self._check_decoded(tensor)

    def _check_decoded(self, tensor: Tensor) -> None:
        """What is stored is finite; what it stands for must be, too: see `Tensor.decode`."""
        assert tensor.decode is not None
        stored = tensor.stored_float32()
        finite = np.isfinite(tensor.decode(stored.astype(np.float64)))
        if not finite.all():
            index = _first_false(finite)
            raise CheckpointError(
                f"{self.path}: {tensor.file_name}: value at {index}: want one that gives a finite "
                f"{tensor.name}, got {stored[index]:g}"
            )


# ---- finite? ---------------------------------------------------------------------------------


def _first_nonfinite(tensor: Tensor, file: gguf_file.GGUF | SafetensorsDirectory) -> str | None:
    """Where the tensor's first NaN or infinity is, described in the file's own terms; None: nowhere."""
    if isinstance(file, gguf_file.GGUF):
        index = gguf_file.first_nonfinite_scale(file.tensors[tensor.file_name])
        if index is None:
            return None
        dense = BY_NAME[tensor.type].dense
        return f"value at {index}" if dense else f"scale of block {index} of {tensor.type}"
    if tensor.scales is None:
        return _first_nonfinite_value(tensor)
    index = first_refused(BY_NAME["F16"], tensor.scales, tensor.scales.shape)
    if index is None:
        return None
    *expert, group, row = index
    return f"scale of row {row}, group {group}" + (f", expert {expert[0]}" if expert else "")


def _first_nonfinite_value(tensor: Tensor) -> str | None:
    apart = isinstance(tensor.data, tuple)
    shape = tensor.shape[1:] if apart else tensor.shape
    for expert, data in enumerate(tensor.data if isinstance(tensor.data, tuple) else (tensor.data,)):
        index = first_refused(BY_NAME[tensor.type], data, shape)
        if index is not None:
            return f"value at {(expert, *index) if apart else index}"
    return None


def _first_false(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(mask.argmin()), mask.shape))
