"""A checkpoint's tensors by Hugging Face's parameter names, whatever file they come from.

Nothing is copied: a `Tensor` holds a view of the mapped file and what it takes to read it in Hugging
Face's layout.  llama.cpp's converter lays the delta net's value heads out tiled (value head t uses
key head t mod n_k) where Hugging Face groups them (value head g uses key head g div r); a Tensor
knows its order, and `Checkpoint.value_head_order` tells the decoder which one the file has.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType

from .codes import GROUP, unpack_int4
from .config import LINEAR, Config, read_group_size, read_hf_config
from .errors import CheckpointError, InputError
from .files import gguf as gguf_file
from .files.safetensors import SafetensorsDirectory
from .names import hint

DENSE_TYPES = ("F32", "F16", "BF16")
MAX_KNOWN_EXPERTS = 100_000  # of all layers together
BLOCK_TYPES = {"Q8_0": GGMLQuantizationType.Q8_0, "Q4_0": GGMLQuantizationType.Q4_0}


# ---- one tensor ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tensor:
    """One parameter as it is stored, and how Hugging Face has it.

    name     Hugging Face's parameter name
    type     F32, F16, BF16, Q8_0, Q4_0, INT8 or INT4
    shape    Hugging Face's: [rows, cols], [experts, rows, cols] or a vector's [n]
    data     as stored: floats (BF16 as uint16) [.., cols]; Q8_0 uint8 [.., cols / 32 * 34]; Q4_0
             uint8 [.., cols / 32 * 18]; INT8 int8 [.., cols]; INT4 uint8 [.., cols / 2], low
             nibble = even column, nibble = code + 8
             A stack whose experts lie apart in their file is a tuple of matrices.
    scales   INT8, INT4: float16 [.., n_groups, rows]; else None
    group    INT8, INT4: columns that share a scale
    row_order, col_order   Hugging Face's row i is stored row row_order[i]; None: the same
    decode   what turns stored values into Hugging Face's (float64 -> float64); None: nothing
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray
    scales: np.ndarray | None = None
    group: int = GROUP
    row_order: np.ndarray | None = None
    col_order: np.ndarray | None = None
    decode: object = None
    file_name: str = ""

    def stored_float32(self, expert=None, rows=slice(None)) -> np.ndarray:
        """The stored values of one expert, or all; exact in float32; the file's order, undecoded."""
        data, scales = self.data, self.scales
        if expert is not None:
            data, scales = data[expert], None if scales is None else scales[expert]
        elif isinstance(data, tuple):
            data = np.stack(data)
        data = data[..., rows, :] if data.ndim > 1 else data
        scales = None if scales is None else scales[..., rows]
        return _dequantize(self.type, data, scales, self.group)

    def float64(self, expert=None) -> np.ndarray:
        """The values in Hugging Face's order and convention; of one expert of a stack, or all."""
        values = self.stored_float32(expert).astype(np.float64)
        if self.row_order is not None:
            values = values[self.row_order]
        if self.col_order is not None:
            values = values[:, self.col_order]
        if self.decode is not None:
            values = self.decode(values)
        return values if expert is not None else values.reshape(self.shape)

    def rows_float32(self, expert, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) in Hugging Face's order, float32 [rows, cols], undecoded."""
        wanted = slice(start, stop) if self.row_order is None else self.row_order[start:stop]
        values = self.stored_float32(expert, wanted)
        return values if self.col_order is None else values[:, self.col_order]

    def rows(self, start: int, stop: int, name: str) -> Tensor:
        """Rows [start, stop) of the matrix, or of every matrix of the stack, as a tensor."""
        return dataclasses.replace(  # of a fused tensor, which is never a tuple
            self, name=name, shape=(*self.shape[:-2], stop - start, self.shape[-1]),
            data=self.data[..., start:stop, :],
            scales=None if self.scales is None else self.scales[..., start:stop])

    def to_hf_rows(self, y: np.ndarray) -> np.ndarray:
        """A product of this matrix, [.., rows], put into Hugging Face's row order."""
        return y if self.row_order is None else y[..., self.row_order]


