"""llama.cpp's library, as llama-cpp-python has it: it quantizes a GGUF to any type, and dequantizes blocks.

quantize(source, path, file_type, types, importance)   a GGUF as llama-quantize writes it
dequantize(blocks, kind)                               ggml's own `to_float`
widen(source, path, dequantize)                        the same GGUF with every weight in F32
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType
from llama_cpp import llama_cpp as library
from rewrite import rewrite

from pyengine.files.gguf import GGUF

F32 = GGMLQuantizationType.F32
ERROR = 4  # ggml.h's GGML_LOG_LEVEL_ERROR


@library.llama_log_callback
def _only_errors(level, text, user_data):
    """llama.cpp prints what it does to every tensor."""
    if level == ERROR:
        print(text.decode(), end="", file=sys.stderr)


class Traits(ctypes.Structure):
    """The first fields of ggml.h's `struct ggml_type_traits`."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("elements", ctypes.c_int64),
        ("elements_interleaved", ctypes.c_int64),
        ("nbytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def ggml_base() -> ctypes.CDLL:
    """libggml-base of llama-cpp-python."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    names = [path for path in folder.iterdir() if path.name.startswith("libggml-base.")]
    return ctypes.CDLL(str(min(names, key=lambda path: len(path.name))))


def dequantize(blocks: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """uint8 [.., bytes per row] -> float32 [.., columns], by ggml's `to_float` of the type."""
    base = ggml_base()
    base.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    traits = base.ggml_get_type_traits(int(kind)).contents
    elements, nbytes = GGML_QUANT_SIZES[kind]
    if (traits.elements, traits.nbytes) != (elements, nbytes):
        raise ValueError(f"{kind.name}: want {elements} elements in {nbytes} bytes, got {traits.elements} in "
                         f"{traits.nbytes}")  # fmt: skip
    blocks = np.ascontiguousarray(blocks)
    values = np.empty((*blocks.shape[:-1], blocks.shape[-1] // nbytes * elements), np.float32)
    traits.to_float(blocks.ctypes.data, values.ctypes.data, values.size)
    return values


def quantize(
    source: Path,
    path: Path,
    file_type: LlamaFileType,
    types: dict[str, str] | None = None,
    importance: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write `source`, an F32, F16 or BF16 GGUF, as llama-quantize does.

    types: {pattern of tensor names: ggml type} where they are not what the file type says.
    importance: {tensor: float32 [columns], or [experts * columns]}, which IQ1 and IQ2 need.
    """
    library.llama_log_set(_only_errors, None)
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(file_type), 1
    entries = list((types or {}).items())
    overrides = (library.llama_model_tensor_override * (len(entries) + 1))()
    for override, (pattern, kind) in zip(overrides, entries):
        override.pattern, override.type = pattern.encode(), int(GGMLQuantizationType[kind])
    params.tt_overrides = overrides
    if importance:
        data = (library.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(data, importance.items()):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = data
    status = library.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"{path}: llama_model_quantize: want 0, got {status}")
    return path


def widen(
    source: Path,
    path: Path,
    dequantize: Callable[[np.ndarray, GGMLQuantizationType], np.ndarray] = dequantize,
) -> Path:
    """`source` with every block in float32, and with the scale beside an NVFP4 tensor multiplied into it."""
    file, tensors = GGUF.open(source), {}
    scales = {name.removesuffix(".scale"): name for name in file.tensors if name.endswith(".scale")}
    beside = [name for name in file.tensors if name.endswith((".scale", ".input_scale"))]
    for name, tensor in file.tensors.items():
        if name in beside:
            continue
        row = tensor.block_type
        values = tensor.data if row.name == "F32" else dequantize(tensor.data.view(np.uint8), tensor.type)
        scale = scales.get(name.removesuffix(".weight"))
        if scale is not None:
            values = values * file.tensors[scale].data.reshape(-1, *(1,) * (values.ndim - 1))
        tensors[name] = values.reshape(tensor.shape), F32
    kind = int(LlamaFileType.ALL_F32), GGUFValueType.UINT32
    return rewrite(source, path, {"general.file_type": kind}, tensors, drop=beside)