def _dequantize(kind, data, scales, group):
    if kind in ("F32", "F16"):
        return data.astype(np.float32)
    if kind == "BF16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    if kind in BLOCK_TYPES:
        return gguf_file.blocks_to_float32(data, BLOCK_TYPES[kind])
    codes = data if kind == "INT8" else unpack_int4(data)
    per_column = np.repeat(np.moveaxis(scales, -2, -1), group, axis=-1)[..., : codes.shape[-1]]
    return codes * per_column.astype(np.float32)


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
    file: object  # GGUF or SafetensorsDirectory

    @property
    def source_files(self) -> list[Path]:
        """The files that hold the tensors."""
        if isinstance(self.file, gguf_file.GGUF):
            return list(self.file.paths)
        return [file.path for file in self.file.files]

    def key_heads(self) -> np.ndarray:
        """int32 [value heads]: the key head of each value head, in the file's order."""
        heads, keys = self.config.linear_num_value_heads, self.config.linear_num_key_heads
        head = np.arange(heads, dtype=np.int32)
        return head % keys if self.value_head_order == "tiled" else head // (heads // keys)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the configuration and of every parameter's name, type, shape and first row (of a
        stack, the first expert's): it tells one model from another and reads little; that two are equal
        it does not prove."""
        digest = hashlib.sha256(json.dumps(self.config.to_hf(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.type} {tensor.shape} ".encode())
            expert = 0 if ".mlp.experts." in name else None
            rows = slice(1) if len(tensor.shape) > 1 else slice(None)
            digest.update(np.ascontiguousarray(tensor.stored_float32(expert, rows), "<f4"))
        return digest.hexdigest()

    def check_finite(self) -> None:
        """CheckpointError naming the tensor and the place of the first NaN or infinity.

        Reads every weight scale once: the whole file, when its blocks carry their scales.
        """
        for tensor in self.tensors.values():
            place = _first_nonfinite(tensor, self.file)
            if place:
                raise CheckpointError(f"{self.path}: {tensor.file_name}: {place}: "
                                      "want a finite value, got NaN or infinity")


def open_checkpoint(path) -> Checkpoint:
    """A GGUF (or the first of its splits) or a checkpoint directory, mapped and checked.

    Errors: FileFormatError, CheckpointError (a name, shape or dtype), InputError (no such path).
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise InputError(f"{path}: want a GGUF file or a checkpoint directory, got no such path")
    return _open_gguf(path)


# ---- what a checkpoint holds -----------------------------------------------------------------


class Spec(NamedTuple):
    """One parameter: its names and its shape as Hugging Face has it."""

    name: str
    gguf: str
    shape: tuple[int, ...]
    linear: bool = True
    order: str | None = None  # what the converter reorders: see value_head_orders
    decode: object = None


def _minus_one(stored):
    return stored - 1.0


def _log_of_negated(stored):
    """ssm_a = -exp(A_log).  Kept in float64: rounded, it would not give ssm_a back."""
    return np.log(-stored)


def layer_specs(config: Config, layer: int) -> list[Spec]:
    """The parameters of one decoder layer, in the order of the forward pass."""
    c, hf, g = config, f"model.layers.{layer}", f"blk.{layer}"
    hidden, ff, shared_ff = c.hidden_size, c.moe_intermediate_size, c.shared_expert_intermediate_size
    if c.layer_types[layer] == LINEAR:
        mixer = _delta_net_specs(c, f"{hf}.linear_attn", g)
    else:
        mixer = _attention_specs(c, f"{hf}.self_attn", g)
    mlp = f"{hf}.mlp"
    return [
        Spec(f"{hf}.input_layernorm.weight", f"{g}.attn_norm.weight", (hidden,), False,
             decode=_minus_one),
        *mixer,
        Spec(f"{hf}.post_attention_layernorm.weight", f"{g}.post_attention_norm.weight", (hidden,),
             False, decode=_minus_one),
        Spec(f"{mlp}.gate.weight", f"{g}.ffn_gate_inp.weight", (c.num_experts, hidden)),
        Spec(f"{mlp}.experts.gate_proj", f"{g}.ffn_gate_exps.weight", (c.num_experts, ff, hidden)),
        Spec(f"{mlp}.experts.up_proj", f"{g}.ffn_up_exps.weight", (c.num_experts, ff, hidden)),
        Spec(f"{mlp}.experts.down_proj", f"{g}.ffn_down_exps.weight", (c.num_experts, hidden, ff)),
        Spec(f"{mlp}.shared_expert.gate_proj.weight", f"{g}.ffn_gate_shexp.weight",
             (shared_ff, hidden)),
        Spec(f"{mlp}.shared_expert.up_proj.weight", f"{g}.ffn_up_shexp.weight", (shared_ff, hidden)),
        Spec(f"{mlp}.shared_expert.down_proj.weight", f"{g}.ffn_down_shexp.weight",
             (hidden, shared_ff)),
        Spec(f"{mlp}.shared_expert_gate.weight", f"{g}.ffn_gate_inp_shexp.weight", (1, hidden)),
    ]


def _delta_net_specs(c: Config, hf: str, g: str) -> list[Spec]:
    hidden, heads = c.hidden_size, c.linear_num_value_heads
    return [
        Spec(f"{hf}.in_proj_qkv.weight", f"{g}.attn_qkv.weight", (c.conv_dim, hidden),
             order="channels"),
        Spec(f"{hf}.in_proj_z.weight", f"{g}.attn_gate.weight", (c.value_dim, hidden),
             order="values"),
        Spec(f"{hf}.in_proj_b.weight", f"{g}.ssm_beta.weight", (heads, hidden), order="heads"),
        Spec(f"{hf}.in_proj_a.weight", f"{g}.ssm_alpha.weight", (heads, hidden), order="heads"),
        Spec(f"{hf}.conv1d.weight", f"{g}.ssm_conv1d.weight",
             (c.conv_dim, 1, c.linear_conv_kernel_dim), False, order="channels"),
        Spec(f"{hf}.A_log", f"{g}.ssm_a", (heads,), False, "heads", _log_of_negated),
        Spec(f"{hf}.dt_bias", f"{g}.ssm_dt.bias", (heads,), False, "heads"),
        Spec(f"{hf}.norm.weight", f"{g}.ssm_norm.weight", (c.linear_value_head_dim,), False),
        Spec(f"{hf}.out_proj.weight", f"{g}.ssm_out.weight", (hidden, c.value_dim),
             order="value columns"),
    ]


def _attention_specs(c: Config, hf: str, g: str) -> list[Spec]:
    hidden, width, kv_width = (c.hidden_size, c.num_attention_heads * c.head_dim,
                               c.num_key_value_heads * c.head_dim)
    return [
        Spec(f"{hf}.q_proj.weight", f"{g}.attn_q.weight", (2 * width, hidden)),
        Spec(f"{hf}.k_proj.weight", f"{g}.attn_k.weight", (kv_width, hidden)),
        Spec(f"{hf}.v_proj.weight", f"{g}.attn_v.weight", (kv_width, hidden)),
        Spec(f"{hf}.q_norm.weight", f"{g}.attn_q_norm.weight", (c.head_dim,), False,
             decode=_minus_one),
        Spec(f"{hf}.k_norm.weight", f"{g}.attn_k_norm.weight", (c.head_dim,), False,
             decode=_minus_one),
        Spec(f"{hf}.o_proj.weight", f"{g}.attn_output.weight", (hidden, width)),
    ]


def model_specs(config: Config) -> list[Spec]:
    """Every parameter of the model, in the order of the forward pass."""
    vocabulary = (config.vocab_size, config.hidden_size)
    specs = [Spec("model.embed_tokens.weight", "token_embd.weight", vocabulary)]
    for layer in range(config.num_hidden_layers):
        specs += layer_specs(config, layer)
    specs.append(Spec("model.norm.weight", "output_norm.weight", (config.hidden_size,), False,
                      decode=_minus_one))
    if not config.tie_word_embeddings:
        specs.append(Spec("lm_head.weight", "output.weight", vocabulary))
    return specs


# ---- GGUF ------------------------------------------------------------------------------------


def _open_gguf(path: Path) -> Checkpoint:
    file = gguf_file.GGUF.open(path)
    config = Config.from_gguf(file)
    reader = _GGUFTensors(file, config)
    tensors = {spec.name: reader.read(spec) for spec in model_specs(config)}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    reader.check_all_used()
    return Checkpoint(path, "gguf", config, tensors, "tiled", file)


class _GGUFTensors:
    """Reads parameters by Spec and remembers which tensors of the file were used."""

    def __init__(self, file, config):
        self.file, self.config = file, config
        self.used = set()

    @functools.cached_property
    def orders(self):
        return value_head_orders(self.config)  # only when a tensor has confirmed the sizes

    def read(self, spec: Spec) -> Tensor:
        tensor = self._fused(spec) or self._whole(spec)
        if spec.order is None:
            return tensor
        axis = "col_order" if spec.order == "value columns" else "row_order"
        return dataclasses.replace(tensor, **{axis: self.orders[spec.order]})

    def check_all_used(self):
        first_nextn = self.config.num_hidden_layers
        for name in self.file.tensors:
            if name in self.used:
                continue
            block = name.split(".")[1] if name.startswith("blk.") else ""
            if block.isdigit() and first_nextn <= int(block) < (
                    first_nextn + self.config.num_nextn_predict_layers):
                continue  # a next-token-prediction block: no layer of the forward pass
            raise CheckpointError(
                f"{self.file.path}: {name}: want only tensors that the architecture qwen35moe has, got "
                f"this one{hint(name, self._known(), 'nearest known name')}")

    def _known(self) -> set[str]:
        """Every name that this model's tensors can have."""
        names = {spec.gguf for spec in model_specs(self.config)}
        for suffix, (fused, _) in _FUSED.items():
            names |= {name.removesuffix(suffix) + fused for name in names if name.endswith(suffix)}
        return names

    def _fused(self, spec: Spec) -> Tensor | None:
        """A part of a tensor that `--fuse-qkv` or a fused gate_up put together, or None."""
        if spec.gguf in self.file.tensors:
            return None
        for suffix, (fused_suffix, parts) in _FUSED.items():
            fused = spec.gguf.removesuffix(suffix) + fused_suffix
            if not spec.gguf.endswith(suffix) or fused not in self.file.tensors:
                continue
            sizes = [rows(self.config) for rows in parts.values()]
            start = sum(sizes[: list(parts).index(suffix)])
            stop = start + parts[suffix](self.config)
            whole = self._whole(spec._replace(
                gguf=fused, shape=(*spec.shape[:-2], sum(sizes), spec.shape[-1])))
            return whole.rows(start, stop, spec.name)
        return None

    def _whole(self, spec: Spec) -> Tensor:
        stored = self.file.tensors.get(spec.gguf)
        if stored is None:
            unknown = set(self.file.tensors) - self._known()
            raise CheckpointError(f"{self.file.path}: {spec.gguf}: want this tensor, got none"
                                  f"{hint(spec.gguf, unknown, 'nearest unknown name in the file')}")
        self.used.add(spec.gguf)
        kinds = (*DENSE_TYPES, *BLOCK_TYPES) if spec.linear else DENSE_TYPES
        shape = _without_unit_axes(spec.shape)
        if stored.type.name not in kinds or _without_unit_axes(stored.shape) != shape:
            raise CheckpointError(
                f"{self.file.path}: {spec.gguf}: want {shape} {' or '.join(kinds)}, "
                f"got {stored.shape} {stored.type.name}")
        data = stored.data
        if spec.linear and data.ndim == 1:
            data = data.reshape(1, -1)
        return Tensor(spec.name, stored.type.name, spec.shape, data, decode=spec.decode,
                      file_name=spec.gguf)


def _q_rows(c):
    return 2 * c.num_attention_heads * c.head_dim


def _kv_rows(c):
    return c.num_key_value_heads * c.head_dim


def _ff_rows(c):
    return c.moe_intermediate_size


_QKV = ("attn_qkv.weight", {"attn_q.weight": _q_rows, "attn_k.weight": _kv_rows,
                            "attn_v.weight": _kv_rows})
_GATE_UP = ("ffn_gate_up_exps.weight", {"ffn_gate_exps.weight": _ff_rows,
                                        "ffn_up_exps.weight": _ff_rows})
# A tensor that may be missing, the one it is then part of, and that one's parts with their rows.
_FUSED = {**dict.fromkeys(_QKV[1], _QKV), **dict.fromkeys(_GATE_UP[1], _GATE_UP)}


def value_head_orders(config: Config) -> dict[str, np.ndarray]:
    """Where each of Hugging Face's rows lies in a GGUF, by what the rows are: heads, values,
    value columns, channels."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    ratio = heads // keys
    grouped = np.arange(heads)
    tiled = grouped % ratio * keys + grouped // ratio
    width = config.linear_value_head_dim
    values = (tiled[:, None] * width + np.arange(width)).reshape(-1)
    channels = np.concatenate([np.arange(2 * config.key_dim), 2 * config.key_dim + values])
    return {"heads": tiled, "values": values, "value columns": values, "channels": channels}


def _without_unit_axes(shape):
    return tuple(n for n in shape if n != 1)


# ---- a directory of safetensors --------------------------------------------------------------


def _open_directory(path: Path) -> Checkpoint:
    config, group = read_hf_config(path), read_group_size(path)
    reader = _DirectoryTensors(SafetensorsDirectory.open(path), config, group)
    tensors = {}
    for spec in model_specs(config):
        tensors[spec.name] = reader.read(spec)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    reader.check_all_used()
    return Checkpoint(path, "directory", config, tensors, "grouped", reader.file)


_QUANTIZED = {  # type: (suffix of linears, of expert stacks, dtype of the codes)
    "INT8": ("i8", "q8", "I8"),
    "INT4": ("i4", "q4", "U8"),
}


def _marks(spec: Spec) -> list[str]:
    """What the names of its codes end in."""
    return [stack if len(spec.shape) == 3 else linear for linear, stack, _ in _QUANTIZED.values()]


class _DirectoryTensors:
    """Reads parameters by Spec: quantised ones of our own layout, or plain floats."""

    def __init__(self, file, config, group):
        self.file, self.config, self.group = file, config, group
        self.used = set()
        self.prefix = ""
        if any(name.startswith("model.language_model.") for name in file.tensors):
            self.prefix = "model.language_model."  # the text model inside the multimodal one

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

    def check_all_used(self):
        for name in self.file.tensors:
            if name not in self.used and not name.startswith(("mtp.", "model.visual.")):
                raise CheckpointError(
                    f"{self.file.path}: {name}: want only tensors that the model has, got this one"
                    f"{hint(name, self._known(), 'nearest known name')}")

    def _known(self) -> set[str]:
        """Every name that this model's tensors can have: as floats, INT8 or INT4, experts fused or
        apart.  None for a config.json whose numbers no tensor has confirmed and no model has."""
        names = set()
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
            names |= {name, *(f"{name}{part}_{mark}" for mark in _marks(spec)
                              for part in ("", "_scale"))}
        return names

    def _name_in_file(self, name):
        if self.prefix and name.startswith("model."):
            return self.prefix + name.removeprefix("model.")
        return name

    def _expert_by_expert(self, spec, name) -> Tensor | None:
        """`mlp.experts.7.gate_proj.weight` and its like, as checkpoints are often published."""
        stem, part = name.rsplit(".", 1)
        names = [f"{stem}.{expert}.{part}.weight" for expert in range(spec.shape[0])]
        if names[0] not in self.file.tensors:
            return None
        data = tuple(self._take(n, spec.shape[1:], DENSE_TYPES) for n in names)
        kinds = {self.file.tensors[n].dtype for n in names}
        if len(kinds) > 1:
            raise CheckpointError(f"{self.file.path}: {names[0]}: want one dtype for all experts, "
                                  f"got {' and '.join(sorted(kinds))}")
        return Tensor(spec.name, kinds.pop(), spec.shape, data, file_name=names[0])

    def _expert_part(self, spec, name, part):
        ff = self.config.moe_intermediate_size
        fused = spec._replace(shape=(spec.shape[0], 2 * ff, spec.shape[2]))
        fused_name = name.removesuffix(part) + "gate_up_proj"
        whole = self._quantized(fused, fused_name) or self._plain(fused, fused_name)
        start = 0 if part == "gate_proj" else ff
        return whole.rows(start, start + ff, spec.name)

    def _quantized(self, spec, name) -> Tensor | None:
        for kind, (linear, stack, dtype) in _QUANTIZED.items():
            if len(spec.shape) == 3:
                codes, scales = f"{name}_{stack}", f"{name}_scale_{stack}"
            else:
                codes, scales = f"{name}_{linear}", f"{name}_scale_{linear}"
            if codes in self.file.tensors and spec.linear:
                *lead, rows, cols = spec.shape
                width = cols if kind == "INT8" else cols // 2
                groups = -(-cols // self.group)
                return Tensor(spec.name, kind, spec.shape,
                              self._take(codes, (*lead, rows, width), (dtype,)),
                              self._take(scales, (*lead, groups, rows), ("F16",)),
                              self.group, file_name=codes)
        return None

    def _plain(self, spec, name) -> Tensor:
        if spec.linear and name not in self.file.tensors:
            raise self._no_form_of(spec, name)
        data = self._take(name, spec.shape, DENSE_TYPES)
        if not spec.linear:
            data = data.reshape(_without_unit_axes(spec.shape) or (1,))
        kind = self.file.tensors[name].dtype
        return Tensor(spec.name, kind, spec.shape, data, file_name=name)

    def _no_form_of(self, spec, name) -> CheckpointError:
        """Neither floats nor codes of a matrix."""
        last = name.rsplit(".", 1)[1]
        forms = " or ".join(f".{last}_{mark}" for mark in _marks(spec))
        return CheckpointError(f"{self.file.path}: {name}, {forms}: want one of these tensors, got none"
                               f"{self._hint(name)}")

    def _hint(self, name) -> str:
        unknown = set(self.file.tensors) - self._known()
        return hint(name, unknown, "nearest unknown name in the file")

    def _take(self, name, shape, dtypes):
        view = self.file.tensors.get(name)
        if view is None:
            raise CheckpointError(f"{self.file.path}: {name}: want this tensor, got none"
                                  f"{self._hint(name)}")
        if tuple(view.shape) != tuple(shape) or view.dtype not in dtypes:
            raise CheckpointError(f"{self.file.path}: {name}: want {tuple(shape)} "
                                  f"{' or '.join(dtypes)}, got {tuple(view.shape)} {view.dtype}")
        self.used.add(name)
        # Its data may begin at any byte; C reads floats where floats may lie.
        return np.require(view.data, requirements="A")


# ---- finite? ---------------------------------------------------------------------------------


def _first_nonfinite(tensor: Tensor, file) -> str | None:
    """Where the tensor's first NaN or infinity is, in words of its file, or None."""
    if isinstance(file, gguf_file.GGUF):
        index = gguf_file.first_nonfinite_scale(file.tensors[tensor.file_name])
        what = "scale of block" if tensor.type in BLOCK_TYPES else "value at"
        return None if index is None else f"{what} {index}"
    if tensor.scales is None:
        finite = np.isfinite(tensor.stored_float32())
        return None if finite.all() else f"value at {_first_false(finite)}"
    finite = np.isfinite(tensor.scales)
    if finite.all():
        return None
    *expert, group, row = _first_false(finite)
    return f"scale of row {row}, group {group}" + (f", expert {expert[0]}" if expert else "")


def _first_false(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(mask.argmin()), mask.shape))
